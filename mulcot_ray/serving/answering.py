"""A post's way through: a place in the engine, the picture, a version of the model, label and rationale; all within one deadline.

`LabelWork` does the asking, as in `mulcot label`, hence the same labels. The work never waits in a growing queue: where all places are
taken and as many requests wait for one, the next is refused with 503.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from PIL import Image

from mulcot_ray.engines.base import Completion, Engine, Messages, Sampling, Scores, Streams
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import EngineError
from mulcot_ray.records import Post, Prediction
from mulcot_ray.serving.faults import log
from mulcot_ray.serving.guards import Refused
from mulcot_ray.serving.metrics import Meters
from mulcot_ray.serving.reading import prepared
from mulcot_ray.serving.schemas import SentimentRequest, Timings

Follow = Callable[[str], Awaitable[None]]  # told the rationale as far as it is written


@dataclass(frozen=True)
class Version:
    """A model that answers, and the part of the posts that it answers."""

    engine: Engine
    work: LabelWork
    fingerprint: str
    share: float = 1.0
    scored: LabelWork = field(init=False)
    explained: LabelWork = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scored", replace(self.work, mode="score"))
        object.__setattr__(self, "explained", replace(self.work, mode="explain"))

    @property
    def name(self) -> str:
        return self.work.model


@dataclass(frozen=True)
class Answer:
    """`timings` has no rationale as long as none is written."""

    prediction: Prediction
    version: Version
    timings: Timings


class Listener(Protocol):
    """Somebody who follows an answer while it is made."""

    async def label(self, answer: Answer) -> None: ...

    async def written(self, text: str) -> None: ...


class Shadow(Protocol):
    """Somebody who looks at answers, and does nothing to them. Must not block."""

    def consider(self, post: Post, image: Image.Image | None, prediction: Prediction, meters: Meters) -> None: ...


class Places:
    """`running` places; `waiting` requests may wait for one, in order. Lines of a batch wait too, but are not counted: a batch has few in flight."""

    def __init__(self, running: int, waiting: int) -> None:
        self.running, self.bound = running, waiting
        self.free = asyncio.Semaphore(running)
        self.taken = self.queued = 0

    @property
    def full(self) -> bool:
        return self.queued >= self.bound and self.free.locked()

    @asynccontextmanager
    async def place(self, patient: bool) -> AsyncIterator[None]:
        """Raises Refused with 503 where all are taken and waited for, unless `patient`."""
        if self.full and not patient:
            raise Refused(503, "over_capacity", "all places are taken", headers={"Retry-After": "1"})
        self.queued += not patient
        try:
            await self.free.acquire()
        finally:
            self.queued -= not patient
        self.taken += 1
        try:
            yield
        finally:
            self.taken -= 1
            self.free.release()


class Watched:
    """An Engine for one post: keeps the time of each step, weighs the label words once, and lets a rationale be followed."""

    def __init__(self, engine: Engine, follow: Follow | None = None) -> None:
        self.engine, self.follow = engine, follow
        self.score_s = 0.0
        self.rationale_s: float | None = None
        self._scores: Scores | None = None

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        if self._scores is None:
            started = time.perf_counter()
            self._scores = await self.engine.score(messages, image, written)
            self.score_s = time.perf_counter() - started
        return self._scores

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        started = time.perf_counter()
        if self.follow is None:
            done = await self.engine.generate(messages, image, sampling)
        else:
            async with aclosing(parts(self.engine, messages, image, sampling)) as written:
                async for done in written:
                    await self.follow(done.text)
        self.rationale_s = time.perf_counter() - started
        return done

    def check(self) -> None:
        self.engine.check()

    def close(self) -> None:
        """The engine is not ours."""


async def parts(engine: Engine, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
    """As `Streams.stream`; where the engine does not stream, the whole answer at once."""
    if not isinstance(engine, Streams):
        yield await engine.generate(messages, image, sampling)
        return
    async with aclosing(engine.stream(messages, image, sampling)) as written:
        async for part in written:
            yield part


class Answering:
    """What the routes share: versions of the model, places, deadline, meters.

    `others` and `shadows` may grow while requests are answered. Each of `others` has its share of the posts; `first` has the rest, and those
    that another fails to answer.
    """

    def __init__(
        self, first: Version, others: Sequence[Version], shadows: Sequence[Shadow], places: Places, timeout_s: float, prefixes: tuple[str, ...],
        meters: Meters,
    ) -> None:  # fmt: skip
        self.first, self.others, self.shadows = first, others, shadows
        self.places, self.timeout_s, self.prefixes, self.meters = places, timeout_s, prefixes, meters
        self.side = first.work.contract.image.side

    @property
    def versions(self) -> list[Version]:
        return [self.first, *self.others]

    async def answer(self, asked: SentimentRequest, picture: bytes | None, *, listener: Listener | None = None, patient: bool = False) -> Answer:
        """Raises RowFault, Refused, EngineError and TimeoutError. `patient`: waits for a place however many do."""
        started = time.perf_counter()
        async with asyncio.timeout(self.timeout_s), self.places.place(patient):
            placed = time.perf_counter()
            post, image = await asyncio.to_thread(prepared, asked, picture, self.side, self.prefixes)
            times = (placed - started, time.perf_counter() - placed)
            answer = await self._by_a_version(post, image, asked, listener, times)
        self.meters.answered(answer.prediction, answer.version.name, answer.timings)
        for shadow in self.shadows:
            shadow.consider(post, image, answer.prediction, self.meters)
        return answer

    async def _by_a_version(
        self, post: Post, image: Image.Image | None, asked: SentimentRequest, listener: Listener | None, times: tuple[float, float]
    ) -> Answer:
        version = self.choose(post)
        try:
            return await _by(version, post, image, asked, listener, times)
        except EngineError as e:
            if version is self.first or listener is not None:
                raise
            log.warning("version %s does not answer, %s does: %s", version.name, self.first.name, e)
            return await _by(self.first, post, image, asked, listener, times)

    def choose(self, post: Post) -> Version:
        """By the post's content: the same post meets the same version."""
        if self.others:
            at = int(post.content[:8], 16) / 2**32
            for v in self.others:
                if at < v.share:
                    return v
                at -= v.share
        return self.first


async def _by(
    version: Version, post: Post, image: Image.Image | None, asked: SentimentRequest, listener: Listener | None, times: tuple[float, float]
) -> Answer:
    engine = Watched(version.engine, listener.written if listener else None)

    def so_far(p: Prediction) -> Answer:
        queue, prepare, score = (round(1000 * t, 2) for t in (*times, engine.score_s))
        rationale = None if engine.rationale_s is None else round(1000 * engine.rationale_s, 2)
        return Answer(p, version, Timings(queue=queue, prepare=prepare, score=score, rationale=rationale))

    if listener is not None:
        await listener.label(so_far(await version.scored(engine, post, image)))
    explain = asked.explain or asked.stream or listener is not None
    return so_far(await (version.explained if explain else version.scored)(engine, post, image))
