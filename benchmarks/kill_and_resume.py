"""Kill the driver, the worker and the engine of `mulcot teach` on its way, run it again, and compare with an undisturbed run.

    python benchmarks/kill_and_resume.py [--posts 2000] [--seed 1]

Everything is real: Ray, vLLM, SIGKILL. Exits with 1 unless the two tables agree: posts in = kept + rejected, no id twice, the same ids with the
same sources and the same rejects with the same reasons. Prints how much was asked twice.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import psutil

from mulcot_ray.artifacts import Manifest, find, read_rows
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.storage import Store

MARK = "MULCOT_KILL_MARK"
VICTIMS = {"driver": "mulcot", "worker": "ChunkWorker", "engine": "EngineCore"}


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--posts", type=int, default=2000)
    ap.add_argument("--seed", type=int, default=1)
    a = ap.parse_args()
    random.seed(a.seed)
    with tempfile.TemporaryDirectory() as folder:
        calm, hunted = Store(f"{folder}/calm"), Store(f"{folder}/hunted")
        for store in (calm, hunted):
            import_sample(store, "sample", train=a.posts, validation=0, test=0, seed=a.seed)
        started = time.time()
        assert run(calm, {}) == 0, "the undisturbed run fails"
        quiet = time.time() - started
        shares = sorted(random.sample(range(10, 85), len(VICTIMS)))
        plan = dict(zip(random.sample(list(VICTIMS), len(VICTIMS)), shares, strict=True))
        print(f"undisturbed: {quiet:.0f} s. Kills (victim: % of the parts there): {plan}", flush=True)
        started, runs = time.time(), 0
        while find(hunted, "rationales", "taught") is None:
            code = run(hunted, plan)
            runs += 1
            print(f"run {runs} ended with {code} after {time.time() - started:.0f} s", flush=True)
            assert runs < 10, "no end"
        one, two = find(calm, "rationales", "taught"), find(hunted, "rationales", "taught")
        assert one is not None and two is not None
        assert not plan, f"never met: {plan}"
        for store, m in ((calm, one), (hunted, two)):
            check(store, m, a.posts)
        for rejects, columns in ((False, ("post_id", "source", "prediction")), (True, ("post_id", "reason"))):
            x, y = ({tuple(r[c] for c in columns) for r in read_rows(s, m, rejects=rejects)} for s, m in ((calm, one), (hunted, two)))
            assert x == y, f"the tables differ in {len(x ^ y)} rows, e.g. {sorted(x ^ y)[:4]}"
        cached = len(hunted.files("answers"))
        print(
            f"{a.posts} posts in = {two.rows} kept + {two.rejects} rejected, no id twice, equal to the undisturbed table; "
            f"{runs} runs, {time.time() - started:.0f} s against {quiet:.0f} s; {cached} answers kept against {len(calm.files('answers'))}"
        )


def run(store: Store, plan: dict[str, int]) -> int:
    """`mulcot teach` once, with each victim of `plan` killed when so many percent of the parts are there. Returns its exit code."""
    mark = uuid.uuid4().hex
    command = [str(Path(sys.executable).with_name("mulcot")), "teach", "--posts", "sample", "--name", "taught", "--root", store.root]
    driver = subprocess.Popen(command, env=os.environ | {MARK: mark}, stdout=subprocess.DEVNULL, start_new_session=True)
    parts = -(-int(find(store, "posts", "sample").rows) // 64)  # type: ignore[union-attr]
    while driver.poll() is None:
        time.sleep(0.2)
        there = sum(f.startswith("part-") for f in store.files("rationales/taught"))
        for victim, share in list(plan.items()):
            if there >= share * parts / 100 and (found := processes(mark, VICTIMS[victim], driver.pid)):
                print(f"{there}/{parts} parts: SIGKILL to the {victim} ({found[0].pid})", flush=True)
                found[0].send_signal(signal.SIGKILL)
                del plan[victim]
                break
    leftovers(mark)
    return driver.returncode


def processes(mark: str, name: str, driver: int) -> list[psutil.Process]:
    if name == "mulcot":
        return [psutil.Process(driver)]
    found = []
    for p in psutil.process_iter():
        try:
            if p.environ().get(MARK) == mark and name in " ".join([p.name(), *p.cmdline()]):
                found.append(p)
        except psutil.Error:
            continue
    return found


def leftovers(mark: str) -> None:
    """What a killed driver has left: Ray's own processes end by themselves, in a while; the next run shall have the machine for itself."""
    for p in psutil.process_iter():
        try:
            if p.environ().get(MARK) == mark:
                p.kill()
        except psutil.Error:
            continue


def check(store: Store, m: Manifest, posts: int) -> None:
    ids = [r["post_id"] for rejects in (False, True) for r in read_rows(store, m, rejects=rejects, columns=["post_id"])]
    assert m.rows_in == posts == m.rows + m.rejects == len(ids) == len(set(ids)), f"{m.rows_in} in, {m.rows} kept, {m.rejects} rejected"


if __name__ == "__main__":
    main()
