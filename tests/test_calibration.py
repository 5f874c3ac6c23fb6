"""Temperature, reliability and coverage against the formulas written out."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from mulcot_ray.calibration import BOUNDS
from mulcot_ray.calibration import scaled as scaled_row
from mulcot_ray.errors import InputError
from mulcot_ray.evaluation.calibration import BINS, Reliability, scaled, temperature

RNG = np.random.default_rng(7)


def posts(n: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, list[int], list[int]]:
    """Probabilities p^sharpness of posts whose gold label follows p: calibrated at temperature `sharpness`."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.5, 0.5, 0.5], n)
    p = np.clip(p, 1e-6, None)
    p /= p.sum(1, keepdims=True)
    gold = [int(rng.choice(3, p=row)) for row in p]
    said = p**sharpness
    said /= said.sum(1, keepdims=True)
    return said, gold, said.argmax(1).tolist()


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 2.5])
def test_the_temperature_that_was_put_in_is_found(sharpness: float) -> None:
    p, gold, _ = posts(6000, sharpness)
    t = temperature(p, gold)
    assert t == pytest.approx(sharpness, rel=0.05)
    grid = [np.mean([-math.log(row[g]) for row, g in zip(scaled(p, x), gold, strict=True)]) for x in (t * 0.98, t, t * 1.02)]
    assert grid[1] == min(grid)
    order = random.Random(1).sample(range(6000), 6000)
    assert temperature(p[order], [gold[i] for i in order]) == t


def test_scaling_is_a_softmax_of_scaled_logits_and_changes_no_label() -> None:
    logits = RNG.normal(size=(50, 3)) * 4
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theirs = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(1, keepdims=True)
    assert scaled(p, 1.7) == pytest.approx(theirs, abs=1e-9)
    assert scaled(p, 1.0) == pytest.approx(p, abs=1e-12)
    assert (scaled(p, 5.0).argmax(1) == p.argmax(1)).all()
    assert [scaled_row(tuple(row), 1.7) for row in p[:5]] == [pytest.approx(row, abs=1e-12) for row in scaled(p, 1.7)[:5].tolist()], (
        "as labeler and endpoint do"
    )
    assert scaled(scaled(p, 1.7), 1 / 1.7) == pytest.approx(p, abs=1e-9)
    assert np.isfinite(scaled(np.array([[1.0, 0.0, 0.0]]), 0.5)).all()


def test_fitted_on_posts_without_an_error_it_stays_within_bounds() -> None:
    assert temperature(np.array([[0.1, 0.2, 0.7]] * 5), [2] * 5) == pytest.approx(BOUNDS[0], rel=1e-2)
    assert temperature(np.array([[0.1, 0.2, 0.7]] * 5), [0] * 5) == pytest.approx(BOUNDS[1], rel=1e-2)


def test_reliability_is_that_of_the_formulas() -> None:
    p, gold, said = posts(3000, 2.0)
    facts = Reliability.of(p, gold, said).facts(3000)
    sure, right = p.max(1), np.array([g == s for g, s in zip(gold, said, strict=True)])
    ece = 0.0
    for b in range(BINS):
        inside = (sure > b / BINS) & (sure <= (b + 1) / BINS)
        if inside.any():
            ece += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
            mine = next(x for x in facts["bins"] if x["low"] == b / BINS)
            assert mine["count"] == inside.sum() and mine["accuracy"] == pytest.approx(right[inside].mean())
            assert mine["confidence"] == pytest.approx(sure[inside].mean())
    assert facts["ece"] == pytest.approx(ece, abs=1e-12) and ece > 0.05
    assert facts["nll"] == pytest.approx(np.mean([-math.log(row[g]) for row, g in zip(p, gold, strict=True)]))
    assert facts["brier"] == pytest.approx(np.mean([(row[0] - (g == 0)) ** 2 + (row[1] - (g == 1)) ** 2 + (row[2] - (g == 2)) ** 2 for row, g in zip(p, gold, strict=True)]))  # fmt: skip
    assert (facts["accuracy"], facts["count"]) == (right.mean(), 3000)
    assert sum(b["count"] for b in facts["bins"]) == 3000


