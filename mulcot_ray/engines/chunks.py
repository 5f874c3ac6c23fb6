"""Work through a posts table in chunks: Ray Data hands chunks to actors, each with an engine; an actor commits a chunk whole.

A chunk is a row range of one part of the posts table, cut the same way on every attempt. Its rows are asked concurrently (vLLM
batches them continuously, several chunks at once), its rejects are written, then its part is *created*: that is the commit. After a
kill, chunks whose part exists are skipped; a chunk in flight is done again, and finds the answers that it had already paid for
(engines/answers.py). Rows of a chunk = rows of its part + its rejects. A part names the file of its rejects, so that no two attempts at a
chunk can mix.

An engine that dies is opened again and the chunk repeated. A chunk that was begun twice without an end is done *carefully*: alone, a row
at a time, each written down before it is asked. A row that is found twice at the scene is the killer, and becomes a reject.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import pyarrow.parquet as pq
from PIL import Image

from mulcot_ray.artifacts import Manifest, Run, parquet_bytes
from mulcot_ray.cluster import log_folder, own_error, session
from mulcot_ray.console import about, log_in_worker
from mulcot_ray.engines.answers import Answers
from mulcot_ray.engines.base import Completion, Engine, EngineSpec, Messages, Sampling, Scores, open_engine
from mulcot_ray.engines.pace import DEFER, PLAIN, Pace
from mulcot_ray.engines.sizing import sequences
from mulcot_ray.errors import ConservationError, EngineError, InputError, RowFault
from mulcot_ray.observing import RESTARTS, Meter, Watch, add
from mulcot_ray.posts.images import post_image
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Post, Prediction, Rationale, Reason, Reject, Split, from_row, to_table
from mulcot_ray.storage import Store

IN_FLIGHT = 3  # chunks an actor works on at once: the tail of one is filled by the next
CAREFUL = 3  # the attempt at a chunk from which on it is done a row at a time
LIVES = 8  # attempts that one actor gives a chunk; a killer row is found in the fifth
TALLY, REJECTS = b"mulcot", b"mulcot.rejects"  # keys in a part's Parquet metadata: its counts, and the name of the file of its rejects
THREADS = 32  # per actor, for reading, decoding and the answer cache: they wait more than they work
log = logging.getLogger(__name__)


class Work(Protocol):
    """What is done with one post. Raises RowFault where the row is at fault. Must pickle."""

    kind: ClassVar[type[Rationale] | type[Prediction]]

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Any:
        """A record of `kind`."""

    def tally(self, post: Post, result: Any) -> Iterable[str]:
        """Names of the counters that go up by one for this row; `result` may be a Reject."""

    def plain(self) -> Work:
        """The same without what can be left out when time or money is short."""


@dataclass(frozen=True)
class Source:
    """A table of posts, somewhere under the root: its Parquet files with their rows, and how many of them are to be asked."""

    prefix: str
    files: Mapping[str, int]
    total: int


def source_of(posts: Manifest, split: Split | None) -> Source:
    """A finished posts table. Raises InputError where the split has no rows."""
    total = posts.rows if split is None else int(posts.stats["splits"].get(split, 0))
    if total == 0:
        raise InputError(f"posts {posts.name!r} has no rows in split {split!r}; there are {posts.stats['splits']}")
    return Source(f"{posts.kind}/{posts.name}", posts.sizes, total)


@dataclass(frozen=True)
class Target:
    """Where parts and rejects go. `owner` tells this run of the stage from the ones before it."""

    store: Store
    prefix: str
    stage: str
    owner: str
    rows_per_chunk: int

    @property
    def run(self) -> str:
        """The result that this is for, in logs and metrics."""
        return self.prefix.partition("/work/")[0]

    @property
    def role(self) -> str:
        """Who answers, where several do one after the other (labeling/scoring.py has a folder for each); empty elsewhere."""
        return self.prefix.partition("/work/")[2]


def target_of(run: Run) -> Target:
    return Target(run.store, run.prefix, run.identity["stage"], run.owner, int(run.plan["rows_per_chunk"]))


@dataclass(frozen=True)
class Chunk:
    """Rows lo to hi (exclusive) of one file of the posts table."""

    file: str
    lo: int
    hi: int

    @property
    def part(self) -> str:
        return f"part-{self.file.removeprefix('part-').removesuffix('.parquet')}-{self.lo:08d}"


@dataclass(frozen=True)
class Selection:
    """Which rows are asked. `redo` (a finished table of the same plan): only its rejects; what it kept is taken over.

    `apart` (a duplicates table): not those that get their representative's rationale.
    """

    split: Split | None = None
    redo: Manifest | None = None
    apart: Manifest | None = None


Progress = Callable[[int, int, int], None]  # rows done, rows in all, rejects


def plan(files: Mapping[str, int], rows_per_chunk: int) -> list[Chunk]:
    """The chunks of files with so many rows each."""
    return [Chunk(f, lo, min(lo + rows_per_chunk, n)) for f, n in files.items() for lo in range(0, n, rows_per_chunk)]


def run_chunks(
    target: Target, source: Source, chosen: Selection, spec: EngineSpec, work: Work, runtime: Runtime, progress: Progress, pace: Pace | None = None
) -> Counter[str]:
    """Do what is not yet done. Returns the summed counts of all chunks, `rows_in` and `rejects` among them; `deferred` are rows for which
    the pace left no time or money: they have no part, and the same call again asks them.

    Raises EngineError when the engine cannot start or keeps dying.
    """
    import ray.data

    store, total = target.store, source.total - _apart(target.store, chosen)
    chunks = plan(source.files, target.rows_per_chunk)
    there = store.files(target.prefix)
    todo = [c for c in chunks if f"{c.part}.parquet" not in there]
    tally, named = Counter[str](), set[str]()
    for commit in read_commits(store, [f"{target.prefix}/{c.part}.parquet" for c in chunks if f"{c.part}.parquet" in there]):
        tally.update(commit.tally)
        named.add(commit.rejects)
    progress(tally["rows_in"], total, tally["rejects"])
    if todo:
        lo, hi = runtime_replicas(spec, len(todo))
        brake = f"{target.prefix}/attempts/{target.owner}/brake"
        purse = pace or _purse(spec)
        before = purse.spent if purse is not None else 0.0
        if purse is not None and (word := purse.begin(spec, tally["rows_in"], total)):
            store.write(brake, word)
        with session(runtime), about(run=target.run, stage=target.stage, role=target.role):
            watch = Watch(target.run, target.stage, target.role)
            watch.rows(tally["rows_in"], total)
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            rows = [{"file": c.file, "lo": c.lo, "hi": c.hi} for c in todo]
            gpus = spec.runtime.devices if spec.device == "cuda" and spec.backend != "endpoint" else 0
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                ChunkWorker,
                fn_constructor_args=(target, source.prefix, chosen, spec, work, runtime.answer_cache, brake),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    # All GPU replicas are asked for at once: Ray Data adds them one by one, and with real machines that is minutes each.
                    # It adds any only where more tasks are in flight than are worked on.
                    min_size=hi if gpus else lo,
                    max_size=hi,
                    max_tasks_in_flight_per_actor=2 * IN_FLIGHT,
                    max_concurrent_calls_per_actor=IN_FLIGHT,
                ),
                num_cpus=spec.runtime.cpus,
                num_gpus=gpus,
                max_restarts=LIVES,
                max_task_retries=LIVES,
            )
            try:
                for batch in results.iter_batches(batch_size=None, prefetch_batches=0):
                    for counts, rejects in zip(batch["tally"], batch["rejects"], strict=True):
                        tally.update(json.loads(counts))
                        named.add(str(rejects))
                    progress(tally["rows_in"] + tally["deferred"], total, tally["rejects"])
                    if purse is not None and (word := purse.look(tally["rows_in"], total, hi)):
                        store.write(brake, word)
                    watch.rows(tally["rows_in"] + tally["deferred"], total)
                    watch.usd(purse.spent - before if purse is not None else 0.0)
            except Exception as e:
                raise own_error(e) or EngineError(f"the workers failed: {type(e).__name__}. Logs: {log_folder()}") from e
    if tally["rows_in"] + tally["deferred"] != total:
        raise ConservationError(f"{target.prefix}: {total} rows planned, {tally['rows_in']} accounted for. Nothing is published; please report this.")
    for name in store.files(f"{target.prefix}/attempts"):
        store.delete(f"{target.prefix}/attempts/{name}")
    ours = {c.part for c in chunks}
    for name in store.files(f"{target.prefix}/rejects"):  # what attempts left that did not commit
        if name.partition(".")[0] in ours and name not in named:
            store.delete(f"{target.prefix}/rejects/{name}")
    return tally


@dataclass(frozen=True)
class Commit:
    """What a part was committed with: its counts, and the file of its rejects ("" where it has none)."""

    tally: Counter[str]
    rejects: str


def read_commits(store: Store, keys: list[str]) -> list[Commit]:
    """Of each part the Parquet footer is read."""

    def read(key: str) -> Commit:
        found = pq.read_metadata(store.path(key), filesystem=store.fs).metadata or {}
        return Commit(Counter(json.loads(found[TALLY])), found[REJECTS].decode())

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, keys))


def commit_part(store: Store, target: str, part: str, kind: Any, kept: list[Any], rejected: list[Reject], tally: Counter[str]) -> Commit:
    """Rejects first, under a name of their content, then the part that names them: creating it is the commit. Returns what stands."""
    name = ""
    if rejected:
        data = parquet_bytes(to_table(Reject, rejected))
        name = f"{part}.{hashlib.sha256(data).hexdigest()[:12]}.parquet"
        store.create(f"{target}/rejects/{name}", data)
    table = to_table(kind, kept).replace_schema_metadata({TALLY: json.dumps(tally), REJECTS: name})
    key = f"{target}/{part}.parquet"
    return Commit(tally, name) if store.create(key, parquet_bytes(table)) else read_commits(store, [key])[0]


def _purse(spec: EngineSpec) -> Pace | None:
    """Adds up what a run without limits costs. None: the price table does not know its machines."""
    found = Pace()
    return found if spec.runtime.accelerator in found.prices.accelerators else None


def _apart(store: Store, chosen: Selection) -> int:
    """How many rows of the split are left to their representatives."""
    if chosen.apart is None:
        return 0
    count = 0
    for name in chosen.apart.parts():
        rows = pq.read_table(store.path(f"duplicates/{chosen.apart.name}/{name}"), columns=["split", "label", "rep_label"], filesystem=store.fs)
        count += sum(r["label"] == r["rep_label"] and chosen.split in (None, r["split"]) for r in rows.to_pylist())
    return count


class ChunkWorker:
    """The Ray Data actor: one engine, several chunks at a time."""

    def __init__(self, target: Target, source: str, chosen: Selection, spec: EngineSpec, work: Work, cache: bool, brake: str) -> None:
        log_in_worker(run=target.run, stage=target.stage, role=target.role)
        self.store, self.target, self.stage, self.role = target.store, target.prefix, target.stage, target.role
        self.attempts = f"{target.prefix}/attempts/{target.owner}"
        self.source, self.chosen, self.work, self.brake = source, chosen, work, brake
        self.spec, self.side = spec, spec.contract.image.side
        self.engine = _Reopening(spec)
        self.cache = target.store if cache else None
        # Enough rows in flight to fill the engine's batch and its queue, few enough that decoded pictures stay few.
        self.places = 2 * sequences(spec)
        self.limit = asyncio.Semaphore(self.places)
        self.alone = asyncio.Lock()
        self.pool: ThreadPoolExecutor | None = None

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.pool is None:
            self.pool = ThreadPoolExecutor(THREADS, "chunk")
            asyncio.get_running_loop().set_default_executor(self.pool)
        done = []
        for f, lo, hi in zip(batch["file"], batch["lo"], batch["hi"], strict=True):
            chunk = Chunk(str(f), int(lo), int(hi))
            with about(chunk=chunk.part):
                done.append(await self._chunk(chunk))
        return {"tally": [json.dumps(c.tally) for c in done], "rejects": [c.rejects for c in done]}

    async def _chunk(self, chunk: Chunk) -> Commit:
        started = time.time()
        word = await asyncio.to_thread(self.store.read, self.brake)
        posts, kept = await asyncio.to_thread(self._read, chunk)
        engine = Answers(self.engine, self.spec, self.cache)
        meter = Meter(self.stage, self.role, engine.tally)
        if word == DEFER:
            meter.row("deferred", len(posts))
            meter.tell()
            return Commit(Counter(deferred=len(posts)), "")
        work = self.work.plain() if word == PLAIN else self.work
        asked = [p for p in posts if p.post_id not in kept]
        for life in range(LIVES):
            attempt = await asyncio.to_thread(self._begin, chunk)
            alive = self.engine.generation
            try:
                results = await (
                    self._at_once(engine, work, asked, meter) if attempt < CAREFUL else self._carefully(engine, work, chunk, asked, meter)
                )
                break
            except EngineError as e:
                if self.engine.shut is not None or life == LIVES - 1:
                    raise
                if await self.engine.replace(alive):
                    log.warning("attempt %d: the engine died and is opened again: %s", attempt, e)
                    add(RESTARTS, 1, stage=self.stage, role=self.role)
        found = kept | {p.post_id: r for p, r in zip(asked, results, strict=True)}
        rejected = [r for r in found.values() if isinstance(r, Reject)]
        tally = Counter[str](rows_in=len(posts), rejects=len(rejected), milliseconds=round((time.time() - started) * 1000))
        tally.update(engine.tally)
        for post in posts:
            tally.update(work.tally(post, found[post.post_id]))
        rows = [r for r in (found[p.post_id] for p in posts) if not isinstance(r, Reject)]
        commit = await asyncio.to_thread(commit_part, self.store, self.target, chunk.part, work.kind, rows, rejected, tally)
        seconds = time.time() - started
        meter.done(seconds)
        log.info("%d rows, %d rejected, in %.1f s", len(posts), len(rejected), seconds)
        return commit

    async def _at_once(self, engine: Engine, work: Work, posts: list[Post], meter: Meter) -> list[Any]:
        results = await asyncio.gather(*(self._placed(engine, work, p, meter) for p in posts), return_exceptions=True)
        for r in results:
            if isinstance(r, BaseException):
                raise r
        return results

    async def _placed(self, engine: Engine, work: Work, post: Post, meter: Meter) -> Any:
        async with self.limit:
            return await self._row(engine, work, post, meter)

    async def _row(self, engine: Engine, work: Work, post: Post, meter: Meter) -> Any:
        try:
            image = await asyncio.to_thread(post_image, post, self.side) if post.has_image else None
            result = await work(engine, post, image)
        except RowFault as f:
            meter.row(f.reason)
            return Reject(post.post_id, self.stage, f.reason, f.detail, f.raw, f.attempts)
        meter.row()
        return result

    async def _carefully(self, engine: Engine, work: Work, chunk: Chunk, posts: list[Post], meter: Meter) -> list[Any]:
        """A row at a time, with no other row in the engine. The scene (which row is being asked) is written before each."""
        scene, record = f"{self.attempts}/{chunk.part}.scene", f"{self.attempts}/{chunk.part}.deaths"
        before = await asyncio.to_thread(self.store.read, record)
        deaths = Counter[str](json.loads(before or b"{}"))
        if (last := await asyncio.to_thread(self.store.read, scene)) is not None:
            deaths[last.decode()] += 1
            await asyncio.to_thread(self.store.write, record, json.dumps(deaths).encode())
            await asyncio.to_thread(self.store.delete, scene)
        results: list[Any] = []
        async with self.alone:
            for _ in range(self.places):
                await self.limit.acquire()
            try:
                for p in posts:
                    if deaths[p.post_id] > 1:
                        meter.row(Reason.ENGINE_ERROR)
                        results.append(Reject(p.post_id, self.stage, Reason.ENGINE_ERROR, "the engine died each time this row was asked, alone"))
                        continue
                    await asyncio.to_thread(self.store.write, scene, p.post_id.encode())
                    results.append(await self._row(engine, work, p, meter))
                await asyncio.to_thread(self.store.delete, scene)
            finally:
                for _ in range(self.places):
                    self.limit.release()
        return results

    def _begin(self, chunk: Chunk) -> int:
        """The number of this attempt at the chunk, from 1, within this run of the stage."""
        attempt = 1
        while not self.store.create(f"{self.attempts}/{chunk.part}.{attempt}", b""):
            attempt += 1
        return attempt

    def _read(self, chunk: Chunk) -> tuple[list[Post], dict[str, Any]]:
        """The chunk's chosen posts, and by id what an earlier table has kept of them."""
        posts, at = [], 0
        with pq.ParquetFile(self.store.path(f"{self.source}/{chunk.file}"), filesystem=self.store.fs) as f:
            for group in range(f.metadata.num_row_groups):
                n = f.metadata.row_group(group).num_rows
                if at < chunk.hi and at + n > chunk.lo:
                    table = f.read_row_group(group)
                    table = table.slice(max(0, chunk.lo - at), min(n, chunk.hi - at) - max(0, chunk.lo - at))
                    posts += [from_row(Post, r) for r in table.to_pylist()]
                at += n
        apart = self._apart_in(chunk)
        posts = [p for p in posts if p.post_id not in apart and (self.chosen.split is None or p.split is self.chosen.split)]
        if self.chosen.redo is None:
            return posts, {}
        old = pq.read_table(self.store.path(f"{self.chosen.redo.kind}/{self.chosen.redo.name}/{chunk.part}.parquet"), filesystem=self.store.fs)
        return posts, {r["post_id"]: from_row(self.work.kind, r) for r in old.to_pylist()}  # type: ignore[type-var]

    def _apart_in(self, chunk: Chunk) -> set[str]:
        """Ids of the chunk's rows that are left to their representatives."""
        if self.chosen.apart is None or chunk.file not in self.chosen.apart.files:
            return set()
        key = self.store.path(f"duplicates/{self.chosen.apart.name}/{chunk.file}")
        rows = pq.read_table(key, columns=["post_id", "row", "label", "rep_label"], filesystem=self.store.fs).to_pylist()
        return {r["post_id"] for r in rows if chunk.lo <= r["row"] < chunk.hi and r["label"] == r["rep_label"]}


