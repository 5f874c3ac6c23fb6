"""A real S3 server for tests and benchmarks: SeaweedFS from its wheel, which can be killed and started again on the same ports and data."""

from __future__ import annotations

import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Seaweed:
    """A server on loopback with one bucket and one identity. Ready when an authenticated write succeeds (4 to 9 s), not when the port opens."""

    def __init__(self, folder: Path, bucket: str = "mulcot") -> None:
        self.folder, self.bucket = folder, bucket
        self.key, self.secret = secrets.token_hex(10), secrets.token_hex(20)
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": self.key, "secretKey": self.secret}],
            "actions": ["Admin", "Read", "List", "Tagging", "Write"],
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.ports = free_ports(8)
        self.url = f"http://127.0.0.1:{self.ports[6]}"
        self.process: subprocess.Popen[bytes] | None = None

    def env(self, url: str | None = None) -> dict[str, str]:
        """What a process needs to use it, by `url` where that is not its own (a proxy's)."""
        return {
            "AWS_ACCESS_KEY_ID": self.key, "AWS_SECRET_ACCESS_KEY": self.secret, "AWS_ENDPOINT_URL": url or self.url, "AWS_REGION": "us-east-1",
        }  # fmt: skip

    def start(self, timeout_s: float = 60.0) -> None:
        """Start, or start again, and wait until it takes writes."""
        m, mg, v, vg, f, fg, port, pg = self.ports
        command = (
            f"-logtostderr=true server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={self.folder}/data -master.port={m} -master.port.grpc={mg} "
            f"-master.telemetry=false -master.volumeSizeLimitMB=1024 -volume.port={v} -volume.port.grpc={vg} -volume.max=0 -volume.preStopSeconds=1 "
            f"-filer -filer.port={f} -filer.port.grpc={fg} -filer.localSocket={self.folder}/f.sock -s3 -s3.port={port} -s3.port.grpc={pg} "
            f"-s3.port.iceberg=0 -s3.port.lance=0 -s3.config={self.folder}/s3.json -s3.localSocket={self.folder}/s.sock"
        )
        for stale in ("f.sock", "s.sock"):  # a killed server leaves them, and cannot bind them again
            (self.folder / stale).unlink(missing_ok=True)
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(Path(sys.executable).parent / "weed"), *command.split()], stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        client, until = self.client(), time.monotonic() + timeout_s
        while True:
            try:
                if self.bucket not in [b["Name"] for b in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"1")
                client.delete_object(Bucket=self.bucket, Key="ready")
                return
            except Exception:
                if time.monotonic() > until or self.process.poll() is not None:
                    raise RuntimeError((self.folder / "log").read_text()[-2000:]) from None
                time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL: what was answered with 200 is safe, and SIGTERM takes a quarter of a minute."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> Any:
        """A boto3 client past any proxy, which tries once."""
        import boto3
        from botocore.config import Config

        config = Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10)
        return boto3.client(
            "s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=self.key, aws_secret_access_key=self.secret, config=config
        )


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the kernel gives to clients: a server that is down for a while finds them free again."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as s:
            if port not in ports and s.connect_ex(("127.0.0.1", port)) != 0:
                ports.append(port)
    return ports


@contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """A running server; AWS_* of this process point to it meanwhile."""
    server = Seaweed(folder)
    server.start()
    with environment(server.env()):
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def environment(settings: dict[str, str]) -> Iterator[None]:
    before = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for k, value in before.items():
            os.environ.pop(k) if value is None else os.environ.update({k: value})
