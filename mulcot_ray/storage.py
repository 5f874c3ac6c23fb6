"""Objects under a root, by key: a folder or `s3://bucket/prefix`. All that is known about kinds of storage is known here.

Two primitives carry everything else. `create` writes an object whole unless there is one; `swap` replaces an object if it is still the one
that was read. Both have one winner, also among machines.

What S3 may answer on a bad day (5xx, 503 SlowDown, 409, throttling, silence, a broken connection) is tried again with jitter for PATIENCE
seconds (against a server that takes requests and is silent: for up to 105); then, and at once where trying again cannot help, it is an
ArtifactError that names bucket and key. Reads through `fs` are pyarrow's, which tries again for 51 s, with half a minute of silence each time.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mulcot_ray.errors import ArtifactError, ConfigError

PATIENCE = 60.0  # seconds from the first attempt within which another one is begun: a restart of the server, a wave of SlowDown
ATTEMPTS = 3  # at least: one that met silence may have used the time up
CONNECT, SILENCE = 5.0, 30.0  # seconds that an attempt waits for a connection, and for the next byte
LONGEST_PAUSE = 5.0
READ_RETRIES = 11  # of pyarrow, after 0.05, 0.1, 0.2 … s: 51 s in all. Its default gives up after two, and its "standard" pauses for up to 20 s each
THROTTLED = {"RequestTimeout", "RequestTimeoutException", "SlowDown", "Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests",
             "TooManyRequestsException", "RequestLimitExceeded", "RequestThrottled", "BandwidthLimitExceeded", "OperationAborted"}  # fmt: skip
MARK = "mulcot-attempt"  # metadata of an object that was written on a condition: whose attempt it was

T = TypeVar("T")


class Store:
    """Objects under a root, by key. The two kinds of root differ only here; pickles as its address. Every call is safe from threads."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"
        self.is_s3 = root.startswith("s3://")
        if "://" in root and not self.is_s3:
            raise ConfigError(f"--root {root!r}: a folder or s3://bucket/prefix is wanted")
        self.base = self.root.removeprefix("s3://") if self.is_s3 else str(Path(self.root).expanduser().absolute())

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.root if self.is_s3 else self.base,)

    @property
    def fs(self) -> pafs.FileSystem:
        return s3_filesystem() if self.is_s3 else pafs.LocalFileSystem()

    def path(self, key: str) -> str:
        """The key as a path for `fs` (and for Ray Data)."""
        return f"{self.base}/{key}"

    def read(self, key: str) -> bytes | None:
        """The object, or None where there is none."""
        if self.is_s3:
            got = self._get(key)
            return None if got is None else got[0]
        try:
            return Path(self.path(key)).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tagged(self, key: str) -> tuple[bytes, str] | None:
        """The object and the tag by which `swap` knows it, or None where there is none. Equal objects have equal tags."""
        if self.is_s3:
            return self._get(key)
        data = self.read(key)
        return None if data is None else (data, hashlib.sha256(data).hexdigest())

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists: atomic, one winner. True: this call wrote it."""
        if self.is_s3:
            return self._put_if(key, data, IfNoneMatch="*")
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = _draft(path, data)
        try:
            os.link(draft, path)  # fails if it exists: the promise that S3 gives with If-None-Match
            return True
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        """Replace the object if it is still the one of `tag` (None: if there is none): atomic, one winner. False: somebody was faster.

        On S3, where an answer was lost on the way, False may also mean that this call's object was there and is replaced by now. So whoever is
        told False reads again, and must not take its own change for another's.
        """
        if tag is None:
            return self.create(key, data)
        if self.is_s3:
            return self._put_if(key, data, IfMatch=tag)
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_name(f".{path.name}.lock").open("ab") as lock:  # stays: whoever removed it would let two in
            fcntl.flock(lock, fcntl.LOCK_EX)
            now = self.tagged(key)
            if now is None or now[1] != tag:
                return False
            _draft(path, data).replace(path)
            return True

    def write(self, key: str, data: bytes) -> None:
        """Write or replace the object, whole."""
        if self.is_s3:
            bucket, name = self._place(key)
            _s3("write", bucket, name, lambda client, _: client.put_object(Bucket=bucket, Key=name, Body=data))
            return
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        _draft(path, data, sync=False).replace(path)

    def delete(self, key: str) -> None:
        """Remove the object, if there is one."""
        if self.is_s3:
            bucket, name = self._place(key)
            _s3("delete", bucket, name, lambda client, _: client.delete_object(Bucket=bucket, Key=name))
        else:
            Path(self.path(key)).unlink(missing_ok=True)

    def files(self, key: str) -> dict[str, int]:
        """Names (relative to `key`) and sizes in bytes of all objects under it, sorted. 10,000 objects take 0.3 s on a near S3 server."""
        start = len(self.path(key)) + 1
        found = self._list(key, recursive=True)
        return {f.path[start:]: f.size for f in found if f.type == pafs.FileType.File and not f.base_name.startswith(".")}

    def folders(self, key: str) -> list[str]:
        """Names of the folders directly under a key, sorted. What is in them is not listed: it may be millions of objects."""
        return [f.base_name for f in self._list(key, recursive=False) if f.type == pafs.FileType.Directory]

    def names(self, kind: str) -> list[str]:
        """Names of the finished results of a kind."""
        found = self.folders(kind)
        with ThreadPoolExecutor(16) as pool:
            done = list(pool.map(lambda n: self.exists(f"{kind}/{n}/manifest.json"), found))
        return [n for n, there in zip(found, done, strict=True) if there]

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        if not self.is_s3:
            return Path(self.path(key)).is_file()
        bucket, name = self._place(key)
        return _s3("look up", bucket, name, lambda client, _: client.head_object(Bucket=bucket, Key=name), absent=True) is not None

    @contextmanager
    def reading(self, key: str) -> Iterator[None]:
        """Around whatever reads `path(key)` through `fs`, which tries again for READ_RETRIES by itself: what fails then is an ArtifactError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as e:
            if not self.is_s3:
                raise
            bucket, name = self._place(key)
            denied = re.search(r"AWS Error (\w*(?:ACCESS_DENIED|SIGNATURE|ACCESS_KEY|CREDENTIALS|TOKEN)\w*)", str(e))
            raise ArtifactError(f"s3://{bucket}/{name}: {_why('read', bucket, denied[1], 403, '') if denied else e}") from None

    @contextmanager
    def parquet(self, key: str) -> Iterator[pq.ParquetFile]:
        """An open Parquet file. Raises ArtifactError, also from within the block, where S3 has not answered in time or refuses."""
        with self.reading(key), pq.ParquetFile(self.path(key), filesystem=self.fs) as f:
            yield f

    def _place(self, key: str) -> tuple[str, str]:
        """Bucket, and name in it."""
        bucket, _, prefix = self.base.partition("/")
        return bucket, f"{prefix}/{key}" if prefix else key

    def _get(self, key: str) -> tuple[bytes, str] | None:
        bucket, name = self._place(key)

        def get(client: Any, _: int) -> tuple[bytes, str]:
            answer = client.get_object(Bucket=bucket, Key=name)
            return bytes(answer["Body"].read()), str(answer["ETag"])

        return _s3("read", bucket, name, get, absent=True)

    def _put_if(self, key: str, data: bytes, **condition: str) -> bool:
        """PUT on a condition. Where an earlier attempt had no clear answer and this one is refused, the object itself says whose it is."""
        bucket, name = self._place(key)
        mark = {MARK: uuid.uuid4().hex}

        def put(client: Any, attempt: int) -> bool:
            try:
                client.put_object(Bucket=bucket, Key=name, Body=data, Metadata=mark, **condition)
                return True
            except client.exceptions.ClientError as e:
                if _status(e) != 412 and not (_status(e) == 404 and "IfMatch" in condition and _code(e) != "NoSuchBucket"):
                    raise
                return attempt > 0 and _s3("look up", bucket, name, mine, absent=True) is True

        def mine(client: Any, _: int) -> bool:
            return bool(client.head_object(Bucket=bucket, Key=name)["Metadata"].get(MARK) == mark[MARK])

        return _s3("write", bucket, name, put) is True

    def _list(self, key: str, recursive: bool) -> list[pafs.FileInfo]:
        with self.reading(key):
            found = self.fs.get_file_info(pafs.FileSelector(self.path(key), allow_not_found=True, recursive=recursive))
        return sorted(found, key=lambda f: str(f.path))


