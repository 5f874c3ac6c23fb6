"""A reverse proxy that treats a share of the requests badly, as gateways do on a bad day; the others it passes on."""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from in_a_thread import served

FAULTS = ("429", "500", "stall", "cut")


@dataclass
class FaultyProxy:
    """In front of `target`. Which requests are treated how is drawn from the seed, in the order in which they come.

    429: with `Retry-After: 1`. 500: at once. stall: no answer for `stall_s`, then the connection is closed. cut: the answer's head and
    half of its body. `counts` says how often each was done, and how many were passed on ("passed"). `share` may be changed at any time.
    """

    target: str
    share: float
    seed: int = 0
    faults: Sequence[str] = FAULTS
    stall_s: float = 60.0
    url: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.parts = urlsplit(self.target)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, EOFError, asyncio.CancelledError):
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
            body = await reader.readexactly(int(length[1])) if length else b""
            fault = self.rng.choice(self.faults) if self.rng.random() < self.share else "passed"
            self.counts[fault] += 1
            if fault == "stall":
                await asyncio.sleep(self.stall_s)
            elif fault in ("429", "500"):
                writer.write(f"HTTP/1.1 {fault} Bad day\r\nRetry-After: 1\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
            else:
                answer = await self._ask(head, body)
                split = answer.index(b"\r\n\r\n") + 4
                writer.write(answer if fault == "passed" else answer[: split + (len(answer) - split) // 2])
            await writer.drain()
        with suppress(OSError):
            writer.close()

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        """The target's whole answer; a connection a request, so that its end is the answer's end."""
        reader, writer = await asyncio.open_connection(self.parts.hostname, self.parts.port)
        writer.write(re.sub(rb"(?i)\r\nconnection: [^\r]*", b"", head)[:-4] + b"\r\nConnection: close\r\n\r\n" + body)
        await writer.drain()
        answer = await reader.read()
        writer.close()
        return answer


@contextmanager
def faulty_proxy(target: str, share: float, *, seed: int = 0, faults: Sequence[str] = FAULTS, stall_s: float = 60.0) -> Iterator[FaultyProxy]:
    """A proxy in a thread of its own; `url` is what `target` was, at the proxy."""
    proxy = FaultyProxy(target, share, seed, faults, stall_s)
    with served(proxy.serve) as address:
        proxy.url = address + proxy.parts.path
        yield proxy
