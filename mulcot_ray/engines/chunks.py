"""Work through a posts table in chunks: Ray Data hands chunks to actors, each with an engine; an actor commits a chunk whole.

A chunk is a row range of one part of the posts table, cut the same way on every attempt. Its rows are asked concurrently (vLLM
batches them continuously, several chunks at once), its rejects are written, then its part is *created*: that is the commit. After a
kill, chunks whose part exists are skipped; a chunk in flight is done again. Rows of a chunk = rows of its part + its rejects.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow.parquet as pq
from PIL import Image

from mulcot_ray.artifacts import Manifest, Run, parquet_bytes
from mulcot_ray.cluster import log_folder, own_error, session
from mulcot_ray.engines.base import Engine, EngineSpec, open_engine
from mulcot_ray.errors import ConservationError, EngineError, InputError, RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Post, Prediction, Rationale, Reject, Split, from_row, to_table
from mulcot_ray.storage import Store

IN_FLIGHT = 3  # chunks an actor works on at once: the tail of one is filled by the next


class Work(Protocol):
    """What is done with one post. Raises RowFault where the row is at fault. Must pickle."""

    kind: ClassVar[type[Rationale] | type[Prediction]]

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Rationale | Prediction: ...


@dataclass(frozen=True)
class Chunk:
    """Rows lo to hi (exclusive) of one file of the posts table."""

    file: str
    lo: int
    hi: int

    @property
    def part(self) -> str:
        return f"part-{self.file.removeprefix('part-').removesuffix('.parquet')}-{self.lo:08d}"


Progress = Callable[[int, int, int], None]  # rows done, rows in all, rejects


def plan(posts: Manifest, rows_per_chunk: int) -> list[Chunk]:
    files = {f: info["rows"] for f, info in posts.files.items() if f.endswith(".parquet") and not f.startswith("rejects/")}
    return [Chunk(f, lo, min(lo + rows_per_chunk, n)) for f, n in files.items() for lo in range(0, n, rows_per_chunk)]


def run_chunks(run: Run, posts: Manifest, split: Split | None, spec: EngineSpec, work: Work, runtime: Runtime, progress: Progress) -> int:
    """Do what is not yet done, and return how many rows the table has in `split` (None: all). Parts and rejects land under `run`.

    Raises EngineError when the engine cannot start or keeps dying, InputError when there is nothing to do.
    """
    import ray.data

    total = posts.rows if split is None else int(posts.stats["splits"].get(split, 0))
    if total == 0:
        raise InputError(f"posts {posts.name!r} has no rows in split {split!r}; there are {posts.stats['splits']}")
    chunks = plan(posts, int(run.plan["rows_per_chunk"]))
    there = run.store.files(run.prefix)
    todo = [c for c in chunks if f"{c.part}.parquet" not in there]
    done, rejects = 0, 0
    if len(todo) < len(chunks):
        for c in chunks:
            if f"{c.part}.parquet" in there:
                counts = pq.read_metadata(run.store.path(f"{run.prefix}/{c.part}.parquet"), filesystem=run.store.fs).metadata or {}
                done, rejects = done + int(counts[b"rows_in"]), rejects + int(counts[b"rejects"])
    progress(done, total, rejects)
    if not todo:
        return total
    lo, hi = runtime_replicas(spec, len(todo))
    with session(runtime):
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        # An actor that cannot start must end the run with its reason, not be tried for ever.
        rows = [{"file": c.file, "lo": c.lo, "hi": c.hi} for c in todo]
        gpus = spec.runtime.tensor_parallel * spec.runtime.pipeline_parallel if spec.device == "cuda" and spec.backend == "vllm" else 0
        results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            ChunkWorker,
            fn_constructor_args=(run.store, f"{posts.kind}/{posts.name}", run.prefix, run.identity["stage"], split, spec, work),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=lo, max_size=hi, max_tasks_in_flight_per_actor=IN_FLIGHT, max_concurrent_calls_per_actor=IN_FLIGHT
            ),
            num_cpus=spec.runtime.cpus,
            num_gpus=gpus,
            max_restarts=2,  # a row that kills its worker each time must not be tried for ever
            max_task_retries=2,
        )
        try:
            for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                done, rejects = done + int(sum(batch["rows"])), rejects + int(sum(batch["rejects"]))
                progress(done, total, rejects)
        except Exception as e:
            raise own_error(e) or EngineError(f"the workers failed: {type(e).__name__}. Logs: {log_folder()}") from e
    if done != total:
        raise ConservationError(f"{run.prefix}: {total} rows planned, {done} accounted for. Nothing is published; please report this.")
    return total


class ChunkWorker:
    """The Ray Data actor: one engine, several chunks at a time."""

    def __init__(self, store: Store, source: str, target: str, stage: str, split: Split | None, spec: EngineSpec, work: Work) -> None:
        self.store, self.source, self.target, self.stage, self.split, self.work = store, source, target, stage, split, work
        self.side = spec.contract.image.side
        self.engine = open_engine(spec)
        # Enough rows in flight to fill the engine's batch and its queue, few enough that decoded pictures stay few.
        self.limit = asyncio.Semaphore(2 * spec.runtime.max_num_seqs)

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        counts: dict[str, list[int]] = {"rows": [], "rejects": []}
        for file, lo, hi in zip(batch["file"], batch["lo"], batch["hi"], strict=True):
            rows, rejects = await self._chunk(Chunk(str(file), int(lo), int(hi)))
            counts["rows"].append(rows)
            counts["rejects"].append(rejects)
        return counts

    async def _chunk(self, chunk: Chunk) -> tuple[int, int]:
        started = time.time()
        posts = await asyncio.to_thread(self._read, chunk)
        results = await asyncio.gather(*(self._row(p) for p in posts))
        kept = [r for r in results if not isinstance(r, Reject)]
        rejected = [r for r in results if isinstance(r, Reject)]
        facts = {"rows_in": len(posts), "rejects": len(rejected), "seconds": round(time.time() - started, 3)}
        await asyncio.to_thread(self._commit, chunk, kept, rejected, facts)
        return len(posts), len(rejected)

    async def _row(self, post: Post) -> Rationale | Prediction | Reject:
        async with self.limit:
            try:
                image = await asyncio.to_thread(post_image, post, self.side)
                return await self.work(self.engine, post, image)
            except RowFault as f:
                return Reject(post.post_id, self.stage, f.reason, f.detail, f.raw)

    def _read(self, chunk: Chunk) -> list[Post]:
        """The chunk's rows, from the row groups that hold them; other splits' rows are passed over."""
        posts, at = [], 0
        with pq.ParquetFile(self.store.path(f"{self.source}/{chunk.file}"), filesystem=self.store.fs) as f:
            for group in range(f.metadata.num_row_groups):
                n = f.metadata.row_group(group).num_rows
                if at < chunk.hi and at + n > chunk.lo:
                    table = f.read_row_group(group)
                    table = table.slice(max(0, chunk.lo - at), min(n, chunk.hi - at) - max(0, chunk.lo - at))
                    posts += [from_row(Post, r) for r in table.to_pylist()]
                at += n
        return [p for p in posts if self.split is None or p.split is self.split]

    def _commit(self, chunk: Chunk, kept: list[Any], rejected: list[Reject], facts: dict[str, Any]) -> None:
        key = f"{self.target}/rejects/{chunk.part}.parquet"
        if rejected:
            self.store.write(key, parquet_bytes(to_table(Reject, rejected)))
        else:
            self.store.delete(key)  # an earlier attempt at this chunk may have died after writing some
        table = to_table(self.work.kind, kept).replace_schema_metadata({k: str(v) for k, v in facts.items()})
        self.store.create(f"{self.target}/{chunk.part}.parquet", parquet_bytes(table))


def runtime_replicas(spec: EngineSpec, chunks: int) -> tuple[int, int]:
    r = spec.runtime.replicas
    lo, hi = (r, r) if isinstance(r, int) else r
    hi = max(1, min(hi, chunks))
    return min(lo, hi), hi
