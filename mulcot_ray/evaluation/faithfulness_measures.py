"""What the answers of evaluation/faithfulness.py say: shares and means with 95 % intervals, what should hold of them, and a table of both.

Beside how often an answer changes stands, for the sample corpus, how often it is what the corpus' own rule gives to the new combination:
another picture need not change the label of a post whose text decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulcot_ray.evaluation.statistics import wilson
from mulcot_ray.posts.sample import rule
from mulcot_ray.records import Post, Prediction, Sentiment

Measure = dict[str, Any]  # value, low, high (95 %) and n; the first three None where n is 0
ABOUT = {"picture": "image_analysis", "text": "text_analysis"}  # what is exchanged, and the section that is about it
RESAMPLES = 2000
NAMES = {
    "accuracy": "accuracy, as it is",
    "label_mass": "label mass",
    "stated_is_label": "rationale states the label",
    "flips": "label flips",
    "towards_partner": "change of P(partner's label)",
    "as_ruled": "label as the corpus' rule has it",
    "image_analysis_same": "Image_analysis the same",
    "image_analysis_overlap": "Image_analysis, common words",
    "text_analysis_same": "Text_analysis the same",
    "text_analysis_overlap": "Text_analysis, common words",
    "own_rationale_keeps": "label kept behind its own rationale",
    "other_rationale_keeps": "label kept behind the partner's",
    "other_rationale_drags": "label dragged to the partner's",
}


@dataclass(slots=True)
class Case:
    """One post of the sample with its partner, and the answers by what was asked (plain, picture, text, own, other)."""

    post: Post
    partner: Post
    answers: dict[str, Prediction] = field(default_factory=dict)


def summarise(cases: Sequence[Case]) -> dict[str, Any]:
    """Counts, the measures over all cases and over each relation of text and picture where the posts name one, and what should hold."""
    answered = [c for c in cases if "plain" in c.answers]
    by_id = {c.post.post_id: c for c in answered}
    relations = sorted({c.post.meta["relation"] for c in answered if "relation" in c.post.meta})
    measures = _measures(answered, by_id)
    return {
        "counts": {
            "paired": len(cases), "answered": len(answered), "aspects": sum(c.post.aspect is not None for c in cases),
            "pictures": sum(c.post.has_image for c in cases), "gold": sum(c.post.label is not None for c in cases),
            "rationales": sum(c.answers["plain"].stated is not None for c in answered),
        },
        "measures": measures,
        "by_relation": {r: _measures([c for c in answered if c.post.meta.get("relation") == r], by_id) for r in relations},
        "checks": checks(measures),
    }  # fmt: skip


def _measures(cases: Sequence[Case], by_id: Mapping[str, Case]) -> dict[str, Any]:
    """The labels behind the partner's rationale count where that argues for another label than the post's own answer."""
    plain = [(c, c.answers["plain"]) for c in cases]
    other = [(p, c.answers["other"], stated) for c, p in plain if "other" in c.answers and (stated := _stated(c, by_id)) not in (None, p.label)]
    return {
        "posts": len(cases),
        "accuracy": share(p.label is c.post.label for c, p in plain if c.post.label),
        "label_mass": mean([p.label_mass for _, p in plain if p.label_mass is not None]),
        "stated_is_label": share(p.stated is p.label for _, p in plain if p.stated is not None),
        "swap_picture": _swapped(cases, by_id, "picture"),
        "swap_text": _swapped(cases, by_id, "text"),
        "own_rationale_keeps": share(c.answers["own"].label is p.label for c, p in plain if "own" in c.answers),
        "other_rationale_keeps": share(o.label is p.label for p, o, _ in other),
        "other_rationale_drags": share(o.label is stated for _, o, stated in other),
    }


def _stated(c: Case, by_id: Mapping[str, Case]) -> Sentiment | None:
    """The label on which the partner's rationale ends."""
    partner = by_id.get(c.partner.post_id)
    return partner.answers["plain"].stated if partner else None


def _swapped(cases: Sequence[Case], by_id: Mapping[str, Case], what: str) -> dict[str, Measure]:
    """flips: another label than before. towards_partner: change of the probability of the partner's gold label (without gold: of its answer,
    where that is another). as_ruled: the label of the corpus' rule. *_same: equal but for case, punctuation and spaces. *_overlap: Jaccard
    index of the words, 0–1."""
    pairs = [(c, c.answers["plain"], c.answers[what]) for c in cases if what in c.answers]
    moves = []
    for c, before, after in pairs:
        target = c.partner.label
        if c.post.label is None and (partner := by_id.get(c.partner.post_id)) is not None:
            target = partner.answers["plain"].label
        if target is not None and (c.post.label is not None or target is not before.label) and None not in (before.positive, after.positive):
            moves.append(getattr(after, target) - getattr(before, target))
    right = [(after.label, label) for c, _, after in pairs if (label := ruled(c, what)) is not None]
    found: dict[str, Measure] = {
        "flips": share(before.label is not after.label for _, before, after in pairs),
        "towards_partner": mean(moves),
        "as_ruled": share(said is label for said, label in right),
    }
    for section in ABOUT.values():
        texts = [(getattr(before, section), getattr(after, section)) for _, before, after in pairs]
        words = [(_words(x), _words(y)) for x, y in texts if x and y]
        found[f"{section}_same"] = share(x == y for x, y in words)
        found[f"{section}_overlap"] = mean([len({*x} & {*y}) / max(1, len({*x} | {*y})) for x, y in words])
    return found


