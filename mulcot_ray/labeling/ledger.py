"""What was answered on earlier nights, by content and version: a post whose text, aspect and picture are known is not asked again.

    ledger/VERSION/NAME/part-BBB.parquet   a *generation*: what one night has added, or several merged; sorted by key, keys unique
    ledger/VERSION/index.json              which generations there are, oldest first; changed by Store.swap alone

Generations are immutable, and the index is one object: whoever has read it has a *view* that stays true. Compaction merges generations;
the merged ones' files stay for KEEP seconds at least, and go with a later compaction.

A look-up reads footers, the keys of the row groups between whose least and greatest there is a candidate, and the payload of those with a
hit. In memory: the keys that are looked for, those of READ row groups (8 MB), one row group (2 MB without rationales), what was found.

How it grows, measured by benchmarks/ledger_growth.py: 42 bytes an entry on disk (a scored label with its probabilities; a rationale adds
its text), of which the key is 14; the index has 170 bytes a file and 30 a night. A night of a million known posts takes 0.6 CPU seconds of
look-ups at a million entries, 1.6 at ten, 4.1 at thirty: 0.12 for each million, thus 13 at a hundred, in which it reads all 4.2 GB. Of new
posts it reads the keys alone: 2 CPU seconds and 1.4 GB at a hundred million. The peak of memory is 100 MB at any size.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.cluster import tasks
from mulcot_ray.errors import ArtifactError, ConservationError
from mulcot_ray.parts import TALLY
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Prediction
from mulcot_ray.storage import Store

KEY = pa.binary(16)
_LEFT_OUT = ("post_id", "model", "contract", "finish_reason", "tokens_in", "tokens_out")
PAYLOAD = pa.schema(
    [*(f for f in Prediction.schema if f.name not in _LEFT_OUT), pa.field("answered_by", pa.string()), pa.field("scored_on", pa.string())]
)
ENTRY = pa.schema([pa.field("key", KEY), *PAYLOAD])
GROUP = 32_768  # rows of a row group
READ = 16  # row groups whose keys are read at once
PART_BYTES = 32 << 20  # of what is merged, as it lies on disk, for one part of the result
MOST_PARTS = 4096
KEEP = 24 * 3600.0  # seconds that a merged generation's files outlive it: a night that was begun with them must find them
TRIES = 40  # at the index, with up to a second between them
REPEATED_WORDS = ["label", "stated", "rationale_fault", "answered_by", "scored_on"]  # a dictionary pays
# Bytes of probabilities and digests by place: 42 bytes an entry instead of 46, and written in half the time.
BY_PLACE = dict.fromkeys(["key", "negative", "neutral", "positive", "label_mass"], "BYTE_STREAM_SPLIT")

View = list[dict[str, Any]]  # generations as the index has them: name, rows, files, and of what they were merged; can be kept as JSON
Column = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Ledger:
    """The ledger of one version. Pickles; holds nothing."""

    store: Store
    version: str

    @property
    def folder(self) -> str:
        return f"ledger/{self.version}"

    def view(self) -> View:
        """The generations as they are now, oldest first."""
        generations: View = self._read()[0]["generations"]
        return generations

    def entries(self) -> int:
        """How many there are. A key that two generations have counts twice, until they are merged."""
        return sum(g["rows"] for g in self.view())

    def lookup(self, keys: pa.Array, view: View | None = None) -> pa.Table:
        """The entries of these keys (binary(16), sorted, unique) that are known, as ENTRY, sorted by key. The newest generation's counts.

        `view` is an earlier one of this ledger; None: the ledger as it is now. Raises ArtifactError where a file of it is gone.
        """
        left, found = as_bytes(keys), [ENTRY.empty_table()]
        for generation in reversed(self.view() if view is None else view):
            hits = []
            for file in generation["files"]:
                lo, hi = np.searchsorted(left, _bytes(file["lo"])), np.searchsorted(left, _bytes(file["hi"]), "right")
                if lo < hi:
                    for at, entries in self._find(file["key"], left[lo:hi]):
                        hits.append(lo + at)
                        found.append(entries)
            if hits:
                left = np.delete(left, np.concatenate(hits))
        entries = pa.concat_tables(found)
        order = np.argsort(as_bytes(entries["key"]), kind="stable")
        return entries if (order[1:] > order[:-1]).all() else entries.take(pa.array(order))

    def _find(self, key: str, wanted: Column) -> Iterator[tuple[Column, pa.Table]]:
        """Positions in `wanted` that a file has, with their entries, by row groups."""
        try:
            with pq.ParquetFile(self.store.path(key), filesystem=self.store.fs, pre_buffer=True) as f:
                starts, ends = _bounds(f.metadata, wanted)
                groups = np.flatnonzero(starts < ends)
                for some in np.split(groups, range(READ, len(groups), READ)) if len(groups) else ():
                    lo, hi = starts[some[0]], ends[some[-1]]
                    keys = as_bytes(f.read_row_groups(some.tolist(), columns=["key"], use_threads=False)["key"])
                    rows = np.minimum(np.searchsorted(keys, wanted[lo:hi]), len(keys) - 1)
                    hits = np.flatnonzero(keys[rows] == wanted[lo:hi])
                    edges = np.cumsum([0, *(f.metadata.row_group(g).num_rows for g in some.tolist())])
                    cuts = np.searchsorted(rows[hits], edges)
                    for g, edge, a, b in zip(some.tolist(), edges, cuts, cuts[1:], strict=False):
                        if a < b:
                            payload = f.read_row_group(g, columns=PAYLOAD.names, use_threads=False).take(pa.array(rows[hits[a:b]] - edge))
                            at = lo + hits[a:b]
                            yield at, payload.add_column(0, ENTRY.field("key"), as_keys(wanted[at])).cast(ENTRY)
        except FileNotFoundError as e:
            raise ArtifactError(
                f"{key} is gone: it was merged into another more than {KEEP / 3600:.0f} h ago. Was this night begun before? Delete what there is of it, and begin again"
            ) from e

    # Adding

    def put(self, generation: str, bucket: int, entries: pa.Table) -> dict[str, Any] | None:
        """Create part `bucket` of a generation, unless it is there. Keys are unique; order does not matter.

        Returns what `add` wants to know of it: key, rows, lo and hi (its least and greatest key, as hex), bytes. None where there are no entries.
        """
        keys = as_bytes(entries["key"])
        if len(keys) == 0:
            return None
        order = np.argsort(keys, kind="stable")
        assert (keys[order][1:] != keys[order][:-1]).all(), f"{generation}: a key twice in bucket {bucket}"
        key = f"{self.folder}/{generation}/part-{bucket:03d}.parquet"
        self.store.create(key, _parquet(entries.select(ENTRY.names).cast(ENTRY).take(pa.array(order))))
        return _line(self.store, key)

    def add(self, name: str, files: list[dict[str, Any]]) -> None:
        """List a generation whose files are there, unless it is listed or was merged into another. One without files needs no line."""
        if not files:
            return

        def change(index: dict[str, Any]) -> bool:
            if any(name == g["name"] or name in g["of"] for g in index["generations"]):
                return False
            index["generations"].append({"name": name, "rows": sum(f["rows"] for f in files), "of": [], "files": files})
            return True

        self._update(change)

    # Compaction

    def compact(self, runtime: Runtime, above: int = 8) -> str | None:
        """Where there are more generations than `above`, merge them into one. Returns its name, or None where there was nothing to do.

        An oldest generation of more than four times the rest stays as it is: each entry is written again some few times in its life, not with
        every compaction. What is merged is written into the index first, so that a killed compaction is ended by the next. Raises ConservationError.
        """

        def begin(index: dict[str, Any]) -> bool:
            chosen = index["generations"]
            if index["merging"] is not None or len(chosen) <= above:
                return False
            while len(chosen) > 2 and chosen[0]["rows"] > 4 * sum(g["rows"] for g in chosen[1:]):
                chosen = chosen[1:]
            names = [g["name"] for g in chosen]
            size = sum(f["bytes"] for g in chosen for f in g["files"])
            parts = min(MOST_PARTS, 1 << (max(1, -(-size // PART_BYTES)) - 1).bit_length())
            index["merging"] = {"name": f"merged-{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]}", "of": names, "parts": parts}
            return True

        index = self._update(begin)
        merging = index["merging"]
        if merging is None:
            return None
        name, sources = str(merging["name"]), [g for g in index["generations"] if g["name"] in merging["of"]]
        parts = [{"part": p, "parts": merging["parts"]} for p in range(merging["parts"])]
        made = tasks(runtime, _Merge, (self.store, f"{self.folder}/{name}", sources), parts)
        lines = sorted((line for line in made if line["rows"]), key=lambda line: line["lo"])
        rows, taken = sum(line["rows"] for line in lines), sum(g["rows"] for g in sources)
        if rows + sum(line.pop("replaced") for line in lines) != taken:
            raise ConservationError(f"{self.folder}: {taken} entries to merge, {rows} merged. Nothing is changed; please report this.")
        merged = {"name": name, "rows": rows, "of": [n for g in sources for n in (g["name"], *g["of"])], "files": lines}
        old = [r for r in index["retired"] if time.time() - r["since"] > KEEP]
        for file in (f for r in old for f in r["files"]):
            self.store.delete(file)

        def end(index: dict[str, Any]) -> bool:
            if (index["merging"] or {}).get("name") != name:
                return False  # somebody else has ended it
            at = next(i for i, g in enumerate(index["generations"]) if g["name"] in merging["of"])
            index["generations"] = [g for g in index["generations"] if g["name"] not in merging["of"]]
            index["generations"].insert(at, merged)
            index["retired"] = [r for r in index["retired"] if r not in old]
            index["retired"].append({"since": time.time(), "files": [f["key"] for g in sources for f in g["files"]]})
            index["merging"] = None
            return True

        self._update(end)
        return name

    # The index

    def _read(self) -> tuple[dict[str, Any], str | None]:
        got = self.store.tagged(f"{self.folder}/index.json")
        return ({"generations": [], "merging": None, "retired": []}, None) if got is None else (json.loads(got[0]), got[1])

    def _update(self, change: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The index after `change`, which says False where it changed nothing; done again on a newer one where somebody was faster."""
        for attempt in range(TRIES):
            index, tag = self._read()
            if not change(index) or self.store.swap(f"{self.folder}/index.json", json.dumps(index).encode(), tag):
                return index
            time.sleep(random.uniform(0, min(1.0, 0.01 * 2**attempt)))
        raise ArtifactError(f"{self.store.root}/{self.folder}/index.json: others were faster {TRIES} times; try again")


