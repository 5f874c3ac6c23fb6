"""Kill the night at each boundary of its commits, run it again, and compare with an undisturbed one, byte by byte.

    python benchmarks/nightly_kills.py [--points 80] [--posts 600] [--nights 8] [--seed 1] [--no-engine]

A night runs on a Ray head of our own and on a real S3 server, behind a proxy that sees every request: before or after the server hears of a
chosen PUT, it sends SIGKILL to the driver, to the process that wrote (a task, or the actor that scores), to the engine, or to the server, which
is started again two seconds later. A killed driver is started again at once. The scripted engine is a process of its own; with the
tiny student in vLLM a last night is killed four times (not with --no-engine).

Exits with 1 unless every night ends as the undisturbed one: the same files with the same checksums, every row of the dump once, published once,
nothing left over; and unless what was asked twice is at most what an actor had in flight, for each kill while it scored. Then two
drivers at once, and one that slept through its lease.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import nights
from night_site import DATE, IN_FLIGHT, KINDS, ORDER, Night, Point, Site, hunted, of_mark, rows_of, same, site, two_at_once
from s3_proxy import Request, Rule

from mulcot_ray.artifacts import need
from mulcot_ray.labeling.night import night_rows
from mulcot_ray.storage import Store


def points(seed: int, counts: dict[str, int], most: int) -> list[Point]:
    """The driver before and after each kind; server and writer before or after each; the engine at what the actor writes."""
    rng = random.Random(seed)
    found = [Point(k, "driver", w) for k in KINDS for w in ("before", "after")]
    for k, (who, _) in KINDS.items():
        found += [Point(k, v, rng.choice(["before", "after"])) for v in ("server", *(["writer"] if who != "d" else []))]
        found += [Point(k, "engine", w) for w in ("before", "after") if k in ("answers", "answers' rejects")]
    found = [replace(p, nth=rng.randint(1, max(1, counts[p.kind] // 3))) for p in found]
    return found if len(found) <= most else rng.sample(found, most)


def slept(at: Site, root: str) -> str:
    """A driver is stopped while it scores, for longer than its lease of four seconds; another does the night; then it wakes. Returns what it says."""
    stopped = threading.Event()

    def stop(_: Request) -> None:
        os.kill(sleeper.pid, signal.SIGSTOP)
        stopped.set()

    at.proxy.rules[:] = [Rule("PUT", f"[^/]+/{KINDS['answers'][1]}", nth=2, after=stop)]
    sleeper = at.start(at.command(root, lease=4.0))
    said = at.said
    assert stopped.wait(120), said.read_text()
    time.sleep(5)
    code = at.run(at.command(root, lease=4.0))
    assert code == 0, at.said.read_text()
    os.kill(sleeper.pid, signal.SIGCONT)
    assert sleeper.wait(120) == 1
    last = said.read_text().strip().splitlines()[-1]
    assert last.startswith("Busy: ") and "took it over" in last, said.read_text()
    return last


def with_vllm(at: Site, posts: int, seed: int) -> str:
    """`mulcot nightly` as it is, with a Ray of its own and the tiny student in vLLM: server, engine, actor and driver are killed while it scores.

    vLLM's answers differ in their last bits with what else is in a batch: labels must be equal, and probabilities to 0.001.
    """
    dump = Store(f"s3://{at.server.bucket}/pictured")
    dump.write(f"dt={DATE}/posts.jsonl", b"".join(json.dumps(r).encode() + b"\n" for r in nights.posts(posts, seed, pictures=True)))
    tables, seconds = [], []
    chain = [
        Point("found", "server", "after"),
        Point("answers", "engine", "before"),
        Point("answers", "writer", "after"),
        Point("answers", "driver", "after"),
    ]
    for name, due in (("pictured-calm", []), ("pictured-hunted", chain)):
        root = f"s3://{at.server.bucket}/{name}"
        at.due, at.met, started = [*due], [], time.monotonic()
        for runs in range(1, 4):
            at.mark = uuid.uuid4().hex
            code = at.run(
                [str(Path(sys.executable).with_name("mulcot")), "nightly", "--input", dump.root, "--model", "builtin:student", "--root", root],
                joined=False,
            )
            for p in of_mark(at.mark):  # what a killed driver has left of its Ray ends by itself, in a while
                with contextlib.suppress(psutil.NoSuchProcess):
                    p.kill()
            if code == 0:
                break
            assert code == -signal.SIGKILL, f"{root}: run {runs} ended with {code}:\n{at.said.read_text()[-3000:]}"
        assert len(at.met) == len(due) and code == 0, f"{root}: ended with {code}, never met: {at.due}"
        store = Store(root)
        m = need(store, "nights", store.names("nights")[0])
        tables.append({r["post_id"]: r for r in night_rows(store, m)})
        seconds.append(time.monotonic() - started)
        assert m.rows == m.rows_in == len(tables[-1]) == posts
    one, two = tables
    assert all(one[i]["label"] == two[i]["label"] and abs(one[i]["positive"] - two[i]["positive"]) < 1e-3 for i in one), "labels differ"
    begun = [r.key for r in at.proxy.log if r.method == "PUT" and r.status == 200 and re.fullmatch(f"pictured-hunted/{KINDS['attempt'][1]}", r.key)]
    chunks = -(-posts // 64)
    twice = sum(not k.endswith("brake") for k in begun) - chunks
    assert twice <= 3 * IN_FLIGHT, f"{twice} chunks were begun again"
    return f"{len(chain)} kills, {runs} runs, {seconds[1]:.0f} s against {seconds[0]:.0f} s; {twice} of {chunks} chunks begun again"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--points", type=int, default=1000)
    ap.add_argument("--posts", type=int, default=600)
    ap.add_argument("--nights", type=int, default=8)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--no-engine", action="store_true")
    a = ap.parse_args()
    with site(a.posts, a.seed) as at:
        done = kills(at, a.posts, a.seed, a.points, a.nights)
        show([p for n in done for p in n.met])
        lines, calm, bucket = rows_of(a.posts, a.seed), done[0].root, f"s3://{at.server.bucket}"
        print(f"two at once: {two_at_once(at, f'{bucket}/both')}", flush=True)
        same(calm, f"{bucket}/both", lines)
        print(f"slept: {slept(at, f'{bucket}/slept')}", flush=True)
        same(calm, f"{bucket}/slept", lines)
        if not a.no_engine:
            print(f"mulcot nightly with vLLM: {with_vllm(at, 640, a.seed)}", flush=True)


def kills(at: Site, posts: int, seed: int, most: int, count: int) -> list[Night]:
    """The undisturbed night, then those with kills. What a night did not come to, because another task was faster, goes to one more."""
    lines, calm = rows_of(posts, seed), f"s3://{at.server.bucket}/calm"
    done = [hunted(at, calm, [])]
    m = same(calm, calm, lines)
    counts = {k: at.proxy.count("DELETE" if k == "clearing" else "PUT", f"calm/{key}") for k, (_, key) in KINDS.items()}
    print(
        f"undisturbed: {done[0].seconds:.0f} s; {m.rows_in} rows in = {m.rows} labels, {m.rejects} rejects, {m.stats['repeated']} repeated",
        flush=True,
    )
    assert all(counts.values()), f"never written: {[k for k, n in counts.items() if not n]}"
    left = sorted(points(seed, counts, most), key=lambda p: ORDER.index(p.kind))
    while left:
        chains = [left[i::count] for i in range(min(count, len(left)))] if len(done) == 1 else [left]
        left = []
        for chain in chains:
            night = hunted(at, f"s3://{at.server.bucket}/night-{len(done):02d}", chain)
            same(calm, night.root, lines)
            assert night.twice <= night.allowed, f"{night.root}: {night.twice} rows asked twice, {night.allowed} allowed"
            assert night.met, f"never met: {chain}"
            left += [replace(p, nth=1) for p in chain if p not in night.met]
            done.append(night)
            said = f"{len(night.met)} kills, {night.runs} runs, {night.seconds:.0f} s, {night.twice} rows asked twice of {night.allowed} in flight at kills"
            print(f"{night.root.rpartition('/')[2]}: {said}", flush=True)
    return done


def show(met: list[Point]) -> None:
    """What was killed where: b before, a after the server heard of it."""
    victims = ("driver", "writer", "engine", "server")
    print(f"{'written':<20}{'by':<8}" + "".join(f"{v:<8}" for v in victims))
    for kind, (who, _) in KINDS.items():
        marks = ["".join(sorted((p.when[0] for p in met if (p.kind, p.victim) == (kind, v)), reverse=True)) or "-" for v in victims]
        print(f"{kind:<20}{dict(d='driver', w='task', a='actor')[who]:<8}" + "".join(f"{x:<8}" for x in marks))
    print(f"{len(met)} kills ({', '.join(f'{v} {sum(p.victim == v for p in met)}' for v in victims)}): 0 rows lost, 0 double, 0 changed", flush=True)


if __name__ == "__main__":
    main()
