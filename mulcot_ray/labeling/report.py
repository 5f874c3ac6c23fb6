"""What a night tells people (one HTML file) and machines (Prometheus text). Both are made from its manifest and the gates' verdicts alone."""

from __future__ import annotations

import datetime
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import ConservationError
from mulcot_ray.html import environment, number, words
from mulcot_ray.labeling.gates import BINS, Gates, Verdict, breaches, last_nights, median_prior, missing_images, prior, readable, rows_in
from mulcot_ray.labeling.publishing import labels_of
from mulcot_ray.posts.shown import clip
from mulcot_ray.prices import dollars
from mulcot_ray.records import LABELS, Fate, Reason

LOWEST = 6  # bin at which the histogram begins: the largest of three probabilities is a third at least
WIDTH, HEIGHT, FOOT, SIDE = 640, 200, 26, 62  # of the histogram's picture, with room for the numbers below and beside it

FATES = {
    Fate.SCORED: "asked tonight",
    Fate.CARRIED: "the same content was asked on an earlier night, by this version: its answer is carried over",
    Fate.COPIED: "another row of this dump has the same content, and was asked in this one’s place",
    Fate.REPEATED: "the same post came before in the dump, word for word: the earlier row has the label",
    Fate.DEFERRED: "time or money ran out before it was asked: a later run asks it",
    Fate.REJECTED: "cannot be labelled; each with its reason, below",
}
REASONS = {
    Reason.BAD_LINE: "Not a row of the format, or the file breaks off there.",
    Reason.BAD_ENCODING: "The bytes are not UTF-8.",
    Reason.MISSING_FIELD: "A field that every post needs is not there.",
    Reason.BAD_VALUE: "A field holds something that it cannot be.",
    Reason.EMPTY_TEXT: "The post has no text.",
    Reason.DUPLICATE_ID: "The id (with its aspect) came before in this dump, with other content. The first one stands.",
    Reason.IMAGE_MISSING: "The picture is not where the post says.",
    Reason.IMAGE_UNREADABLE: "The picture is damaged, or no picture.",
    Reason.IMAGE_TOO_LARGE: "The picture has too many bytes or pixels.",
    Reason.IMAGE_BAD_SHAPE: "The picture is too small, or too far from square.",
    Reason.PROMPT_TOO_LONG: "The post does not fit the model’s context.",
    Reason.ANSWER_TRUNCATED: "The answer was cut by the token limit.",
    Reason.ANSWER_UNPARSED: "No label could be read from the answer.",
    Reason.ENGINE_ERROR: "The engine died each time this post was asked.",
}


def night_page(
    manifest: Manifest,
    verdicts: Sequence[Verdict],
    earlier: Sequence[Manifest],
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    nights: int = Gates().nights,
    root: str = "ROOT",
) -> str:
    """The report of a finished night as HTML.

    earlier: published nights, of which the last `nights` before this one are what is "usual"; examples: by reason, a few rows of the rejects' table;
    root: for the commands. Raises ConservationError where the manifest's counts do not add up.
    """
    stats, before = manifest.stats, last_nights(manifest, earlier, nights)
    _check(manifest)
    version, date = stats["version"], stats["date"]
    usual_labels = median_prior(before) if any(m.rows for m in before) else None
    labels = [(s.value, stats["labels"].get(s, 0), share, usual_labels and usual_labels[i]) for i, (s, share) in enumerate(zip(LABELS, prior(manifest), strict=True))]  # fmt: skip
    bad, judged = breaches(verdicts), [v for v in verdicts if v.ok is not None]
    return environment(Path(__file__).parent).get_template("night.html.j2").render(
        m=manifest, s=stats, date=date, version=version, before=before, verdicts=verdicts, bad=bad, judged=judged,
        fates=[(f.value, FATES[f], stats["fates"].get(f, 0), _usual(before, lambda m, f=f: m.stats["fates"].get(f, 0))) for f in Fate],  # type: ignore[misc]
        labelled=(Fate.SCORED, Fate.CARRIED, Fate.COPIED), labels=labels[::-1], histogram=_histogram(manifest, before), usual_confidence=_usual_confidence(before),
        answered=sorted(stats["answered_by"].items(), key=lambda x: (-x[1], x[0])), missing=(missing_images(manifest), readable(manifest), _usual(before, missing_images, readable)),
        reasons=[(r, n, REASONS.get(Reason(r), ""), [_example(e) for e in examples.get(r, ())]) for r, n in sorted(manifest.rejects_by_reason.items(), key=lambda x: (-x[1], x[0]))],
        steps=list(stats["seconds_by_step"].items()), engine=_engine(stats["engine"]), pace=_pace(stats["pace"]), price=dollars,
        commands=_commands(date, root), labels_at=f"{root}/{labels_of(manifest.name)}",
        identity=json.dumps(manifest.identity, indent=1, ensure_ascii=False), versions=manifest.versions | {"source": manifest.commit or "installed package"},
    )  # fmt: skip


