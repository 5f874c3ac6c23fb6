"""What the answers to a bucket of posts add up to, and how two such sums become one.

A Tally holds counts, exact sums, distinct n-grams (8 bytes each) and a few examples, and no answer: it is all that the driver sees of a
table. Its size does not depend on the number of posts, but for the n-grams.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.evaluation.calibration import Reliability, scaled
from mulcot_ray.evaluation.matching import Bucket, Rows
from mulcot_ray.evaluation.metrics import Score, TextSums, confusion, exact
from mulcot_ray.evaluation.statistics import REPLICATES, Counts, by_source, hash64, replicates
from mulcot_ray.prompts import Contract
from mulcot_ray.records import LABELS, SECTIONS, Reason, Sentiment

EXAMPLES = 8  # of each kind
BUILT_IN_SLICES = ("aspect", "image", "length", "split", "duplicate")
SLICE_VALUES = 50  # of one slice
MALFORMED = (Reason.ANSWER_UNPARSED, Reason.SECTIONS_MISSING, Reason.ANSWER_TRUNCATED)  # rejects of an answer, not of a post
Example = tuple[float, int, dict[str, Any]]  # what it is ranked by, a hash that breaks ties, the example


@dataclass(frozen=True)
class Question:
    """What is asked of each bucket.

    kind: of the answers, predictions or rationales; answers: their name. slices: keys of meta. given: the temperature that is in the
    probabilities; it is undone for `before`. temperature: that of `after`, None where there is none.
    """

    kind: str
    answers: str
    contract: Contract
    slices: tuple[str, ...]
    duplicates: bool
    scores: tuple[Score, ...]
    given: float
    temperature: float | None


@dataclass
class Tally:
    """counts: by name. by: counts by kind and value, such as rejects by reason. slices: confusion by (slice, value). bootstrap:
    REPLICATES confusions. sums: by name. before, after: reliability of the model's own probabilities, and scaled."""

    counts: Counter[str] = field(default_factory=Counter)
    by: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    labels: Counts = field(default_factory=lambda: confusion([]))
    slices: dict[tuple[str, str], Counts] = field(default_factory=dict)
    bootstrap: Counts = field(default_factory=lambda: np.zeros((REPLICATES, 3, 4), dtype=np.int64))
    sums: dict[str, Fraction] = field(default_factory=dict)
    texts: TextSums = field(default_factory=TextSums)
    before: Reliability = field(default_factory=Reliability)
    after: Reliability = field(default_factory=Reliability)
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def merge(self, other: Tally) -> None:
        self.counts.update(other.counts)
        for name, values in other.by.items():
            self.by[name].update(values)
        self.labels = self.labels + other.labels
        self.bootstrap += other.bootstrap
        for key, counts in other.slices.items():
            self.slices[key] = self.slices[key] + counts if key in self.slices else counts
        _check_slices(self.slices)
        for name, value in other.sums.items():
            self.sums[name] = self.sums.get(name, Fraction()) + value
        self.texts.merge(other.texts)
        self.before.merge(other.before)
        self.after.merge(other.after)
        for kind, some in other.examples.items():
            self.examples[kind] = heapq.nsmallest(EXAMPLES, [*self.examples.get(kind, []), *some], key=lambda e: e[:2])


def tally(question: Question, bucket: Bucket) -> Tally:
    """Roles: post, answer, reject; reference and duplicate where they are asked for.

    Raises InputError for a post that is answered twice, ConfigError for an answer under another contract.
    """
    t, posts = Tally(), bucket["post"]
    answers = _answers(question, posts, bucket["answer"])
    _labels(t, question, bucket, posts, answers)
    rejected = {r["post_id"]: r["reason"] for r in bucket["reject"]}
    reasons = Counter(rejected[p["post_id"]] for p in posts if p["post_id"] in rejected and p["post_id"] not in answers)
    t.by["rejects"] = reasons
    t.counts.update(gold=len(posts), answered=len(answers), rejected=reasons.total())
    t.counts["malformed"] = sum(reasons[r] for r in MALFORMED)
    _facts(t, question, answers.values())
    _texts(t, question, posts, answers, bucket.get("reference", []))
    scored = [(p, a) for p in posts if (a := answers.get(p["post_id"])) and a.get("negative") is not None]
    if scored:
        _reliability(t, question, scored)
    _examples(t, posts, answers)
    return t


