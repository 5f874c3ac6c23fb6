"""The endpoint from one command: Ray and Serve started, a token made where none is configured, all of it stopped at the end."""

from __future__ import annotations

import io
import logging
import os
import re
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import httpx

from mulcot_ray.cluster import log_folder, session
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.errors import ConfigError, EngineError
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.serving import front, haproxy
from mulcot_ray.serving.app import Options, application
from mulcot_ray.serving.guards import is_loopback
from mulcot_ray.serving.tokens import Tokens, configured_tokens, known_tokens, plain, token_digest
from mulcot_ray.storage import Store

APP = "mulcot"
READY_S = 60.0  # from a running replica to the first answer through the proxy
REQUEST_S = 600.0  # Serve's own limit, for a whole batch; a post's is the application's


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where it answers. `token` is one that it takes; None where it asks for none, or where only digests are configured."""

    url: str
    token: str | None
    asks: bool = True

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


def serve_model(
    store: Store, model: str, recipe: Recipe, runtime: Runtime, *, host: str = "127.0.0.1", port: int = 8000, auth: bool = True,
    say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Serve until Ctrl-C or SIGTERM. Says the address, an example and, if it had to be made, the token. Raises ConfigError and EngineError."""
    made = auth and not known_tokens(os.environ)
    say(f"Starting {model} …")
    with serving(store, model, recipe, runtime, host=host, port=port, auth=auth) as endpoint:
        # How systemd and containers stop it. The handler that Ray has set aborts and leaves the engine running.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        say(f"Serving {model} at {endpoint.url}. Ctrl-C stops it. Logs: {log_folder()}")
        if made:
            say(f"No token is configured (MULCOT_TOKENS_FILE, MULCOT_TOKENS); this one holds until the end: {endpoint.token}")
        say(f"\nTry it:\n{example(endpoint, shown=made)}\n")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            say("Stopping …")


def example(endpoint: Endpoint, *, shown: bool) -> str:
    """A request for a shell. A token of the user's own is not shown."""
    token = f' -H "Authorization: Bearer {endpoint.token if shown else "$TOKEN"}"' if endpoint.asks else ""
    body = '{"text": "What a day at the beach!", "aspect": "beach", "explain": true}'
    return f"curl {endpoint.url}/v1/sentiment{token} -H 'Content-Type: application/json' -d '{body}'"


@contextmanager
def serving(
    store: Store, model: str, recipe: Recipe, runtime: Runtime, *, host: str = "127.0.0.1", port: int = 0, auth: bool = True,
    options: Options | None = None, engine: EngineSpec | None = None,
) -> Iterator[Endpoint]:  # fmt: skip
    """The endpoint for as long as the context is open, ready when it is entered. Port 0: any that is free. `options` stand in for `model`.

    Raises ConfigError (no tokens off loopback, port taken, Serve in use on the cluster joined) and EngineError (no replica started).
    """
    if not auth and not is_loopback(host):
        raise ConfigError(f"--host {host} without tokens: --no-auth is for loopback (127.0.0.1) only; configure MULCOT_TOKENS_FILE")
    known, token = _tokens() if auth else (None, None)
    port = _free_port(host, port)
    here = not (os.environ.get("RAY_ADDRESS") or runtime.address)
    with session(runtime), haproxy.proxy(os.environ, host, here) as proxy:
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # of this process; importing it sends INFO to the terminal
        variables = {**proxy, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": front.PATH}
        app = application(store, options or Options(model=model), recipe, runtime, known, environment=variables, engine=engine)
        if serve.status().applications:
            raise ConfigError("this cluster serves already, and its address cannot be changed: use `serve deploy serve_config.yaml`")
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": host, "port": port, "request_timeout_s": REQUEST_S},
                controller_options={"runtime_env": {"env_vars": variables}},  # the proxies are its children
            )
            try:
                serve.run(app, name=APP, route_prefix="/")
            except RuntimeError as e:
                raise EngineError(f"the endpoint did not start: {_reason(serve.status())}. Logs: {log_folder()}") from e
            endpoint = Endpoint(f"http://{_reachable(host)}:{port}", token, asks=known is not None)
            _wait(endpoint.url)
            yield endpoint
        finally:
            # Ray prints the planned end of Serve's controller on stdout, as a failed task.
            with redirect_stdout(io.StringIO()):
                serve.shutdown()


def _tokens() -> tuple[Tokens, str | None]:
    """Those that are configured, or one that is made; and one of them to be used here."""
    if known := known_tokens(os.environ):
        return known, plain(configured_tokens(os.environ))
    made = secrets.token_urlsafe(24)
    return Tokens(fixed=frozenset({token_digest(made)})), made


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Serve itself binds with SO_REUSEPORT: it would share a taken port without a word."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ConfigError(f"cannot listen on {host} port {port}: {e.strerror or e}; choose another --port or --host") from e
        return int(s.getsockname()[1])


def _reachable(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait(url: str) -> None:
    deadline = time.monotonic() + READY_S
    fault = ""
    with httpx.Client(trust_env=False, timeout=10) as client:  # a proxy of the environment is not for this machine
        while time.monotonic() < deadline:
            try:
                answer = client.get(f"{url}/healthz")
                if answer.status_code == 200:
                    return
                fault = f"status {answer.status_code}"
            except httpx.TransportError as e:
                fault = str(e)
            time.sleep(0.2)
    raise EngineError(f"{url} does not answer ({fault}). Logs: {log_folder()}")


def _reason(status: Any) -> str:
    """The error at the end of the traceback in Serve's report of the failed replicas, on one line."""
    app = status.applications.get(APP)
    report = "\n".join([app.message, *(d.message for d in app.deployments.values())]) if app else "no reason was given"
    own = re.split(r"\bmulcot_ray\.errors\.\w+: ", report)
    return " ".join(own[-1].split() if len(own) > 1 else report.splitlines()[-1:])[:500]
