"""Server-sent events: the label at once, the rationale by section as it is written, then the whole answer.

    event: label       Scored
    event: rationale   Delta, many times
    event: done        SentimentResponse
    event: error       Fault, in place of the rest

What goes wrong before the label is a plain answer with its status: the events begin with the label.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from fastapi import Request
from pydantic import BaseModel

from mulcot_ray.serving.answering import Answer, Answering
from mulcot_ray.serving.faults import describe
from mulcot_ray.serving.leaving import Put, Written, while_there
from mulcot_ray.serving.schemas import Delta, Fault, Scored, SentimentRequest, SentimentResponse
from mulcot_ray.serving.sections import Splitter

EVENTS = "text/event-stream"
Emit = Callable[[bytes], None]


def event(name: str, data: BaseModel) -> bytes:
    return f"event: {name}\ndata: {data.model_dump_json()}\n\n".encode()


class Teller:
    """A listener that says what it hears in events."""

    def __init__(self, emit: Emit, scored: Callable[[Answer], Scored]) -> None:
        self.emit, self.scored = emit, scored
        self.splitter, self.text = Splitter(), ""

    async def label(self, answer: Answer) -> None:
        self.emit(event("label", self.scored(answer)))

    async def written(self, text: str) -> None:
        self.text = text
        self._split(end=False)

    def end(self, whole: SentimentResponse) -> None:
        self._split(end=True)
        self.emit(event("done", whole))

    def _split(self, end: bool) -> None:
        for section, delta in self.splitter.feed(self.text, end):
            self.emit(event("rationale", Delta(section=section, delta=delta)))


async def follow(
    request: Request, answering: Answering, asked: SentimentRequest, picture: bytes | None,
    scored: Callable[[Answer], Scored], whole: Callable[[Answer], SentimentResponse],
) -> Written:  # fmt: skip
    """The events of one post's answer. Raises what `Answering.answer` does before the label is there."""

    async def work(emit: Emit) -> None:
        teller = Teller(emit, scored)
        teller.end(whole(await answering.answer(asked, picture, listener=teller)))

    return await emitted(request, answering, work, lambda fault: event("error", fault))


async def emitted(request: Request, answering: Answering, work: Callable[[Emit], Awaitable[None]], broken: Callable[[Fault], bytes]) -> Written:
    """A response of what `work` emits, which begins when there is something. What `work` raises before that is raised here; what it raises
    later is told by `broken`. `work` is cancelled when the client leaves."""
    queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

    async def run() -> None:
        try:
            await work(queue.put_nowait)
            queue.put_nowait(None)
        except Exception as e:
            queue.put_nowait(e)

    task = asyncio.create_task(run())

    async def end() -> None:
        if not task.done():
            task.cancel()
            await asyncio.wait((task,))

    try:
        first = await while_there(request.receive, queue.get())
    except BaseException:
        await end()
        raise
    if isinstance(first, Exception):
        raise first

    async def write(put: Put) -> None:
        item: bytes | Exception | None = first
        try:
            while item is not None:
                if isinstance(item, Exception):
                    _, fault, _ = describe(item)
                    answering.meters.refused.labels(fault.code).inc()
                    await put(broken(fault))
                    return
                await put(item)
                item = await queue.get()
        finally:
            await end()

    return Written(write, EVENTS)