def metrics(manifest: Manifest, verdicts: Sequence[Verdict]) -> str:
    """The night as gauges `mulcot_night_…{version=…}` in Prometheus' text format, for the textfile collector of its node exporter.

    What is not known (a price, an accuracy without a canary, a gate that could not judge) has no sample. Which date it was is no label, for each
    night would be a series of its own; when the file came, the collector tells (node_textfile_mtime_seconds).
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry, s = CollectorRegistry(), manifest.stats

    def gauge(name: str, text: str, values: Mapping[str, float | None] | float | None, label: str | None = None) -> None:
        g = Gauge(f"mulcot_night_{name}", text, ["version", *([label] if label else [])], registry=registry)
        for key, value in (values if isinstance(values, Mapping) else {"": values}).items():
            if value is not None:
                g.labels(s["version"], *([key] if label else [])).set(value)

    gauge("rows_in", "Rows of the dump.", manifest.rows_in)
    gauge("rows", "Rows of the dump by what became of them; they add up to mulcot_night_rows_in.", s["fates"], "fate")
    gauge("labels", "Rows with this label.", s["labels"], "label")
    gauge("answered_by", "Labels by who gave them.", s["answered_by"], "role")
    gauge("rejects", "Rows rejected, by reason.", manifest.rejects_by_reason, "reason")
    gauge("images", "Rows with and without a picture, and pictures that could not be used.", {**s["images"], "fault": s["image_faults"]}, "kind")
    gauge("explained", "Labels with a rationale.", s["explained"])
    gauge("confidence", "Mean of the largest probability.", s["confidence"]["mean"] if any(s["confidence"]["histogram"]) else None)
    gauge("canary_accuracy", "Accuracy on the canary posts.", s["canary"] and s["canary"]["accuracy"])
    gauge("canary_macro_f1", "Macro F1 on the canary posts.", s["canary"] and s["canary"]["macro_f1"])
    gauge("tokens", "Tokens read and written.", s["tokens"], "direction")
    gauge("posts_per_second", "Posts scored in a second of the scoring step.", s["rate"])
    gauge("seconds", "Time of each step.", s["seconds_by_step"], "step")
    gauge("usd", "US dollars for the engines' machines, by the price table.", s["usd"])
    gauge("usd_per_1k", "US dollars for 1,000 posts asked.", s["usd_per_1k"])
    gauge("gate_ok", "1: the gate is passed, 0: it is breached.", {v.gate: None if v.ok is None else float(v.ok) for v in verdicts}, "gate")
    gauge("gate_measured", "What the gate measured, a share.", {v.gate: v.measured for v in verdicts}, "gate")
    gauge("gate_limit", "The gate's limit at this night's size, a share.", {v.gate: v.limit for v in verdicts}, "gate")
    gauge("fit", "1: no gate is breached.", float(not breaches(verdicts)))
    return generate_latest(registry).decode()


# --- parts -----------------------------------------------------------------------------------------------------------


def _check(manifest: Manifest) -> None:
    """A report does not smooth over what does not add up."""
    fates = {f: int(manifest.stats["fates"].get(f, 0)) for f in Fate}
    labelled = fates[Fate.SCORED] + fates[Fate.CARRIED] + fates[Fate.COPIED]
    sums = {
        "rows in": (manifest.rows_in, sum(fates.values())),
        "rows labelled": (manifest.rows, labelled),
        "labels": (manifest.rows, sum(manifest.stats["labels"].values())),
        "rejects": (manifest.rejects, fates[Fate.REJECTED]),
        "rejects by reason": (manifest.rejects, sum(manifest.rejects_by_reason.values())),
    }
    for what, (stated, counted) in sums.items():
        if stated != counted:
            raise ConservationError(f"nights/{manifest.name}: {stated} {what} are stated, {counted} counted. Please report this.")


def _usual(before: Sequence[Manifest], count: Callable[[Manifest], int], of: Callable[[Manifest], int] = rows_in) -> float | None:
    """The median share of a night's rows."""
    shares = [count(m) / of(m) for m in before if of(m)]
    return median(shares) if shares else None


