"""Training rows: which post goes with which rationale, and in which order, which depends on the seed alone.

The index is held in memory (five integers a row), the rows are not: readers keep what they decoded last, CACHE_BYTES of it. Every
epoch has one permutation of all rows, and the epochs' rows, one after the other, are cut into global batches; worker r of w takes the
r-th slice of each. So the batches are the same whatever the number of workers, and a run goes on at any step.

Parquet is read by row groups (256 posts that were imported), not by rows. Where the groups of a corpus do not fit into WINDOW_BYTES, the permutation
is of windows: the groups are shuffled, as many as fit make a window, and rows are shuffled within it. Each group is then read about once an
epoch by each reader, instead of once for almost every row. Posts of Twitter-2015 (49 kB with their pictures) fill a window by 5,000; all of
its training split is one window.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import TrainingError
from mulcot_ray.prompts import digest
from mulcot_ray.records import Post, Rationale, Split, from_row
from mulcot_ray.storage import Store

CACHE_BYTES = 512 << 20  # of decoded row groups in one process; one group is kept even if it is larger
WINDOW_BYTES = 256 << 20  # of posts, as Parquet says it


@dataclass(frozen=True, eq=False)
class Index:
    """Rows of a split: `rows` int32 [n, 5] = post file, post row, rationale file (-1: none), rationale row, post row group. Pickles.

    `name` stands for the content: two of one name are equal. `starts[f]` are the first rows of the row groups of file f; `sizes` int64
    [groups], bytes by the numbers in the last column of `rows`.
    """

    name: str
    store: Store
    files: tuple[str, ...]
    starts: tuple[tuple[int, ...], ...]
    rows: np.ndarray
    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def fetch(self, i: int) -> tuple[Post, Rationale | None]:
        pf, pr, rf, rr, _ = (int(x) for x in self.rows[i])
        return from_row(Post, self._row(pf, pr)), None if rf < 0 else from_row(Rationale, self._row(rf, rr))

    def _row(self, file: int, row: int) -> dict[str, Any]:
        group = int(np.searchsorted(self.starts[file], row, "right")) - 1
        table = GROUPS.get(self.store, self.files[file], group)
        found: dict[str, Any] = table.slice(row - self.starts[file][group], 1).to_pylist()[0]
        return found


def index(store: Store, posts: Manifest, split: Split, rationales: list[Manifest] | None) -> Index:
    """Labelled posts of a split; with `rationales`, one row for each of their rows (a post may have one of each kind).

    Holds the ids of the split's posts in memory while it is made, some 150 bytes a post.
    """
    files: list[str] = []
    starts: list[tuple[int, ...]] = []
    sizes: list[int] = []
    where: dict[str, tuple[int, int, int]] = {}
    for path in _parts(posts):
        with store.parquet(path) as f:
            first = _starts(f)
            table = f.read(columns=["post_id", "split", "label"])
            groups = [len(sizes) + int(g) for g in np.searchsorted(first, np.arange(len(table)), "right") - 1]
            sizes += [f.metadata.row_group(g).total_byte_size for g in range(f.metadata.num_row_groups)]
        for row, (pid, s, y) in enumerate(zip(*(table[c].to_pylist() for c in ("post_id", "split", "label")), strict=True)):
            if s == split and y is not None:
                where[pid] = (len(files), row, groups[row])
        files.append(path)
        starts.append(first)
    rows: list[tuple[int, ...]] = []
    if rationales is None:
        rows = [(file, row, -1, -1, group) for file, row, group in where.values()]
    for m in rationales or ():
        for path in _parts(m):
            with store.parquet(path) as f:
                starts.append(_starts(f))
                ids = f.read(columns=["post_id"])["post_id"].to_pylist()
            for row, pid in enumerate(ids):
                if pid in where:
                    file, at, group = where[pid]
                    rows.append((file, at, len(files), row, group))
            files.append(path)
    if not rows:
        what = f" with a rationale in {', '.join(m.name for m in rationales)}" if rationales else ""
        raise TrainingError(f"posts {posts.name!r} has no labelled post of split {split}{what}")
    name = digest([posts.fingerprint, split, [m.fingerprint for m in rationales or ()]])
    return Index(name, store, tuple(files), tuple(starts), np.array(rows, np.int32), np.array(sizes, np.int64))


# --- the order -------------------------------------------------------------------------------------------------------


def steps(rows: int, epochs: int, global_batch: int) -> int:
    """Optimizer steps: every epoch's rows in turn; what is left of the last one does not fill a batch."""
    return rows * epochs // global_batch


@dataclass(frozen=True)
class Order:
    """What decides the batches. `side`: pixels of a prepared picture; None: pictures are not decoded, their features are kept."""

    index: Index
    epochs: int
    global_batch: int
    seed: int
    side: int | None

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run."""
        return steps(len(self.index), self.epochs, self.global_batch)


def batch(ix: Index, step: int, global_batch: int, seed: int, rank: int, world: int) -> np.ndarray:
    """Row numbers of a worker's slice of the global batch of a step (from 0). `global_batch` divides by `world`."""
    local = global_batch // world
    at = np.arange(local) + step * global_batch + rank * local
    return np.array([permutation(ix, seed, int(p) // len(ix))[int(p) % len(ix)] for p in at])


@lru_cache(maxsize=4)
def permutation(ix: Index, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's rows: of all of them, or window by window (see the module's docstring)."""
    rng = np.random.default_rng((seed, epoch))
    group = ix.rows[:, 4]
    used = np.unique(group)
    if ix.sizes[used].sum() <= WINDOW_BYTES:
        return rng.permutation(len(ix))
    place = np.empty(len(ix.sizes), np.int64)  # group -> its window
    window, filled = 0, 0
    for g in rng.permutation(used):
        if filled and filled + ix.sizes[g] > WINDOW_BYTES:
            window, filled = window + 1, 0
        place[g] = window
        filled += ix.sizes[g]
    return np.lexsort((rng.random(len(ix)), place[group]))


def row_key(**values: Any) -> int:
    """A seed from named integers, stable between processes."""
    return int(np.random.SeedSequence([int(v) for v in values.values()]).generate_state(1)[0])


# --- reading ---------------------------------------------------------------------------------------------------------


class _Groups:
    """Row groups that were read last, up to a number of bytes. One for a process; its threads may share it."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = limit, 0
        self.tables: OrderedDict[tuple[str, str, int], pa.Table] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, store: Store, path: str, group: int) -> pa.Table:
        key = (store.base, path, group)
        with self.lock:
            if key not in self.tables:
                with store.parquet(path) as f:
                    self.tables[key] = f.read_row_group(group)
                self.held += self.tables[key].nbytes
                while self.held > self.limit and len(self.tables) > 1:
                    self.held -= self.tables.popitem(last=False)[1].nbytes
            self.tables.move_to_end(key)
            return self.tables[key]


GROUPS = _Groups(CACHE_BYTES)


def _starts(f: pq.ParquetFile) -> tuple[int, ...]:
    rows = [f.metadata.row_group(g).num_rows for g in range(f.metadata.num_row_groups)]
    return tuple(int(x) for x in np.cumsum([0, *rows[:-1]]))


def _parts(m: Manifest) -> Iterator[str]:
    return (f"{m.kind}/{m.name}/{f}" for f in m.parts())
