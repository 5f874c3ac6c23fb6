"""What a night must pass before it is published: a canary with gold, and what moved against the last nights. Pure.

**Limits and chance.** A limit says what is too much. Where tonight is compared with earlier nights, a move must also be more than chance
explains, for a small night moves by itself: see `chance`. A verdict's `limit` is the larger of the two, so `measured > limit` is a breach
(of `canary_accuracy`, whose limit is a floor, `measured < limit`).

**The reference** is the median over the last published nights, whatever made them: one bad night does not become the measure of the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from mulcot_ray.artifacts import Manifest
from mulcot_ray.html import NB, number, percent
from mulcot_ray.prompts import Frozen
from mulcot_ray.records import LABELS

SIGMAS = 3.0  # standard errors that are chance. With limits of 0, at most one in a hundred nights like the others would be held (simulated)
BINS = 20  # of the histogram of confidence


class Gates(Frozen):
    """The limits. All are shares from 0 to 1; a limit of 1 (for `canary_accuracy_min` 0) holds nothing back."""

    canary_accuracy_min: float = Field(0.6, ge=0, le=1)  # only a broken model or prompt falls so low; set it just under what your model reaches
    canary_drop_max: float = Field(
        0.03, ge=0, le=1
    )  # below the last nights: a model that loses so much on the same posts is another, or sees other prompts
    label_drift_max: float = Field(0.1, ge=0, le=1)  # a tenth of the posts in another class than usual: news do that rarely, a fault at once
    confidence_drift_max: float = Field(0.05, ge=0, le=1)  # of the mean, either way: a model that sees other posts than it knows grows unsure
    missing_image_rate_rise_max: float = Field(0.05, ge=0, le=1)  # a bucket or a column that is not there costs far more than this
    reject_rate_max: float = Field(0.05, ge=0, le=1)  # whatever was usual: a table that lacks a twentieth is not the dump
    reject_rate_rise_max: float = Field(0.02, ge=0, le=1)  # a new fault in the dump shows before the rate is bad by itself
    deferred_rate_max: float = Field(0.1, ge=0, le=1)  # put off for want of time or money: more is no finished night
    nights: int = Field(7, ge=1)  # a week: each weekday once
    min_nights: int = Field(3, ge=1)  # the median of fewer is no better than one of them

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.min_nights > self.nights:
            raise ValueError(f"min_nights {self.min_nights}: at most nights, {self.nights}, can be asked for")
        return self


class Verdict(Frozen):
    """What a gate found. `ok` is None where it could not judge; `measured` and `limit` are shares; `why` is for people."""

    gate: str
    ok: bool | None
    measured: float | None
    limit: float | None
    why: str


class Spread(NamedTuple):
    """How one post's value is spread: standard deviation, and third central moment over the squared deviation (skewness × deviation)."""

    deviation: float
    lean: float


def judge(manifest: Manifest, earlier: Sequence[Manifest], gates: Gates) -> list[Verdict]:
    """One verdict a gate, always the same gates in the same order. `earlier`: manifests of published nights, in any order."""
    before = last_nights(manifest, earlier, gates.nights)
    return [
        _canary_floor(manifest, gates),
        _canary_drop(manifest, before, gates),
        _label_drift(manifest, before, gates),
        _confidence_drift(manifest, before, gates),
        _rise(
            "missing_image_rise",
            "posts without a usable picture",
            manifest,
            before,
            gates,
            gates.missing_image_rate_rise_max,
            missing_images,
            readable,
        ),
        _ceiling("reject_rate", "rows rejected", manifest, rejected(manifest), gates.reject_rate_max),
        _rise("reject_rate_rise", "rows rejected", manifest, before, gates, gates.reject_rate_rise_max, rejected, rows_in),
        _ceiling("deferred_rate", "rows deferred", manifest, int(manifest.stats["deferred"]), gates.deferred_rate_max),
    ]


