"""Who may ask and how much they may send, settled before a body is read or parsed. Pure ASGI, so that nothing is buffered on the way."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Collection, Mapping
from pathlib import Path

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mulcot_ray.errors import ConfigError

MIN_TOKEN = 16  # characters; only the digests are kept, so a short token could be guessed from them


def configured_tokens(environ: Mapping[str, str]) -> list[str]:
    """Tokens from the file MULCOT_TOKENS_FILE (one a line; `#` starts a comment line) and from MULCOT_TOKENS (comma separated).

    Raises ConfigError for a file that cannot be read, a variable that names no token, and a token that is short or not printable ASCII.
    """
    found: list[str] = []
    if path := environ.get("MULCOT_TOKENS_FILE"):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"MULCOT_TOKENS_FILE {path!r} cannot be read: {e}") from e
        found += _checked([x.strip() for x in lines if x.strip() and not x.strip().startswith("#")], f"MULCOT_TOKENS_FILE {path!r}")
    if listed := environ.get("MULCOT_TOKENS"):
        found += _checked([x.strip() for x in listed.split(",") if x.strip()], "MULCOT_TOKENS")
    return found


def _checked(tokens: list[str], where: str) -> list[str]:
    if not tokens:
        raise ConfigError(f"{where} holds no token: one of at least {MIN_TOKEN} characters is wanted, or unset it")
    for i, token in enumerate(tokens, 1):
        if len(token) < MIN_TOKEN or not all("!" <= c <= "~" for c in token):
            raise ConfigError(f"{where}: token {i} needs at least {MIN_TOKEN} characters, all printable ASCII, without spaces")
    return tokens


def token_digest(token: str) -> str:
    """What is kept of a token: tokens are long and random, so a plain SHA-256 tells nothing about them."""
    return hashlib.sha256(token.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def error(status: int, code: str, message: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The one shape of every error: {"error": {"code", "message", "field"?}}."""
    body = {"code": code, "message": message} | ({"field": field} if field else {})
    return JSONResponse({"error": body}, status, dict(headers or {}))


class Refused(HTTPException):
    """An answer other than 200 that we decided on. FastAPI turns any other exception that is raised while it reads a body into a bare 400."""

    def __init__(self, status: int, code: str, message: str, field: str | None = None) -> None:
        super().__init__(status, message)
        self.code, self.field = code, field


class BearerTokens:
    """401 for every path but the open ones, unless the request has a token whose digest is known."""

    def __init__(self, app: ASGIApp, digests: Collection[str], open_paths: Collection[str]) -> None:
        self.app, self.digests, self.open_paths = app, list(digests), frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) in self.open_paths:
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
    """In place of tokens: 403 for a connection that reached this machine by another address than loopback."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_loopback((scope.get("server") or ("", 0))[0]):
            await error(403, "forbidden", "this endpoint runs without tokens and answers on loopback only")(scope, receive, send)
            return
        await self.app(scope, receive, send)


class BodyLimit:
    """413 by the declared length and, as that may be absent or a lie, by the bytes that arrive."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the body is larger than {self.limit} bytes"
        declared = _header(scope, b"content-length")
        if declared.isdecimal() and int(declared[:20]) > self.limit:
            await error(413, "body_too_large", message, headers={"Connection": "close"})(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            part = await receive()
            seen += len(part.get("body", b""))
            if seen > self.limit:
                raise Refused(413, "body_too_large", message)
            return part

        await self.app(scope, counted, send)


def _path(scope: Scope) -> str:
    """The path below the prefix under which Serve mounts the application."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _header(scope: Scope, name: bytes) -> str:
    return next((bytes(v).decode("latin-1") for k, v in scope["headers"] if k == name), "")
