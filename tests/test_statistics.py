"""Intervals cover what they promise, also where posts come in groups, and tests equal the ones by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mulcot_ray.errors import InputError
from mulcot_ray.evaluation.metrics import confusion, label_scores
from mulcot_ray.evaluation.statistics import (
    REPLICATES,
    by_source,
    confusion_scores,
    interval,
    mcnemar,
    poisson_weights,
    replicates,
    wilson,
)
from mulcot_ray.records import LABELS

FROZEN = [[3, 2, 0, 0, 0, 1, 0, 2, 1, 0, 1, 2, 2, 0, 0, 2], [1, 2, 0, 1, 0, 1, 1, 0, 1, 1, 0, 3, 1, 1, 1, 2]]


def test_weights_are_poisson_and_depend_on_the_source_alone() -> None:
    names = [f"source-{i}" for i in range(4000)]
    w = poisson_weights(names)
    assert w.shape == (4000, REPLICATES)
    assert w.mean() == pytest.approx(1, abs=2e-3) and w.var() == pytest.approx(1, abs=5e-3)
    for k in range(5):
        assert (w == k).mean() == pytest.approx(math.exp(-1) / math.factorial(k), abs=2e-3)
    between = np.corrcoef(w[:, :60].T)[~np.eye(60, dtype=bool)]
    among = np.corrcoef(w[:60])[~np.eye(60, dtype=bool)]
    assert abs(between).max() < 0.09 and abs(among).max() < 0.16, "replicates, and sources, are drawn apart (5 standard deviations)"
    assert (poisson_weights(names[7:9]) == w[7:9]).all() and (poisson_weights(names[7:8]) != w[8]).any()
    # Frozen: another machine or version must draw the same.
    assert poisson_weights(["a", "b"])[:, :16].tolist() == FROZEN


def test_replicates_add_up_over_batches() -> None:
    rng = np.random.default_rng(0)
    names, counts = [f"s{i}" for i in range(2500)], rng.integers(0, 3, (2500, 3, 4))
    whole = replicates(names, counts)
    assert whole.shape == (REPLICATES, 3, 4)
    assert (whole == replicates(names[:900], counts[:900]) + replicates(names[900:], counts[900:])).all()
    assert (whole == np.einsum("sb,sij->bij", poisson_weights(names).astype(int), counts)).all()
    assert not replicates([], np.zeros((0, 3, 4), dtype=np.int64)).any()


def test_posts_are_summed_by_source() -> None:
    names, counts = by_source(["x", "y", "x"], np.array([[1, 0], [0, 1], [2, 2]]))
    assert names == ["x", "y"] and counts.tolist() == [[3, 2], [0, 1]]


def test_scores_of_many_matrices_are_those_of_one() -> None:
    rng = np.random.default_rng(1)
    many = rng.integers(0, 9, (50, 3, 4))
    many[0, 1], many[1, :, 2], many[2] = 0, 0, 0
    many[2, 0, 0] = 3  # one class only
    scores = confusion_scores(many)
    for i, one in enumerate(many):
        assert {k: v[i] for k, v in scores.items()} == pytest.approx({k: label_scores(one)[k] for k in scores}, abs=1e-14)
    assert np.isnan(confusion_scores(np.zeros((1, 3, 4)))["accuracy"][0])


def test_interval_is_that_of_the_usual_bootstrap() -> None:
    """Drawing whole sources with replacement, by hand."""
    rng = np.random.default_rng(2)
    sizes = rng.integers(1, 4, 600)
    right = [rng.random(n) < p for n, p in zip(sizes, rng.choice([0.3, 0.95], 600), strict=True)]
    names = [f"s{i}" for i in range(600)]
    counts = np.array([[r.sum(), len(r) - r.sum()] for r in right])
    ours = replicates(names, counts)
    low, high = interval(ours[:, 0] / ours.sum(1))
    drawn = [counts[rng.integers(0, 600, 600)].sum(0) for _ in range(4000)]
    by_hand = np.percentile([r / (r + w) for r, w in drawn], [2.5, 97.5])
    assert (low, high) == pytest.approx(tuple(by_hand), abs=0.006)


def test_an_interval_covers_the_truth_where_posts_share_a_source() -> None:
    """Sources of 6 posts that are answered alike: ours covers, Wilson's (posts as independent) does not."""
    rng = np.random.default_rng(3)
    covered = covered_wilson = 0
    for trial in range(200):
        alike = rng.random(80) < 0.7
        counts = np.zeros((80, 3, 4), dtype=np.int64)
        counts[:, 0, 0], counts[:, 0, 1] = 6 * alike, 6 * ~alike
        drawn = confusion_scores(replicates([f"{trial}/{i}" for i in range(80)], counts))["accuracy"]
        low, high = interval(drawn)
        covered += low <= 0.7 <= high
        low, high = wilson(alike.mean(), 480)
        covered_wilson += low <= 0.7 <= high
    assert 0.90 <= covered / 200 <= 0.99
    assert covered_wilson / 200 < 0.75


def test_empty_replicates_are_left_out() -> None:
    assert interval(np.array([0.5, np.nan, 0.5])) == (0.5, 0.5)
    assert all(math.isnan(x) for x in interval(np.array([np.nan])))


def test_wilson() -> None:
    from scipy.stats import binomtest

    for right, n in ((0, 5), (3, 10), (90, 100), (7, 7)):
        theirs = binomtest(right, n).proportion_ci(method="wilson")
        assert wilson(right / n, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    with pytest.raises(InputError, match="share of 0 posts"):
        wilson(0.5, 0)


def test_mcnemar_is_the_exact_binomial_by_hand() -> None:
    tail = sum(math.comb(13, k) for k in range(4)) / 2**13
    assert mcnemar(3, 10) == mcnemar(10, 3) == pytest.approx(2 * tail, abs=1e-15)
    assert mcnemar(0, 0) == 1.0 and mcnemar(4, 4) == 1.0
    assert mcnemar(0, 20) < 1e-5


def test_confusion_is_in_the_order_of_the_labels() -> None:
    assert [confusion([(g, a)]).nonzero() for g in LABELS for a in LABELS] == [([i], [j]) for i in range(3) for j in range(3)]
