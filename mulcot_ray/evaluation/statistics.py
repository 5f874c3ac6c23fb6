"""How sure a score is: intervals and tests, from counts alone.

Posts that share a `source_id` (two aspects of one tweet, one picture behind several posts) are not independent draws: where one is
answered wrongly, so often is the other, and an interval over posts would be too narrow. So whole sources are drawn: the cluster bootstrap
(Field and Welsh 2007, "Bootstrapping clustered data"). It streams by giving each source, in each replicate, a weight drawn from
Poisson(1) instead of drawing sources from a list (Hanley and MacGibbon 2006; Chamandy et al. 2012, "Estimating uncertainty for massive
data streams"), from a hash of the source and the replicate: the same source weighs the same wherever and in whatever order it is met.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mulcot_ray.errors import InputError
from mulcot_ray.records import LABELS

REPLICATES = 1000
Z = 1.959963984540054  # 95 %, two-sided
BATCH = 1024  # sources weighed at once: a few MB
Counts = np.ndarray[Any, np.dtype[np.int64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def hash64(text: str) -> int:
    """64 bits of a hash that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def poisson_weights(sources: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Bootstrap weights, sources × REPLICATES, each Poisson(1) to 16 bits (mean and variance 1 within 1e-4).

    splitmix64 (Steele et al. 2014) of the source's hash gives four weights of 16 bits at a time.
    """
    x = np.array([hash64(s) for s in sources], dtype=np.uint64)[:, None]
    with np.errstate(over="ignore"):
        x = x + np.arange(1, REPLICATES // 4 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return _poisson_table()[x.astype("<u8").view("<u2")]


def replicates(sources: Sequence[str], counts: Counts) -> Counts:
    """Sums of `counts` (sources × …, whole numbers) in each replicate: REPLICATES × …. They add up over batches."""
    flat = counts.reshape(len(counts), math.prod(counts.shape[1:]))
    total = np.zeros((REPLICATES, flat.shape[1]), dtype=np.int64)
    for at in range(0, len(sources), BATCH):
        weights = poisson_weights(sources[at : at + BATCH])
        total += np.rint(weights.T.astype(np.float64) @ flat[at : at + BATCH]).astype(np.int64)
    return total.reshape(REPLICATES, *counts.shape[1:])


def by_source(sources: Sequence[str], counts: Counts) -> tuple[list[str], Counts]:
    """Counts of posts (posts × …) summed by source."""
    place: dict[str, int] = {}
    index = [place.setdefault(s, len(place)) for s in sources]
    total = np.zeros((len(place), *counts.shape[1:]), dtype=np.int64)
    np.add.at(total, index, counts)
    return list(place), total


def confusion_scores(counts: Counts) -> dict[str, Floats]:
    """Accuracy, macro and weighted F1 of many confusion matrices (… × 3 × 4, as `metrics.confusion`), in the sense of
    `metrics.label_scores`; NaN where a matrix is empty."""
    right = np.diagonal(counts, axis1=-2, axis2=-1).astype(float)
    support = counts.sum(-1).astype(float)
    said = counts[..., : len(LABELS)].sum(-2).astype(float)
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.where(support + said > 0, 2 * right / (support + said), 0.0)
        n = support.sum(-1)
        weighted = (f1 * support).sum(-1) / n
        return {"accuracy": right.sum(-1) / n, "macro_f1": np.where(n > 0, f1.mean(-1), np.nan), "weighted_f1": weighted}


def interval(values: Floats) -> tuple[float, float]:
    """95 % percentile interval of bootstrap replicates; those that drew no post are left out.

    With few sources it is rough, and where every answer is right it shrinks to a point: Wilson's says more there.
    """
    drawn = values[~np.isnan(values)]
    if not len(drawn):
        return math.nan, math.nan
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, count: int, z: float = Z) -> tuple[float, float]:
    """95 % interval of a share of `count` independent trials (Wilson 1927), which stays within 0 and 1."""
    if count < 1:
        raise InputError(f"an interval of a share of {count} posts: at least one is wanted")
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test (1947): posts that only A or only B has right, were both as good, would be heads and tails.

    It takes posts as independent; where many share a source, trust the interval of the difference more. 1 where they never differ.
    """
    from scipy.stats import binomtest

    return float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0


@lru_cache(maxsize=1)
def _poisson_table() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The Poisson(1) number of each 16-bit uniform, by its inverse distribution function."""
    below = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
    return np.searchsorted(below, (np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.uint8)