def _usual_confidence(before: Sequence[Manifest]) -> float | None:
    means = [float(m.stats["confidence"]["mean"]) for m in before if any(m.stats["confidence"]["histogram"])]
    return median(means) if means else None


def _histogram(manifest: Manifest, before: Sequence[Manifest]) -> dict[str, Any] | None:
    """Bars and a line of medians in the coordinates of the picture, and the same numbers as a table. None where nothing has probabilities."""
    counts = manifest.stats["confidence"]["histogram"]
    if not (n := sum(counts)):
        return None
    others = [[c / sum(h) for c in h] for m in before if sum(h := m.stats["confidence"]["histogram"])]
    usual = [median(h[i] for h in others) for i in range(BINS)] if others else None
    first = min(LOWEST, next(i for i, c in enumerate(counts) if c))
    shares = [c / n for c in counts]
    top = max([*shares, *(usual or ())])
    wide, high = (WIDTH - SIDE) / (BINS - first), HEIGHT - FOOT - 14

    def y(share: float) -> float:
        return round(14 + high * (1 - share / top), 1)

    bins = range(first, BINS)
    line = " ".join(f"{SIDE + (i - first) * wide:.1f},{y(usual[i])} {SIDE + (i + 1 - first) * wide:.1f},{y(usual[i])}" for i in bins) if usual else ""
    return {
        "width": WIDTH, "height": HEIGHT, "side": SIDE, "base": y(0), "top": top, "line": line, "nights": len(others),
        "bars": [(round(SIDE + (i - first) * wide + 1, 1), y(shares[i]), round(wide - 2, 1), round(y(0) - y(shares[i]), 1)) for i in bins],
        "ticks": [(round(SIDE + (i - first) * wide, 1), f"{i / BINS:.1f}") for i in range(first, BINS + 1) if i % 2 == 0],
        "rows": [(f"{i / BINS:.2f} – {(i + 1) / BINS:.2f}", counts[i], shares[i], usual and usual[i]) for i in bins],
        "sure": sum(counts[18:]) / n, "unsure": sum(counts[:12]) / n,
    }  # fmt: skip


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    raw = row.get("raw")
    return {"post_id": clip(str(row["post_id"]), 120), "detail": clip(str(row["detail"]), 400), "raw": None if raw is None else clip(str(raw), 800)}


def _engine(engine: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Counts of each role's engine, of a mapping of roles or of counts alone."""
    roles = engine if engine and all(isinstance(v, Mapping) for v in engine.values()) else {"": engine} if engine else {}
    return [(role, [(words(k), number(v)) for k, v in counts.items()]) for role, counts in roles.items()]


def _pace(pace: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What was set and what it led to, as facts with one or several values."""
    shown = []
    for key, value in sorted(pace.items(), key=lambda x: x[0] == "said"):
        if value is None:
            continue
        if key == "deadline" and isinstance(value, int | float):
            value = datetime.datetime.fromtimestamp(value, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
        elif key == "budget" and isinstance(value, int | float):
            value = dollars(value)
        values = value if isinstance(value, list | tuple) else [value]
        shown.append(("What it led to" if key == "said" else words(key), [str(v) for v in values]))
    return shown


def _commands(date: str, root: str) -> dict[str, str]:
    where = "" if root == "runs" else f" --root {shlex.quote(root)}"
    return {k: f"mulcot {v}{where}" for k, v in {"publish": f"publish {date}", "force": f"publish {date} --force", "rollback": f"rollback {date}", "see": "published", "sql": "published --sql", "athena": "published --athena"}.items()}  # fmt: skip
