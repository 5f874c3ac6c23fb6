"""Training rows: which post goes with which rationale, in an order that depends on the seed alone.

The index (four integers a row) is held in memory, the rows are not: a worker reads the parts that it needs and keeps a few.
Order: one permutation of all rows per epoch, cut into global batches; worker r of w takes the r-th slice of each batch. So the
batches are the same whatever the number of workers, and a run resumes at any step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import TrainingError
from mulcot_ray.records import Post, Rationale, Split, from_row
from mulcot_ray.storage import Store

OPEN_PARTS = 16


@dataclass(frozen=True)
class Index:
    """Rows of a split: `rows` int32 [n, 4] = post file, post row, rationale file (-1: none), rationale row. Pickles."""

    store: Store
    files: tuple[str, ...]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, i: int) -> tuple[Post, Rationale | None]:
        pf, pr, rf, rr = (int(x) for x in self.rows[i])
        post = from_row(Post, _part(self.store, self.files[pf]).slice(pr, 1).to_pylist()[0])
        return post, None if rf < 0 else from_row(Rationale, _part(self.store, self.files[rf]).slice(rr, 1).to_pylist()[0])


def index(store: Store, posts: Manifest, split: Split, rationales: list[Manifest] | None) -> Index:
    """Labelled posts of a split; with `rationales`, one row for each of their rows (a post may have one of each kind)."""
    files: list[str] = []
    where: dict[str, tuple[int, int]] = {}
    for path in _parts(posts):
        table = pq.read_table(store.path(path), columns=["post_id", "split", "label"], filesystem=store.fs)
        for row, (pid, s, y) in enumerate(zip(*(table[c].to_pylist() for c in ("post_id", "split", "label")), strict=True)):
            if s == split and y is not None:
                where[pid] = (len(files), row)
        files.append(path)
    if rationales is None:
        rows = [(*at, -1, -1) for at in where.values()]
    else:
        rows = []
        for m in rationales:
            for path in _parts(m):
                ids = pq.read_table(store.path(path), columns=["post_id"], filesystem=store.fs)["post_id"].to_pylist()
                rows += [(*where[pid], len(files), row) for row, pid in enumerate(ids) if pid in where]
                files.append(path)
    if not rows:
        what = f" with a rationale in {', '.join(m.name for m in rationales)}" if rationales else ""
        raise TrainingError(f"posts {posts.name!r} has no labelled post of split {split}{what}")
    return Index(store, tuple(files), np.array(rows, np.int32))


def steps(rows: int, epochs: int, global_batch: int) -> int:
    """Optimizer steps: every epoch's rows in turn; what is left of the last one does not fill a batch."""
    return rows * epochs // global_batch


def batches(rows: int, epochs: int, global_batch: int, seed: int, rank: int, world: int, start: int) -> Iterator[np.ndarray]:
    """Row numbers of this worker's slice of each global batch, from step `start` on. `global_batch` divides by `world`."""
    local = global_batch // world
    for step in range(start, steps(rows, epochs, global_batch)):
        at = np.arange(local) + step * global_batch + rank * local
        yield np.array([_permutation(rows, seed, int(p) // rows)[int(p) % rows] for p in at])


@lru_cache(maxsize=2)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(rows)


@lru_cache(maxsize=OPEN_PARTS)
def _read_part(root: str, path: str) -> pa.Table:
    store = Store(root)
    return pq.read_table(store.path(path), filesystem=store.fs)


def _part(store: Store, path: str) -> pa.Table:
    return _read_part(store.root if store.is_s3 else store.base, path)


def _parts(m: Manifest) -> list[str]:
    return [f"{m.kind}/{m.name}/{f}" for f in m.parts()]


def row_key(**values: Any) -> int:
    """A seed from named integers, stable between processes."""
    return int(np.random.SeedSequence([int(v) for v in values.values()]).generate_state(1)[0])