def s3_filesystem() -> pafs.S3FileSystem:
    """pyarrow's S3, with the addresses and keys that boto3 uses (AWS_ENDPOINT_URL, AWS_REGION, the AWS credential chain)."""
    return _filesystem(*_address())


def _draft(path: Path, data: bytes, sync: bool = True) -> Path:
    """The data in a file beside its place, hidden from listings; with `sync` on the disk before anybody can see it at its place."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with draft.open("xb") as f:
        f.write(data)
        if sync:
            f.flush()
            os.fsync(f.fileno())
    return draft


def _address() -> tuple[str | None, str | None, str | None, str | None]:
    """Endpoint, region, and what tells credentials apart: clients are made once for each."""
    e = os.environ
    endpoint, region = e.get("AWS_ENDPOINT_URL_S3") or e.get("AWS_ENDPOINT_URL"), e.get("AWS_REGION") or e.get("AWS_DEFAULT_REGION")
    return endpoint, region, e.get("AWS_ACCESS_KEY_ID"), e.get("AWS_PROFILE")


@lru_cache(maxsize=8)
def _filesystem(endpoint: str | None, region: str | None, _key: str | None, _profile: str | None) -> pafs.S3FileSystem:
    retries = pafs.AwsDefaultS3RetryStrategy(max_attempts=READ_RETRIES)
    options: dict[str, Any] = {"connect_timeout": CONNECT, "request_timeout": SILENCE, "retry_strategy": retries}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if region or endpoint:
        options["region"] = region or "us-east-1"
    return pafs.S3FileSystem(**options)


_making = threading.Lock()  # making a client is not safe from threads, using it is


def _client() -> Any:
    with _making:
        return _made(*_address())


@lru_cache(maxsize=8)
def _made(endpoint: str | None, region: str | None, _key: str | None, _profile: str | None) -> Any:
    import boto3
    from botocore.config import Config

    # One attempt: botocore's own retries share a quota of some 50 in a process, which many threads use up in the first second of an outage.
    config = Config(retries={"total_max_attempts": 1}, connect_timeout=CONNECT, read_timeout=SILENCE, max_pool_connections=64)
    try:
        return boto3.session.Session().client("s3", config=config, endpoint_url=endpoint, region_name=region or "us-east-1")
    except ValueError as e:
        raise ConfigError(f"AWS_ENDPOINT_URL {endpoint!r}: {e}; http://host:port or https://host is wanted") from None


def _status(e: Any) -> int:
    return int(e.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _code(e: Any) -> str:
    return str(e.response.get("Error", {}).get("Code", ""))


def _s3(what: str, bucket: str, key: str, call: Callable[[Any, int], T], absent: bool = False) -> T | None:
    """`call(client, attempt)`, tried again while the fault may pass. With `absent`, None where there is no such object. Raises ArtifactError."""
    from botocore import exceptions as faults
    from botocore.parsers import ResponseParserError

    place, begun, attempt = f"s3://{bucket}/{key}", time.monotonic(), 0
    while True:
        try:
            return call(_client(), attempt)
        except faults.ClientError as e:
            code, status = _code(e), _status(e)
            if absent and status == 404 and code != "NoSuchBucket":
                return None
            if status < 500 and status not in (409, 429) and code not in THROTTLED:
                raise ArtifactError(f"{place}: {_why(what, bucket, code, status, str(e))}") from None
            said = f"{status} {code}"
        except (faults.NoCredentialsError, faults.PartialCredentialsError, faults.CredentialRetrievalError) as e:
            raise ArtifactError(f"{place}: {e}. {LOOKED}") from None
        except (faults.ConnectionError, faults.HTTPClientError, faults.IncompleteReadError, faults.FlexibleChecksumError, ResponseParserError) as e:
            said = f"{type(e).__name__}: {e}"
        except faults.BotoCoreError as e:
            raise ArtifactError(f"{place}: {what}: {e}") from None
        attempt += 1
        passed = time.monotonic() - begun
        pause = random.uniform(0, min(LONGEST_PAUSE, 0.1 * 2**attempt))
        if attempt >= ATTEMPTS and passed + pause > PATIENCE:
            raise ArtifactError(
                f"{place}: {what} failed {attempt} times in {passed:.0f} s, last with {said}. Is the server up? The same command goes on from here"
            )
        time.sleep(pause)


LOOKED = "Looked at: the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the profile AWS_PROFILE in ~/.aws, and the role of the container or machine"


def _why(what: str, bucket: str, code: str, status: int, text: str) -> str:
    """A refusal that will stay one, for a person. Credentials are named by their origin, never shown."""
    endpoint = _client().meta.endpoint_url
    if code == "NoSuchBucket":
        return f"there is no bucket {bucket!r} at {endpoint}; make it, or name another --root"
    if status in (401, 403):
        import boto3

        method = getattr(boto3.session.Session().get_credentials(), "method", None) or "nowhere"
        origin = {"env": "the environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY)"}.get(method, method)
        return f"{endpoint} refuses to {what} ({status} {code}) with the credentials from {origin}: they are wrong, have expired, or lack this right"
    if status in (301, 307) or code in ("AuthorizationHeaderMalformed", "PermanentRedirect"):
        return f"bucket {bucket!r} is in another region ({text}); set AWS_REGION"
    return f"{what}: {text}"