def breaches(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts that hold a night back."""
    return [v for v in verdicts if v.ok is False]


def last_nights(manifest: Manifest, earlier: Sequence[Manifest], count: int) -> list[Manifest]:
    """The last `count` of the nights before this one's date, oldest first. Another revision of the same date is not earlier."""
    before = [m for m in earlier if m.stats["date"] < manifest.stats["date"] and m.rows_in]
    return sorted(before, key=lambda m: (m.stats["date"], m.finished))[-count:]


def prior(manifest: Manifest) -> list[float]:
    """Shares of the labels, in the order of LABELS."""
    return [manifest.stats["labels"].get(s, 0) / max(1, manifest.rows) for s in LABELS]


def median_prior(nights: Sequence[Manifest]) -> list[float]:
    """Class by class the median share, made to sum to 1."""
    labelled = [prior(m) for m in nights if m.rows]
    middle = [median(shares) for shares in zip(*labelled, strict=True)]
    return [m / (sum(middle) or 1.0) for m in middle]


def missing_images(manifest: Manifest) -> int:
    """Rows that came without a picture, and rows whose picture could not be used."""
    return int(manifest.stats["images"]["without"]) + int(manifest.stats["image_faults"])


def readable(manifest: Manifest) -> int:
    """Rows of which it is known whether they came with a picture: of a broken line it is not."""
    return int(manifest.stats["images"]["with"]) + int(manifest.stats["images"]["without"])


def rejected(manifest: Manifest) -> int:
    return manifest.rejects


def rows_in(manifest: Manifest) -> int:
    return manifest.rows_in


def chance(spread: Spread, n: int, earlier: Sequence[int]) -> float:
    """How far the mean over `n` posts may lie off the median of earlier nights' means (over so many posts each) when nothing has changed.

    SIGMAS standard errors of the difference. The median of k nights with m posts each counts as 2/π·k·m posts: it is that much less sharp than a
    mean. The second term is the third moment's (Cornish and Fisher 1938): without it the rule would cry at the first rare event of a small
    night, which is far more often above three standard errors than a normal variable is.
    """
    m = 2 / math.pi * len(earlier) * median(earlier)
    return SIGMAS * spread.deviation * math.sqrt(1 / n + 1 / m) + (SIGMAS**2 - 1) / 6 * abs(spread.lean) / n


def chance_of_share(p: float, n: int, earlier: Sequence[int]) -> float:
    """`chance` of a yes or no whose median share was `p`. One of each is added to a night's posts: "never yet" is not "never"."""
    m = median(earlier)
    q = (p * m + 1) / (m + 2)
    return chance(Spread(math.sqrt(q * (1 - q)), 1 - 2 * q), n, earlier)


# --- the gates -------------------------------------------------------------------------------------------------------


def _canary_floor(manifest: Manifest, gates: Gates) -> Verdict:
    canary, least = manifest.stats["canary"], gates.canary_accuracy_min
    if not canary:
        return Verdict(gate="canary_accuracy", ok=None, measured=None, limit=least, why="There is no canary: no posts with gold were asked.")
    accuracy = float(canary["accuracy"])
    said = f"{_share(accuracy)} of {number(canary['posts'])} canary posts are right; at least {_share(least)} are wanted."
    return Verdict(gate="canary_accuracy", ok=accuracy >= least, measured=accuracy, limit=least, why=said)


def _canary_drop(manifest: Manifest, before: Sequence[Manifest], gates: Gates) -> Verdict:
    """The same posts each night: between nights of one model there is no chance; between models it is counted as if each had drawn its own."""
    canary, gate = manifest.stats["canary"], "canary_drop"
    if not canary:
        return _unknown(gate, gates.canary_drop_max, "There is no canary: no posts with gold were asked.")
    before = [m for m in before if _same_canary(m.stats["canary"], canary)]
    if few := _too_few(gate, before, gates, gates.canary_drop_max, "with this canary"):
        return few
    usual = median(float(m.stats["canary"]["accuracy"]) for m in before)
    n, drop = int(canary["posts"]), usual - float(canary["accuracy"])
    others = {m.stats["version"] for m in before} != {manifest.stats["version"]}
    slack = chance_of_share(usual, n, [n] * len(before)) if others else 0.0
    said = (
        f"{_share(canary['accuracy'])} of {number(n)} canary posts are right, against {_share(usual)} in the median of the last {len(before)} nights"
    )
    return _verdict(gate, drop, gates.canary_drop_max, slack, n, said, "The same model was asked the same posts: this is not chance.")


def _label_drift(manifest: Manifest, before: Sequence[Manifest], gates: Gates) -> Verdict:
    """Total variation distance. With three classes it is the largest difference of any one share, so each share's chance is the distance's."""
    gate, limit = "label_drift", gates.label_drift_max
    n = manifest.rows - int(manifest.stats["fates"].get("copied", 0))  # a copy is the same answer once more
    if not n:
        return _unknown(gate, limit, "No row was labelled.")
    before = [m for m in before if m.rows]
    if few := _too_few(gate, before, gates, limit, "with labels"):
        return few
    tonight, usual = prior(manifest), median_prior(before)
    distance = sum(abs(a - b) for a, b in zip(tonight, usual, strict=True)) / 2
    slack = max(chance_of_share(p, n, _asked(before)) for p in usual)
    shares = ", ".join(f"{s.value} {_share(a)} (usually {_share(b)})" for s, a, b in zip(LABELS, tonight, usual, strict=True))
    said = f"The shares of the labels lie {_share(distance)} from the median of the last {len(before)} nights: {shares}"
    return _verdict(gate, distance, limit, slack, n, said)


def _confidence_drift(manifest: Manifest, before: Sequence[Manifest], gates: Gates) -> Verdict:
    gate, limit, tonight = "confidence_drift", gates.confidence_drift_max, manifest.stats["confidence"]
    n = _scored(manifest)
    if not n:
        return _unknown(gate, limit, "No row has probabilities.")
    before = [m for m in before if _scored(m)]
    if few := _too_few(gate, before, gates, limit, "with probabilities"):
        return few
    usual = median(float(m.stats["confidence"]["mean"]) for m in before)
    drift = abs(float(tonight["mean"]) - usual)
    slack = chance(_spread(before), n, [_scored(m) for m in before])
    said = f"The mean confidence is {_share(tonight['mean'])}, against {_share(usual)} in the median of the last {len(before)} nights"
    return _verdict(gate, drift, limit, slack, n, said)


def _rise(
    gate: str, what: str, manifest: Manifest, before: Sequence[Manifest], gates: Gates, limit: float, count: Callable[[Manifest], int],
    of: Callable[[Manifest], int],
) -> Verdict:  # fmt: skip
    """A rate above the median rate."""
    n = of(manifest)
    if not n:
        return _unknown(gate, limit, "No row came in." if not manifest.rows_in else "No row could be read.")
    before = [m for m in before if of(m)]
    if few := _too_few(gate, before, gates, limit, ""):
        return few
    usual = median(count(m) / of(m) for m in before)
    slack = chance_of_share(usual, n, [of(m) for m in before])
    rate = count(manifest) / n
    said = f"{number(count(manifest))} of {number(n)} {what} ({_share(rate)}), against {_share(usual)} in the median of the last {len(before)} nights"
    return _verdict(gate, rate - usual, limit, slack, n, said)


def _ceiling(gate: str, what: str, manifest: Manifest, count: int, limit: float) -> Verdict:
    if not manifest.rows_in:
        return _unknown(gate, limit, "No row came in.")
    rate = count / manifest.rows_in
    said = f"{number(count)} of {number(manifest.rows_in)} {what} ({_share(rate)}); at most {_share(limit)} are allowed."
    return Verdict(gate=gate, ok=rate <= limit, measured=rate, limit=limit, why=said)


def _verdict(gate: str, measured: float, limit: float, slack: float, n: int, said: str, otherwise: str = "") -> Verdict:
    """Of a move that counts only beyond `slack`, what chance explains."""
    measured, most = round(measured, 12), max(limit, slack)  # 0.7 - 0.67 is 0.03
    if measured <= limit:
        end = f"{_share(limit)} is allowed."
    elif measured <= slack:
        end = f"{_share(limit)} is allowed, but over {number(n)} posts chance alone gives up to {_share(slack)}."
    elif slack:
        end = f"{_share(limit)} is allowed, and chance gives {_share(slack)} at most over {number(n)} posts."
    else:
        end = f"{_share(limit)} is allowed. {otherwise}"
    return Verdict(gate=gate, ok=measured <= most, measured=measured, limit=most, why=f"{said}. {end}")


def _unknown(gate: str, limit: float, why: str) -> Verdict:
    return Verdict(gate=gate, ok=None, measured=None, limit=limit, why=why)


def _too_few(gate: str, before: Sequence[Manifest], gates: Gates, limit: float, which: str) -> Verdict | None:
    if len(before) >= gates.min_nights:
        return None
    there = f"{len(before) or 'none'} published before this date{' ' + which if which else ''}"
    return _unknown(gate, limit, f"Not enough nights to compare with: {there}, {gates.min_nights} are wanted.")


def _same_canary(then: Any, now: Any) -> bool:
    return bool(then) and then["posts"] == now["posts"] and then.get("fingerprint") == now.get("fingerprint")


def _asked(nights: Sequence[Manifest]) -> list[int]:
    return [max(1, m.rows - int(m.stats["fates"].get("copied", 0))) for m in nights]


def _scored(manifest: Manifest) -> int:
    """Rows with probabilities."""
    return sum(manifest.stats["confidence"]["histogram"])


def _spread(nights: Sequence[Manifest]) -> Spread:
    """Of one post's confidence, from the nights' histograms together; a bin's rows stand at its middle."""
    counts = [sum(m.stats["confidence"]["histogram"][i] for m in nights) for i in range(BINS)]
    middles, n = [(i + 0.5) / BINS for i in range(BINS)], sum(counts)
    mean = sum(c * x for c, x in zip(counts, middles, strict=True)) / n
    second, third = (sum(c * (x - mean) ** k for c, x in zip(counts, middles, strict=True)) / n for k in (2, 3))
    second += 1 / (12 * BINS**2)  # within a bin
    return Spread(math.sqrt(second), third / second)


def _share(x: float) -> str:
    """0.1234 → 12.3 %; small ones keep two digits."""
    return percent(x) if x >= 0.01 or not x else f"{100 * x:.2g}{NB}%"
