"""A night of a million synthetic posts through the scripted engine: rows a second by step, and the driver's memory while it grows.

    python benchmarks/night_million.py [--rows 250000,1000000]

Everything is real but the engine: intake, match, chunks on Ray Data, commits, assembly, manifest, ledger, in a local folder. Then the same dump is
labelled again as the next night, when the ledger knows all. A scripted answer costs a few microseconds, so what is measured is the system around
the engine. Memory is the driver process's own, sampled every 0.2 s, in MB above what it had before the night.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from mulcot_ray.cluster import session
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.labeling.night import night
from mulcot_ray.labeling.version import NightSettings, version_of
from mulcot_ray.recipe import EngineRuntime, load_recipe, load_runtime
from mulcot_ray.storage import Store

RECIPE = load_recipe("tiny")
SETTINGS = NightSettings(name="million")
RUNTIME = load_runtime("laptop").model_copy(update={"rows_per_chunk": 2048})
WORDS = [
    *[
        "the",
        "a",
        "new",
        "old",
        "good",
        "bad",
        "day",
        "night",
        "train",
        "coffee",
        "song",
        "rain",
        "game",
        "win",
        "lose",
        "street",
        "park",
        "friend",
        "city",
        "light",
    ]
]


def script(messages: list, sampling: object) -> str:
    """A label from the length of the post."""
    return '"Prediction": "' + ("negative", "neutral", "positive")[len(messages[-1]["content"][-1]["text"]) % 3] + '"'


def write_dump(folder: Path, rows: int) -> None:
    rng = random.Random(7)
    folder.mkdir(parents=True)
    for file in range(8):
        with (folder / f"posts-{file}.jsonl").open("w") as f:
            for i in range(file, rows, 8):
                f.write(json.dumps({"id": f"{i:09d}", "text": f"{' '.join(rng.choices(WORDS, k=12))} {i}"}) + "\n")


@contextlib.contextmanager
def memory() -> Iterator[list[float]]:
    """The process's resident memory, in MB above the start, every 0.2 s."""
    me, seen, stop = psutil.Process(), list[float](), threading.Event()
    start = me.memory_info().rss

    def watch() -> None:
        while not stop.wait(0.2):
            seen.append((me.memory_info().rss - start) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def quiet(step: str) -> Iterator:
    yield lambda *_: None


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--rows", default="250000,1000000")
    a = ap.parse_args()
    with session(RUNTIME):
        for rows in map(int, a.rows.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                write_dump(Path(folder) / "in" / "dt=2026-11-21", rows)
                store = Store(f"{folder}/root")
                spec = EngineSpec(
                    "fake", "fake", RECIPE.contract, "float32", 1024, 42, "cpu", EngineRuntime(replicas=2, max_num_seqs=64), "scripted", script=script
                )
                version = version_of(store, "student", RECIPE, RUNTIME, SETTINGS, {"student": spec})
                for date in ("2026-11-21", "2026-11-22"):
                    started = time.time()
                    with memory() as seen:
                        m, _ = night(
                            store, date, f"{folder}/in/dt=2026-11-21", version=version, settings=SETTINGS, runtime=RUNTIME, steps=quiet
                        )  # fmt: skip
                    took, s = time.time() - started, m.stats
                    assert m.rows == rows and s["fates"]["scored"] == (rows if date == "2026-11-21" else 0)
                    steps = ", ".join(f"{k} {v:.0f} s" for k, v in s["seconds_by_step"].items())
                    print(
                        f"{rows:,} rows, {s['fates']['scored']:,} asked: {took:.0f} s, {rows / took:,.0f} rows/s ({steps}); "
                        f"driver +{max(seen):.0f} MB at most, +{seen[len(seen) // 2]:.0f} MB half-way",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
