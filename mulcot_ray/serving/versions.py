"""Further versions of a model beside the first: asked through Serve, for a share of the posts, or as a shadow whose answers are only compared.

The replicas of the first version take all requests and hand a share of them on. A light deployment in front of all would do the same for
one more process on the way of every request: docs/decisions/0006-endpoint.md has the figures.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from PIL import Image

from mulcot_ray.engines.base import Completion, Messages, Sampling, Scores
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.records import Post, Prediction
from mulcot_ray.serving.answering import Version
from mulcot_ray.serving.faults import log
from mulcot_ray.serving.metrics import Meters

TRIES = 3  # of a call whose replica is lost on the way: it changes nothing, so it can be made again
FIRST_WAIT_S = 0.1
RETRY_S = 5.0  # between two questions to a version that has not answered yet


class Remote:
    """An Engine whose calls go to the replicas of another deployment. Faults of rows come back as values: Ray would wrap exceptions."""

    def __init__(self, handle: Any, name: str) -> None:
        self.handle, self.name = handle, name

    async def about(self) -> tuple[LabelWork, str]:
        """The version's work and fingerprint, as soon as a replica of it answers."""
        while True:
            try:
                return await self._call("about")  # type: ignore[no-any-return]
            except EngineError as e:
                log.warning("%s", e)
                await asyncio.sleep(RETRY_S)

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        return await self._call("generate", messages, image, sampling)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        return await self._call("score", messages, image, written)

    async def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        parts = self.handle.options(method_name="stream", stream=True).remote(messages, image, sampling)
        try:
            async for part in parts:
                if isinstance(part, RowFault):
                    raise part
                yield part
        except (RayError, RayServeException) as e:
            raise EngineError(f"version {self.name!r}: {type(e).__name__}") from e
        finally:
            parts.cancel()

    def check(self) -> None:
        """Serve looks after its replicas."""

    def close(self) -> None:
        """The engine is not ours."""

    async def _call(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError, RayError
        from ray.serve.exceptions import RayServeException

        for attempt in range(TRIES):
            try:
                result = await self.handle.options(method_name=method).remote(*args)
            except RayActorError as e:
                log.warning("version %s: a replica is lost (%s)", self.name, type(e).__name__)
                await asyncio.sleep(FIRST_WAIT_S * 2**attempt)
                continue
            except (RayError, RayServeException) as e:
                raise EngineError(f"version {self.name!r}: {type(e).__name__}") from e
            if isinstance(result, RowFault):
                raise result
            return result
        raise EngineError(f"version {self.name!r}: {TRIES} replicas were lost on the way")


class Compared:
    """A shadow: asks `version` a share of the posts after they were answered, and counts how it differs. Posts that it cannot keep up with are
    passed over."""

    def __init__(self, version: Version, at_once: int) -> None:
        self.version, self.at_once = version, at_once
        self.tasks: set[asyncio.Task[None]] = set()

    def consider(self, post: Post, image: Image.Image | None, prediction: Prediction, meters: Meters) -> None:
        if int(post.content[8:16], 16) / 2**32 >= self.version.share:
            return
        if len(self.tasks) >= self.at_once:
            meters.shadow.labels(self.version.name, "passed_over").inc()
            return
        task = asyncio.create_task(self._compare(post, image, prediction, meters))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def _compare(self, post: Post, image: Image.Image | None, prediction: Prediction, meters: Meters) -> None:
        try:
            other = await self.version.scored(self.version.engine, post, image)
        except Exception as e:  # a shadow must not be heard
            log.warning("shadow %s: %s", self.version.name, e)
            meters.shadow.labels(self.version.name, "failed").inc()
        else:
            meters.compared(self.version.name, prediction, other)
