"""A replica: one engine, a thread that ends the process when the engine has died, and, in those of the first version, the HTTP interface."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from fastapi import FastAPI
from PIL import Image

from mulcot_ray.engines.base import Completion, Engine, EngineSpec, Messages, Sampling, Scores, engine_spec, open_engine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Post
from mulcot_ray.serving.answering import Shadow, Version, parts
from mulcot_ray.serving.api import make_api
from mulcot_ray.serving.faults import log
from mulcot_ray.serving.tokens import Tokens
from mulcot_ray.serving.versions import Compared, Remote
from mulcot_ray.storage import Store

WATCH_S = 0.5


@dataclass(frozen=True)
class Settings:
    """What the HTTP interface of a replica is told. `tokens` None: none are asked for, on loopback only."""

    tokens: Tokens | None
    share: float
    places: int
    timeout_s: float
    image_prefixes: tuple[str, ...]
    metrics_open: bool


@dataclass(frozen=True)
class Beside:
    """Another version: `handle` asks its replicas."""

    model: str
    share: float
    handle: Any


def label_work(recipe: Recipe, s: EngineSpec, model: str) -> LabelWork:
    return LabelWork(recipe.contract, "score", recipe.explain_tokens, recipe.seed, model, s.temperature)


class EngineReplica:
    """One engine of this process, asked through Serve by the replicas of the first version. Faults of rows are values: Ray wraps exceptions."""

    def __init__(self, store: Store, model: str, recipe: Recipe, runtime: Runtime, engine: EngineSpec | None) -> None:
        opened = engine or engine_spec(store, recipe, runtime, "student", model)
        self.fingerprint, self.work = opened.fingerprint, label_work(recipe, opened, model)
        self.engine, self.warm = open_engine(opened), False
        self.stopping = threading.Event()
        threading.Thread(target=self._watch, name="engine watchdog", daemon=True).start()

    async def check_health(self) -> None:
        """Serve asks before it sends the first request."""
        if not self.warm:
            await warm_up(self.engine, self.work)
            self.warm = True
        self.engine.check()

    async def about(self) -> tuple[LabelWork, str]:
        return self.work, self.fingerprint

    async def score(self, messages: Messages, image: Image.Image | None, written: str) -> Scores | RowFault:
        try:
            return await self.engine.score(messages, image, written)
        except RowFault as f:
            return f

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion | RowFault:
        try:
            return await self.engine.generate(messages, image, sampling)
        except RowFault as f:
            return f

    async def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion | RowFault, None]:
        try:
            async with aclosing(parts(self.engine, messages, image, sampling)) as written:
                async for part in written:
                    yield part
        except RowFault as f:
            yield f

    def _watch(self) -> None:
        """End the process when its engine has died: Serve replaces a lost actor at once, but an unhealthy one only after three checks,
        while its quick 503s draw requests to it (measured: 516 failed requests against 6)."""
        while not self.stopping.wait(WATCH_S):
            try:
                self.engine.check()
            except EngineError as e:
                log.error("%s", e)
                os._exit(1)

    def __del__(self) -> None:
        if hasattr(self, "stopping"):  # not if the engine did not open
            self.stopping.set()
            self.engine.close()


class Replica(EngineReplica):
    """The first version's: Serve runs the constructor, then asks for the application."""

    def __init__(
        self, store: Store, model: str, recipe: Recipe, runtime: Runtime, engine: EngineSpec | None, settings: Settings,
        others: Sequence[Beside] = (), shadow: Beside | None = None,
    ) -> None:  # fmt: skip
        super().__init__(store, model, recipe, runtime, engine)
        self.settings, self.others, self.shadow = settings, others, shadow
        self.asking: list[asyncio.Task[None]] = []

    async def __serve_build_asgi_app__(self) -> FastAPI:
        from ray import serve

        await self.check_health()  # warm: the application is there before Serve asks
        s = self.settings
        others: list[Version] = []
        shadows: list[Shadow] = []

        async def add(b: Beside, shadow: bool) -> None:
            """A version joins when its replicas answer. Until then the first does its share: a version that cannot start harms nobody."""
            remote = Remote(b.handle, b.model)
            version = Version(remote, *await remote.about(), b.share)
            if shadow:
                shadows.append(Compared(version, at_once=s.places))
            else:
                others.append(version)

        self.asking = [asyncio.create_task(add(b, shadow=b is self.shadow)) for b in (*self.others, *([self.shadow] if self.shadow else []))]
        return make_api(
            self.engine, self.work, self.fingerprint, s.tokens, s.timeout_s, share=s.share, others=others, shadows=shadows, running=s.places,
            image_prefixes=s.image_prefixes, metrics_open=s.metrics_open, replica=serve.get_replica_context().replica_id.unique_id,
        )  # fmt: skip


async def warm_up(engine: Engine, work: LabelWork) -> None:
    """One post with a picture and one without, scored and a few tokens explained: pays the costs of a first request, and shows that
    the model and the contract fit. Raises EngineError."""
    side = work.contract.image.side
    short = replace(work, mode="explain", max_tokens=2)
    try:
        await short(engine, Post("warm-up", "-", "warm up", image_bytes=b"-"), Image.new("RGB", (side, side)))
        if work.contract.image.missing == "note":
            await short(engine, Post("warm-up", "-", "warm up"), None)
    except RowFault as f:
        raise EngineError(f"model {work.model!r} and contract {work.contract.name!r} do not fit: a two-word post fails, {f}") from f
