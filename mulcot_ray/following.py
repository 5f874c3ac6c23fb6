"""A job on a cluster, watched from here: its log as it comes, over connections that break, and how it ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, NoReturn

from mulcot_ray.errors import EngineError

BLIND_S = 600.0  # how long a running job may be out of sight before it is left alone
INTERRUPTED = 130
POLL_S = 1.0


def follow(client: Any, job: str, where: str, ask: Callable[[str], bool], say: Callable[[str], None]) -> tuple[int, bool]:
    """The exit code, and whether the job was killed (rather than ended by itself, or stopped by somebody)."""
    try:
        return _outcome(asyncio.run(_watch(client, job, say)), say)
    except KeyboardInterrupt:
        if not ask(f"\n{job} is still running. Stop it?"):
            say(how_to_follow(job, where))
            return INTERRUPTED, False
    try:
        client.stop_job(job)
        say(f"Stopping {job} …")
        return _outcome(asyncio.run(_watch(client, job, lambda _: None)), say)
    except KeyboardInterrupt:
        say(how_to_follow(job, where))
        return INTERRUPTED, False


def _outcome(info: Any, say: Callable[[str], None]) -> tuple[int, bool]:
    code = info.driver_exit_code
    say(f"{info.submission_id}: {info.status.value.lower()}" + (f", exit code {code}" if code else ""))
    if info.status == "SUCCEEDED":
        return 0, False
    if info.status == "STOPPED":
        return INTERRUPTED, False
    if code is None:  # the supervisor died, or the job never started: Ray's message says which
        say(str(info.message or "").strip()[-2000:])
        return 1, True
    return (128 - code, True) if code < 0 else (code or 1, code >= 128)  # the shell between says 128 + the signal


async def _watch(client: Any, job: str, say: Callable[[str], None]) -> Any:
    """Follow the log to its end; the job's details. A connection that breaks is made again, and goes on where the log was."""
    shown, line, seen, waiting = 0, "", time.monotonic(), ""
    while True:
        try:
            info = await asyncio.to_thread(client.get_job_info, job)
            seen = time.monotonic()
            if info.status == "PENDING":
                if info.message and info.message != waiting:
                    waiting = info.message
                    say(waiting)
                await asyncio.sleep(POLL_S)
                continue
            at = 0
            async for text in client.tail_job_logs(job):  # from the beginning, each time
                new, at = text[max(0, shown - at) :], at + len(text)
                shown = max(shown, at)
                *lines, line = (line + new).split("\n")
                for whole in lines:
                    say(whole)
            info = await asyncio.to_thread(client.get_job_info, job)
            if info.status.is_terminal():
                if line:
                    say(line)
                return info
        except Exception as e:  # Ray's RuntimeError, requests' and aiohttp's: all of them a connection or a dashboard that is away
            if time.monotonic() - seen > BLIND_S:
                _lost(client, job, e)
        await asyncio.sleep(POLL_S)


def _lost(client: Any, job: str, e: BaseException) -> NoReturn:
    raise EngineError(
        f"{job} is out of sight for {BLIND_S:.0f} s ({type(e).__name__}); it may still be running. {how_to_follow(job, client.get_address())}"
    ) from e


def how_to_follow(job: str, where: str) -> str:
    return f"Follow it: ray job logs {job} --follow --address {where}; stop it: ray job stop {job} --address {where}"
