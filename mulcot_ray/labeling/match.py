"""Who is asked tonight: of each content one post that no earlier night has asked. The others copy it, are carried over, or clash.

(a) By bucket of the id: of the rows with one (post_id, aspect) the earliest stands; those of another content than its *clash*. Where it
    has the same content it is a repetition, which (b) finds, because equal content shares a bucket.
(b) By bucket of the key (the content's digest): clashes are rejected. What the ledger knows is carried. Of what it does not know the
    earliest post is asked, and other posts copy it.

"Earliest" is by unit, slice and row: the order of the dump. A bucket's commit is its part under work/found, created after its parts
under work/todo. All of them depend on nothing but the intake and the view of the ledger in work/ledger.json, which the night's first
attempt takes: a bucket that is done again, by whomever, comes out the same.

A task holds a bucket, and no texts of it. At its peak (a) has 500 bytes a row, (b) 550, and 120 more for each content that the ledger
knows (with a rationale: its text); measured with 400,000 rows, ids of 19 characters. On top of that come the texts and pictures of AHEAD + 1
cells (what a slice has in a bucket: at most the slice's 64 MB) and one part to write of TODO_BYTES. A content cannot be split: ten million
posts of one and the same text are in one bucket, and cost 6 GB. Both together take 3.5 CPU seconds for a million rows.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Run, parquet_bytes
from mulcot_ray.cluster import tasks
from mulcot_ray.console import Progress
from mulcot_ray.errors import ConservationError
from mulcot_ray.labeling.intake import read_groups
from mulcot_ray.labeling.ledger import KEY, PAYLOAD, Column, Ledger, View, as_bytes, as_keys
from mulcot_ray.parts import TALLY, footers
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Fate, Post, Split
from mulcot_ray.storage import Store

CLASH = pa.schema([("key", KEY), ("unit", pa.int32()), ("slice", pa.int32()), ("row", pa.int64())])
FOUND = pa.schema(
    [("key", KEY), ("post_id", pa.string()), ("aspect", pa.string()), ("unit", pa.int32()), ("slice", pa.int32()), ("row", pa.int64()),
     ("has_image", pa.bool_()), ("fate", pa.string()), ("of", pa.string()), *((f.name, f.type) for f in PAYLOAD)]
)  # fmt: skip
FATES = (Fate.SCORED, Fate.CARRIED, Fate.COPIED, Fate.REPEATED, Fate.REJECTED)
SCORED, CARRIED, COPIED, REPEATED, REJECTED = range(5)
TODO_ROWS, TODO_BYTES = 4096, 64 << 20  # of a part of what is to be asked
GROUP_BYTES = 4 << 20  # of its row groups: a chunk of posts reads whole ones, and pictures are large
FOUND_ROWS = 32_768  # of a row group
THREADS, AHEAD = 16, 2  # cells read at once: digests and ids, texts and pictures
ROW_BITS = 40  # a unit has fewer rows than this many bits can count

Cell = list[int]  # unit, slice, first row group, how many
T = TypeVar("T")
R = TypeVar("R")


def match(run: Run, buckets: int, markers: list[dict[str, Any]], ledger: Ledger, runtime: Runtime, progress: Progress) -> Counter[str]:
    """Decide the fate of every row that the intake took, by Ray Data tasks, a bucket each. Returns the rows by fate: their sum is all rows.

    `markers` are the intake's, of all units. Buckets that are done are left alone. Raises ConservationError, EngineError.
    """
    total = sum(s["rows"] for m in markers for s in m["slices"])
    work = f"{run.prefix}/work"
    view = _pinned(run.store, work, ledger)
    names = [f"part-{b:03d}.parquet" for b in range(buckets)]

    def missing(folder: str) -> list[int]:
        there = run.store.files(f"{work}/{folder}")
        return [b for b, name in enumerate(names) if name not in there]

    cells = _cells(markers, buckets, "id_groups")
    for _ in tasks(runtime, FindClashes, (run.store, work, buckets), [{"bucket": b, "cells": cells[b]} for b in missing("clashes")]):
        pass
    clashes = _tallies(run.store, [f"{work}/clashes/{n}" for n in names])
    _conserved(run.prefix, "ids", total, sum(c["rows"] for c in clashes))
    tally, todo = Counter[str](), missing("found")
    for done in matched(run, buckets, [b for b in range(buckets) if b not in todo]):
        tally.update(done["fates"])
    progress(tally.total(), total, tally[Fate.REJECTED])
    cells = _cells(markers, buckets, "groups")
    rows = [
        {"bucket": b, "cells": cells[b], "clashes": [[i, *c["groups"][str(b)]] for i, c in enumerate(clashes) if str(b) in c["groups"]]} for b in todo
    ]
    for done in tasks(runtime, FindFates, (run.store, work, ledger, view), rows):
        tally.update(done["fates"])
        progress(tally.total(), total, tally[Fate.REJECTED])
    _conserved(run.prefix, "rows", total, tally.total())
    return Counter({f.value: tally[f] for f in FATES})


def matched(run: Run, buckets: int, some: Iterable[int] | None = None) -> list[dict[str, Any]]:
    """What each bucket's found part was committed with: "bucket", "rows", "fates" {fate: rows}, "images" (rows with a picture), "todo_parts" [[name, rows]]."""
    return _tallies(run.store, [f"{run.prefix}/work/found/part-{b:03d}.parquet" for b in (range(buckets) if some is None else some)])


