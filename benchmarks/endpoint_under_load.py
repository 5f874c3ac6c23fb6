"""What clients of the endpoint meet while it is updated, loses a replica, loses an engine, and is asked ten times what it can do.

    python benchmarks/endpoint_under_load.py [--proxy haproxy|python] [--clients 8] [--only update,replica,engine,overload]

Clients ask in a loop, one post each at a time. Each scenario prints what was answered (by status, or by what broke), the longest that a
client waited, and how long it took until a request that was sent after the blow was answered. One replica, one machine: while a new one
starts, there is none.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp
import psutil

from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.serving.run import Endpoint
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
MODEL, NEXT = "builtin:student", "builtin:assistant"
BODY = json.dumps({"text": "What a day at the beach!", "aspect": "beach"}).encode()
BEFORE_S, AFTER_S, LIMIT_S = 3.0, 5.0, 180.0


@dataclass
class Seen:
    """What clients saw. `answered` holds (sent, got) of each 200, in seconds of the monotonic clock."""

    outcomes: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, float]] = field(default_factory=list)
    longest: float = 0.0

    def recovered(self, blow: float) -> float | None:
        """Seconds from the blow to the first answer of a request that was sent after it."""
        return min((got - blow for sent, got in self.answered if sent > blow), default=None)


async def clients(endpoint: Endpoint, n: int, seen: Seen, stop: Callable[[], bool], pause: float = 0.0) -> None:
    async with aiohttp.ClientSession(
        headers={**endpoint.headers, "Content-Type": "application/json"},
        connector=aiohttp.TCPConnector(limit=n),
        timeout=aiohttp.ClientTimeout(LIMIT_S),
    ) as session:

        async def client() -> None:
            while not stop():
                sent = time.monotonic()
                try:
                    async with session.post(f"{endpoint.url}/v1/sentiment", data=BODY) as answer:
                        body = await answer.read()
                        what = str(answer.status)
                        if answer.status == 200:
                            seen.models[json.loads(body)["model"]] += 1
                            seen.answered.append((sent, time.monotonic()))
                        else:
                            what += f" {answer.headers.get('x-error-code', body[:60])}"
                except (aiohttp.ClientError, TimeoutError) as e:
                    what = type(e).__name__
                seen.outcomes[what] += 1
                seen.longest = max(seen.longest, time.monotonic() - sent)
                if what != "200" or pause:
                    await asyncio.sleep(pause or 0.2)

        await asyncio.gather(*(client() for _ in range(n)))


def process(name: str) -> psutil.Process:
    return max((p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())), key=lambda p: p.create_time())


def memory(*names: str) -> dict[str, int]:
    """MB by name."""
    return {n: process(n).memory_info().rss >> 20 for n in names}


def under_blow(title: str, endpoint: Endpoint, n: int, blow: Callable[[], None], wait: Callable[[Seen, float], bool]) -> None:
    """Clients before, during and after the blow, until `wait` says that it is over."""
    seen, struck = Seen(), [0.0]
    end = [0.0]

    def strike() -> None:
        time.sleep(BEFORE_S)
        struck[0] = time.monotonic()
        blow()

    def stop() -> bool:
        now = time.monotonic()
        if struck[0] and not end[0] and (wait(seen, struck[0]) or now - struck[0] > LIMIT_S):
            end[0] = now + AFTER_S
        return bool(end[0]) and now > end[0]

    thread = threading.Thread(target=strike)
    thread.start()
    asyncio.run(clients(endpoint, n, seen, stop))
    thread.join()
    back = seen.recovered(struck[0])
    failed = sum(seen.outcomes.values()) - seen.outcomes["200"]
    print(f"{title}: {failed} of {sum(seen.outcomes.values())} failed; {dict(seen.outcomes)}; models {dict(seen.models)}; longest {seen.longest:.1f} s; "
          f"answered again {'never' if back is None else f'{back:.1f} s'} after it, over after {end[0] - AFTER_S - struck[0]:.1f} s", flush=True)  # fmt: skip


def overload(endpoint: Endpoint, places: int, seconds: float = 15.0) -> None:
    names = ("ServeReplica", "ProxyActor")
    before = memory(*names)
    seen, end = Seen(), time.monotonic() + seconds
    asyncio.run(clients(endpoint, 10 * 2 * places, seen, lambda: time.monotonic() > end))
    during = memory(*names)
    time.sleep(3)
    calm, end = Seen(), time.monotonic() + 5
    asyncio.run(clients(endpoint, 4, calm, lambda: time.monotonic() > end))
    refused = 1 - seen.outcomes["200"] / sum(seen.outcomes.values())
    print(f"overload ×10 ({10 * 2 * places} clients): {refused:.0%} refused, {dict(seen.outcomes)}; longest {seen.longest:.1f} s; MB before {before}, "
          f"during {during}, after {memory(*names)}; then {dict(calm.outcomes)}, longest {calm.longest:.2f} s", flush=True)  # fmt: skip


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--proxy", choices=("haproxy", "python"), default="haproxy")
    ap.add_argument("--clients", type=int, default=8)
    ap.add_argument("--only", default="update,replica,engine,overload")
    a = ap.parse_args()
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if a.proxy == "haproxy" else "0"
    from mulcot_ray.serving.app import Options, application
    from mulcot_ray.serving.run import APP, serving
    from mulcot_ray.serving.tokens import known_tokens

    os.environ["MULCOT_TOKENS"] = "a-token-of-this-benchmark"
    places = 16
    runtime = RUNTIME.model_copy(update={"student": RUNTIME.student.model_copy(update={"max_num_seqs": places})})
    print(f"proxy {a.proxy}, {a.clients} clients, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")

    def kill(name: str) -> Callable[[], None]:
        return lambda: process(name).send_signal(signal.SIGKILL)

    def back(seen: Seen, struck: float) -> bool:
        return seen.recovered(struck) is not None and time.monotonic() - struck > 3

    with tempfile.TemporaryDirectory() as folder, serving(Store(folder), MODEL, RECIPE, runtime) as endpoint:
        from ray import serve

        def update() -> None:
            app = application(Store(folder), Options(model=NEXT), RECIPE, runtime, known_tokens(os.environ))
            serve.run(app, name=APP, route_prefix="/")

        for name in a.only.split(","):
            if name == "update":
                under_blow("rolling update", endpoint, a.clients, update, lambda seen, _: seen.models[NEXT] > 100)
            elif name == "replica":
                under_blow("replica killed", endpoint, a.clients, kill("ServeReplica"), back)
            elif name == "engine":
                under_blow("engine killed", endpoint, a.clients, kill("VLLM::EngineCore"), back)
            elif name == "overload":
                overload(endpoint, places)


if __name__ == "__main__":
    main()
