"""The dumps that posts arrive in every night: folders `dt=YYYY-MM-DD` of JSONL (plain, gzip, zstd) and Parquet, on a disk or on S3.

A partition is cut into *units* that can be read apart: byte ranges of plain JSONL, row groups of Parquet, whole compressed files. The cut
depends on the files alone, and a unit holds the same rows whoever reads it: a line belongs to the unit in which it starts. Rows become
Posts or Rejects by the rules of `posts/fields.py`. Pictures are named here, not opened.
"""

from __future__ import annotations

import datetime
import hashlib
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mulcot_ray.errors import InputError, RowFault
from mulcot_ray.posts.fields import Row, as_post_or_reject
from mulcot_ray.posts.inputs import (
    MAX_LINE,
    SUFFIXES,
    BrokenStream,
    Compression,
    buffered,
    check_columns,
    compression_of,
    input_fs,
    input_info,
    json_row,
    lines,
    open_parquet,
    parquet_rows,
    skip_line,
)
from mulcot_ray.records import Post, Reason, Reject
from mulcot_ray.storage import _s3

PARTITION = re.compile(r"dt=(\d{4}-\d\d-\d\d)")
BATCH_BYTES, BATCH_ROWS = 4 << 20, 1024  # of Parquet that are Python objects at once
THREADS = 16  # that read the footers of Parquet files


@dataclass(frozen=True)
class Unit:
    """A piece of one file of a partition. `asdict` of it is JSON.

    `file` is relative to the partition. `lo` and `hi` (exclusive) are bytes of plain JSONL or row groups of Parquet; of a compressed file
    0 and its size. `weight` is the bytes that are read for it, as they lie in the file (Parquet: decompressed). `tag` tells that the file has
    changed: S3's ETag, or size and time of a local one.
    """

    number: int
    file: str
    format: Literal["jsonl", "parquet"]
    compression: Compression | None
    lo: int
    hi: int
    weight: int
    tag: str


def partitions(path: str) -> dict[str, str]:
    """The dates of a dump and their folders (absolute, or s3://), by date. A path that is itself a `dt=…` folder is a dump of one.

    Raises InputError where there are none.
    """
    root = absolute(path)
    if input_info(root, "dump").type is not pafs.FileType.Directory:
        raise InputError(f"dump {path} is a file; a folder of dt=YYYY-MM-DD folders, or one of these, is wanted")
    if date := _date(root.rpartition("/")[2]):
        return {date: root}
    try:
        inside = input_fs(root).get_file_info(pafs.FileSelector(root.removeprefix("s3://")))
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"dump {path} cannot be read: {e}") from e
    found = sorted(f.base_name for f in inside if f.type is pafs.FileType.Directory and _date(f.base_name))
    if not found:
        raise InputError(f"dump {path} has no folder dt=YYYY-MM-DD (as dt=2026-11-22) and is none")
    return {str(_date(name)): f"{root}/{name}" for name in found}


def list_units(path: str, unit_bytes: int = 64 << 20) -> list[Unit]:
    """The units of a partition, in the order of their files' names, about `unit_bytes` each where a file can be cut.

    Files that Spark and editors leave (`_SUCCESS`, `.x.crc`, hidden ones, `_temporary/`) are passed over. A listing takes a request for
    1,000 files on S3; of Parquet files, the footers are read.
    Raises InputError where there is nothing to read, or a file is of another format.
    """
    root = absolute(path)
    if input_info(root, "partition").type is not pafs.FileType.Directory:
        raise InputError(f"partition {path} is a file; the folder that holds it is wanted")
    files = _files(root)
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = list(pool.map(lambda name: _cut(root, name, files[name][0], unit_bytes), files))
    units: list[Unit] = []
    for (name, (_, tag)), (kind, ranges) in zip(files.items(), pieces, strict=True):
        units += [Unit(n, name, kind, compression_of(name), lo, hi, weight, tag) for n, (lo, hi, weight) in enumerate(ranges, len(units))]
    if not units:
        raise InputError(f"partition {path} is empty: {f'its {len(files)} files have no rows' if files else 'there is no file in it'}")
    return units


def read_unit(path: str, unit: Unit, images: str | None) -> Iterator[tuple[int, Post | Reject]]:
    """The rows of a unit of the partition `path`, numbered from 0.

    A picture that is inside its row is hashed, so that `Post.content` covers its pixels. One that is named is not opened: its name stands
    for it, and names (under `images`, a folder or s3:// prefix) are taken to mean the same picture for ever.
    The id of a Reject is its row's, or where it has none "file:byte" of the line (of the text, where that is compressed) or "file:row".
    A compressed stream that breaks off ends in a Reject. Whether a (post_id, aspect) came before is not looked at.
    Raises InputError where the file cannot be read, or is no longer the one that was listed; that is looked at first and last.
    """
    root = absolute(path)
    fs, at = input_fs(root), f"{root.removeprefix('s3://')}/{unit.file}"
    _check_tag(fs, at, unit)
    try:
        rows = _parquet(fs, at, unit) if unit.format == "parquet" else _jsonl(fs, at, unit)
        for number, (where, row) in enumerate(rows):
            post = as_post_or_reject(where, row, images, ())
            if isinstance(post, Post) and post.image_bytes is not None:
                post = replace(post, image_sha256=hashlib.sha256(post.image_bytes).hexdigest())
            yield number, post
    except (pa.ArrowException, OSError) as e:
        _check_tag(fs, at, unit)
        raise InputError(f"{unit.file} cannot be read: {e}") from e
    _check_tag(fs, at, unit)