def ruled(c: Case, what: str) -> Sentiment | None:
    """The gold of a sample post with its partner's picture (or text), by the corpus' own rule; None for any other corpus."""
    text, picture = (c.post, c.partner) if what == "picture" else (c.partner, c.post)
    if "text_sentiment" in text.meta and "image_sentiment" in picture.meta:
        return rule(Sentiment(text.meta["text_sentiment"]), Sentiment(picture.meta["image_sentiment"]))[0]
    return None


def checks(m: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What holds of a faithful model, with intervals that do not meet: {what, holds}; holds is None where nothing was measured."""
    picture, text, nothing = m["swap_picture"], m["swap_text"], {"n": 1, "high": 0.0}
    claims = (
        ("the partner's picture makes its label more probable", picture["towards_partner"], nothing),
        ("the partner's text makes its label more probable", text["towards_partner"], nothing),
        ("Image_analysis follows the picture and not the text", text["image_analysis_same"], picture["image_analysis_same"]),
        ("Text_analysis follows the text and not the picture", picture["text_analysis_same"], text["text_analysis_same"]),
        ("the label is kept behind its own rationale more often than behind another's", m["own_rationale_keeps"], m["other_rationale_keeps"]),
    )
    return [{"what": what, "holds": bool(a["low"] > b["high"]) if a["n"] and b["n"] else None} for what, a, b in claims]


def share(flags: Iterable[bool]) -> Measure:
    """Share of true ones with its 95 % Wilson interval."""
    values = list(flags)
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    k, n = sum(values), len(values)
    low, high = wilson(k / n, n)
    return {"value": k / n, "low": low, "high": high, "n": n}


def mean(values: Sequence[float]) -> Measure:
    """Mean with its 95 % percentile bootstrap interval (2000 resamples, one seed)."""
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    rng, x = np.random.default_rng(0), np.asarray(values, float)
    means = [x[rng.integers(len(x), size=len(x))].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return {"value": float(x.mean()), "low": float(low), "high": float(high), "n": len(x)}


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


# --- on the terminal -------------------------------------------------------------------------------------------------


def show(report: Mapping[str, Any]) -> RenderableType:
    """The measures of both exchanges side by side, those by relation, and the checks."""
    m, c = report["measures"], report["counts"]
    title = f"{report['model']} on posts/{report['posts']}, {report['split']}: {c['paired']} posts, asked to {report['mode']}"
    table = Table("", "as it is", "other picture", "other text", title=title)
    swaps = (m["swap_picture"], m["swap_text"])
    for key, name in NAMES.items():
        if key in m:
            table.add_row(name, _interval(m[key]), "", "")
        else:
            table.add_row(name, "", *(_interval(s[key]) for s in swaps))
    marks = {True: Text("✓ ", "green"), False: Text("✗ ", "red"), None: Text("– ", "dim")}
    lines = [
        marks[x["holds"]].copy().append(x["what"] + ("" if x["holds"] is not None else " (nothing to measure)"), "default") for x in report["checks"]
    ]
    return Group(table, *([_by_relation(report["by_relation"])] if report["by_relation"] else []), *lines)


def _by_relation(relations: Mapping[str, Any]) -> Table:
    table = Table("relation", "posts", "accuracy", title="by relation of text and picture")
    keys = ("flips", "towards_partner", "as_ruled")
    for what in ("picture", "text"):
        for key in keys:
            table.add_column(f"{what}: {NAMES[key]}", justify="right")
    for name, m in relations.items():
        swaps = [_value(m[f"swap_{what}"][key]) for what in ("picture", "text") for key in keys]
        table.add_row(name, str(m["posts"]), _value(m["accuracy"]), *swaps)
    return table


def _interval(m: Measure) -> str:
    return f"{m['value']:.3f} ({m['low']:.3f} to {m['high']:.3f}, n = {m['n']})" if m["n"] else "–"


def _value(m: Measure) -> str:
    return f"{m['value']:.3f}" if m["n"] else "–"