class _Reopening:
    """The actor's engine: opened at the first question (a run that finds all answers kept loads no model), and again after a death."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.generation = 0
        self.shut: EngineError | None = None  # why it cannot be opened
        self._engine: Engine | None = None
        self._lock = asyncio.Lock()

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        return await (await self._open()).generate(messages, image, sampling)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        return await (await self._open()).score(messages, image, written)

    def check(self) -> None:
        if self._engine is not None:
            self._engine.check()

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    async def replace(self, generation: int) -> bool:
        """Drop the engine of this generation; the next question opens another. False: another chunk has done that."""
        async with self._lock:
            if generation != self.generation:
                return False
            self.generation += 1
            dead, self._engine = self._engine, None
            with contextlib.suppress(Exception):  # it is dead: what it says to that does not matter
                if dead is not None:
                    await asyncio.to_thread(dead.close)
            return True

    async def _open(self) -> Engine:
        if self._engine is not None:
            return self._engine
        async with self._lock:
            if self._engine is None:
                if self.shut is not None:
                    raise self.shut
                try:
                    self._engine = await asyncio.to_thread(open_engine, self.spec)
                except EngineError as e:
                    self.shut = e
                    raise
            return self._engine


def runtime_replicas(spec: EngineSpec, chunks: int) -> tuple[int, int]:
    """From–to. A range gives an engine to every 2 × IN_FLIGHT chunks at most: fewer would not be worth its start."""
    r = spec.runtime.replicas
    lo, hi = (r, r) if isinstance(r, int) else r
    lo = max(1, min(lo, chunks))
    return lo, max(lo, min(hi, chunks // (2 * IN_FLIGHT)) if lo < hi else lo)
