"""Answers scored per second, and the memory that it takes, by group of metrics.

    python benchmarks/evaluate_rate.py [--posts 100000] [--part 4000] [--embedded 300]

Posts are of the sample corpus, answers and references its rationales with words exchanged, one answer in five wrong, two posts in five
sharing a source. Each group is one `evaluate` in a process of its own, Ray's start included, so that peaks of memory do not mix:

    labels        accuracy, F1, bootstrap intervals, slices, calibration, of answers without rationale
    texts         the same and BLEU, ROUGE-L, Distinct-1/2, of answers with rationale and references
    meteor        METEOR and Distinct-1/2 (--part posts)
    embeddings    MiniLM similarity and Distinct-1/2 (--embedded posts)

`labels` and `texts` run at a tenth of the posts too, which is worked on in the driver itself, and at a third, which is not: from there on
the driver's memory must not grow with the posts. Memory is that of the process alone (USS), sampled: of the driver beyond what its imports
take, and of all of Ray's processes together, of which the object store's part is not ours.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil

from mulcot_ray.artifacts import Run, begin
from mulcot_ray.evaluation import matching
from mulcot_ray.evaluation.evaluate import evaluate
from mulcot_ray.evaluation.metrics import Score
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Split, to_table
from mulcot_ray.storage import Store

CONTRACT = load_recipe("tiny").contract
SPLITS, PART_ROWS, TEMPLATES = (Split.TEST, Split.VALIDATION), 4096, 400
SWAPS = {
    "voices": "speaks of",
    "shows": "depicts",
    "poster": "author",
    "clashes": "is at odds",
    "decides": "settles it",
    "factual": "sober",
    "plain": "bare",
}
GROUPS: dict[str, tuple[Score, ...]] = {"labels": (), "texts": ("bleu", "rouge_l"), "meteor": ("meteor",), "embeddings": ("embedding_similarity",)}


def make(store: Store, posts: int) -> None:
    """posts/p (test posts, and a tenth as many for validation), predictions bare and told, validation, rationales refs."""
    templates = {s: [replace(p, image_bytes=None) for p in sample_posts(TEMPLATES, s, 1)] for s in SPLITS}

    def rows() -> Iterator[Post]:
        for split, n in zip(SPLITS, (posts, posts // 10), strict=True):
            for i in range(n):
                p = templates[split][i % TEMPLATES]
                yield replace(p, post_id=f"{split}-{i:07d}", source_id=f"{split}-{i - (i % 5 == 1):07d}", text=f"{p.text} {i % 977}")

    def answer(p: Post, told: bool) -> Prediction:
        rng = random.Random(p.post_id)
        assert p.label is not None
        label = p.label if rng.random() < 0.8 else rng.choice([x for x in LABELS if x is not p.label])
        sure = rng.betavariate(4, 1) * 2 / 3 + 1 / 3
        shares = {str(x): sure if x is label else (1 - sure) / 2 for x in LABELS}
        texts = {s: _vary(getattr(reference_rationale(p, label), s), rng) for s in SECTIONS} if told else {}
        return Prediction(
            p.post_id, label, "m", CONTRACT.hash, **shares, label_mass=0.9, **texts, stated=label if told else None, tokens_in=400, tokens_out=60
        )  # type: ignore[arg-type]

    _write(store, "posts", "p", Post, rows())
    _write(store, "predictions", "bare", Prediction, (answer(p, False) for p in rows() if p.split is Split.TEST))
    _write(store, "predictions", "told", Prediction, (answer(p, True) for p in rows() if p.split is Split.TEST))
    _write(store, "predictions", "validation", Prediction, (answer(p, False) for p in rows() if p.split is Split.VALIDATION))
    _write(store, "rationales", "refs", Rationale, (replace(reference_rationale(p), post_id=p.post_id) for p in rows() if p.split is Split.TEST))


def _vary(text: str, rng: random.Random) -> str:
    return " ".join(SWAPS.get(w, w) if rng.random() < 0.5 else w for w in text.split()) + (
        f" Seen {rng.randint(2, 9999)} times." if rng.random() < 0.3 else ""
    )


def _write(store: Store, kind: str, name: str, record: type, rows: Iterator[object]) -> None:
    run = begin(store, kind, name, {"stage": "benchmark", "name": name})  # type: ignore[arg-type]
    assert isinstance(run, Run)
    with run:
        part, count = [], 0
        for row in rows:
            part.append(row)
            if len(part) == PART_ROWS:
                run.write_table(f"part-{count:07d}", to_table(record, part))
                count, part = count + len(part), []
        run.write_table(f"part-{count:07d}", to_table(record, part))
        run.commit(count + len(part))


def measure(root: str, group: str) -> dict[str, float]:
    """One evaluation, in this process."""
    peak = {"driver": 0, "ray": 0}
    threading.Thread(target=_watch, args=(peak,), daemon=True).start()
    matching.ROWS_PER_BUCKET = min(matching.ROWS_PER_BUCKET, 2048 if group in ("meteor", "embeddings") else matching.ROWS_PER_BUCKET)
    bare, before, started = group == "labels", psutil.Process().memory_full_info().uss, time.time()
    _, report, _ = evaluate(
        Store(root), group, posts="p", answers="bare" if bare else "told", answers_kind="predictions", references=None if bare else "refs",
        split=Split.TEST, contract=CONTRACT, runtime=load_runtime("laptop"), calibration="validation", scores=GROUPS[group],
    )  # fmt: skip
    seconds = time.time() - started
    rows = report["counts"]["gold"]
    return {"rows": rows, "seconds": seconds, "rows_per_s": rows / seconds, "driver_mb": (peak["driver"] - before) / 1e6, "ray_mb": peak["ray"] / 1e6}


def _watch(peak: dict[str, int]) -> None:
    me = psutil.Process()
    while True:
        peak["driver"] = max(peak["driver"], me.memory_full_info().uss)
        total = 0
        for child in me.children(recursive=True):
            try:
                total += child.memory_full_info().uss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak["ray"] = max(peak["ray"], total)
        time.sleep(0.2)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--posts", type=int, default=100_000)
    ap.add_argument("--part", type=int, default=4000)
    ap.add_argument("--embedded", type=int, default=300)
    ap.add_argument("--one", nargs=2, metavar=("ROOT", "GROUP"), help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.one:
        print(json.dumps(measure(*a.one)))
        return
    print(f"{'group':<12}{'rows':>9}{'seconds':>9}{'rows/s':>9}{'driver, MB':>12}{'Ray, MB':>9}")
    sizes = [(n, ("labels", "texts")) for n in (a.posts // 10, a.posts // 3, a.posts)]
    for n, groups in (*sizes, (a.part, ("meteor",)), (a.embedded, ("embeddings",))):
        with tempfile.TemporaryDirectory() as root:
            make(Store(root), n)
            for group in groups:
                done = subprocess.run([sys.executable, __file__, "--one", root, group], capture_output=True, text=True, check=True)
                m = json.loads(done.stdout.splitlines()[-1])
                print(f"{group:<12}{m['rows']:>9}{m['seconds']:>9.1f}{m['rows_per_s']:>9.0f}{m['driver_mb']:>12.0f}{m['ray_mb']:>9.0f}", flush=True)


if __name__ == "__main__":
    main()
