"""Ray Data's part of training: rows are read and pictures decoded on the cluster's CPUs, ahead of the workers that train.

Ray Train asks `Feed.steps` for the dataset whenever it starts a group of workers, and `Feed.configure` for each worker's share. The dataset is
the optimizer steps to come, from the last committed checkpoint on; a worker's share is its slice of the global batch of each of them. So a
resumed run goes on with the next batch, on any number of workers. Ray's own streaming split deals blocks, not slices, to whoever has fewest
rows: its batches are the same only as long as every block is one slice. Here order alone counts, which `preserve_order` keeps.

docs/decisions/0003-training-input.md has the measurements behind what is done here and what in the workers' collate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from ray.data import DataIterator, Dataset, ExecutionOptions, ExecutionResources, TaskPoolStrategy
from ray.train import DataConfig

from mulcot_ray.errors import RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.records import Post, Rationale, Reason, from_row, to_table
from mulcot_ray.storage import Store
from mulcot_ray.training.data import Order, batch

ROWS_PER_TASK = 64  # about; 0.3 s of work on real pictures
TASKS = 4096  # at most, however long the run is
AT_ONCE = 2  # tasks for each worker
CPUS = 0.5  # of a task
AHEAD_BYTES = 256 << 20  # rows that wait in the object store for one worker


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: which it is, what it holds, and its picture of the contract's size (where it is wanted); or why it cannot be used."""

    number: int
    post: Post
    rationale: Rationale | None
    picture: Image.Image | None
    fault: RowFault | None = None


class Feed(DataConfig):
    """The training input of a run that Ray Train keeps under `work` of the store, for up to so many workers."""

    def __init__(self, order: Order, store: Store, work: str, workers: int) -> None:
        options = ExecutionOptions(preserve_order=True, resource_limits=ExecutionResources(object_store_memory=AHEAD_BYTES))
        super().__init__(execution_options=options, enable_shard_locality=False)
        self.order, self.store, self.work, self.workers = order, store, work, workers

    def steps(self) -> Dataset:
        """The steps that no committed checkpoint covers, a row each; a block of them is a task for each worker."""
        import ray.data

        to_come = range(committed_step(self.store, self.work), self.order.total)
        each = max(-(-ROWS_PER_TASK * self.workers // self.order.global_batch), -(-len(to_come) // TASKS))
        return ray.data.from_items([{"step": s} for s in to_come], override_num_blocks=max(1, len(to_come) // each))

    def configure(
        self, datasets: dict[str, Dataset], world_size: int, worker_handles: Any, worker_node_ids: Any, **kwargs: Any
    ) -> list[dict[str, DataIterator]]:
        """For each worker, every dataset as the rows of its slices."""
        found: list[dict[str, DataIterator]] = [{} for _ in range(world_size)]
        for name, to_come in datasets.items():
            for rank in range(world_size):
                read = partial(rows_of_steps, order=self.order, rank=rank, world=world_size)
                share = to_come.map_batches(read, batch_size=None, num_cpus=CPUS, compute=TaskPoolStrategy(size=AT_ONCE))
                share.context.execution_options = self._resolve_execution_options(name)
                share.context.enable_progress_bars = False
                found[rank][name] = share.iterator()
        return found


def committed_step(store: Store, work: str) -> int:
    """The step of the checkpoint from which Ray Train will resume, by its own record; 0 where there is none."""
    record = store.read(f"{work}/checkpoint_manager_snapshot.json")
    latest = json.loads(record)["latest_checkpoint_result"] if record else None
    return int(latest["metrics"]["step"]) if latest else 0


# --- what a task sends and a worker gets -----------------------------------------------------------------------------

_EXTRA = pa.schema([("step", pa.int32()), ("number", pa.int32()), ("pixels", pa.binary()), ("reason", pa.string()), ("detail", pa.string())])
_RATIONALE = pa.schema([f.with_name(f"r_{f.name}") for f in Rationale.schema])


def rows_of_steps(block: dict[str, np.ndarray], *, order: Order, rank: int, world: int) -> Iterator[pa.Table]:
    """Read and decode a worker's rows of some steps; a table a step."""
    for step in (int(i) for i in block["step"]):
        numbers = batch(order.index, step, order.global_batch, order.seed, rank, world)
        yield pack([read_row(order, int(n)) for n in numbers], step)


def read_row(order: Order, number: int) -> Row:
    post, rationale = order.index.fetch(number)
    try:
        return Row(number, post, rationale, None if order.side is None else post_image(post, order.side))
    except RowFault as fault:
        return Row(number, post, rationale, None, fault)


def pack(rows: list[Row], step: int) -> pa.Table:
    """Rows of one step as a table. The picture goes as it was decoded, three bytes a pixel; the compressed one stays behind."""
    posts = to_table(Post, [replace(r.post, image_bytes=r.post.image_bytes and b"-") for r in rows])  # there is one, says that to the prompt
    bare = [{} if r.rationale is None else r.rationale.row() for r in rows]
    rationales = pa.table([pa.array([b.get(f.name.removeprefix("r_")) for b in bare], f.type) for f in _RATIONALE], schema=_RATIONALE)
    extra = [
        (step, r.number, None if r.picture is None else r.picture.tobytes(), r.fault and r.fault.reason, r.fault and r.fault.detail) for r in rows
    ]
    columns = [pa.array(c, f.type) for c, f in zip(zip(*extra, strict=True), _EXTRA, strict=True)]
    return pa.table([*posts.columns, *rationales.columns, *columns], schema=pa.schema([*posts.schema, *_RATIONALE, *_EXTRA]))


def unpack(table: pa.Table, side: int) -> tuple[list[int], list[Row]]:
    """The steps of the rows, and the rows."""
    found = []
    for row in table.to_pylist():
        rationale = None if row["r_post_id"] is None else from_row(Rationale, {k[2:]: v for k, v in row.items() if k.startswith("r_")})
        fault = None if row["reason"] is None else RowFault(Reason(row["reason"]), row["detail"])
        picture = None if row["pixels"] is None else Image.frombytes("RGB", (side, side), row["pixels"])
        found.append(Row(row["number"], from_row(Post, row), rationale, picture, fault))
    return table["step"].to_pylist(), found
