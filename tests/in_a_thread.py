"""A server of asyncio streams in a thread of its own, for the proxies."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager


@contextmanager
def served(serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> Iterator[str]:
    """The address at which `serve` answers connections, as http://127.0.0.1:PORT."""
    loop, ready, found = asyncio.new_event_loop(), threading.Event(), list[asyncio.Server]()

    async def start() -> None:
        found.append(await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20))
        ready.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        if not ready.wait(10):
            raise RuntimeError("the proxy did not start")
        yield f"http://127.0.0.1:{found[0].sockets[0].getsockname()[1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
