"""No key or token ends up in what a stage leaves behind: results, rejects, manifests, kept answers, logs, Ray's session, the terminal.

A stage is run as a person runs it, with the keys of the storage and of an endpoint, and tokens, set to words that occur nowhere else. The endpoint
is of the careless kind: its errors repeat the key that it was given. Then everything that was written is searched, Parquet as text too.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from ray_nodes import end_of

ANSWER = json.dumps(
    {"Text_analysis": "t", "Image_analysis": "i", "Conflict_resolution": "c", "Final_conclusion": "f", "Prediction": "positive"}, indent=1
).strip("{}\n")


class Careless(BaseHTTPRequestHandler):
    """OpenAI's chat API as far as a label needs it. A post that says "quote" is refused with the caller's key in the message."""

    refuse = False

    def do_GET(self) -> None:
        self.answer(200, {"object": "list", "data": [{"id": "fake", "object": "model", "created": 0, "owned_by": "x"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        quoted = {"error": {"message": f"you sent {self.headers['Authorization']}", "type": "invalid_request_error", "code": None, "param": None}}
        if Careless.refuse:
            return self.answer(401, quoted)
        if "quote" in json.dumps(body["messages"]):
            return self.answer(400, quoted)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": ANSWER}}
        usage = {"prompt_tokens": 9, "completion_tokens": 9, "total_tokens": 18}
        self.answer(200, {"id": "x", "object": "chat.completion", "created": 0, "model": "fake", "choices": [choice], "usage": usage})

    def answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Careless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Careless.refuse = False
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="mcx", dir="/tmp"))  # short: Ray's sockets lie under it
    yield path
    end_of(path)
    shutil.rmtree(path, ignore_errors=True)


def text_of(data: bytes) -> bytes:
    """The bytes, and what they say where they are Parquet."""
    if not data.startswith(b"PAR1"):
        return data
    table = pq.read_table(io.BytesIO(data))
    return data + json.dumps(table.to_pylist(), default=str).encode() + str(table.schema.metadata).encode()


def objects(bucket: str, prefix: str) -> dict[str, bytes]:
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    keys = [x["Key"] for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix) for x in page.get("Contents", [])]
    return {k: client.get_object(Bucket=bucket, Key=k)["Body"].read() for k in keys}


def files(path: Path) -> dict[str, bytes]:
    found = {}
    for p in path.rglob("*"):
        if p.is_file() and not p.is_symlink() and p.stat().st_size < 64 << 20:
            found[str(p.relative_to(path))] = p.read_bytes()
    return found


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_keys_and_tokens_are_in_nothing_that_a_stage_leaves(s3_bucket: str, endpoint: str, folder: Path) -> None:
    words = {name: f"canary{secrets.token_hex(12)}" for name in ("TEACHER_KEY", "MULCOT_TOKENS", "RAY_AUTH_TOKEN", "HF_TOKEN")}
    words |= {"AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"], "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"]}
    (folder / "tmp").mkdir()
    env = {**os.environ, **words, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": str(folder), "TMPDIR": str(folder / "tmp"), "COLUMNS": "200"}
    env.pop("RAY_ADDRESS", None)
    texts = ["a fine day", "quote me", "a grey day", "rain again"]
    (folder / "posts.jsonl").write_text("".join(json.dumps({"id": f"p{i}", "text": t, "aspect": "day"}) + "\n" for i, t in enumerate(texts)))
    (folder / "api.yaml").write_text(
        json.dumps({"base": "laptop", "local_cpus": 2, "teacher": {"endpoint": {"url": endpoint, "key_env": "TEACHER_KEY", "retries": 1}}})
    )
    root = f"s3://{s3_bucket}/secrets-{secrets.token_hex(4)}"

    def mulcot(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mulcot_ray.cli", *arguments, "--root", root]
        return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=150)

    label = ("label", "--posts", "p", "--model", "endpoint:fake", "--role", "teacher", "--mode", "generate", "--runtime", "api.yaml")
    outs = [mulcot("import", "posts.jsonl", "--format", "jsonl", "--name", "p"), mulcot(*label, "--name", "done")]
    assert [o.returncode for o in outs] == [0, 0], outs[-1].stdout + outs[-1].stderr
    Careless.refuse = True
    outs.append(mulcot(*label, "--name", "refused"))
    assert outs[-1].returncode == 1 and "EngineError" in outs[-1].stderr

    left = {f"s3/{k}": v for k, v in objects(s3_bucket, root.partition(f"{s3_bucket}/")[2]).items()} | files(folder)
    left |= {f"terminal/{i}": (o.stdout + o.stderr).encode() for i, o in enumerate(outs)}
    # What should be searched is there: results, a reject with the endpoint's words, our logs, Ray's.
    rejects = next(v for k, v in left.items() if "/predictions/done/rejects/" in k)
    assert b"you sent" in text_of(rejects)
    assert any(k.endswith("manifest.json") for k in left) and any("/logs/" in k and k.startswith("tmp/") for k in left)
    assert any("session_" in k and "raylet" in k for k in left)
    found = []
    for name, word in words.items():
        shapes = {word.encode(), base64.b64encode(word.encode()).rstrip(b"=")}
        found += [f"{name} in {where}" for where, data in left.items() if any(s in text_of(data) for s in shapes)]
    assert not found, found
