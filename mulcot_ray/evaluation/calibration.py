"""Do probabilities mean what they say? Reliability, and what a confidence threshold would keep, before and after temperature scaling.

Guo et al. 2017, "On calibration of modern neural networks" (arXiv 1706.04599). Confidence is the probability of the label that was answered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np

from mulcot_ray.calibration import TINY, fit
from mulcot_ray.errors import InputError
from mulcot_ray.evaluation.metrics import exact
from mulcot_ray.evaluation.statistics import Counts, Floats
from mulcot_ray.records import LABELS

BINS = 15  # of the reliability table and of ECE
LEVELS = 1000  # of the confidence threshold


def temperature(probabilities: Floats, gold: Sequence[int]) -> float:
    """`mulcot_ray.calibration.fit`, whatever the order of the posts (posts × 3, and an index of LABELS each)."""
    order = np.lexsort((*probabilities.T, gold)) if len(probabilities) else []
    rows: Any = probabilities[order]
    return fit(rows, [gold[i] for i in order])


def scaled(probabilities: Floats, t: float) -> Floats:
    """p^(1/T), rows made to sum to 1; scaling by 1/T undoes it. Raises InputError for a row that is no distribution over the labels."""
    p = np.asarray(probabilities, dtype=np.float64).reshape(-1, len(LABELS))
    wrong = ~((p >= 0).all(1) & (np.abs(p.sum(1) - 1) < 1e-3))
    if wrong.any():
        raise InputError(f"probabilities {p[wrong][0].tolist()} are no distribution over {[s.value for s in LABELS]}")
    z = np.log(np.maximum(p, TINY)) / t
    e = np.exp(z - z.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def _nll(p: Floats, gold: Sequence[int]) -> Floats:
    return np.asarray(-np.log(np.maximum(p[np.arange(len(p)), np.asarray(gold, dtype=int)], TINY)))


@dataclass
class Reliability:
    """What answers with probabilities add up to. Of constant size; exact sums, so that neither order nor grouping changes a digit.

    Bin b holds confidences from b/15 (exclusive) to (b + 1)/15.
    """

    count: Counts = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    right: Counts = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    confidence: list[Fraction] = field(default_factory=lambda: [Fraction()] * BINS)  # sums
    nll: Fraction = field(default_factory=Fraction)
    brier: Fraction = field(default_factory=Fraction)
    at_level: Counts = field(default_factory=lambda: np.zeros((LEVELS + 1, 2), dtype=np.int64))  # posts and right ones, by floor(confidence · LEVELS)

    @classmethod
    def of(cls, probabilities: Floats, gold: Sequence[int], answered: Sequence[int]) -> Reliability:
        """probabilities: posts × 3; gold and answered: indices of LABELS, one a post."""
        r = cls()
        g, a = np.asarray(gold, dtype=int), np.asarray(answered, dtype=int)
        p = np.asarray(probabilities, dtype=np.float64).reshape(-1, len(LABELS))
        sure, right = p[np.arange(len(p)), a], (a == g).astype(np.int64)
        bins = np.clip(np.ceil(sure * BINS).astype(int) - 1, 0, BINS - 1)
        np.add.at(r.count, bins, 1)
        np.add.at(r.right, bins, right)
        r.confidence = [exact(sure[bins == b].tolist()) for b in range(BINS)]
        r.nll = exact(_nll(p, gold).tolist())
        r.brier = exact(((p - np.eye(len(LABELS))[g]) ** 2).sum(1).tolist())
        np.add.at(r.at_level, np.clip((sure * LEVELS).astype(int), 0, LEVELS), np.stack([np.ones_like(right), right], axis=1))
        return r

    def merge(self, other: Reliability) -> None:
        self.count, self.right, self.at_level = self.count + other.count, self.right + other.right, self.at_level + other.at_level
        self.confidence = [a + b for a, b in zip(self.confidence, other.confidence, strict=True)]
        self.nll, self.brier = self.nll + other.nll, self.brier + other.brier

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of confidence and accuracy over the bins, weighted by posts; 0–1."""
        gaps = (abs(int(n) - c) for n, c in zip(self.right, self.confidence, strict=True))
        return float(sum(gaps, Fraction()) / self._posts)

    @property
    def ece_by_chance(self) -> float:
        """The ECE that probabilities without a fault would show on as many posts, on average: each bin's binomial mean deviation.

        With few posts this is what a good ECE comes to, and no less: 0.03 for 400 posts over six bins.
        """
        from scipy.stats import binom

        n = self.count[self.count > 0]
        p = np.array([float(c) / int(k) for c, k in zip(self.confidence, self.count, strict=True) if k])
        m = np.minimum(np.floor(n * p) + 1, n)
        return float((2 * m * (1 - p) * binom.pmf(m, n, p)).sum() / n.sum())  # de Moivre's formula

    def facts(self, posts: int) -> dict[str, Any]:
        """For a report. `posts`: how many were asked about, answered or not: coverage is a share of them.

        ece, accuracy, confidence: shares. nll: nats. brier: mean squared distance to the gold label's corner, 0–2.
        bins: those with posts. coverage: what each threshold of confidence keeps, from all to none, a point at each percent or so.
        """
        n, bins = self._posts, [b for b in range(BINS) if self.count[b]]
        return {
            "count": n,
            "ece": self.ece,
            "ece_by_chance": self.ece_by_chance,
            "nll": float(self.nll) / n,
            "brier": float(self.brier) / n,
            "accuracy": int(self.right.sum()) / n,
            "confidence": float(sum(self.confidence, Fraction())) / n,
            "bins": [
                {
                    "low": b / BINS, "high": (b + 1) / BINS, "count": int(self.count[b]), "confidence": float(self.confidence[b]) / int(self.count[b]),
                    "accuracy": int(self.right[b]) / int(self.count[b]),
                }
                for b in bins
            ],
            "coverage": self._coverage(posts),
        }  # fmt: skip

    def _coverage(self, posts: int) -> list[dict[str, float]]:
        kept = self.at_level[::-1].cumsum(0)[::-1]  # posts and right ones at or above each level
        points, last = list[dict[str, float]](), math.inf
        for level, (n, right) in enumerate(kept.tolist()):
            following = kept[level + 1, 0] if level < LEVELS else 0  # of the thresholds that keep the same posts, the highest is named
            if n and following < n and (last - n >= posts / 100 or following == 0):
                points.append({"threshold": level / LEVELS, "kept": n, "coverage": n / posts, "accuracy": right / n})
                last = n
        return points

    @property
    def _posts(self) -> int:
        return int(self.count.sum())
