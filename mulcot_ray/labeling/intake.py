"""The first step of a night: the units of a dump, read once, as slices whose rows lie sorted by what they will be matched on.

Under the night's work/ each unit U leaves, for each of its slices S (at most SLICE_ROWS rows or SLICE_BYTES):

    posts/part-UUUUU-SSSS.parquet     Post, and key (the content's digest, 16 bytes) and row (its number in the unit, from 0)
    ids/part-UUUUU-SSSS.parquet       id (digest of post_id and aspect), key, row
    rejects/part-UUUUU-SSSS.parquet   Reject
    intake/UUUUU.json                 created last: the unit is done, with its counts and where each bucket's rows are

A bucket is what the first bits of a digest say: of the key for posts, of the id for ids. Rows are sorted by bucket, then by number, and no
row group holds two buckets, so that a later task reads a bucket from all slices and nothing else. A file without rows is not made.
All of it depends on the unit alone: a unit that is done twice, or by two at once, comes out the same to the byte.

A task works on one unit and holds one slice: as Python objects, as columns, and as the Parquet file that is uploaded. Its process had 0.2 GB
where posts are short, and up to 0.8 GB where pictures lie inside or a row has 64 MB; what it holds does not grow with the unit. One core
takes 40,000 to 60,000 short rows a second.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Run, parquet_bytes
from mulcot_ray.cluster import tasks
from mulcot_ray.console import Progress
from mulcot_ray.errors import ArtifactError, RecipeChanged
from mulcot_ray.posts.dumps import Unit, absolute, read_unit
from mulcot_ray.posts.importers import check_images
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Post, Reject, to_table
from mulcot_ray.storage import Store

STAGE = "intake"
SLICE_ROWS, SLICE_BYTES = 20_000, 64 << 20
GROUP_ROWS, GROUP_BYTES = 4096, 8 << 20  # of a bucket that has more in one slice
BUCKETS, BUCKET_BYTES = 64, 64 << 20  # at most (footers grow with them, and are read for each); input that makes one
INFLATION = 4  # bytes of JSONL in one of its compressed file
THREADS = 32  # for reading markers, which is waiting

KEY = pa.binary(16)
ROWS = pa.schema([*Post.schema, pa.field("key", KEY), pa.field("row", pa.int64())])
IDS = pa.schema([pa.field("id", KEY), pa.field("key", KEY), pa.field("row", pa.int64())])


def buckets_for(units: Iterable[Unit]) -> int:
    """Into how many buckets these units are best cut: a power of two, with some 64 MB of input in each, 64 at most."""
    size = sum(map(_bytes, units))
    return min(BUCKETS, 1 << (max(1, -(-size // BUCKET_BYTES)) - 1).bit_length())


def intake(run: Run, path: str, images: str | None, units: list[Unit], buckets: int, runtime: Runtime, progress: Progress) -> Counter[str]:
    """Read the units of the partition `path` that are not yet done, by Ray Data tasks, a unit each.

    `units` and `buckets` must be those of the first attempt (keep them in the run's plan). `images` is the folder or s3:// prefix that
    pictures are named under; an absolute path of it is part of a post's content.
    `progress` is told rows done, rows in all (by the bytes that are left; 0 before anything is known) and rejects, unit by unit.
    Returns the sums over all units: "rows" (posts kept), "rejects", "images" (posts with a picture) and "reasons/…". Rows in = rows + rejects.
    Raises InputError where a file cannot be read or has changed since it was listed, RecipeChanged where other units were begun with.
    """
    check_images(images)
    work, total, read = f"{run.prefix}/work", Counter[str](), 0
    there = run.store.files(f"{work}/intake")
    done = [u for u in units if f"{u.number:05d}.json" in there]
    left = [u for u in units if f"{u.number:05d}.json" not in there]
    for unit, marker in zip(done, _markers(run, [u.number for u in done]), strict=True):
        if marker["source"] != asdict(unit):
            raise RecipeChanged(f"{run.prefix}: unit {unit.number} was {marker['source']} and is {asdict(unit)} now. Give the night another name")
        total.update(_counts(marker))
        read += _bytes(unit)
    size = read + sum(map(_bytes, left))

    def tell() -> None:
        rows = total["rows"] + total["rejects"]
        progress(rows, rows * size // read if read else 0, total["rejects"])

    tell()
    place = (run.store, work, absolute(path), None if images is None else absolute(images), buckets)
    for counts in tasks(runtime, _Intake, place, [asdict(u) for u in left]):
        read += counts.pop("read")
        total.update(counts)
        tell()
    return total


def read_markers(run: Run) -> list[dict[str, Any]]:
    """What each unit was committed with, in the units' order:

    "unit" (its number), "source" (asdict of it), "rows", "rejects", "images", "reasons" {reason: rejects}, "slices" [{"slice", "rows", "rejects",
    "groups" {bucket: [first row group, how many]} of posts, "id_groups" of ids}]. Buckets are strings: it is JSON.
    """
    return _markers(run, sorted(int(n.removesuffix(".json")) for n in run.store.files(f"{run.prefix}/work/intake")))


def read_groups(store: Store, key: str, first: int, count: int, columns: list[str]) -> pa.Table:
    """Some columns of `count` row groups of a Parquet object. Ranges that lie together are one request."""
    with store.parquet(key) as f:
        return f.read_row_groups(list(range(first, first + count)), columns=columns, use_threads=False)


def _bytes(unit: Unit) -> int:
    """Bytes of text in a unit, as far as its listing tells."""
    return unit.weight * (INFLATION if unit.compression else 1)


def _markers(run: Run, numbers: list[int]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(THREADS) as pool:
        return [json.loads(data or b"") for data in pool.map(lambda n: run.store.read(f"{run.prefix}/work/intake/{n:05d}.json"), numbers)]


def _counts(marker: Mapping[str, Any]) -> Counter[str]:
    reasons = {f"reasons/{reason}": n for reason, n in marker["reasons"].items()}
    return Counter({**{k: marker[k] for k in ("rows", "rejects", "images")}, **reasons})


# --- one unit ------------------------------------------------------------------------------------------------------------


@dataclass
class _Slice:
    """Rows on their way into one slice."""

    numbers: list[int] = field(default_factory=list)
    posts: list[Post] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    size: int = 0

    def has_room(self, size: int) -> bool:
        rows = len(self.posts) + len(self.rejects)
        return rows == 0 or (rows < SLICE_ROWS and self.size + size <= SLICE_BYTES)


class _Intake:
    """The task: one unit, from its file to its marker."""

    def __init__(self, store: Store, work: str, path: str, images: str | None, buckets: int) -> None:
        self.store, self.work, self.path, self.images = store, work, path, images
        self.shift = 8 - (buckets.bit_length() - 1)

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        unit = Unit(**row)
        slices: list[dict[str, Any]] = []
        reasons, images, now = Counter[str](), 0, _Slice()
        for number, found in read_unit(self.path, unit, self.images):
            if not now.has_room(size := _size(found)):
                slices.append(self._write(unit.number, len(slices), now))
                now = _Slice()
            now.size += size
            if isinstance(found, Post):
                now.numbers.append(number)
                now.posts.append(found)
                images += found.has_image
            else:
                now.rejects.append(replace(found, stage=STAGE))
                reasons[found.reason] += 1
        if now.posts or now.rejects:
            slices.append(self._write(unit.number, len(slices), now))
        marker = {
            "unit": unit.number, "source": row, **{k: sum(s[k] for s in slices) for k in ("rows", "rejects")}, "images": images, "reasons": dict(sorted(reasons.items())),
            "slices": slices,
        }  # fmt: skip
        self._create(f"intake/{unit.number:05d}.json", json.dumps(marker).encode())
        return {**_counts(marker), "read": _bytes(unit)}

    def _write(self, unit: int, number: int, rows: _Slice) -> dict[str, Any]:
        part = f"part-{unit:05d}-{number:04d}.parquet"
        groups: dict[str, list[int]] = {}
        id_groups: dict[str, list[int]] = {}
        if rows.posts:
            keys = _digests(bytes.fromhex(p.content) for p in rows.posts)
            order, bounds = self._sorted(keys)
            posts, numbers = [rows.posts[i] for i in order], np.array(rows.numbers)
            table = _table(posts, keys[order], numbers[order])
            data, groups = _parquet(table, bounds, np.array([_size(p) for p in posts]), ["source_id", "aspect", "label", "split", "meta"])
            self._create(f"posts/{part}", data)
            ids = _digests(hashlib.blake2b(json.dumps([p.post_id, p.aspect]).encode(), digest_size=16).digest() for p in rows.posts)
            order, bounds = self._sorted(ids)
            table = pa.Table.from_arrays([_fixed(ids[order]), _fixed(keys[order]), pa.array(numbers[order])], schema=IDS)
            data, id_groups = _parquet(table, bounds, np.full(len(ids), 40), [])
            self._create(f"ids/{part}", data)
        if rows.rejects:
            self._create(f"rejects/{part}", parquet_bytes(to_table(Reject, rows.rejects)))
        return {"slice": number, "rows": len(rows.posts), "rejects": len(rows.rejects), "groups": groups, "id_groups": id_groups}

    def _create(self, name: str, data: bytes) -> None:
        """What an earlier attempt has left must be the same: the marker of this one is true of it only then."""
        if not self.store.create(f"{self.work}/{name}", data) and self.store.read(f"{self.work}/{name}") != data:
            raise ArtifactError(f"{self.work}/{name} was made by another version of this package or of pyarrow. Delete {self.work} and run again")

    def _sorted(self, digests: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.int64], dict[int, tuple[int, int]]]:
        """The order by bucket, and from where to where each bucket's rows then lie."""
        buckets = digests[:, 0] >> self.shift if self.shift < 8 else np.zeros(len(digests), np.uint8)
        order = np.argsort(buckets, kind="stable")
        present, starts = np.unique(buckets[order], return_index=True)
        ends = np.append(starts[1:], len(order))
        return order, {int(b): (int(lo), int(hi)) for b, lo, hi in zip(present, starts, ends, strict=True)}


def _size(row: Post | Reject) -> int:
    """Roughly the bytes that a row holds; characters are counted as one."""
    if isinstance(row, Reject):
        return len(row.post_id) + len(row.detail) + len(row.raw or "")
    size = len(row.post_id) + len(row.source_id) + len(row.text) + len(row.aspect or "") + len(row.image_ref or "") + len(row.image_bytes or b"")
    return size + sum(len(k) + len(v) for k, v in row.meta.items()) if row.meta else size


def _digests(values: Iterable[bytes]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(values), np.uint8).reshape(-1, 16)


def _fixed(digests: npt.NDArray[np.uint8]) -> pa.Array:
    return pa.Array.from_buffers(KEY, len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests))])


