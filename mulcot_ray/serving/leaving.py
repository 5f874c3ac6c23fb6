"""Clients that leave: whatever is done for one ends when it closes its connection, so that its place in the engine is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

SEND_S = 60.0  # for a client to take in what was sent; its buffers hold some megabytes
T = TypeVar("T")
Put = Callable[[bytes], Awaitable[None]]


class Left(Exception):
    """The client has left; nobody is there to answer."""


async def while_there(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves first, `work` is cancelled and Left raised. The body must have been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Left
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.wait((working,))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_body(send: Send, piece: bytes) -> None:
    """Raises Left when the client does not take it."""
    try:
        async with asyncio.timeout(SEND_S):
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except TimeoutError:
        raise Left from None


class Written(Response):
    """A response whose body is written piece by piece by `write(put)`, which ends when the client leaves.

    In place of Starlette's StreamingResponse, which leaves the writer running under uvicorn until its next piece.
    """

    def __init__(self, write: Callable[[Put], Coroutine[Any, Any, None]], media_type: str) -> None:
        self.write, self.status_code, self.media_type, self.background = write, 200, media_type, None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def put(piece: bytes) -> None:
            await send_body(send, piece)

        with suppress(Left):
            await while_there(receive, self.write(put))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