def as_bytes(keys: pa.Array | pa.ChunkedArray) -> Column:
    """binary(16) values as numpy's S16, which sorts and compares as they do. (It drops zeros at the end, but of all values alike.)"""
    array = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    return np.frombuffer(array.buffers()[1] or b"", "S16", len(array), array.offset * 16) if len(array) else np.empty(0, "S16")


def as_keys(values: Column) -> pa.Array:
    """The reverse of `as_bytes`."""
    return pa.FixedSizeBinaryArray.from_buffers(KEY, len(values), [None, pa.py_buffer(np.ascontiguousarray(values).tobytes())])


def _bytes(digits: str) -> Column:
    return np.array(bytes.fromhex(digits), "S16")


def _bounds(metadata: pq.FileMetaData, wanted: Column) -> tuple[Column, Column]:
    """For each row group: from where to where (exclusive) the wanted keys, sorted, lie between its least and its greatest."""
    stats = [metadata.row_group(g).column(0).statistics for g in range(metadata.num_row_groups)]
    lo, hi = np.array([s.min for s in stats], "S16"), np.array([s.max for s in stats], "S16")
    return np.searchsorted(wanted, lo), np.searchsorted(wanted, hi, "right")


def _parquet(entries: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(
        entries, sink, compression="zstd", row_group_size=GROUP, use_dictionary=REPEATED_WORDS, column_encoding=BY_PLACE, write_statistics=["key"]
    )
    return bytes(sink.getvalue())


def _line(store: Store, key: str) -> dict[str, Any]:
    """What the index says of a file (that is not empty), read from its footer."""
    m = pq.read_metadata(store.path(key), filesystem=store.fs)
    lo, hi = m.row_group(0).column(0).statistics.min.hex(), m.row_group(m.num_row_groups - 1).column(0).statistics.max.hex()
    size = store.fs.get_file_info(store.path(key)).size
    return {"key": key, "rows": m.num_rows, "lo": lo, "hi": hi, "bytes": size} | json.loads((m.metadata or {}).get(TALLY, b"{}"))


@dataclass(frozen=True)
class _Merge:
    """A Ray Data task: one part of a merged generation, with the keys from part/parts to (part+1)/parts of all there can be.

    Holds PART_BYTES of the sources, unpacked, and the result: some 200 MB.
    """

    store: Store
    folder: str
    sources: View

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part, parts = int(row["part"]), int(row["parts"])
        key = f"{self.folder}/part-{part:04d}.parquet"
        if not self.store.exists(key):
            lo, hi = (n.to_bytes(16, "big").hex() for n in ((part << 128) // parts, ((part + 1 << 128) // parts) - 1))
            found = [_between(self.store, f["key"], lo, hi) for g in self.sources for f in g["files"] if f["lo"] <= hi and f["hi"] >= lo]
            entries = pa.concat_tables([ENTRY.empty_table(), *found])
            if not entries.num_rows:
                return {"rows": 0, "replaced": 0}
            keys = as_bytes(entries["key"])
            order = np.argsort(keys, kind="stable")  # equal keys stay in the order of their generations: the last is the newest
            keys = keys[order]
            newest = order[np.append(keys[1:] != keys[:-1], True)]
            tally = {TALLY: json.dumps({"replaced": len(order) - len(newest)})}
            self.store.create(key, _parquet(entries.take(pa.array(newest)).replace_schema_metadata(tally)))
        return _line(self.store, key)


def _between(store: Store, key: str, lo: str, hi: str) -> pa.Table:
    """The entries of a file from one key to another, both among them."""
    with pq.ParquetFile(store.path(key), filesystem=store.fs, pre_buffer=True) as f:
        stats = [f.metadata.row_group(g).column(0).statistics for g in range(f.metadata.num_row_groups)]
        groups = [g for g, s in enumerate(stats) if s.min.hex() <= hi and s.max.hex() >= lo]
        entries = f.read_row_groups(groups, use_threads=False).cast(ENTRY)
    keys = as_bytes(entries["key"])
    a, b = int(np.searchsorted(keys, _bytes(lo))), int(np.searchsorted(keys, _bytes(hi), "right"))
    return entries.slice(a, b - a)
