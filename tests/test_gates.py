"""Gates: what holds a night back, what is chance, and what cannot be judged yet."""

from __future__ import annotations

import random
from statistics import median
from typing import Any

import pytest
from finished_nights import canary, confidence_of, manifest
from pydantic import ValidationError

from mulcot_ray.artifacts import Manifest
from mulcot_ray.html import NB
from mulcot_ray.labeling.gates import Gates, Verdict, breaches, chance_of_share, judge, last_nights

GATES = Gates()
NAMES = [
    "canary_accuracy",
    "canary_drop",
    "label_drift",
    "confidence_drift",
    "missing_image_rise",
    "reject_rate",
    "reject_rate_rise",
    "deferred_rate",
]


def week(**changes: Any) -> list[Manifest]:
    return [manifest(f"2026-11-{d}", **changes) for d in range(15, 22)]


def one(gate: str, tonight: Manifest, earlier: list[Manifest], gates: Gates = GATES) -> Verdict:
    return next(v for v in judge(tonight, earlier, gates) if v.gate == gate)


def labels(rows: int, negative: float, neutral: float) -> dict[str, int]:
    counts = {"negative": round(negative * rows), "neutral": round(neutral * rows)}
    return counts | {"positive": rows - sum(counts.values())}


def test_a_night_like_the_others_passes_every_gate() -> None:
    verdicts = judge(manifest(canary=canary(0.9)), week(canary=canary(0.9)), GATES)
    assert [v.gate for v in verdicts] == NAMES and all(v.ok for v in verdicts) and breaches(verdicts) == []
    assert all(v.measured is not None and v.limit is not None and v.why.endswith(".") for v in verdicts)
    assert [Verdict.model_validate(v.model_dump()) for v in verdicts] == verdicts


def test_the_first_nights_are_judged_by_themselves_alone() -> None:
    verdicts = {v.gate: v for v in judge(manifest(), week()[:2], GATES)}
    assert [g for g, v in verdicts.items() if v.ok] == ["reject_rate", "deferred_rate"]
    assert {g for g, v in verdicts.items() if v.ok is None} == set(NAMES) - {"reject_rate", "deferred_rate"}
    assert verdicts["label_drift"].why == "Not enough nights to compare with: 2 published before this date with labels, 3 are wanted."
    assert "no canary" in verdicts["canary_accuracy"].why and "no canary" in verdicts["canary_drop"].why
    assert "none published before this date" in one("reject_rate_rise", manifest(), []).why
    assert one("label_drift", manifest(), week()[:2], Gates(min_nights=2)).ok


def test_only_earlier_dates_count_and_only_the_last_of_them() -> None:
    tonight = manifest()
    others = [manifest("2026-11-22", revision=2), manifest("2026-11-23"), *week(), manifest("2026-11-01"), manifest("2026-11-14", 0)]
    random.Random(1).shuffle(others)
    assert [m.stats["date"] for m in last_nights(tonight, others, 3)] == ["2026-11-19", "2026-11-20", "2026-11-21"]
    assert [m.stats["date"] for m in last_nights(tonight, others, 9)] == ["2026-11-01", *(f"2026-11-{d}" for d in range(15, 22))]


# --- each gate -------------------------------------------------------------------------------------------------------


def test_the_canarys_floor() -> None:
    for accuracy, ok in ((0.59, False), (0.6, True), (0.95, True)):
        v = one("canary_accuracy", manifest(canary=canary(accuracy)), [])
        assert (v.ok, v.measured, v.limit) == (ok, accuracy, 0.6)
    assert f"59.0{NB}% of 400 canary posts are right; at least 60.0{NB}% are wanted." in one("canary_accuracy", manifest(canary=canary(0.59)), []).why


