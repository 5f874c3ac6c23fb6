"""How the ledger grows: a night's look-ups against ledgers of 1, 3 and 10 million entries, and what that makes of 100 million.

    python benchmarks/ledger_growth.py [--millions 1 3 10] [--night 1000000] [--new 0.01] [--repeat 3]

The ledger is one large generation and seven small ones, as before a compaction, with scored labels (no rationales) of random posts. The
night's posts are random posts of the ledger and new ones, in buckets as the intake cuts a dump of 300 bytes a row. Each measurement is a
process of its own; the median counts. "keys" is a night of nothing but new posts: of the ledger, only keys are read. Data lies in a
temporary folder and thus, mostly, in the page cache; bytes read are stated, for what they cost elsewhere.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from mulcot_ray.labeling.ledger import ENTRY, PART_BYTES, Ledger, as_bytes, as_keys
from mulcot_ray.records import LABELS
from mulcot_ray.storage import Store

ENTRY_BYTES = 42  # about, to cut the large generation as a compaction does
ROW_BYTES, BUCKET_BYTES = 300, 64 << 20  # of a night's input
SMALL = 7


def some_keys(rng: np.random.Generator, n: int, bucket: int, buckets: int) -> pa.Array:
    """Random keys of a bucket, sorted."""
    raw = rng.integers(0, 256, (n, 16), np.uint8)
    width = 256 // buckets
    raw[:, 0] = rng.integers(bucket * width, (bucket + 1) * width, n)
    return as_keys(np.unique(raw.view("S16").ravel()))


def entries(rng: np.random.Generator, keys: pa.Array) -> pa.Table:
    p = rng.dirichlet([0.5, 0.5, 0.5], len(keys))
    words = {"label": pa.array([str(s) for s in LABELS]).take(pa.array(p.argmax(1))), "answered_by": pa.repeat("student", len(keys)), "scored_on": pa.repeat("2026-11-22", len(keys))}  # fmt: skip
    made = {"key": keys, "negative": p[:, 0], "neutral": p[:, 1], "positive": p[:, 2], "label_mass": rng.uniform(0.9, 1, len(keys)), **words}
    return pa.table([made.get(f.name, pa.nulls(len(keys), f.type)) for f in ENTRY], schema=ENTRY)


def power_of_two(n: float) -> int:
    return min(256, 1 << max(0, int(np.ceil(np.log2(max(1.0, n))))))


def build(ledger: Ledger, size: int, night: int, new: float) -> list[bytes]:
    """The ledger; returns the night's keys by bucket, sorted, a string of 16 bytes each."""
    rng = np.random.default_rng(size)
    small = int(night * new)
    known: list[np.ndarray] = []
    for name, n in (("base", size - SMALL * small), *((f"night-{i}", small) for i in range(SMALL))):
        parts = power_of_two(n * ENTRY_BYTES / PART_BYTES if name == "base" else night * ROW_BYTES / BUCKET_BYTES)
        files = []
        for b in range(parts):
            keys = some_keys(rng, n // parts, b, parts)
            files.append(ledger.put(name, b, entries(rng, keys)))
            known.append(rng.choice(as_bytes(keys), int(len(keys) * min(1.0, night * (1 - new) / size)), replace=False))
        ledger.add(name, [f for f in files if f])
    keys = np.unique(np.concatenate([*known, as_bytes(some_keys(rng, small, 0, 1))]))
    return by_bucket(keys, night)


def by_bucket(keys: np.ndarray, night: int) -> list[bytes]:
    buckets = power_of_two(night * ROW_BYTES / BUCKET_BYTES)
    edges = np.searchsorted(np.frombuffer(keys.tobytes(), np.uint8)[::16], np.arange(buckets + 1) * (256 // buckets))
    return [keys[a:b].tobytes() for a, b in zip(edges, edges[1:], strict=False)]


def measure(root: str, buckets: list[bytes]) -> tuple[float, float, float, int]:
    """Seconds and CPU seconds of all look-ups, peak memory in MB above that of a process that has looked up nothing, entries found."""
    ledger, found = Ledger(Store(root), "v"), 0
    ledger.lookup(pa.array([bytes(16)], pa.binary(16)))
    view, before = ledger.view(), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here; getrusage would have the parent's in it
    started, cpu = time.perf_counter(), time.process_time()
    for raw in buckets:
        found += ledger.lookup(as_keys(np.frombuffer(raw, "S16")), view).num_rows
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return seconds, cpu, resident("VmHWM") - before, found


def resident(name: str) -> float:
    """Memory of this process in MB."""
    return next(int(line.split()[1]) / 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--millions", type=float, nargs="+", default=[1, 3, 10])
    ap.add_argument("--night", type=int, default=1_000_000)
    ap.add_argument("--new", type=float, default=0.01)
    ap.add_argument("--repeat", type=int, default=3)
    a = ap.parse_args()
    columns = ["entries M", "known s", "known cpu-s", "keys s", "keys cpu-s", "peak MB", "B/entry", "key B/entry", "files", "index kB"]
    print(f"a night of {a.night:,} rows, {a.new:.0%} new; {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    print(" | ".join(f"{c:>11}" for c in columns), flush=True)
    table = []
    spawn = multiprocessing.get_context("spawn")
    for millions in a.millions:
        with tempfile.TemporaryDirectory() as root:
            ledger = Ledger(Store(root), "v")
            night = build(ledger, int(millions * 1e6), a.night, a.new)
            fresh = by_bucket(as_bytes(some_keys(np.random.default_rng(7), a.night, 0, 1)), a.night)
            runs: dict[str, list[tuple[float, float, float, int]]] = {"night": [], "fresh": []}
            for _ in range(a.repeat):
                for name, keys in (("night", night), ("fresh", fresh)):
                    with spawn.Pool(1) as pool:
                        runs[name].append(pool.apply(measure, (root, keys)))
            rows = sum(len(b) for b in night) // 16
            assert all(r[3] == rows - int(a.night * a.new) for r in runs["night"]), (runs, rows)
            assert all(r[3] == 0 for r in runs["fresh"])
            middle = {name: [statistics.median(r[i] for r in found) for i in range(3)] for name, found in runs.items()}
            files = [f for g in ledger.view() for f in g["files"]]
            size, n = sum(f["bytes"] for f in files), ledger.entries()
            row = [
                n / 1e6, *middle["night"][:2], *middle["fresh"][:2], middle["night"][2], size / n, key_bytes(ledger) / n, len(files),
                Path(root, "ledger/v/index.json").stat().st_size / 1e3,
            ]  # fmt: skip
            table.append(row)
            print(" | ".join(f"{x:>11.2f}" for x in row), flush=True)
    if len(table) > 1:
        found = np.array(table)
        line = [100.0]
        for i in range(1, len(columns)):
            slope, base = np.polyfit(found[:, 0], found[:, i], 1)
            line.append(found[-1, i] if columns[i] in ("peak MB", "B/entry", "key B/entry") else slope * 100 + base)
        print(" | ".join(f"{x:>11.2f}" for x in line), " (times, files, index by slope)")


def key_bytes(ledger: Ledger) -> int:
    import pyarrow.parquet as pq

    total = 0
    for f in (f for g in ledger.view() for f in g["files"]):
        m = pq.read_metadata(ledger.store.path(f["key"]))
        total += sum(m.row_group(g).column(0).total_compressed_size for g in range(m.num_row_groups))
    return total


if __name__ == "__main__":
    main()