# (a) Clashes


@dataclass(frozen=True)
class FindClashes:
    """A Ray Data task: of a bucket of ids, the rows whose (post_id, aspect) came before with another content, in row groups by bucket of the key."""

    store: Store
    work: str
    buckets: int

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        bucket, cells = int(task["bucket"]), task["cells"]
        read = [t for _, t in _ahead(lambda c: _read(self.store, self.work, "ids", c, ["id", "key", "row"]), cells, THREADS)]
        unit, number = _places(cells, [len(t) for t in read])
        ids, keys, row = (_column(read, name) for name in ("id", "key", "row"))
        order, starts = _groups(ids)
        first = np.repeat(order[starts], np.diff(starts, append=len(order)))
        clash = np.sort(order[keys[order] != keys[first]])
        home = _buckets(keys[clash], self.buckets)
        clash, home = clash[np.argsort(home, kind="stable")], np.sort(home)
        table = pa.Table.from_arrays([as_keys(keys[clash]), unit[clash], number[clash], row[clash]], schema=CLASH)
        present, at = np.unique(home, return_index=True)
        tally = {"bucket": bucket, "rows": len(ids), "clashes": len(clash), "groups": {str(b): [i, 1] for i, b in enumerate(present.tolist())}}
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, CLASH.with_metadata({TALLY: json.dumps(tally)}), compression="zstd") as f:
            for a, b in zip(at, [*at[1:], len(table)], strict=False):
                f.write_table(table.slice(a, b - a), row_group_size=b - a)
        self.store.create(f"{self.work}/clashes/part-{bucket:03d}.parquet", bytes(sink.getvalue()))
        return tally


# (b) Fates


