"""What stands before the replicas, in the process of Serve's own proxy: lost replicas are made up for, and Serve's own errors are JSON too.

Serve loads it where RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=mulcot_ray.serving.front:middlewares is in the proxy's environment
(serving/run.py and serve_config.yaml see to that). It costs no further process and no further hop. HAProxy in the proxy's place does the
first by its own retries (serving/haproxy.py).
"""

from __future__ import annotations

import asyncio
import logging

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mulcot_ray.serving.guards import CODE_HEADER, error

PATH = "mulcot_ray.serving.front:middlewares"
TRIES = 4
FIRST_WAIT_S = 0.2  # doubled each time: 1.4 s in all, beside what Serve itself waits for a replica
KEPT = 16 << 20  # bytes of a body that is kept to be sent again; a longer one (of a batch) is tried once
# Serve takes these from anybody: a client could switch off its own time limit, or that its leaving is noticed.
FOR_SERVE = (
    b"x-request-timeout-seconds",
    b"x-request-disconnect-disabled",
    b"serve_multiplexed_model_id",
    b"serve-multiplexed-model-id",
    b"x-session-id",
)
# What Serve answers by itself, always as plain text.
CODES = {
    404: (404, "not_found", "there is nothing at this path"),
    408: (504, "timeout", "no answer within the time limit"),
    503: (503, "over_capacity", "all replicas are busy, or none has started yet"),
}

log = logging.getLogger("ray.serve")


def middlewares() -> list[Middleware]:
    return [Middleware(Front)]


class Front:
    """Sends a request again when its replica, or the engine in it, is lost before the answer has begun: a request changes nothing, so it can
    be made twice."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = [(k, v) for k, v in scope["headers"] if k not in FOR_SERVE]
        body = _Body(receive)
        for attempt in range(TRIES):
            answer = _Answer(send)
            try:
                await self.app({**scope, "headers": list(headers)}, body.again(), answer)
            except Exception as e:  # Serve's proxy logs it too; to a client it is a lost replica
                if answer.begun:
                    raise
                log.warning("proxy: %s", type(e).__name__)
            if answer.begun or body.left:
                return
            if not body.kept:
                break
            await asyncio.sleep(FIRST_WAIT_S * 2**attempt)
        await error(503, "replica_lost", "the replica was lost on the way", headers={"Retry-After": "5"})(scope, receive, send)


class _Body:
    """A request's body as it arrives, kept so that it can be read from its beginning again."""

    def __init__(self, receive: Receive) -> None:
        self.receive, self.messages, self.size = receive, list[Message](), 0
        self.kept, self.left = True, False

    def again(self) -> Receive:
        at = 0

        async def receive() -> Message:
            nonlocal at
            if self.kept and at < len(self.messages):
                at += 1
                return self.messages[at - 1]
            message = await self.receive()
            self.left = message["type"] == "http.disconnect"
            if self.kept and not self.left:
                self.messages.append(message)
                at += 1
                self.size += len(message.get("body", b""))
                if self.size > KEPT:
                    self.kept, self.messages = False, []
            return message

        return receive


class _Answer:
    """Passes on what the replica sends, but that its engine is dead; puts JSON in the place of Serve's own plain texts."""

    def __init__(self, send: Send) -> None:
        self.send, self.begun, self.replaced, self.lost = send, False, False, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = dict(message.get("headers", ()))
            self.lost = headers.get(CODE_HEADER.encode()) == b"engine_error"
            self.begun = not self.lost
            ours = CODE_HEADER.encode() in headers or not headers.get(b"content-type", b"").startswith(b"text/plain")
            if message["status"] in CODES and not ours:
                self.replaced = True
                status, code, text = CODES[message["status"]]
                after = headers.get(b"retry-after", b"1" if status == 503 else b"").decode()
                response = error(status, code, text, headers={"Retry-After": after} if after else None)
                await response({"type": "http"}, _nothing, self.send)
        if not self.replaced and not self.lost:
            await self.send(message)


async def _nothing() -> Message:
    return {"type": "http.disconnect"}
