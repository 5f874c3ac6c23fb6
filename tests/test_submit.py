"""`mulcot submit` against a Ray cluster that asks for a token: refused without, log followed, exit codes, Ctrl-C, a killed job."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from ray.job_submission import JobStatus
from ray_nodes import Head, free_ports, processes_of, ray_head

from mulcot_ray import following
from mulcot_ray import submit as module
from mulcot_ray.errors import ConfigError, EngineError
from mulcot_ray.submit import submit

JOB = """
import os, pathlib, sys, time
print("colour", os.environ.get("COLOUR"), "git", os.path.exists(".git"), flush=True)
match sys.argv[1]:
    case "exit":
        print("first", flush=True); time.sleep(3); print("last"); sys.exit(int(sys.argv[2]))
    case "killed once":
        there = pathlib.Path(sys.argv[2])
        if not there.exists():
            there.touch(); print("dying", flush=True); os.kill(os.getpid(), 9)
        print("resumed")
    case "sleep":
        print("sleeping", flush=True); time.sleep(float(sys.argv[2])); print("slept")
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="mcs", dir="/tmp"))
    try:
        with ray_head(folder, cpus=2) as h:
            yield h
        assert not processes_of(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("work")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "tiny.py").write_text(JOB)
    (folder / ".git").mkdir()
    (folder / ".git" / "left-out").write_text("x" * 100_000)
    return str(folder)


@pytest.fixture(autouse=True)
def no_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def token(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.token)


def details(head: Head, job: str) -> dict[str, Any]:
    return httpx.get(f"{head.url}/api/jobs/{job}", headers=head.headers, trust_env=False).json()


def named(said: list[str]) -> str:
    return said[0].split()[1]


@pytest.mark.ray
def test_refused_without_the_token(head: Head, work: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"wants a token and got none \(401\).*RAY_AUTH_TOKEN"):
        submit(["tiny", "exit", "0"], address=head.url, working_dir=work)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "not-this-one")
    with pytest.raises(ConfigError, match=r"refuses the token \(403\)") as e:
        submit(["tiny", "exit", "0"], address=head.url, working_dir=work)
    assert "not-this-one" not in str(e.value)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "gone"))
    with pytest.raises(ConfigError, match="gone.*cannot be read"):
        submit(["tiny", "exit", "0"], address=head.url, working_dir=work)
    assert httpx.get(f"{head.url}/api/jobs/", headers=head.headers, trust_env=False).json() == []  # none of it arrived


@pytest.mark.ray
def test_the_log_is_followed_and_the_exit_code_comes_back(head: Head, work: str, token: None) -> None:
    said: list[tuple[float, str]] = []
    code = submit(
        ["tiny", "exit", "7"],
        address=head.url,
        working_dir=work,
        env=["COLOUR=red"],
        tags={"run": "a"},
        say=lambda t: said.append((time.monotonic(), t)),
    )
    at = {text: when for when, text in said}
    assert code == 7 and said[-1][1].endswith("failed, exit code 7")
    assert at["last"] - at["first"] > 1.0 and "colour red git False" in at  # the lines came while it ran
    job = details(head, named([text for _, text in said]))
    assert job["metadata"] == {"stage": "tiny", "user": module._user(), "run": "a", "attempt": "1"}
    assert job["runtime_env"]["env_vars"] == {"COLOUR": "red"} and head.token not in str(job)