@dataclass(frozen=True)
class FindFates:
    """A Ray Data task: of a bucket of keys, the parts of what is to be asked, then the found part, which is the commit."""

    store: Store
    work: str
    ledger: Ledger
    view: View

    def __call__(self, task: dict[str, Any]) -> dict[str, Any]:
        bucket, cells = int(task["bucket"]), task["cells"]
        read = [t for _, t in _ahead(lambda c: _light(self.store, self.work, c), cells, THREADS)]
        unit, number = _places(cells, [len(t) for t in read])
        at = np.cumsum([0, *(len(t) for t in read)])
        rows = pa.concat_tables([_LIGHT.empty_table(), *read]).combine_chunks()
        del read
        clashing = _clashing(self.store, self.work, task["clashes"], unit, number, rows["row"].to_numpy())
        fate, of, entries, entry = decide(as_bytes(rows["key"]), rows["post_id"], clashing, partial(self.ledger.lookup, view=self.view))

        todo, asked = _Todo(self.store, self.work, bucket), fate == SCORED
        some = [i for i in range(len(cells)) if asked[at[i] : at[i + 1]].any()]
        for i, table in _ahead(lambda i: _read(self.store, self.work, "posts", cells[i], _ASKED), some, AHEAD):
            todo.add(table.filter(pa.array(asked[at[i] : at[i + 1]])))
        todo.flush()

        count = np.bincount(fate, minlength=len(FATES)).tolist()
        tally = {
            "bucket": bucket, "rows": len(fate), "fates": {f.value: n for f, n in zip(FATES, count, strict=True)},
            "images": int(pc.sum(rows["has_image"]).as_py() or 0), "todo_parts": todo.parts,
        }  # fmt: skip
        words = pa.array([f.value for f in FATES])
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, FOUND.with_metadata({TALLY: json.dumps(tally)}), compression="zstd") as f:
            for lo in range(0, len(fate), FOUND_ROWS):
                part, light = slice(lo, lo + FOUND_ROWS), rows.slice(lo, FOUND_ROWS)
                payload = entries.select(PAYLOAD.names).take(pa.array(entry[part], mask=entry[part] < 0))
                columns = [
                    *(light[c] for c in ("key", "post_id", "aspect")), unit[part], number[part], light["row"], light["has_image"],
                    words.take(pa.array(fate[part])), rows["post_id"].take(pa.array(of[part], mask=of[part] < 0)), *payload.columns,
                ]  # fmt: skip
                f.write_table(pa.table(columns, schema=FOUND))
        self.store.create(f"{self.work}/found/part-{bucket:03d}.parquet", bytes(sink.getvalue()))
        return tally


def decide(
    keys: Column, post_id: pa.ChunkedArray, clashing: Column, lookup: Callable[[pa.Array], pa.Table]
) -> tuple[Column, Column, pa.Table, Column]:
    """The fates of a bucket's rows, given in the order of the dump; `clashing` has the positions of those that clash.

    Returns of each row: fate (0 to 4, of FATES); the row whose post_id stands in `of` (a repetition and a clash have their own, for it is
    theirs that came before), or -1; then the ledger's entries, and of each row which of them it is carried over from, or -1.
    """
    fate = np.full(len(keys), REPEATED, np.int8)
    fate[clashing] = REJECTED
    live = np.flatnonzero(fate != REJECTED)
    order, starts = _groups(keys[live])
    first = live[order[starts]]  # the earliest row of each content
    group = np.full(len(keys), -1)
    group[live[order]] = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(order)))
    entries = lookup(as_keys(keys[first]))
    known = np.full(len(first), -1)
    known[np.searchsorted(keys[first], as_bytes(entries["key"]))] = np.arange(len(entries))

    new = _first_of_their_id(live, group, post_id)
    fate[new] = np.where(known[group[new]] >= 0, CARRIED, COPIED)
    fate[first] = np.where(known >= 0, CARRIED, SCORED)
    of, entry = np.where(fate >= REPEATED, np.arange(len(keys)), -1), np.full(len(keys), -1)
    for code, column, values in ((COPIED, of, first), (CARRIED, entry, known)):
        some = np.flatnonzero(fate == code)
        column[some] = values[group[some]]
    return fate, of, entries, entry


def _first_of_their_id(live: Column, group: Column, post_id: pa.ChunkedArray) -> Column:
    """Those of the live rows that are the first with their post_id among the rows of their content (which the aspect is part of)."""
    many = live[np.bincount(group[live])[group[live]] > 1] if len(live) else live
    if len(many) == 0:
        return live
    ids = post_id.take(pa.array(many)).combine_chunks().dictionary_encode()
    _, at = np.unique(group[many] * len(ids.dictionary) + ids.indices.to_numpy(), return_index=True)
    return np.setdiff1d(live, np.delete(many, at), assume_unique=True)


