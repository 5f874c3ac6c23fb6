"""Who may ask and how much they may send, settled before a body is parsed. Pure ASGI, so that nothing is buffered on the way."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Collection, Mapping

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mulcot_ray.serving.tokens import token_digest

CODE_HEADER = "x-error-code"  # of every error, for logs and metrics
BODY_S = 30.0  # for a whole body to arrive; of a batch, for each next piece


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def error(status: int, code: str, message: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one shape of every error: {"error": {"code", "message", "field"?}}."""
    body = {"code": code, "message": message} | ({"field": field} if field else {})
    return JSONResponse({"error": body}, status, {**(headers or {}), CODE_HEADER: code})


class Refused(HTTPException):
    """An answer other than 200 that we decided on. FastAPI turns any other exception that is raised while it reads a body into a bare 400."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers) if headers else None)
        self.code, self.field = code, field


class BearerTokens:
    """401 for every path but the open ones, unless the request has a token whose digest is known at that moment."""

    def __init__(self, app: ASGIApp, digests: Collection[str], open_paths: Collection[str]) -> None:
        self.app, self.digests, self.open_paths = app, digests, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or path_of(scope) in self.open_paths:
            await self.app(scope, receive, send)
            return
        scheme, _, token = _header(scope, b"authorization").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            refusal = error(401, "unauthorized", "a header `Authorization: Bearer TOKEN` is wanted", headers={"WWW-Authenticate": "Bearer"})
        else:
            given = token_digest(token.strip())
            # All are compared, whichever fits: the time taken must not tell.
            if any([hmac.compare_digest(given, known) for known in self.digests]):
                await self.app(scope, receive, send)
                return
            refusal = error(401, "unauthorized", "the token is not known", headers={"WWW-Authenticate": 'Bearer error="invalid_token"'})
        await refusal(scope, receive, send)


class LoopbackOnly:
    """In place of tokens: 403 for a connection that reached this machine by another address than loopback, or that is meant for another
    name: a web page may send a browser here under a name of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = re.sub(r":\d*$", "", _header(scope, b"host")).strip("[]") if scope["type"] == "http" else ""
        if scope["type"] == "http" and not (is_loopback((scope.get("server") or ("", 0))[0]) and is_loopback(named)):
            await error(403, "forbidden", "this endpoint runs without tokens and answers on loopback only")(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """413 by the declared length and, as that may be absent or a lie, by the bytes that arrive; 408 for a body that is too slow.

    `larger` gives other paths another limit. Theirs come in pieces that are worked on as they arrive, so that only a pause is too slow.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, int], seconds: float = BODY_S) -> None:
        self.app, self.limit, self.larger, self.seconds = app, limit, larger, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = path_of(scope)
        limit, pieces = self.larger.get(path, self.limit), path in self.larger
        message = f"the body is larger than {limit} bytes"
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared[:20]) > limit:
            await error(413, "body_too_large", message, headers={"Connection": "close"})(scope, receive, send)
            return
        seen, whole = 0, False
        end = asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal seen, whole
            if whole:  # what is waited for now is that the client leaves
                return await receive()
            try:
                async with asyncio.timeout(self.seconds) if pieces else asyncio.timeout_at(end):
                    part = await receive()
            except TimeoutError:
                raise Refused(408, "body_too_slow", f"no body within {self.seconds:g} s", headers={"Connection": "close"}) from None
            seen += len(part.get("body", b""))
            whole = not part.get("more_body", False)
            if seen > limit:
                raise Refused(413, "body_too_large", message, headers={"Connection": "close"})
            return part

        await self.app(scope, counted, send)


def path_of(scope: Scope) -> str:
    """The path below the prefix under which Serve mounts the application."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _header(scope: Scope, name: bytes) -> str:
    return next((bytes(v).decode("latin-1") for k, v in scope["headers"] if k == name), "")
