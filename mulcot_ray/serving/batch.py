"""Many posts in one request: lines of JSON in, lines of JSON out, in the same order, an error object in place of a bad line's answer.

Answers are written while lines still arrive. At most `window` lines, of together MAX_HELD bytes, are in work; no more is read until one is
done and written, so that a sender who does not read is made to wait. Serve's Python proxy reads on by itself, up to schemas.MAX_BATCH bytes.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

from fastapi.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mulcot_ray.serving.answering import Answer, Answering
from mulcot_ray.serving.faults import describe
from mulcot_ray.serving.guards import Refused
from mulcot_ray.serving.leaving import Left, send_body
from mulcot_ray.serving.reading import parse
from mulcot_ray.serving.schemas import MAX_BODY, MAX_ID, MAX_LINES, BadLine, SentimentResponse

NDJSON = "application/x-ndjson"
KINDS = (NDJSON, "application/ndjson", "application/jsonl", "application/x-jsonlines")
MAX_HELD = 64 << 20  # bytes of lines in work

Line = bytes | Refused


class Batch(Response):
    """The answers to the lines of a request's body. It reads that itself: Starlette's own streaming response would wait for its end."""

    def __init__(self, answering: Answering, window: int, answered: Callable[[Answer], SentimentResponse], ended: Callable[[], None]) -> None:
        self.answering, self.answered, self.ended = answering, answered, ended
        self.status_code, self.media_type, self.background = 200, NDJSON, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self.tasks: asyncio.Queue[tuple[asyncio.Task[bytes], int] | None] = asyncio.Queue(window)
        self.held, self.freed = 0, asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reading, writing = asyncio.create_task(self._read(receive)), asyncio.create_task(self._write(send))
        try:
            await asyncio.wait((reading, writing), return_when=asyncio.FIRST_COMPLETED)
            (writing if writing.done() else reading).result()  # reading ends first only where it fails
        except Left:
            pass
        finally:
            self.ended()
            for task in (reading, writing):
                task.cancel()
            while not self.tasks.empty():
                if (waiting := self.tasks.get_nowait()) is not None:
                    waiting[0].cancel()

    async def _read(self, receive: Receive) -> None:
        """Start a task for each line, no more of them than may be in work. Then wait for the client to leave."""
        async for number, line in numbered(receive):
            size = len(line) if isinstance(line, bytes) else 0
            while self.held and self.held + size > MAX_HELD:
                self.freed.clear()
                await self.freed.wait()
            self.held += size
            await self.tasks.put((asyncio.create_task(self._answer(number, line)), size))
        await self.tasks.put(None)
        while True:
            if (await receive())["type"] == "http.disconnect":
                raise Left

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        while (head := await self.tasks.get()) is not None:
            task, size = head
            await send_body(send, await task)
            self.held -= size
            self.freed.set()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, number: int, line: Line) -> bytes:
        asked = None
        try:
            if isinstance(line, Refused):
                raise line
            asked = parse(line)
            if asked.stream:
                raise Refused(422, "invalid_request", "stream: a line of a batch is answered by a line", "stream")
            return self.answered(await self.answering.answer(asked, None, patient=True)).model_dump_json().encode() + b"\n"
        except Exception as e:
            _, fault, _ = describe(e)
            self.answering.meters.refused.labels(fault.code).inc()
            name = asked.id if asked else _id(line)
            return BadLine(id=name, line=number, error=fault).model_dump_json().encode() + b"\n"


async def numbered(receive: Receive) -> AsyncIterator[tuple[int, Line]]:
    """The lines of a body with their numbers, from 1; empty ones are passed over. A line that is too long comes as its fault, without having
    been kept; so does what ends the reading. Raises Left."""
    number, kept, dropping = 0, bytearray(), False
    more = True
    while more:
        try:
            message: Message = await receive()
        except Refused as e:  # the body is too long, or too slow
            yield number + 1, e
            return
        if message["type"] == "http.disconnect":
            raise Left
        more = message.get("more_body", False)
        piece = message.get("body", b"") + (b"" if more else b"\n")
        kept += piece
        *lines, kept = kept.split(b"\n") if b"\n" in piece else (kept,)
        for line in lines:
            number += 1
            if number > MAX_LINES:
                yield number, Refused(413, "too_many_lines", f"at most {MAX_LINES} lines are answered in one batch")
                return
            if dropping or len(line) > MAX_BODY:
                dropping = False
                yield number, Refused(413, "line_too_long", f"a line has at most {MAX_BODY} bytes")
            elif line.strip():
                yield number, bytes(line)
        if len(kept) > MAX_BODY:
            kept, dropping = bytearray(), True


def _id(line: Line) -> str | None:
    """The id in a line that is not a request, where one can be read."""
    try:
        found = json.loads(line).get("id") if isinstance(line, bytes) else None
    except (ValueError, AttributeError, RecursionError):
        return None
    return found.encode("utf-8", "replace").decode() if isinstance(found, str) and len(found) <= MAX_ID else None