def test_scaling_lowers_the_error_on_posts_that_it_was_not_fitted_on() -> None:
    p, gold, said = posts(4000, 2.5, seed=1)
    t = temperature(*posts(4000, 2.5, seed=2)[:2])
    before, after = Reliability.of(p, gold, said), Reliability.of(scaled(p, t), gold, said)
    assert before.ece > 0.1 > 0.03 > after.ece
    assert after.facts(4000)["nll"] < before.facts(4000)["nll"]
    assert after.facts(4000)["accuracy"] == before.facts(4000)["accuracy"]


def test_faultless_probabilities_have_an_ece_by_chance() -> None:
    """The mean over many drawings of gold labels from the probabilities themselves."""
    p, _, said = posts(400, 1.0)
    rng = np.random.default_rng(4)
    drawn = [Reliability.of(p, [int(rng.choice(3, p=row)) for row in p], said) for _ in range(60)]
    assert drawn[0].ece_by_chance == drawn[1].ece_by_chance, "it depends on the confidences alone"
    assert np.mean([r.ece for r in drawn]) == pytest.approx(drawn[0].ece_by_chance, rel=0.12)
    assert drawn[0].ece_by_chance > 0.02
    assert Reliability.of(np.array([[1.0, 0, 0]]), [0], [0]).ece_by_chance == 0.0


def test_coverage_is_what_a_threshold_keeps() -> None:
    p, gold, said = posts(2000, 1.0)
    curve = Reliability.of(p, gold, said).facts(2500)["coverage"]
    sure, right = p.max(1), np.array([g == s for g, s in zip(gold, said, strict=True)])
    assert curve[0]["kept"] == 2000 and curve[0]["coverage"] == 0.8, "500 posts have no answer: they are covered at no threshold"
    assert 40 < len(curve) <= 101
    for point in curve:
        keeps = sure >= point["threshold"]
        assert abs(point["kept"] - keeps.sum()) <= 1, "a confidence that lies on the threshold may fall to either side"
        assert point["accuracy"] == pytest.approx(right[keeps].mean(), abs=0.002 if keeps.sum() > 500 else 0.05)
    assert [x["threshold"] for x in curve] == sorted({x["threshold"] for x in curve})
    assert curve[-1]["accuracy"] > curve[0]["accuracy"] + 0.2


def test_any_cut_into_batches_gives_the_same_digits() -> None:
    p, gold, said = posts(500, 1.5)
    total = Reliability()
    for lo, hi in ((300, 500), (0, 17), (17, 300)):
        total.merge(Reliability.of(p[lo:hi], gold[lo:hi], said[lo:hi]))
    assert total.facts(500) == Reliability.of(p, gold, said).facts(500)


def test_one_answer_and_the_ends_of_the_scale() -> None:
    facts = Reliability.of(np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]), [2, 1], [2, 0]).facts(2)
    assert facts["bins"] == [{"low": 14 / 15, "high": 1.0, "count": 2, "confidence": 1.0, "accuracy": 0.5}]
    assert facts["coverage"] == [{"threshold": 1.0, "kept": 2, "coverage": 1.0, "accuracy": 0.5}]
    assert facts["ece"] == 0.5 and facts["brier"] == 1.0 and math.isfinite(facts["nll"])


def test_named_errors() -> None:
    with pytest.raises(InputError, match="no post with probabilities"):
        temperature(np.empty((0, 3)), [])
    with pytest.raises(InputError, match=r"\[0.5, 0.1, 0.1\] are no distribution"):
        scaled(np.array([[0.5, 0.4, 0.1], [0.5, 0.1, 0.1]]), 1.0)
