"""Two sets of answers to the same posts, against counts and tests by hand."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from mulcot_ray.artifacts import Run, begin, find, need, read_rows
from mulcot_ray.errors import ArtifactMissing, ConfigError, InputError, RecipeChanged
from mulcot_ray.evaluation.compare import Pairing, compare, pairing
from mulcot_ray.evaluation.show import show_comparison
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import LABELS, Post, Prediction, Rationale, Sentiment, Source, Split, to_table
from mulcot_ray.storage import Store

CONTRACT, RUNTIME = load_recipe("tiny").contract, load_runtime("laptop")
Labels = dict[str, Sentiment]


def publish(store: Store, kind: Any, name: str, rows: list[Any]) -> None:
    run = begin(store, kind, name, {"stage": "by hand", "name": name})
    assert isinstance(run, Run)
    with run:
        run.write_table("part-00000", to_table({"posts": Post, "predictions": Prediction, "rationales": Rationale}[kind], rows))
        run.commit(len(rows))


def answer(store: Store, name: str, labels: Labels) -> None:
    publish(store, "predictions", name, [Prediction(p, y, name, CONTRACT.hash) for p, y in labels.items()])


def run(store: Store, name: str = "c", **changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"posts": "p", "a": "a", "b": "b", "split": Split.TEST, "contract": CONTRACT, "runtime": RUNTIME}
    return dict(compare(store, name, **{**settings, **changes})[1])


def noisy(posts: list[Post], accuracy: float, seed: int) -> Labels:
    rng = random.Random(seed)
    return {p.post_id: p.label if rng.random() < accuracy else rng.choice(LABELS) for p in posts}  # type: ignore[misc]


@pytest.fixture(scope="module")
def posts() -> list[Post]:
    return [dataclasses.replace(p, image_bytes=None) for p in sample_posts(400, Split.TEST, 1)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, posts: list[Post]) -> Store:
    """a is better than b; a leaves out 3 posts, b others; posts/night are the same posts without gold."""
    s = Store(str(tmp_path_factory.mktemp("compare")))
    publish(s, "posts", "p", posts)
    publish(s, "posts", "night", [dataclasses.replace(p, label=None, split=Split.UNLABELED) for p in posts])
    answer(s, "a", {k: v for k, v in noisy(posts, 0.85, 1).items() if k not in {p.post_id for p in posts[:3]}})
    answer(s, "b", {k: v for k, v in noisy(posts, 0.7, 2).items() if k not in {p.post_id for p in posts[3:8]}})
    return s


def labels_of(store: Store, name: str) -> Labels:
    return {r["post_id"]: Sentiment(r["label"]) for r in read_rows(store, need(store, "predictions", name))}


def test_counts_are_those_by_hand(store: Store, posts: list[Post]) -> None:
    from scipy.stats import binomtest

    report = run(store)
    a, b, gold = labels_of(store, "a"), labels_of(store, "b"), {p.post_id: p.label for p in posts}
    assert report["counts"] == {"posts": 400, "both": 392, "only_a": 5, "only_b": 3, "neither": 0}
    both = [(a[i], b[i]) for i in gold if i in a and i in b]
    assert report["agreement"]["share"] == sum(x == y for x, y in both) / 392
    assert report["agreement"]["matrix"] == [[both.count((x, y)) for y in LABELS] for x in LABELS]
    g = report["gold"]
    right_a, right_b = {i for i in gold if a.get(i) == gold[i]}, {i for i in gold if b.get(i) == gold[i]}
    assert (g["count"], g["a"]["accuracy"], g["b"]["accuracy"]) == (400, len(right_a) / 400, len(right_b) / 400)
    assert g["a"]["confusion"][0][3] + g["a"]["confusion"][1][3] + g["a"]["confusion"][2][3] == 3, "posts without an answer are wrong"
    assert (g["only_a_right"], g["only_b_right"]) == (len(right_a - right_b), len(right_b - right_a))
    assert (g["both_right"], g["none_right"]) == (len(right_a & right_b), 400 - len(right_a | right_b))
    assert g["mcnemar_p"] == binomtest(len(right_a - right_b), len(right_a ^ right_b)).pvalue < 0.01
    assert g["difference"]["accuracy"] == pytest.approx((len(right_a) - len(right_b)) / 400)
    for label in LABELS:
        differ = [i for i in gold if gold[i] is label and a.get(i) != b.get(i)]
        assert sum(g["disagreements"][label].values()) == len(differ)
        assert g["disagreements"][label]["none_right"] == sum(i not in right_a | right_b for i in differ)
    assert need(store, "evaluations", "c").stats["mcnemar_p"] == g["mcnemar_p"]
    assert json.loads(json.dumps(report)) == report


def test_the_difference_has_a_paired_interval_over_sources(store: Store, posts: list[Post]) -> None:
    g = run(store)["gold"]
    low, high = g["intervals"]["accuracy"]
    assert 0 < low < g["difference"]["accuracy"] < high, "a is better, and surely so"
    a, b = labels_of(store, "a"), labels_of(store, "b")
    sources = sorted({p.source_id for p in posts})
    by_source = {s: np.zeros(2) for s in sources}
    for p in posts:
        by_source[p.source_id] += (1, (a.get(p.post_id) == p.label) - (b.get(p.post_id) == p.label))
    table, rng = np.array([by_source[s] for s in sources]), np.random.default_rng(0)
    drawn = [table[rng.integers(0, len(sources), len(sources))].sum(0) for _ in range(4000)]
    assert (low, high) == pytest.approx(tuple(np.percentile([d / n for n, d in drawn], [2.5, 97.5])), abs=0.012)
    unpaired = sum((x[1] - x[0]) ** 2 for x in (g["a"]["intervals"]["accuracy"], g["b"]["intervals"]["accuracy"])) ** 0.5
    assert high - low < 1.05 * unpaired
    assert g["intervals"]["macro_f1"][0] < g["difference"]["macro_f1"] < g["intervals"]["macro_f1"][1]


def test_examples_are_balanced_over_who_is_right(store: Store, posts: list[Post]) -> None:
    examples = run(store)["examples"]
    a, b, gold = labels_of(store, "a"), labels_of(store, "b"), {p.post_id: p.label for p in posts}
    assert len(examples) == 24 == len({e["post_id"] for e in examples})
    for e in examples:
        i = e["post_id"]
        assert (e["a"], e["b"], e["gold"]) == (a[i], b[i], gold[i]) and e["a"] != e["b"]
        assert e["right"] == ("a" if a[i] == gold[i] else "b" if b[i] == gold[i] else "none")
    shown = {who: sum(e["right"] == who for e in examples) for who in ("a", "b", "none")}
    there = {who: 0 for who in shown}
    for i in a.keys() & b.keys():
        if a[i] != b[i]:
            there["a" if a[i] == gold[i] else "b" if b[i] == gold[i] else "none"] += 1
    assert min(there.values()) < 8 < max(there.values()), "one kind is rare here: it is shown whole, the others in equal parts"
    assert all(n == there[who] for who, n in shown.items() if there[who] < 8)
    plenty = [n for who, n in shown.items() if there[who] >= 8]
    assert max(plenty) - min(plenty) <= 1


def test_a_night_without_gold(store: Store) -> None:
    report = run(store, "night", posts="night", split=None)
    assert report["gold"] is None and report["agreement"] == run(store)["agreement"]
    assert len(report["examples"]) == 24 and all(e["right"] is None and e["gold"] is None for e in report["examples"])
    assert set(need(store, "evaluations", "night").stats) == {"posts", "agreement"}


def test_some_posts_have_gold(tmp_path: Path, posts: list[Post]) -> None:
    s = Store(str(tmp_path))
    publish(s, "posts", "p", [p if i < 100 else dataclasses.replace(p, label=None) for i, p in enumerate(posts)])
    answer(s, "a", noisy(posts, 0.9, 1))
    answer(s, "b", noisy(posts, 0.9, 3))
    report = run(s)
    assert (report["counts"]["both"], report["gold"]["count"]) == (400, 100)
    assert sum(map(sum, report["agreement"]["matrix"])) == 400


def test_show_in_the_terminal(store: Store) -> None:
    for name, posts, words in (("c", "p", ("McNemar's exact p", "macro F1", "predictions/b")), ("night", "night", ("They agree on", "neutral"))):
        console = Console(record=True, width=100)
        report = run(store, name, posts=posts, split=Split.TEST if posts == "p" else None)
        console.print(show_comparison(report))
        text = console.export_text()
        assert all(w in text for w in words), text
        assert report["examples"][0]["post_id"] in text and f"{report['agreement']['share']:.4f}" in text


def test_rationales_can_be_compared(store: Store, posts: list[Post]) -> None:
    told = [Rationale(p.post_id, Source.PREDICTED, "t", "another", "t", "i", "c", "f", p.label or LABELS[0]) for p in posts]
    publish(store, "rationales", "told", told)
    report = run(store, "told", b="told")
    assert report["b"] == "rationales/told" and report["gold"]["b"]["accuracy"] == 1.0


def test_buckets_add_up_to_one_batch(store: Store, posts: list[Post]) -> None:
    """Whatever posts share a bucket (their sources are cut apart), and in whatever order buckets come."""
    rows = [{"post_id": p.post_id, "source_id": p.source_id, "label": p.label} for p in posts]
    a, b = ([{"post_id": i, "label": y, "contract": CONTRACT.hash} for i, y in labels_of(store, x).items()] for x in ("a", "b"))
    names = ("predictions/a", "predictions/b")
    whole, total = pairing(names, CONTRACT.hash, {"post": rows, "a": a, "b": b}), Pairing()
    for part in (2, 0, 1):
        total.merge(pairing(names, CONTRACT.hash, {"post": rows[part::3], "a": a, "b": b}))
    assert (total.counts, total.winners, total.examples) == (whole.counts, whole.winners, whole.examples)
    assert (total.agreement == whole.agreement).all() and (total.labels == whole.labels).all() and (total.bootstrap == whole.bootstrap).all()


def test_again_does_nothing_and_other_settings_are_refused(store: Store) -> None:
    common: dict[str, Any] = {"posts": "p", "a": "a", "b": "b", "contract": CONTRACT, "runtime": RUNTIME}
    first, second = (compare(store, "again", split=Split.TEST, **common) for _ in range(2))
    assert (first[2], second[2]) == (True, False) and first[:2] == second[:2]
    with pytest.raises(RecipeChanged, match="split"):
        run(store, "again", split=None)


def test_named_errors(store: Store) -> None:
    with pytest.raises(ArtifactMissing, match="nobody"):
        run(store, "x", b="nobody")
    with pytest.raises(ConfigError, match="the same answers"):
        run(store, "x", b="a")
    answer(store, "far", {"elsewhere": LABELS[0]})
    with pytest.raises(InputError, match="predictions/far is about none of the 400 posts"):
        run(store, "x", b="far")
    publish(store, "predictions", "alien", [Prediction("sample-test-00000-0", LABELS[0], "m", "else")])
    with pytest.raises(ConfigError, match="under contract else"):
        run(store, "x", b="alien")
    publish(store, "predictions", "twice", [Prediction("sample-test-00000-0", LABELS[0], "m", CONTRACT.hash)] * 2)
    with pytest.raises(InputError, match="'sample-test-00000-0' twice"):
        run(store, "x", b="twice")
    assert find(store, "evaluations", "x") is None
