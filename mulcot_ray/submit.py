"""A stage as a Ray job: `ray job submit` with the address and token looked at first, the log followed (following.py), and the job's own exit code.

A job outlives the terminal that submitted it: it runs on the cluster's head node, in a copy of the working directory. Ray's job API runs
whatever it is sent, so it must never be reachable without a token (docs/security.md). What goes to the cluster beside the files: the command
line, the tags and the chosen environment variables. All three can be read by whoever may look at the dashboard: no secrets there.
"""

from __future__ import annotations

import getpass
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from mulcot_ray.console import console
from mulcot_ray.errors import ConfigError, EngineError
from mulcot_ray.following import follow, how_to_follow

DASHBOARD = "http://127.0.0.1:8265"
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # Ray's own variables; they would override an address that is passed to its client
EXCLUDES = (
    ".git",
    ".venv",
    "runs",
    "__pycache__",
    "*.egg-info",
    ".*_cache",
    ".hypothesis",
)  # beside what .gitignore names, which Ray leaves out itself
SECRET = re.compile(r"(secret|token|password|passwd|credential|(^|_)key($|_)|api_?key)", re.IGNORECASE)
CHATTY = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
TRIES = 5  # of the submission
RETRY_S = 1.0  # before the second try of the submission; twice as long before each further one


def submit(
    command: Sequence[str], *, address: str | None = None, working_dir: str | None = ".", env: Sequence[str] = (), tags: Mapping[str, str] | None = None,
    cpus: float = 0, gpus: float = 0, memory: int = 0, wait: bool = True, attempts: int = 1,
    ask: Callable[[str], bool] | None = None, say: Callable[[str], None] | None = None,
) -> int:  # fmt: skip
    """Run a stage (`["label", "--posts", "mine", …]`) on a cluster. Returns its exit code; 130 where it was stopped or Ctrl-C left it running.

    `address`: the dashboard's, http://HOST:PORT; else $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS, http://127.0.0.1:8265. The token is Ray's:
    $RAY_AUTH_TOKEN, the file $RAY_AUTH_TOKEN_PATH, ~/.ray/auth_token. `working_dir` travels along (None: nothing does, and the package must be
    installed on the nodes). `env`: NAME (its value here) or NAME=VALUE. `cpus`, `gpus`, `memory` (bytes): what is reserved for the entry point
    itself; with none it runs on the head node. `attempts`: how often the job is started where it was killed (an error of its own, exit code 1,
    is final); each start goes on where the last one stopped. `ask` answers yes or no to a question, after Ctrl-C.

    Raises ConfigError (address, token, options) and EngineError (the cluster cannot be reached any more).
    """
    say, ask = say or _say, ask or _ask
    if not command:
        raise ConfigError("nothing to submit: a stage and its options are wanted, e.g. label --posts mine --root s3://bucket/runs")
    values = _environment(env)
    where, headers = _address(address), _headers()
    _check(where, headers)
    client = _client(where, headers)
    entrypoint = _entrypoint(command, working_dir)
    runtime_env: dict[str, Any] = {"env_vars": values} if values else {}
    if working_dir is not None:
        runtime_env |= {"working_dir": _folder(working_dir), "excludes": list(EXCLUDES)}
    metadata = {"stage": command[0], "user": _user(), **_tags(tags or {})}
    code = 1
    for attempt in range(1, attempts + 1):
        job = f"mulcot-{command[0]}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
        _send(
            client, job, entrypoint=entrypoint, runtime_env=runtime_env, metadata={**metadata, "attempt": str(attempt)}, entrypoint_num_cpus=cpus,
            entrypoint_num_gpus=gpus, entrypoint_memory=memory,
        )  # fmt: skip
        say(f"Submitted {job} to {where}: {entrypoint}")
        if not wait:
            say(how_to_follow(job, where))
            return 0
        code, killed = follow(client, job, where, ask, say)
        if not killed or attempt == attempts:
            break
        say(f"{job} was killed (exit code {code}); starting it again, {attempts - attempt} more times at most")
    return code


def _say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _ask(question: str) -> bool:
    """Yes or no from the terminal; no where there is none, or at a second Ctrl-C."""
    try:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def _address(given: str | None) -> str:
    found = given or next((v for k in ADDRESSES if (v := os.environ.get(k, "")).startswith(("http://", "https://"))), DASHBOARD)
    url = found if "://" in found else f"http://{found}"
    if not re.fullmatch(r"https?://[^/\s@]+", url.rstrip("/")):
        raise ConfigError(f"--address {found!r}: the dashboard's address is wanted, http://HOST:8265 (without a path or a password)")
    return url.rstrip("/")