def absolute(path: str) -> str:
    """A local path made absolute, because other processes read it too; one of S3 as it is. Without a slash at its end."""
    return (path if "://" in path else str(Path(path).expanduser().absolute())).rstrip("/") or "/"


# --- what is there -------------------------------------------------------------------------------------------------------


def _date(name: str) -> str | None:
    match = PARTITION.fullmatch(name)
    try:
        return datetime.date.fromisoformat(match[1]).isoformat() if match else None
    except ValueError:
        return None


def _files(root: str) -> dict[str, tuple[int, str]]:
    """Name under the partition → size and tag, sorted by name."""
    found: dict[str, tuple[int, str]] = {}
    if root.startswith("s3://"):
        prefix = root.removeprefix("s3://").partition("/")[2] + "/"
        found = {o["Key"].removeprefix(prefix): (int(o["Size"]), o["ETag"].strip('"')) for o in _objects(root)}
    else:
        try:
            for f in pafs.LocalFileSystem().get_file_info(pafs.FileSelector(root, recursive=True)):
                if f.type is pafs.FileType.File:
                    found[f.path[len(root) + 1 :]] = f.size, _stat(f)
        except (pa.ArrowException, OSError) as e:
            raise InputError(f"partition {root} cannot be read: {e}") from e
    return {n: found[n] for n in sorted(found) if not n.endswith(("/", ".crc")) and not any(p.startswith((".", "_")) for p in n.split("/"))}


def _objects(root: str) -> Iterator[dict[str, Any]]:
    """What S3 lists under a folder, 1,000 a request. Neither Store.files nor Arrow tells ETags."""
    bucket, _, folder = root.removeprefix("s3://").partition("/")
    more: dict[str, str] = {}
    while True:

        def page(client: Any, _: int, options: dict[str, str] = more) -> dict[str, Any]:
            return dict(client.list_objects_v2(Bucket=bucket, Prefix=f"{folder}/", **options))

        got = _s3("list", bucket, f"{folder}/", page) or {}
        yield from got.get("Contents", ())
        if not got.get("IsTruncated"):
            return
        more = {"ContinuationToken": got["NextContinuationToken"]}


def _check_tag(fs: pafs.FileSystem, at: str, unit: Unit) -> None:
    try:
        if isinstance(fs, pafs.LocalFileSystem):
            now = _stat(fs.get_file_info(at))
        else:
            with fs.open_input_file(at) as f:
                now = f.metadata()["ETag"].decode().strip('"')
    except FileNotFoundError:
        now = "gone"
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{unit.file} cannot be read: {e}") from e
    if now != unit.tag:
        raise InputError(f"{unit.file} changed while it was being read; run again")


def _stat(info: pafs.FileInfo) -> str:
    return "gone" if info.type is pafs.FileType.NotFound else f"{info.size}-{info.mtime_ns}"


def _cut(root: str, name: str, size: int, unit_bytes: int) -> tuple[Literal["jsonl", "parquet"], list[tuple[int, int, int]]]:
    """A file's format, and lo, hi and weight of each of its units."""
    if name.endswith(SUFFIXES["parquet"]):
        return "parquet", _row_groups(root, name, unit_bytes)
    if not name.endswith(SUFFIXES["jsonl"]):
        wanted = ", ".join(end for ends in SUFFIXES.values() for end in ends)
        raise InputError(f"partition {root} holds {name}, which is of no format that is read here; names that end in {wanted} are wanted")
    if compression_of(name):
        return "jsonl", [(0, size, size)]
    return "jsonl", [(lo, min(lo + unit_bytes, size), min(unit_bytes, size - lo)) for lo in range(0, size, unit_bytes)]


def _row_groups(root: str, name: str, unit_bytes: int) -> list[tuple[int, int, int]]:
    try:
        footer = pq.read_metadata(f"{root.removeprefix('s3://')}/{name}", filesystem=input_fs(root))
        check_columns(footer.schema.to_arrow_schema().names, name)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{name} cannot be read as Parquet: {e}") from e
    ranges: list[tuple[int, int, int]] = []
    for i in range(footer.num_row_groups):
        size = footer.row_group(i).total_byte_size
        if ranges and ranges[-1][2] + size <= unit_bytes:
            lo, _, weight = ranges.pop()
            ranges.append((lo, i + 1, weight + size))
        else:
            ranges.append((i, i + 1, size))
    return ranges


# --- rows ----------------------------------------------------------------------------------------------------------------


def _jsonl(fs: pafs.FileSystem, at: str, unit: Unit) -> Iterator[Row]:
    with fs.open_input_file(at) as stream:
        f, start = buffered(stream, unit.compression), 0
        if unit.lo:  # the line that reaches over the edge is of the unit before; one that starts at the edge is ours
            f.seek(unit.lo - 1)
            start = unit.lo - 1 + skip_line(f)
        try:
            for _, byte, line in lines(f, start, sys.maxsize if unit.compression else unit.hi, MAX_LINE):
                yield f"{unit.file}:{byte}", json_row(line)
        except BrokenStream as e:
            yield f"{unit.file}:{e.at}", RowFault(Reason.BAD_LINE, f"{unit.file}: {e}")


def _parquet(fs: pafs.FileSystem, at: str, unit: Unit) -> Iterator[Row]:
    with open_parquet(fs, at) as file:
        groups = [file.metadata.row_group(i) for i in range(unit.hi)]
        rows = sum(g.num_rows for g in groups[unit.lo :])
        batch = max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, unit.weight)))
        first = 1 + sum(g.num_rows for g in groups[: unit.lo])
        for i, row in enumerate(parquet_rows(file, list(range(unit.lo, unit.hi)), batch), first):
            yield f"{unit.file}:{i}", row
