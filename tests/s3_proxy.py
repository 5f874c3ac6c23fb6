"""A proxy in front of an S3 server that treats chosen requests badly, or stops the world before or after one of them, and keeps a log of all.

The Host header goes on as it came, so that signatures hold: clients sign for the proxy's address, and the server checks what it is told.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import unquote, urlsplit

from in_a_thread import served

Do = Literal["pass", "answer", "cut", "lost", "half", "stall"]
CODES = {
    403: "AccessDenied",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    503: "SlowDown",
}


@dataclass
class Request:
    """A request as the log keeps it. `key` is what follows the bucket, decoded; `status` what the client was told (None: nothing); `port` the
    client's, by which its process can be found."""

    method: str
    bucket: str
    key: str
    query: str
    headers: dict[str, str]
    size: int
    at: float
    port: int
    did: list[str] = field(default_factory=list)
    status: int | None = None


@dataclass
class Rule:
    """What is done with the requests of `method` (a regular expression, as `key`; both match in full) from the `nth` match on, `times` times.

    pass: nothing. answer: `status` (and `code`) at once. cut: the connection is closed, the server never hears of it. lost: the server does it, then the
    connection is closed. half: half of the answer's body, then the connection is closed. stall: no byte for `seconds`, then it goes on.
    `before` and `after` are called with the request, before the server hears of it and after it has answered, in a thread of their own;
    where one returns False the connection is closed there and then.
    """

    method: str = ".*"
    key: str = ".*"
    do: Do = "pass"
    nth: int = 1
    times: int = 1
    status: int = 503
    seconds: float = 0.0
    before: Callable[[Request], bool | None] | None = None
    after: Callable[[Request], bool | None] | None = None
    query: str = ".*"
    code: str | None = None
    seen: int = 0

    def takes(self, r: Request) -> bool:
        if not (re.fullmatch(self.method, r.method) and re.fullmatch(self.key, r.key) and re.fullmatch(self.query, r.query)):
            return False
        self.seen += 1
        return self.nth <= self.seen < self.nth + self.times


class Cut(Exception):
    """The connection is to be closed."""


class S3Proxy:
    """Rules may be added and removed at any time; of several that take a request the first decides. `log` grows by every request."""

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.rules: list[Rule] = []
        self.log: list[Request] = []
        self.url = ""

    def count(self, method: str = ".*", key: str = ".*") -> int:
        """How many requests of the log match."""
        return sum(bool(re.fullmatch(method, r.method) and re.fullmatch(key, r.key)) for r in list(self.log))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if re.search(rb"(?i)\r\nexpect: *100-continue", head):
                    writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    await writer.drain()
                body = await _body(reader, head)
                request = _request(head, len(body), writer.get_extra_info("peername")[1])
                self.log.append(request)
                rule = next((x for x in list(self.rules) if x.takes(request)), Rule())
                request.did.append(rule.do)
                await _call(rule.before, request)
                if rule.do == "stall":
                    await asyncio.sleep(rule.seconds)
                if rule.do == "cut":
                    raise Cut
                if rule.do == "answer":
                    request.status = rule.status
                    writer.write(_refusal(rule, request))
                    await writer.drain()
                    continue
                if upstream is None:
                    upstream = await asyncio.open_connection(self.target.hostname, self.target.port, limit=1 << 20)
                upstream[1].write(re.sub(rb"(?i)\r\nexpect: [^\r]*", b"", head) + body)
                await upstream[1].drain()
                await self._answer(request, rule, upstream[0], writer)
        except (OSError, EOFError, Cut, asyncio.CancelledError):  # cancelled: the test is over
            pass
        finally:
            for w in (writer, upstream[1] if upstream else None):
                if w is not None:
                    with suppress(OSError, RuntimeError):
                        w.close()

    async def _answer(self, request: Request, rule: Rule, source: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await source.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        chunked = re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head)
        bare = request.method == "HEAD" or status in (204, 304)
        body = b"" if bare or not (length or chunked) else await _body(source, head)
        await _call(rule.after, request)
        if rule.do == "lost":
            raise Cut
        if rule.do == "half":
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            raise Cut
        request.status = status
        writer.write(head + body)
        await writer.drain()


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """As it is on the wire, chunks and all."""
    if re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        parts = []
        while True:
            line = await reader.readuntil(b"\r\n")
            size = int(line.split(b";")[0], 16)
            parts += [line, await reader.readexactly(size + 2)]
            if size == 0:
                return b"".join(parts)
    length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return await reader.readexactly(int(length[1])) if length else b""


def _request(head: bytes, size: int, port: int) -> Request:
    first, *lines = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    path, _, query = target.partition("?")
    bucket, _, key = unquote(path).lstrip("/").partition("/")
    headers = {k.strip().lower(): v.strip() for k, _, v in (x.partition(":") for x in lines if x)}
    return Request(method, bucket, key, unquote(query), headers, size, time.monotonic(), port)


def _refusal(rule: Rule, r: Request) -> bytes:
    status, code = rule.status, rule.code or CODES.get(rule.status, "InternalError")
    body = "" if r.method == "HEAD" else f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>a bad day</Message></Error>'
    return f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()


async def _call(what: Callable[[Request], bool | None] | None, request: Request) -> None:
    if what is not None and await asyncio.to_thread(what, request) is False:
        raise Cut


@contextmanager
def s3_proxy(target: str) -> Iterator[S3Proxy]:
    """A proxy in a thread of its own."""
    proxy = S3Proxy(target)
    with served(proxy.serve) as proxy.url:
        yield proxy
