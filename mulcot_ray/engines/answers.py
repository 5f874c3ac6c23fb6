"""Answers that were paid for are kept under the root, and never asked for again: over attempts, runs and data sets.

    ROOT/answers/ab/cdef….json    one written answer, named by the digest of all that decides it

The name is made of model, contract, precision, context length, messages, pixels and sampling. Whatever differs in one of them is another
question. A million answers of 1.5 KB are 1.5 GB; deleting the folder loses nothing but their price.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
from collections import Counter
from typing import Any

from PIL import Image

from mulcot_ray.engines.base import Completion, Engine, EngineSpec, Messages, Sampling, Scores
from mulcot_ray.prompts import digest
from mulcot_ray.storage import Store

FOLDER = "answers"


class Answers:
    """An Engine that looks an answer up before it asks `engine` for it. `tally` counts what was asked, what was spared, and their tokens.

    `store` None: it only counts. Identical questions that are under way at once are asked once.
    """

    def __init__(self, engine: Engine, spec: EngineSpec, store: Store | None) -> None:
        self.engine, self.store = engine, store
        self.base = [spec.fingerprint, spec.contract.hash, spec.dtype, spec.max_model_len, spec.quantization]
        self.tally: Counter[str] = Counter()
        self._asking: dict[str, asyncio.Task[Completion]] = {}

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        if self.store is None:
            return self._count("asked", await self.engine.generate(messages, image, sampling))
        key = self._key(messages, image, sampling)
        if key in self._asking:
            return self._count("reused", await asyncio.shield(self._asking[key]))
        if (kept := await asyncio.to_thread(self.store.read, key)) is not None:
            return self._count("reused", Completion(**json.loads(kept)))
        if key in self._asking:  # while we were reading
            return self._count("reused", await asyncio.shield(self._asking[key]))
        task = self._asking[key] = asyncio.create_task(self._ask(key, messages, image, sampling))
        try:
            return self._count("asked", await task)
        finally:
            del self._asking[key]

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        """Not kept: one prefill costs little more than looking it up."""
        scores = await self.engine.score(messages, image, written)
        self.tally.update({"scored": 1, "tokens_in": scores.tokens_in})
        return scores

    def check(self) -> None:
        self.engine.check()

    def close(self) -> None:
        self.engine.close()

    async def _ask(self, key: str, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        done = await self.engine.generate(messages, image, sampling)
        assert self.store is not None
        await asyncio.to_thread(self.store.write, key, json.dumps(dataclasses.asdict(done), ensure_ascii=False).encode())
        return done

    def _count(self, what: str, done: Completion) -> Completion:
        spared = "spared_" if what == "reused" else ""
        self.tally.update({what: 1, f"{spared}tokens_in": done.tokens_in, f"{spared}tokens_out": done.tokens_out})
        return done

    def _key(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> str:
        pixels: Any = None if image is None else [image.size, hashlib.sha256(image.tobytes()).hexdigest()]
        full = digest([self.base, messages, pixels, dataclasses.asdict(sampling)], length=32)
        return f"{FOLDER}/{full[:2]}/{full[2:]}.json"
