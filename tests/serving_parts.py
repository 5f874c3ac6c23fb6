"""What the tests of the endpoint share: the API around a scripted engine, pictures, and a real server on a thread for what is streamed."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import threading
import time
import zlib
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI
from PIL import Image

from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, Scores, spec
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.prompts import KEYS
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.serving.api import make_api
from mulcot_ray.serving.tokens import token_digest

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
WORK = LabelWork(RECIPE.contract, "score", RECIPE.explain_tokens, RECIPE.seed, "scripted")
TOKEN = "a-token-for-the-tests"
AUTH = {"Authorization": f"Bearer {TOKEN}"}


def script(messages: Messages, sampling: Sampling) -> str:
    """Negative where the prompt has the word "awful", else positive; a bare label where it has "terse"."""
    text = json.dumps(messages)
    label = "negative" if "awful" in text else "positive"
    sections = "" if "terse" in text else "".join(f'"{key}": "About {key}."\n' for key in KEYS.values())
    return f'{sections}"Prediction": "{label}"'


def scripted(**changes: Any) -> EngineSpec:
    return replace(spec(RECIPE, RUNTIME, "student", "none"), **({"backend": "scripted", "script": script} | changes))


class Seen(ScriptedEngine):
    """Keeps the pictures it was shown."""

    def __init__(self) -> None:
        super().__init__(scripted())
        self.images: list[Image.Image | None] = []

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        self.images.append(image)
        return await super().score(messages, image, written)


class Failing(ScriptedEngine):
    """Scores by raising, or by taking its time."""

    def __init__(self, fault: Exception | None = None, seconds: float = 0.0) -> None:
        super().__init__(scripted())
        self.fault, self.seconds = fault, seconds

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        await asyncio.sleep(self.seconds)
        if self.fault:
            raise self.fault
        return await super().score(messages, image, written)


class Stepping(ScriptedEngine):
    """Each word of an answer, and each score, waits for a step of `go`. Counts what is under way, the most of it, and what was broken off."""

    def __init__(self, fault: Exception | None = None) -> None:
        super().__init__(scripted())
        self.steps, self.fault = threading.Semaphore(0), fault
        self.under_way = self.most = self.broken_off = 0

    def go(self, steps: int = 1) -> None:
        self.steps.release(steps)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await self._step()
            return await super().score(messages, image, written)
        except asyncio.CancelledError:
            self.broken_off += 1
            raise
        finally:
            self.under_way -= 1

    async def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
        self.under_way += 1
        try:
            async for part in super().stream(messages, image, sampling):
                await self._step()
                if self.fault:
                    raise self.fault
                yield part
        except (asyncio.CancelledError, GeneratorExit):
            self.broken_off += 1
            raise
        finally:
            self.under_way -= 1

    async def _step(self) -> None:
        while not self.steps.acquire(blocking=False):
            await asyncio.sleep(0.002)


def app(engine: Any = None, **options: Any) -> FastAPI:
    return make_api(engine or ScriptedEngine(scripted()), WORK, "f1", [token_digest("another-token-of-it"), token_digest(TOKEN)], **options)


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The address of a server that runs in a thread: for what TestClient holds back until it is whole."""
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(true: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


def picture(form: str = "JPEG", size: tuple[int, int] = (60, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, form)
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bomb(side: int) -> bytes:
    """A PNG of some bytes that says side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(99)))
