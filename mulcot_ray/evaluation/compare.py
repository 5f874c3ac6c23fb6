"""Two sets of answers to the same posts: where they differ, who is right there, and whether the difference means anything.

report.json, VERSION 1. Shares are from 0 to 1, intervals [low, high] at 95 %; `gold` null where no post has a gold label.

    version, posts, split, a, b      names; "predictions/NAME" or "rationales/NAME"
    counts              posts, both, only_a, only_b, neither: posts, by who answered
    agreement           of the posts that both answered: share, interval (Wilson), matrix 3 × 3 (rows A, columns B, in the order of LABELS)
    gold                of the posts with gold, an answer that is not there counting as wrong: count; a, b: {accuracy, macro_f1, weighted_f1,
                        intervals of them, wilson of the accuracy}; difference (A less B) {accuracy, macro_f1, weighted_f1} and its
                        intervals, paired: one bootstrap over source_id weighs both (statistics.py); only_a_right, only_b_right, both_right,
                        none_right; mcnemar_p (exact); disagreements {gold class: {only_a_right, only_b_right, none_right}}: where they differ,
                        or only one has an answer
    examples            up to 24 posts on which they differ [{post_id, gold, a, b, right}]; `right` is a, b, none, or null without gold;
                        as many of each as there are, drawn by a hash
    lineage             posts, a, b: what their manifests say
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from mulcot_ray.artifacts import Manifest, find, need
from mulcot_ray.console import Progress
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.evaluation.evaluate import Pages, posts_of, publish
from mulcot_ray.evaluation.matching import Bucket, Rows, answers, match
from mulcot_ray.evaluation.matching import posts as post_rows
from mulcot_ray.evaluation.metrics import confusion
from mulcot_ray.evaluation.statistics import REPLICATES, Counts, by_source, confusion_scores, hash64, interval, mcnemar, replicates, wilson
from mulcot_ray.evaluation.summary import labels
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, Sentiment, Split
from mulcot_ray.storage import Store

VERSION = 1
EXAMPLES = 24
SEED = 0  # of the examples
WINNERS = ("a", "b", "none", None)
Example = tuple[int, dict[str, Any]]


def compare(
    store: Store, name: str, *, posts: str, a: str, b: str, split: Split | None, contract: Contract, runtime: Runtime,
    progress: Progress | None = None, pages: Pages | None = None,
) -> tuple[Manifest, dict[str, Any], bool]:  # fmt: skip
    """Write evaluations/NAME/report.json (and what `pages` makes of it) from the answers A and B (predictions of that name, or else rationales) to posts/POSTS.

    Posts without gold count for the agreement alone, so a night without labels can be compared too. `split` None: every post.
    Returns the manifest, the report, and whether this call made it. Raises ArtifactMissing; InputError when a table is about other posts or
    answers one twice; ConfigError when A and B are one table or predictions were made under another contract.
    """
    tables = {"posts": need(store, "posts", posts), "a": _answers(store, a), "b": _answers(store, b)}
    if tables["a"].fingerprint == tables["b"].fingerprint:
        raise ConfigError(f"{a!r} and {b!r} are the same answers: two different ones are wanted")
    identity = {"stage": "compare", "report": VERSION, **{k: m.fingerprint for k, m in tables.items()}, "split": split, "contract": contract.hash}
    return publish(store, name, identity, partial(_compare, store, tables, split, contract, runtime, progress), "posts", _headline, pages)


@dataclass
class Pairing:
    """What the two answers to some posts add up to. `labels` and `bootstrap`: confusion of A and of B, … × 2 × 3 × 4."""

    counts: Counter[str] = field(default_factory=Counter)
    agreement: Counts = field(default_factory=lambda: np.zeros((3, 3), dtype=np.int64))
    labels: Counts = field(default_factory=lambda: np.zeros((2, 3, 4), dtype=np.int64))
    bootstrap: Counts = field(default_factory=lambda: np.zeros((REPLICATES, 2, 3, 4), dtype=np.int64))
    # By gold class: both right, only a, only b, none of two different answers (or of one), and wrong alike.
    winners: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    examples: dict[str | None, list[Example]] = field(default_factory=dict)

    def merge(self, other: Pairing) -> None:
        self.counts.update(other.counts)
        self.agreement, self.labels = self.agreement + other.agreement, self.labels + other.labels
        self.bootstrap += other.bootstrap
        for gold, counts in other.winners.items():
            self.winners[gold].update(counts)
        for winner, some in other.examples.items():
            self.examples[winner] = heapq.nsmallest(EXAMPLES, [*self.examples.get(winner, []), *some], key=lambda e: e[0])


def pairing(names: tuple[str, str], contract: str, bucket: Bucket) -> Pairing:
    """Roles: post, a, b."""
    p, posts = Pairing(), bucket["post"]
    said = [_labels(n, contract, posts, bucket[role]) for n, role in zip(names, ("a", "b"), strict=True)]
    cells: list[Counts] = []
    examples = defaultdict[str | None, list[Example]](list)
    for post in posts:
        x, y = (s.get(post["post_id"]) for s in said)
        p.counts["both" if x and y else "only_a" if x else "only_b" if y else "neither"] += 1
        if x and y:
            p.agreement[LABELS.index(x), LABELS.index(y)] += 1
        gold = Sentiment(post["label"]) if post["label"] is not None else None
        winner = None
        if gold is not None:
            cells.append(np.stack([confusion([(gold, x)]), confusion([(gold, y)])]))
            winner = ("both" if x == gold else "alike") if x == y else "a" if x == gold else "b" if y == gold else "none"
            p.winners[gold][winner] += 1
        if x and y and x != y:
            e = {"post_id": post["post_id"], "gold": gold, "a": x, "b": y, "right": winner}
            examples[winner].append((hash64(f"{SEED}/{post['post_id']}"), e))
    p.counts["posts"] = len(posts)
    if cells:
        p.labels = np.sum(cells, axis=0)
        p.bootstrap = replicates(*by_source([x["source_id"] for x in posts if x["label"] is not None], np.stack(cells)))
    p.examples = {winner: heapq.nsmallest(EXAMPLES, some, key=lambda e: e[0]) for winner, some in examples.items()}
    return p


def _answers(store: Store, name: str) -> Manifest:
    return find(store, "predictions", name) or find(store, "rationales", name) or need(store, "predictions", name)


def _labels(name: str, contract: str, posts: Rows, rows: Rows) -> dict[str, Sentiment]:
    wanted, found = {p["post_id"] for p in posts}, dict[str, Sentiment]()
    for r in rows:
        if r["post_id"] in wanted:
            if r["post_id"] in found:
                raise InputError(f"{name} answers post {r['post_id']!r} twice")
            if name.startswith("predictions/") and r["contract"] != contract:
                raise ConfigError(f"{name} were made under contract {r['contract']}, not {contract}: compare with the recipe that made both")
            found[r["post_id"]] = Sentiment(r["label"] if "label" in r else r["prediction"])
    return found


def _compare(
    store: Store, tables: Mapping[str, Manifest], split: Split | None, contract: Contract, runtime: Runtime, progress: Progress | None
) -> dict[str, Any]:
    inputs = [post_rows(tables["posts"], None if split is None else [split], (), gold=False), *(answers(x, tables[x]) for x in ("a", "b"))]
    names = tuple(f"{tables[x].kind}/{tables[x].name}" for x in ("a", "b"))
    p = Pairing()
    for part in match(store, inputs, partial(pairing, (names[0], names[1]), contract.hash), runtime):
        p.merge(part)
        if progress is not None:
            progress(p.counts["posts"], max(p.counts["posts"], posts_of(tables["posts"], split)), 0)
    c = p.counts
    for x in ("a", "b"):
        if not c["both"] + c[f"only_{x}"]:
            where = f"posts/{tables['posts'].name}" + (f", split {split}" if split else "")
            raise InputError(
                f"{tables[x].kind}/{tables[x].name} is about none of the {c['posts']} posts of {where}: another --posts or --split is meant"
            )
    return {
        "version": VERSION, "posts": tables["posts"].name, "split": split, "a": names[0], "b": names[1],
        "counts": {k: c[k] for k in ("posts", "both", "only_a", "only_b", "neither")},
        "agreement": _agreement(p.agreement),
        "gold": _gold(p) if p.winners else None,
        "examples": _balanced(p.examples),
        "lineage": {k: m.model_dump(mode="json", exclude={"files"}) for k, m in tables.items()},
    }  # fmt: skip


def _agreement(matrix: Counts) -> dict[str, Any]:
    same, n = int(np.trace(matrix)), int(matrix.sum())
    return {"share": same / n if n else None, "interval": list(wilson(same / n, n)) if n else None, "matrix": matrix.tolist()}


def _gold(p: Pairing) -> dict[str, Any]:
    a, b = (labels(p.labels[i], p.bootstrap[:, i]) for i in (0, 1))
    spread = [confusion_scores(p.bootstrap[:, i]) for i in (0, 1)]
    right = Counter[str]()
    for counts in p.winners.values():
        right.update(counts)
    return {
        "count": a["count"], "a": a, "b": b,
        "difference": {k: a[k] - b[k] for k in spread[0]},
        "intervals": {k: list(interval(spread[0][k] - spread[1][k])) for k in spread[0]},
        "only_a_right": right["a"], "only_b_right": right["b"], "both_right": right["both"], "none_right": right["none"] + right["alike"],
        "mcnemar_p": mcnemar(right["a"], right["b"]),
        "disagreements": {
            s.value: {"only_a_right": p.winners[s]["a"], "only_b_right": p.winners[s]["b"], "none_right": p.winners[s]["none"]} for s in LABELS
        },
    }  # fmt: skip


def _balanced(found: Mapping[str | None, list[Example]]) -> list[dict[str, Any]]:
    """EXAMPLES in all, one of each winner in turn as long as there are any."""
    queues = [list(found.get(w, [])) for w in WINNERS]
    chosen: list[dict[str, Any]] = []
    while any(queues) and len(chosen) < EXAMPLES:
        chosen += [q.pop(0)[1] for q in queues if q]
    return chosen[:EXAMPLES]


def _headline(report: Mapping[str, Any]) -> dict[str, float]:
    g, agreement = report["gold"], report["agreement"]["share"]
    found: dict[str, float] = {"posts": report["counts"]["posts"]} | ({"agreement": agreement} if agreement is not None else {})
    if g:
        found |= {"accuracy_a": g["a"]["accuracy"], "accuracy_b": g["b"]["accuracy"]}
        found |= {"difference": g["difference"]["accuracy"], "mcnemar_p": g["mcnemar_p"]}
    return found