def _table(posts: list[Post], keys: npt.NDArray[np.uint8], numbers: npt.NDArray[np.int64]) -> pa.Table:
    """`to_table` column by column, without a dict for each row: 4 times as fast."""
    columns = [pa.array([getattr(p, f.name) for p in posts], f.type) for f in Post.schema if f.name != "meta"]
    ends = np.cumsum([0, *(len(p.meta) for p in posts)], dtype=np.int32)
    names, values = [k for p in posts for k in p.meta], [v for p in posts for v in p.meta.values()]
    meta = pa.MapArray.from_arrays(pa.array(ends), pa.array(names, pa.string()), pa.array(values, pa.string()))
    columns.insert(Post.schema.get_field_index("meta"), meta)
    return pa.Table.from_arrays([*columns, _fixed(keys), pa.array(numbers, pa.int64())], schema=ROWS)


def _parquet(
    table: pa.Table, bounds: Mapping[int, tuple[int, int]], sizes: npt.NDArray[np.int64], repeating: list[str]
) -> tuple[bytes, dict[str, list[int]]]:
    """The table as Parquet with a row group or more for each bucket, and by bucket the first of them and how many there are.

    Without minima and maxima: nobody asks for them, and a footer that names 256 groups is read with each of them.
    """
    sink, ends, groups, at = pa.BufferOutputStream(), np.cumsum(sizes), dict[str, list[int]](), 0
    with pq.ParquetWriter(sink, table.schema, compression="zstd", use_dictionary=repeating, write_statistics=False) as f:
        for bucket, (lo, hi) in bounds.items():
            groups[str(bucket)] = [at, 0]
            while lo < hi:
                base = ends[lo - 1] if lo else 0
                fit = int(np.searchsorted(ends, base + GROUP_BYTES, side="right"))
                cut = min(hi, lo + GROUP_ROWS, max(lo + 1, fit))
                f.write_table(table.slice(lo, cut - lo), row_group_size=cut - lo)
                groups[str(bucket)][1] += 1
                lo, at = cut, at + 1
    return sink.getvalue().to_pybytes(), groups
