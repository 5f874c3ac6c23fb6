"""A Ray head of a test's own, by `ray start`: ports of its own, a token, an own folder for its session; nothing is left of it at the end.

`ray stop` would end every Ray on the machine, that of the other tests too. So the head is started in the foreground, and what it has started is
found by its session folder.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

BIN = Path(sys.executable).parent
READY_S = 90.0


@dataclass(frozen=True)
class Head:
    """`url` of the dashboard, `agent` of the node's agent; `gcs` is HOST:PORT for ray.init and further nodes; `environment` what a process needs to join."""

    url: str
    agent: str
    gcs: str
    token: str
    folder: Path
    environment: dict[str, str]

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def ray_head(folder: Path, *options: str, cpus: int = 2, port: int | None = None, environment: dict[str, str] | None = None) -> Iterator[Head]:
    """`folder` must have a short path: Ray puts Unix sockets under it, whose names are limited to 107 bytes."""
    gcs, dashboard, agent, agent_grpc, metrics = free_ports(5)
    gcs, token = port or gcs, secrets.token_hex(16)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_AUTH", "RAY_ADDRESS", "RAY_API"))}
    env = {
        **inherited, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0", **(environment or {}),
    }  # fmt: skip
    command = [
        str(BIN / "ray"), "start", "--head", "--block", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}", f"--metrics-export-port={metrics}",
        "--min-worker-port=0", "--max-worker-port=0", f"--num-cpus={cpus}", "--object-store-memory=200000000", *options,
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    url = f"http://127.0.0.1:{dashboard}"
    try:
        for path in (f"{url}/api/version", f"http://127.0.0.1:{agent}/api/local_raylet_healthz"):
            _answers(path, {"Authorization": f"Bearer {token}"}, process, folder / "head.log")
        written = folder / "ray" / "ray_current_cluster"
        while not written.exists() and process.poll() is None:
            time.sleep(0.1)
        address = written.read_text().strip()
        yield Head(url, f"http://127.0.0.1:{agent}", address, token, folder, env)
    finally:
        end_of(folder, process.pid)
        process.wait(10)


def _answers(url: str, headers: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, headers=headers, timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise RuntimeError(f"the Ray head is not up:\n{log.read_text()[-3000:]}")


def processes_of(folder: Path, *pids: int) -> list[psutil.Process]:
    """All processes that have to do with a session folder, by command line or environment, and these."""
    found = []
    for p in psutil.process_iter():
        try:
            mine = p.pid in pids or str(folder) in " ".join(p.cmdline()) or p.environ().get("RAY_TMPDIR") == str(folder)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if mine and p.pid != os.getpid():
            found.append(p)
    return found


def end_of(folder: Path, *pids: int) -> None:
    for _ in range(10):  # one may start another while it is being ended
        found = [p for p in processes_of(folder, *pids) if p.status() != psutil.STATUS_ZOMBIE]
        if not found:
            return
        for p in found:
            try:
                p.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(found, timeout=5)
    raise RuntimeError(f"still running: {found}")