_LIGHT = pa.schema([("key", KEY), ("row", pa.int64()), ("post_id", pa.string()), ("aspect", pa.string()), ("has_image", pa.bool_())])
_ASKED = ["key", "text", "aspect", "image_ref", "image_bytes", "image_sha256"]


def _light(store: Store, work: str, cell: Cell) -> pa.Table:
    """A cell without texts and pictures. A picture shows in its reference or, where it came with the row, in its digest."""
    t = _read(store, work, "posts", cell, ["key", "row", "post_id", "aspect", "image_ref", "image_sha256"])
    pictured = pc.or_(pc.is_valid(t["image_ref"]), pc.is_valid(t["image_sha256"]))
    return pa.table([*(t[c] for c in ("key", "row", "post_id", "aspect")), pictured], schema=_LIGHT)


def _clashing(store: Store, work: str, clashes: list[list[int]], unit: Column, number: Column, row: Column) -> Column:
    """Positions of the bucket's rows that clash. `clashes`: part and row groups of each."""

    def code(unit: Column, number: Column, row: Column) -> Column:
        return (np.searchsorted(cells, unit.astype(np.int64) << 32 | number) << ROW_BITS) | row

    cells = np.unique(unit.astype(np.int64) << 32 | number)
    assert len(row) == 0 or int(row.max()) >> ROW_BITS == 0, f"a unit of {row.max()} rows"
    found = [t for _, t in _ahead(lambda c: read_groups(store, f"{work}/clashes/part-{c[0]:03d}.parquet", c[1], c[2], CLASH.names), clashes, THREADS)]
    if not found:
        return np.empty(0, np.int64)
    table = pa.concat_tables(found)
    mine, theirs = code(unit, number, row), code(*(table[c].to_numpy() for c in ("unit", "slice", "row")))
    at = np.minimum(np.searchsorted(mine, theirs), len(mine) - 1)
    if (mine[at] != theirs).any():
        raise ConservationError(f"{work}: {int((mine[at] != theirs).sum())} clashes are of no row. Nothing is published; please report this.")
    return at