def probabilities(rows: Rows) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Rows × 3, in the order of LABELS."""
    return np.array([[r[s.value] for s in LABELS] for r in rows], dtype=np.float64).reshape(-1, len(LABELS))


def rationale_text(row: dict[str, Any]) -> str:
    """The four sections, one a line. Headers are left out: they are the same in every rationale and would raise each score."""
    return "\n".join(row[s] for s in SECTIONS)


def _answers(question: Question, posts: Rows, rows: Rows) -> dict[str, dict[str, Any]]:
    """The answers to the posts by post_id; "answer" is the label."""
    wanted, found = {p["post_id"] for p in posts}, dict[str, dict[str, Any]]()
    contract = question.contract.hash  # computed once, not for every row
    for r in rows:
        post = r["post_id"]
        if post not in wanted:
            continue
        if post in found:
            raise InputError(f"{question.kind}/{question.answers} answers post {post!r} twice")
        if question.kind == "predictions" and r["contract"] != contract:
            raise ConfigError(
                f"predictions/{question.answers} were made under contract {r['contract']}, not {contract} "
                f"({question.contract.name}): evaluate with the recipe that made them"
            )
        found[post] = {**r, "answer": Sentiment(r["label"] if question.kind == "predictions" else r["prediction"])}
    return found


def _labels(t: Tally, question: Question, bucket: Bucket, posts: Rows, answers: dict[str, dict[str, Any]]) -> None:
    duplicates = {r["post_id"]: r["kind"] for r in bucket.get("duplicate", [])}
    cells = np.zeros((len(posts), len(LABELS), len(LABELS) + 1), dtype=np.int64)
    for i, p in enumerate(posts):
        a = answers.get(p["post_id"])
        cells[i] = confusion([(Sentiment(p["label"]), a["answer"] if a else None)])
        for key in _slices(p, question, duplicates):
            t.slices[key] = t.slices[key] + cells[i] if key in t.slices else cells[i]
    _check_slices(t.slices)
    t.labels = cells.sum(0)
    t.bootstrap = replicates(*by_source([p["source_id"] for p in posts], cells))


def _slices(post: dict[str, Any], question: Question, duplicates: dict[str, str]) -> Iterator[tuple[str, str]]:
    yield "aspect", "with aspect" if post["aspect"] else "whole post"
    yield "image", "with image" if post["image"] else "no image"
    # Fixed lengths, near the thirds of Twitter-2015 and -2017, so that no pass over the posts has to find them.
    yield "length", "up to 60 characters" if post["length"] <= 60 else "61 to 120" if post["length"] <= 120 else "over 120"
    yield "split", post["split"]
    if question.duplicates:
        yield "duplicate", duplicates.get(post["post_id"]) or "unique"
    for key in question.slices:
        if (value := post[f"meta/{key}"]) is not None:
            yield key, value


def _check_slices(slices: dict[tuple[str, str], Counts]) -> None:
    for name, n in Counter(name for name, _ in slices).items():
        if n > SLICE_VALUES:
            raise ConfigError(f"slice {name!r} has over {SLICE_VALUES} values among the posts: a key of meta with few values is wanted")


def _facts(t: Tally, question: Question, answers: Any) -> None:
    """What the answers' own columns say, counted."""
    masses = []
    for a in answers:
        t.counts.update(tokens_in=a["tokens_in"] or 0, tokens_out=a["tokens_out"] or 0)
        sections = {s: a[s] for s in SECTIONS if a[s]}
        if question.kind == "rationales":
            t.by["sources"][a["source"]] += 1
            stated = fault = None
        else:
            stated, fault = a["stated"], a["rationale_fault"]
            if a["label_mass"] is not None:
                masses.append(a["label_mass"])
            t.counts.update(stated=stated is not None, consistent=stated is not None and stated == a["answer"])
        if fault is not None:
            t.by["faults"][fault.partition(":")[0]] += 1
        t.counts["tried"] += bool(sections) or stated is not None or fault is not None
        if len(sections) == len(SECTIONS):
            t.counts["formed"] += question.kind == "rationales" or stated is not None
            t.counts["contradicting"] += question.contract.contradiction(sections, a["answer"]) is not None
    t.counts["massed"] = len(masses)
    t.sums["label_mass"] = exact(masses)


def _texts(t: Tally, question: Question, posts: Rows, answers: dict[str, dict[str, Any]], references: Rows) -> None:
    wanted = {p["post_id"] for p in posts}
    told = {r["post_id"]: r for r in references if r["post_id"] in wanted and all(r[s] for s in SECTIONS)}
    spoken = [a for a in answers.values() if all(a[s] for s in SECTIONS)]
    pairs = [told.get(a["post_id"]) for a in spoken]
    t.texts = TextSums.of([rationale_text(a) for a in spoken], [rationale_text(r) if r else None for r in pairs], question.scores)
    # Of every reference to these posts, paired or not: whether any was written with the gold label in view.
    t.counts["references"] = len(told)
    t.by["reference_sources"].update(r.get("source") or "" for r in told.values())


def _reliability(t: Tally, question: Question, scored: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    gold = [LABELS.index(Sentiment(p["label"])) for p, _ in scored]
    answered = [LABELS.index(a["answer"]) for _, a in scored]
    p = scaled(probabilities([a for _, a in scored]), 1 / question.given)
    t.before = Reliability.of(p, gold, answered)
    if question.temperature is not None:
        t.after = Reliability.of(scaled(p, question.temperature), gold, answered)


def _examples(t: Tally, posts: Rows, answers: dict[str, dict[str, Any]]) -> None:
    """The surest right and wrong answers and the least sure ones; without probabilities any right and wrong ones, by a hash."""
    found: dict[str, list[Example]] = {"right": [], "wrong": [], "unsure": []}
    for p in posts:
        a = answers.get(p["post_id"])
        if a is None:
            continue
        sure = a.get(a["answer"])
        tie, e = hash64(p["post_id"]), {"post_id": p["post_id"], "gold": p["label"], "label": str(a["answer"]), "confidence": sure}
        found["right" if a["answer"] == p["label"] else "wrong"].append((-(sure or 0.0), tie, e))
        if sure is not None:
            found["unsure"].append((sure, tie, e))
    t.examples = {kind: heapq.nsmallest(EXAMPLES, some, key=lambda e: e[:2]) for kind, some in found.items()}