def test_a_canary_that_drops() -> None:
    before = week(canary=canary(0.9))
    assert one("canary_drop", manifest(canary=canary(0.87)), before).ok  # at the limit
    v = one("canary_drop", manifest(canary=canary(0.86)), before)
    assert v.ok is False and v.measured == pytest.approx(0.04) and v.limit == 0.03 and "this is not chance" in v.why
    assert one("canary_drop", manifest(canary=canary(0.99)), before).ok
    # Another model answers other posts rightly: of 400 posts that alone is more than 4 points, of 40,000 it is not.
    for posts, ok in ((400, True), (40_000, False)):
        other = manifest(version="student-other", canary=canary(0.86, posts))
        v = one("canary_drop", other, week(canary=canary(0.9, posts)))
        assert v.ok is ok and v.limit is not None and (v.limit > 0.04) == ok
    # Other posts tell nothing about these.
    assert one("canary_drop", manifest(canary=canary(0.5)), week(canary=canary(0.9, fingerprint="c2"))).ok is None
    assert one("canary_drop", manifest(canary=canary(0.5)), week(canary=canary(0.9, 500))).ok is None
    # One bad night among the others is not the measure.
    assert one("canary_drop", manifest(canary=canary(0.86)), [*before[:-1], manifest("2026-11-21", canary=canary(0.5))]).ok is False


def test_labels_that_move() -> None:
    v = one("label_drift", manifest(labels=labels(1000, 0.4, 0.33)), week())
    assert v.ok is False and v.measured == pytest.approx(0.16, abs=1e-6) and v.limit == 0.1
    assert f"negative 40.0{NB}% (usually 24.0{NB}%)" in v.why and "last 7 nights" in v.why and "chance gives" in v.why
    assert one("label_drift", manifest(labels=labels(1000, 0.33, 0.33)), week()).ok
    # The same shares of 40 posts are what chance gives.
    small = one("label_drift", manifest(rows=40, labels=labels(40, 0.4, 0.33)), week())
    assert small.ok and small.measured > 0.1 and small.limit > small.measured and "chance alone gives up to" in small.why
    # Copies are one answer many times: 1,000 rows of which 960 are copies are 40 answers.
    fates = {"scored": 40, "copied": 960, "rejected": 10}
    assert one("label_drift", manifest(labels=labels(1000, 0.4, 0.33), fates=fates), week()).ok
    assert one("label_drift", manifest(rows=0, labels={}, fates={}), week()).ok is None


def test_confidence_that_moves_either_way() -> None:
    before = week(confidence=confidence_of({15: 1000}))
    for bin_, ok in ((15, True), (14, True), (13, False), (18, False)):
        v = one("confidence_drift", manifest(confidence=confidence_of({bin_: 1000})), before)
        assert v.ok is ok and v.measured == pytest.approx(abs(bin_ - 15) / 20)
    assert f"67.5{NB}%, against 77.5{NB}%" in one("confidence_drift", manifest(confidence=confidence_of({13: 1000})), before).why
    wide = week()  # its histogram has posts at 52 % and at 97 %: three posts may be any of these
    mean = median(m.stats["confidence"]["mean"] for m in wide)
    for count, ok in ((3, True), (3000, False)):
        v = one("confidence_drift", manifest(confidence={"mean": mean - 0.1, "histogram": confidence_of({10: count})["histogram"]}), wide)
        assert v.ok is ok
    assert one("confidence_drift", manifest(confidence=confidence_of({})), before).ok is None
    assert one("confidence_drift", manifest(), week(confidence=confidence_of({}))).ok is None


def test_pictures_that_go_missing_or_cannot_be_used() -> None:
    for images, faults, ok in (({"with": 990, "without": 20}, 0, True), ({"with": 900, "without": 110}, 0, False), ({"with": 990, "without": 20}, 100, False),
                               ({"with": 1010, "without": 0}, 0, True)):  # fmt: skip
        v = one("missing_image_rise", manifest(images=images, image_faults=faults), week())
        assert v.ok is ok and v.measured == pytest.approx((images["without"] + faults) / 1010 - 20 / 1010, abs=1e-9)
    assert one("missing_image_rise", manifest(rows=10, images={"with": 9, "without": 1}), week()).ok
    # Broken lines are no posts without pictures, and no posts with pictures either.
    half = one("missing_image_rise", manifest(rows=500, rejects=500, images={"with": 490, "without": 10}), week())
    assert half.ok and abs(half.measured) < 1e-3
    assert one("missing_image_rise", manifest(rows=0, rejects=9, images={"with": 0, "without": 0}), week()).why == "No row could be read."


