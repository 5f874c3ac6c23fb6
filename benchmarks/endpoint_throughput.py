"""Requests per second and latency of the endpoint against a bare `vllm serve`: same model folder, same prompts and pictures, one label token.

    python benchmarks/endpoint_throughput.py [--seconds 4] [--repeat 5] [--concurrency 32] [--proxy haproxy|python] [--check 500]

Both servers stand side by side for the whole run and are asked in turns, so that whatever else the machine does meets both; medians of
the turns are printed, with their ratio. Processor time is read per process and divided by the requests it was spent on: with a tiny model
it is the limit, and less prone to noise than rates are.

--check N also sends N posts by the batch route and compares them with `mulcot label`: same labels, probabilities within 1e-4.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from mulcot_ray.artifacts import need, read_rows, resolve_model
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.prompts import label_token_ids
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import LABELS, Post, Prediction, Task, from_row
from mulcot_ray.storage import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

MODEL = "builtin:student"
RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
Cost = dict[str, float]


def endpoint_bodies(posts: list[Post], pictures: list[str]) -> list[bytes]:
    return [json.dumps({"text": p.text, "aspect": p.aspect, "image": picture}).encode() for p, picture in zip(posts, pictures, strict=True)]


def vllm_bodies(posts: list[Post], pictures: list[str], folder: Path) -> list[bytes]:
    """The classification prompt as chat messages, answered by one of the three label tokens with their log-probabilities."""
    from transformers import AutoTokenizer

    ids = label_token_ids(AutoTokenizer.from_pretrained(str(folder)), RECIPE.contract)
    more = {
        "model": folder.name, "max_tokens": 1, "temperature": 0, "logprobs": True, "add_generation_prompt": False, "continue_final_message": True,
        "logprob_token_ids": ids, "allowed_token_ids": ids, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    bodies = []
    for post, picture in zip(posts, pictures, strict=True):
        messages = RECIPE.contract.messages(Task.CLASSIFICATION, post)
        for part in messages[-1]["content"]:
            if part["type"] == "image":
                part.update({"type": "image_url", "image_url": {"url": "data:image/png;base64," + picture}})
        begun = {"role": "assistant", "content": RECIPE.contract.label_prefix}
        bodies.append(json.dumps({**more, "messages": [*messages, begun]}).encode())
    return bodies


def png(post: Post) -> str:
    """The prepared picture: neither server has to resize it."""
    out = io.BytesIO()
    image = post_image(post, RECIPE.contract.image.side)
    assert image is not None
    image.save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


async def load(url: str, headers: dict[str, str], bodies: list[bytes], concurrency: int, seconds: float) -> tuple[float, list[float], int]:
    """Requests per second, their latencies in seconds, sorted, and how many were not answered with 200."""
    latencies: list[float] = []
    bad = sent = 0
    connector = aiohttp.TCPConnector(limit=concurrency)
    async with aiohttp.ClientSession(headers={**headers, "Content-Type": "application/json"}, connector=connector) as session:
        end = time.perf_counter() + seconds

        async def client() -> None:
            nonlocal bad, sent
            while (started := time.perf_counter()) < end:
                body = bodies[sent % len(bodies)]
                sent += 1
                async with session.post(url, data=body) as answer:
                    await answer.read()
                    bad += answer.status != 200
                latencies.append(time.perf_counter() - started)

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(concurrency)))
        return len(latencies) / (time.perf_counter() - started), sorted(latencies), bad


def processor_seconds() -> dict[int, tuple[str, float]]:
    """Name and processor time of each of our processes."""
    found = {}
    for p in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            line = p.cmdline()
            name = (
                "this load generator" if p.pid == os.getpid() else line[0] if line and line[0].startswith(("ray::", "VLLM")) else " ".join(line[:3])
            )
            found[p.pid] = (name.split("/")[-1][:44], sum(p.cpu_times()[:2]))
        except psutil.Error:
            continue
    return found


def turn(url: str, headers: dict[str, str], bodies: list[bytes], a: argparse.Namespace) -> dict[str, Any]:
    before = processor_seconds()
    rate, latencies, bad = asyncio.run(load(url, headers, bodies, a.concurrency, a.seconds))
    cost: Cost = defaultdict(float)
    for pid, (name, spent) in processor_seconds().items():
        cost[name] += (spent - before.get(pid, (name, 0.0))[1]) * 1000 / len(latencies)
    ours = {k: round(v, 2) for k, v in sorted(cost.items(), key=lambda x: -x[1]) if v >= 0.05}
    n = len(latencies)
    return {"rate": rate, "p50": latencies[n // 2] * 1000, "p99": latencies[int(n * 0.99)] * 1000, "bad": bad, "cost": ours}


def check(store: Store, url: str, headers: dict[str, str], n: int) -> None:
    """N posts by the batch route against `mulcot label` of the same table."""
    import httpx

    from mulcot_ray.labeling.label import label

    import_sample(store, "checked", train=n, validation=0, test=0, seed=11)
    posts = [from_row(Post, r) for r in read_rows(store, need(store, "posts", "checked"))]
    manifest, _ = label(store, "checked", posts="checked", model=MODEL, recipe=RECIPE, runtime=RUNTIME, progress=lambda *_: None)
    said = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, manifest))}
    lines = "\n".join(
        json.dumps({"id": p.post_id, "text": p.text, "aspect": p.aspect, "image": base64.b64encode(p.image_bytes or b"").decode()}) for p in posts
    )
    started = time.perf_counter()
    with httpx.Client(timeout=300, trust_env=False) as client:
        answer = client.post(f"{url}/v1/sentiment/batch", content=lines, headers={**headers, "Content-Type": "application/x-ndjson"})
    took = time.perf_counter() - started
    found = [json.loads(x) for x in answer.text.splitlines()]
    assert [x["id"] for x in found] == [p.post_id for p in posts], "order is kept"
    labels = sum(x["label"] == said[x["id"]].label for x in found)
    worst = max(abs(x["probabilities"][s] - getattr(said[x["id"]], s)) for x in found for s in LABELS)
    print(f"batch: {n} posts in {took:.1f} s ({n / took:.0f}/s); the labels of `mulcot label`: {labels} of {n}; largest difference {worst:.1e}")
    assert labels == n and worst <= 1e-4


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seconds", type=float, default=4.0)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--concurrency", type=int, default=32)
    ap.add_argument("--proxy", choices=("haproxy", "python"), default="haproxy")
    ap.add_argument("--check", type=int, default=0, metavar="N")
    a = ap.parse_args()
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if a.proxy == "haproxy" else "0"
    from vllm_server import vllm_server

    from mulcot_ray.serving.run import serving

    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        model, _ = resolve_model(store, MODEL)
        import_sample(store, "sample", train=256, validation=0, test=0, seed=3)
        posts = [from_row(Post, r) for r in read_rows(store, need(store, "posts", "sample"))]
        pictures = [png(p) for p in posts]
        with serving(store, MODEL, RECIPE, RUNTIME) as endpoint, vllm_server(model) as (url, key):
            sides = {
                "endpoint": (f"{endpoint.url}/v1/sentiment", endpoint.headers, endpoint_bodies(posts, pictures)),
                "vllm serve": (f"{url}/chat/completions", {"Authorization": f"Bearer {key}"}, vllm_bodies(posts, pictures, model)),
            }
            turns: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
            for i in range(a.repeat + 1):
                for side, (where, headers, bodies) in sides.items():
                    result = turn(where, headers, bodies, a)
                    if i:  # the first turn warms both
                        turns[side].append(result)
                        print(
                            f"{side:>10}: {result['rate']:6.1f}/s  p50 {result['p50']:4.0f} ms  p99 {result['p99']:4.0f} ms  {result['cost']}",
                            flush=True,
                        )
            if a.check:
                check(store, endpoint.url, endpoint.headers, a.check)
    median = {side: {k: statistics.median(t[k] for t in found) for k in ("rate", "p50", "p99")} for side, found in turns.items()}
    ours, theirs = median["endpoint"], median["vllm serve"]
    pairs = statistics.median(e["rate"] / v["rate"] for e, v in zip(turns["endpoint"], turns["vllm serve"], strict=True))
    load = os.getloadavg()[0]
    print(f"medians of {a.repeat}, concurrency {a.concurrency}, proxy {a.proxy}, {os.cpu_count()} cores, load {load:.1f}:")
    for side, m in median.items():
        print(f"  {side:>10}: {m['rate']:.1f}/s, p50 {m['p50']:.0f} ms, p99 {m['p99']:.0f} ms")
    print(f"  endpoint ÷ vllm serve: rate {ours['rate'] / theirs['rate']:.2f} (of pairs {pairs:.2f}), p99 {ours['p99'] / theirs['p99']:.2f}")
    print(f"  not answered with 200: { ({side: sum(t['bad'] for t in found) for side, found in turns.items()}) }")


if __name__ == "__main__":
    main()
