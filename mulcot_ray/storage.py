"""Objects under a root, by key: a folder or `s3://bucket/prefix`. All that is known about kinds of storage is known here.

`create` is the one primitive that everything else rests on: it writes an object whole unless there is one, and has one winner.
"""

from __future__ import annotations

import os
import time
import uuid
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from mulcot_ray.errors import ArtifactError, ConfigError


class Store:
    """Objects under a root, by key. The two kinds of root differ only here; pickles as its address."""

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
        if not self.is_s3:
            try:
                return Path(self.path(key)).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None
        client, bucket = _boto3(), self.base.partition("/")[0]
        try:
            return bytes(client.get_object(Bucket=bucket, Key=self._key(key))["Body"].read())
        except client.exceptions.NoSuchKey:
            return None

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless it exists: atomic, one winner. True: this call wrote it."""
        if self.is_s3:
            return _s3_put(self.base.partition("/")[0], self._key(key), data, IfNoneMatch="*")
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with draft.open("xb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            os.link(draft, path)  # fails if it exists: the promise that S3 gives with If-None-Match
            return True
        except FileExistsError:
            return False
        finally:
            draft.unlink(missing_ok=True)

    def write(self, key: str, data: bytes) -> None:
        """Write or replace the object, whole."""
        if self.is_s3:
            _s3_put(self.base.partition("/")[0], self._key(key), data)
            return
        path = Path(self.path(key))
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        draft.write_bytes(data)
        draft.replace(path)

    def delete(self, key: str) -> None:
        if self.is_s3:
            _boto3().delete_object(Bucket=self.base.partition("/")[0], Key=self._key(key))
        else:
            Path(self.path(key)).unlink(missing_ok=True)

    def files(self, key: str) -> dict[str, int]:
        """Names (relative to `key`) and sizes in bytes of all objects under it, sorted."""
        selector = pafs.FileSelector(self.path(key), allow_not_found=True, recursive=True)
        prefix = self.path(key) + "/"
        found = self.fs.get_file_info(selector)
        return {
            f.path.removeprefix(prefix): f.size
            for f in sorted(found, key=lambda f: f.path)
            if f.type == pafs.FileType.File and not f.base_name.startswith(".")
        }

    def names(self, kind: str) -> list[str]:
        """Names of the finished results of a kind."""
        return sorted(k.removesuffix("/manifest.json") for k in self.files(kind) if k.endswith("/manifest.json"))

    def _key(self, key: str) -> str:
        prefix = self.base.partition("/")[2]
        return f"{prefix}/{key}" if prefix else key


def s3_filesystem() -> pafs.S3FileSystem:
    """pyarrow's S3, with the addresses and keys that boto3 uses (AWS_ENDPOINT_URL, AWS_REGION, the AWS credential chain)."""
    options: dict[str, Any] = {"connect_timeout": 5, "request_timeout": 60}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region or endpoint:
        options["region"] = region or "us-east-1"
    return pafs.S3FileSystem(**options)


@lru_cache(maxsize=1)
def _boto3() -> Any:
    import boto3
    from botocore.config import Config

    # "standard" retries 5xx, throttling and timeouts with jitter.
    config = Config(retries={"max_attempts": 6, "mode": "standard"}, connect_timeout=5, read_timeout=60, max_pool_connections=64)
    return boto3.client("s3", config=config, region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1")


def _s3_put(bucket: str, key: str, data: bytes, **condition: str) -> bool:
    from botocore.exceptions import BotoCoreError, ClientError

    for attempt in range(6):
        try:
            _boto3().put_object(Bucket=bucket, Key=key, Body=data, **condition)
            return True
        except ClientError as e:
            status = e.response["ResponseMetadata"].get("HTTPStatusCode")
            if status == 412:
                return False
            if status != 409 or attempt == 5:  # 409: AWS saw a conflicting conditional write and asks to try again
                raise ArtifactError(f"s3://{bucket}/{key}: {e}") from e
            time.sleep(0.1 * 2**attempt)
        except BotoCoreError as e:
            raise ArtifactError(f"s3://{bucket}/{key}: {e}") from e
    raise AssertionError("unreachable")