def test_rejects_and_rows_put_off() -> None:
    assert one("reject_rate", manifest(rejects=50, rows=950), []).ok  # at the limit
    v = one("reject_rate", manifest(rejects=51, rows=949), [])
    assert v.ok is False and v.measured == 0.051 and v.why == f"51 of 1{NB}000 rows rejected (5.1{NB}%); at most 5.0{NB}% are allowed."
    rise = one("reject_rate_rise", manifest(rejects=45, rows=955), week())
    assert rise.ok is False and rise.measured == pytest.approx(0.045 - 10 / 1010) and one("reject_rate", manifest(rejects=45, rows=955), []).ok
    assert one("reject_rate_rise", manifest(rejects=25, rows=975), week()).ok
    assert one("reject_rate_rise", manifest(rejects=1, rows=19), week()).ok  # one of twenty is chance
    assert one("deferred_rate", manifest(rows=890, rejects=10, deferred=100), []).ok
    assert one("deferred_rate", manifest(rows=880, rejects=10, deferred=110), []).ok is False
    assert {v.ok for v in judge(manifest(rows=0, rejects=0), week(), GATES)} == {None}


def test_limits_are_settings() -> None:
    off = Gates(canary_accuracy_min=0, canary_drop_max=1, label_drift_max=1, confidence_drift_max=1, missing_image_rate_rise_max=1, reject_rate_max=1,
                reject_rate_rise_max=1, deferred_rate_max=1)  # fmt: skip
    worst = manifest(
        rows=10,
        rejects=900,
        deferred=500,
        canary=canary(0.0),
        labels={"negative": 10},
        confidence=confidence_of({6: 10}),
        images={"with": 0, "without": 1410},
    )
    assert breaches(judge(worst, week(canary=canary(1.0)), off)) == []
    assert [v.gate for v in breaches(judge(worst, week(canary=canary(1.0)), GATES))] == NAMES
    for bad in ({"label_drift_max": 1.5}, {"nights": 0}, {"drift": 0.1}, {"nights": 2, "min_nights": 3}):
        with pytest.raises(ValidationError):
            Gates(**bad)


# --- chance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nights", "size", "n", "p"), [(7, 1000, 1, 0.1), (7, 1000, 5, 0.4), (7, 1000, 30, 0.02), (3, 300, 100, 0.02), (7, 3000, 1000, 0.002), (7, 1000, 1000, 0.4)])  # fmt: skip
def test_nights_that_differ_by_chance_alone_are_rarely_held(nights: int, size: int, n: int, p: float) -> None:
    """20,000 simulated weeks: with a limit of 0, fewer than 1 in 100 nights lie above what `chance_of_share` gives, and a real change is found."""
    import numpy as np

    rng, weeks = np.random.default_rng(7), 20_000
    usual = np.median(rng.binomial(size, p, (weeks, nights)) / size, axis=1)
    limit = {u: chance_of_share(float(u), n, [size] * nights) for u in np.unique(usual)}
    above = rng.binomial(n, p, weeks) / n - usual > np.array([limit[u] for u in usual])
    assert above.mean() < 0.01
    if n >= 30:
        changed = rng.binomial(n, min(1.0, 5 * p + 0.2), weeks) / n - usual > np.array([limit[u] for u in usual])
        assert changed.mean() > 0.5


def test_chance_shrinks_with_the_night_and_never_holds_a_single_post() -> None:
    sizes = [1, 10, 100, 1000, 100_000]
    for p in (0.0, 0.01, 0.3, 0.9, 1.0):
        found = [chance_of_share(p, n, [1000] * 7) for n in sizes]
        assert found == sorted(found, reverse=True) and found[0] > 1 - p and found[-1] < 0.05
    assert chance_of_share(0.0, 100, [10] * 3) > chance_of_share(0.0, 100, [10_000] * 3)  # never in 30 rows is little to go by
    assert chance_of_share(0.1, 1000, [100] * 3) > chance_of_share(0.1, 1000, [100] * 30)