def _headers() -> dict[str, str]:
    """The token as Ray looks for it, so that one set-up serves `ray` and `mulcot`. Ray itself ends the process where the file is missing."""
    token, path = os.environ.get("RAY_AUTH_TOKEN", "").strip(), os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(path) if path else Path.home() / ".ray" / "auth_token"
    if not token and (path or file.exists()):
        try:
            token = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"RAY_AUTH_TOKEN_PATH {str(file)!r} cannot be read: {e}") from e
    return {"Authorization": f"Bearer {token}"} if token else {}


def _check(where: str, headers: dict[str, str]) -> None:
    """Somebody answers there, it is Ray, and it takes our token. Raises ConfigError with what to do."""
    try:
        answer = httpx.get(f"{where}/api/version", headers=headers, timeout=10, trust_env=False)
    except httpx.HTTPError as e:
        raise ConfigError(
            f"no Ray dashboard at {where} ({type(e).__name__}). It listens on the head node's loopback: `ray dashboard cluster.yaml` forwards it here "
            "(on Kubernetes: kubectl port-forward svc/mulcot-head-svc 8265)"
        ) from e
    if answer.status_code == 401:
        raise ConfigError(
            f"{where} wants a token and got none (401): copy the cluster's ~/.ray/auth_token here, or set RAY_AUTH_TOKEN_PATH or RAY_AUTH_TOKEN"
        )
    if answer.status_code == 403:
        raise ConfigError(
            f"{where} refuses the token (403): it is not this cluster's. It comes from RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        )
    if answer.status_code != 200 or "ray_version" not in answer.text:
        raise ConfigError(f"{where} is no Ray dashboard: /api/version answers {answer.status_code}")


def _client(where: str, headers: dict[str, str]) -> Any:
    import logging

    from ray.job_submission import JobSubmissionClient

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _without(ADDRESSES):
        return JobSubmissionClient(where, headers=headers)


@contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    saved = {k: os.environ.pop(k) for k in names if k in os.environ}
    try:
        yield
    finally:
        os.environ.update(saved)


def _environment(env: Sequence[str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for entry in env:
        name, given, value = entry.partition("=")
        if SECRET.search(name):
            raise ConfigError(
                f"--env {name}: looks like a secret, and a job's environment can be read on the dashboard. "
                "Set it on the nodes instead: an instance profile, a Kubernetes Secret, or a file"
            )
        if not given and name not in os.environ:
            raise ConfigError(f"--env {name}: not set here; give {name}=VALUE")
        values[name] = value if given else os.environ[name]
    return values


def _tags(tags: Mapping[str, str]) -> Mapping[str, str]:
    if secret := next((k for k in tags if SECRET.search(k)), None):
        raise ConfigError(f"--tag {secret}: looks like a secret, and a job's tags can be read on the dashboard")
    return tags


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _folder(working_dir: str) -> str:
    if "://" not in working_dir and not Path(working_dir).is_dir():
        raise ConfigError(f"--working-dir {working_dir!r} is no folder")
    return working_dir


def _entrypoint(command: Sequence[str], working_dir: str | None) -> str:
    """jobs/STAGE.py where the working directory has it (a checkout), else the package that is installed on the nodes."""
    stage, *options = command
    if working_dir is not None and (Path(working_dir) / "jobs" / f"{stage}.py").is_file():
        return shlex.join(["python", f"jobs/{stage}.py", *options])
    return shlex.join(["python", "-m", "mulcot_ray.cli", stage, *options])


def _send(client: Any, job: str, **request: Any) -> None:
    """Submit under a name of our own, so that a submission whose answer was lost is not sent twice."""
    for attempt in range(TRIES):
        try:
            client.submit_job(submission_id=job, **request)
            return
        except Exception as e:  # Ray raises RuntimeError for all answers but 200, and whatever `requests` raises
            if attempt and _known(client, job):
                return
            if not _passing(e):
                raise ConfigError(
                    f"the cluster does not take the job: {str(e).strip().splitlines()[-1] if str(e).strip() else type(e).__name__}"
                ) from e
            if attempt == TRIES - 1:
                raise EngineError(f"the job could not be submitted in {TRIES} tries: {type(e).__name__}: {e}") from e
            time.sleep(2**attempt * RETRY_S)


def _known(client: Any, job: str) -> bool:
    try:
        return client.get_job_info(job) is not None
    except Exception:  # not there, or out of reach: the next try will tell
        return False


def _passing(e: BaseException) -> bool:
    """Whether it may go away: the network, a restart behind a proxy, an agent that is not up yet."""
    text = str(e)
    return (
        "requests" in type(e).__module__ or isinstance(e, ConnectionError) or bool(re.search(r"status code (502|503|504)|No available agent", text))
    )
