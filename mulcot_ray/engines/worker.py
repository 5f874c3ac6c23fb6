"""The Ray Data actor that works through chunks: one engine, several chunks at a time, each committed whole.

Rows of a chunk are asked concurrently (vLLM batches them continuously); rows of a chunk = rows of its part + its rejects. Answers that were
paid for before are found again (engines/answers.py).

An engine that dies is opened again and the chunk repeated. A chunk that was begun twice without an end is done *carefully*: alone, a row
at a time, each written down before it is asked. A row that is found twice at the scene is the killer, and becomes a reject.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from mulcot_ray.console import about, log_in_worker
from mulcot_ray.engines.answers import Answers
from mulcot_ray.engines.base import Completion, Engine, EngineSpec, Messages, Sampling, Scores, open_engine
from mulcot_ray.engines.pace import DEFER, PLAIN
from mulcot_ray.engines.scope import LIVES, Chunk, Selection, Target, Work
from mulcot_ray.engines.sizing import sequences
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.observing import RESTARTS, Meter, add
from mulcot_ray.parts import Commit, as_batch, commit_part
from mulcot_ray.posts.images import post_image
from mulcot_ray.records import Post, Reason, Reject, from_row, to_table

CAREFUL = 3  # the attempt at a chunk from which on it is done a row at a time
THREADS = 32  # per actor, for reading, decoding and the answer cache: they wait more than they work
log = logging.getLogger(__name__)


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
        return as_batch(done)

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
        commit = await asyncio.to_thread(lambda: commit_part(self.store, self.target, chunk.part, to_table(work.kind, rows), rejected, tally))
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