class _Todo:
    """Posts to ask, as they come, into parts of at most TODO_ROWS rows or TODO_BYTES (a single larger one has a part to itself)."""

    def __init__(self, store: Store, work: str, bucket: int) -> None:
        self.store, self.work, self.bucket = store, work, bucket
        self.parts: list[tuple[str, int]] = []
        self._held: list[pa.Table] = []
        self._rows = self._bytes = 0

    def add(self, table: pa.Table) -> None:
        sizes = np.cumsum([pc.fill_null(pc.binary_length(table[c]), 0).to_numpy() for c in ("text", "image_bytes")], 0, np.int64)[-1]
        ends = np.cumsum(sizes)
        lo = 0
        while lo < len(table):
            before = int(ends[lo - 1]) if lo else 0
            hi = min(int(np.searchsorted(ends, before + TODO_BYTES - self._bytes, "right")), lo + TODO_ROWS - self._rows)
            if hi <= lo and not self._held:
                hi = lo + 1
            if hi > lo:
                self._held.append(_as_posts(table.slice(lo, hi - lo)))
                self._rows += hi - lo
                self._bytes += int(ends[hi - 1]) - before
                lo = hi
            if lo < len(table):
                self.flush()

    def flush(self) -> None:
        if not self._held:
            return
        name = f"part-{self.bucket:03d}-{len(self.parts):04d}.parquet"
        group = max(16, min(1024, self._rows * GROUP_BYTES // max(1, self._bytes)))
        self.store.create(f"{self.work}/todo/{name}", parquet_bytes(pa.concat_tables(self._held), group))
        self.parts.append((name, self._rows))
        self._held, self._rows, self._bytes = [], 0, 0


def _as_posts(table: pa.Table) -> pa.Table:
    """The posts as they are asked: named by their content, since the answer is every such post's."""
    n = len(table)
    digits = pa.py_buffer(as_bytes(table["key"]).tobytes().hex().encode())
    names = pa.StringArray.from_buffers(n, pa.py_buffer(np.arange(0, 32 * n + 1, 32, dtype=np.int32)), digits)
    meta = pa.MapArray.from_arrays(pa.array(np.zeros(n + 1, np.int32)), pa.array([], pa.string()), pa.array([], pa.string()))
    made = {"post_id": names, "source_id": names, "label": pa.nulls(n, pa.string()), "split": pa.repeat(str(Split.UNLABELED), n), "meta": meta}
    return pa.table([made[f.name] if f.name in made else table[f.name] for f in Post.schema], schema=Post.schema)


# What both share


def _pinned(store: Store, work: str, ledger: Ledger) -> View:
    """The view of the ledger that this night was begun with."""
    key = f"{work}/ledger.json"
    store.create(key, json.dumps(ledger.view()).encode())
    view: View = json.loads(store.read(key) or b"[]")
    return view


def _cells(markers: list[dict[str, Any]], buckets: int, groups: str) -> list[list[Cell]]:
    """By bucket, where its rows are, in the order of the dump."""
    cells: list[list[Cell]] = [[] for _ in range(buckets)]
    for marker in markers:
        for s in marker["slices"]:
            for bucket, (first, count) in s[groups].items():
                cells[int(bucket)].append([marker["unit"], s["slice"], first, count])
    return cells


def _read(store: Store, work: str, folder: str, cell: Cell, columns: list[str]) -> pa.Table:
    unit, number, first, count = cell
    return read_groups(store, f"{work}/{folder}/part-{unit:05d}-{number:04d}.parquet", first, count, columns)


def _places(cells: list[Cell], sizes: list[int]) -> tuple[Column, Column]:
    """Unit and slice of each row."""
    at = np.array(cells, np.int32).reshape(-1, 4)
    return np.repeat(at[:, 0], sizes), np.repeat(at[:, 1], sizes)


def _column(tables: list[pa.Table], name: str) -> Column:
    """A column of all tables in numbers or, for digests, as bytes."""
    parts = [as_bytes(t[name]) if t.schema.field(name).type == KEY else t[name].to_numpy() for t in tables]
    return np.concatenate(parts) if parts else np.empty(0, np.int64 if name == "row" else "S16")


def _buckets(keys: Column, buckets: int) -> Column:
    """The bucket of each key: its first bits."""
    return np.frombuffer(keys.tobytes(), np.uint8)[::16] >> (8 - (buckets.bit_length() - 1))


def _groups(values: Column) -> tuple[Column, Column]:
    """The order that sorts the values, equal ones as they come, and where in it each value begins."""
    order = np.argsort(values, kind="stable")
    s = values[order]
    return order, np.flatnonzero(np.append(True, s[1:] != s[:-1])) if len(s) else np.empty(0, np.int64)


def _ahead(work: Callable[[T], R], items: Iterable[T], n: int) -> Iterator[tuple[T, R]]:
    """Each item with `work` of it, in order, n at once and no more than n waiting."""
    with ThreadPoolExecutor(n) as pool:
        waiting = deque[tuple[T, Future[R]]]()
        for item in items:
            if len(waiting) == n:
                done, result = waiting.popleft()
                yield done, result.result()
            waiting.append((item, pool.submit(work, item)))
        for done, result in waiting:
            yield done, result.result()


def _tallies(store: Store, keys: list[str]) -> list[dict[str, Any]]:
    """The counts that these parts were committed with."""
    return footers(store, keys, lambda f: json.loads(f.metadata[TALLY]))


def _conserved(prefix: str, what: str, planned: int, found: int) -> None:
    if planned != found:
        raise ConservationError(f"{prefix}: {planned} {what} taken in, {found} matched. Nothing is published; please report this.")