@pytest.mark.ray
def test_a_killed_job_is_started_again_and_goes_on(head: Head, work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "token"
    path.write_text(head.token + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.setenv("RAY_ADDRESS", head.url)  # as inside a cluster's shell
    said: list[str] = []
    assert submit(["tiny", "killed once", str(tmp_path / "mark")], working_dir=work, attempts=2, say=said.append) == 0
    assert [t for t in said if t in ("dying", "resumed")] == ["dying", "resumed"] and any("was killed (exit code 137)" in t for t in said)


@pytest.mark.ray
def test_ctrl_c_stops_it_or_leaves_it_running(head: Head, work: str, token: None) -> None:
    """Both at once, each in a thread. The interrupt comes where the main thread would get it: within the log."""

    def interrupted(answer: bool, seconds: str) -> None:
        def say(text: str) -> None:
            said[answer].append(text)
            if text == "sleeping":
                raise KeyboardInterrupt

        def ask(question: str) -> bool:
            asked.append(question)
            return answer

        codes[answer] = submit(["tiny", "sleep", seconds], address=head.url, working_dir=work, say=say, ask=ask)

    said: dict[bool, list[str]] = {True: [], False: []}
    asked: list[str] = []
    codes: dict[bool, int] = {}
    threads = [threading.Thread(target=interrupted, args=a) for a in ((True, "600"), (False, "6"))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert codes == {True: 130, False: 130} and all(q.endswith("is still running. Stop it?") for q in asked) and len(asked) == 2
    assert said[True][-1].endswith("stopped") and details(head, named(said[True]))["status"] == "STOPPED"
    left = named(said[False])
    assert said[False][-1] == f"Follow it: ray job logs {left} --follow --address {head.url}; stop it: ray job stop {left} --address {head.url}"
    deadline = time.monotonic() + 30
    while details(head, left)["status"] == "RUNNING" and time.monotonic() < deadline:
        time.sleep(0.5)
    assert details(head, left)["status"] == "SUCCEEDED"


@pytest.mark.ray
def test_no_wait_comes_back_at_once_and_an_installed_package_needs_no_folder(head: Head, token: None) -> None:
    said: list[str] = []
    assert submit(["label", "--help"], address=head.url, working_dir=None, wait=False, say=said.append) == 0
    job = named(said)
    assert job in said[-1] and said[-1].startswith("Follow it: ray job logs")
    deadline = time.monotonic() + 60
    while details(head, job)["status"] in ("PENDING", "RUNNING") and time.monotonic() < deadline:
        time.sleep(0.5)
    found = details(head, job)
    assert found["entrypoint"] == "python -m mulcot_ray.cli label --help" and found["status"] == "SUCCEEDED" and found["driver_exit_code"] == 0


@pytest.mark.ray
def test_the_probes_of_the_kubernetes_manifests_pass_on_a_head_that_asks_for_a_token(head: Head) -> None:
    """They carry no token: Ray answers its health paths without."""
    spec = yaml.safe_load((Path(__file__).parents[1] / "deploy" / "kuberay" / "cluster.yaml").read_text())["spec"]
    container = spec["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {"52365": head.agent.rpartition(":")[2], "8265": head.url.rpartition(":")[2]}
    for probe in ("readinessProbe", "livenessProbe"):
        python, *arguments = container[probe]["exec"]["command"]
        assert python == "python" and not subprocess.run([sys.executable, *_swapped(arguments, ports)], timeout=20).returncode
        gone = _swapped(arguments, ports | {"8265": str(free_ports(1)[0])})
        assert subprocess.run([sys.executable, *gone], timeout=20, stderr=subprocess.DEVNULL).returncode == 1  # and fail where nobody answers


def _swapped(words: list[str], ports: dict[str, str]) -> list[str]:
    for stated, here in ports.items():
        words = [w.replace(f":{stated}/", f":{here}/") for w in words]
    return words


def test_addresses_and_options_that_cannot_be_right(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = free_ports(1)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of Ray's control store, not the dashboard's
    assert module._address(None) == "http://127.0.0.1:8265" and module._address("head:8265/") == "http://head:8265"
    for wrong in ("ray://head:10001", "http://user:word@head:8265", "http://head:8265/api"):
        with pytest.raises(ConfigError, match="the dashboard's address is wanted"):
            submit(["label"], address=wrong, working_dir=work)
    with pytest.raises(ConfigError, match=rf"no Ray dashboard at http://127.0.0.1:{port}.*ray dashboard cluster.yaml"):
        submit(["label"], address=f"127.0.0.1:{port}", working_dir=work)
    with pytest.raises(ConfigError, match="nothing to submit"):
        submit([], address="x:1")
    for name in ("AWS_SECRET_ACCESS_KEY", "TEACHER_KEY", "OPENAI_API_KEY", "MULCOT_TOKENS", "DB_PASSWORD"):
        with pytest.raises(ConfigError, match=f"{name}: looks like a secret"):
            submit(["label"], address="x:1", env=[f"{name}=v"])
        with pytest.raises(ConfigError, match="looks like a secret"):
            module._tags({name: "v"})
    with pytest.raises(ConfigError, match="NOT_SET_HERE: not set here"):
        submit(["label"], address="x:1", env=["NOT_SET_HERE"])
    assert module._environment(["AWS_REGION=eu-west-1", "MULCOT_ROOT=s3://b/runs?a=b"]) == {
        "AWS_REGION": "eu-west-1",
        "MULCOT_ROOT": "s3://b/runs?a=b",
    }
    with pytest.raises(ConfigError, match="is no folder"):
        module._folder("nowhere")


class Cluster:
    """Ray's client as far as it is used, with faults."""

    def __init__(self, *faults: BaseException | None, stored: bool = False, log: tuple[Any, ...] = ()) -> None:
        self.faults, self.stored, self.log, self.sent = list(faults), stored, list(log), 0

    def submit_job(self, **request: Any) -> None:
        self.sent += 1
        if self.faults and (fault := self.faults.pop(0)) is not None:
            raise fault

    def get_job_info(self, job: str) -> Any:
        if not self.stored:
            raise RuntimeError("status code 404")
        done = not self.log
        return SimpleNamespace(
            submission_id=job, status=JobStatus.SUCCEEDED if done else JobStatus.RUNNING, driver_exit_code=0 if done else None, message=""
        )

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for item in self.log.pop(0):
            if isinstance(item, BaseException):
                raise item
            yield item

    def get_address(self) -> str:
        return "http://head:8265"


def test_a_submission_is_tried_again_but_never_sent_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.001)
    lost = Cluster(ConnectionError("cut"), RuntimeError("already exists"), stored=True)
    module._send(lost, "j", entrypoint="x")
    assert lost.sent == 2  # the second was told that the first had arrived
    starting = Cluster(RuntimeError("Request failed with status code 503: x"), RuntimeError("No available agent to submit job"), None)
    module._send(starting, "j", entrypoint="x")
    assert starting.sent == 3
    refused = Cluster(RuntimeError("status code 400\nworking_dir is larger than 500 MiB"))
    with pytest.raises(ConfigError, match="does not take the job: working_dir is larger"):
        module._send(refused, "j", entrypoint="x")
    assert refused.sent == 1
    away = Cluster(*[ConnectionError("down")] * 9)
    with pytest.raises(EngineError, match="in 5 tries"):
        module._send(away, "j", entrypoint="x")
    assert away.sent == 5


def test_a_log_whose_connection_breaks_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "POLL_S", 0.001)
    said: list[str] = []
    log = (("one\ntw", RuntimeError("closed")), ("one\n", "two\nthr", OSError("reset")), ("one\ntwo\nthree\n", "end"))
    assert following.follow(Cluster(stored=True, log=log), "j", "http://x:1", lambda q: False, said.append) == (0, False)
    assert said == ["one", "two", "three", "end", "j: succeeded"]
    monkeypatch.setattr(following, "BLIND_S", -1.0)
    with pytest.raises(EngineError, match="out of sight.*may still be running.*ray job logs j"):
        following.follow(Cluster(), "j", "http://x:1", lambda q: False, said.append)


def test_what_a_job_ended_with() -> None:
    def ended(status: JobStatus, code: int | None) -> tuple[int, bool]:
        return following._outcome(SimpleNamespace(submission_id="j", status=status, driver_exit_code=code, message="why"), lambda t: None)

    assert ended(JobStatus.SUCCEEDED, 0) == (0, False) and ended(JobStatus.STOPPED, None) == (130, False)
    assert ended(JobStatus.FAILED, 1) == (1, False)  # an error of ours: trying again is no use
    assert ended(JobStatus.FAILED, None) == (1, True) and ended(JobStatus.FAILED, -9) == (137, True) and ended(JobStatus.FAILED, 137) == (137, True)
