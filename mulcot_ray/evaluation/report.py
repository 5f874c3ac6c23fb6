"""The demo's report: one HTML file that needs nothing beside it. Pictures are data: URIs, plots inline SVG, no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mulcot_ray.evaluation.metrics import NONE
from mulcot_ray.evaluation.plots import bars, curve
from mulcot_ray.evaluation.statistics import wilson
from mulcot_ray.html import data_uri, duration, environment, percent, words
from mulcot_ray.records import LABELS

ROWS = {
    "student": ("Student", "the small model that is served"),
    "student_before": ("Student before", "the same model before any training"),
    "labels_only": ("Labels only", "the same model, trained on labels alone"),
    "assistant": ("Assistant", "trained on the teacher’s rationales"),
    "teacher": ("Teacher", "the large model, asked without the label"),
    "text_only": ("Best with text only", "a perfect reader of the text alone"),
    "image_only": ("Best with image only", "a perfect reader of the picture alone"),
    "majority": ("Majority", "always the most frequent label"),
}
YARDSTICKS = ("text_only", "image_only", "majority")


def demo_report(
    summary: Mapping[str, Any], curves: Mapping[str, Mapping[str, Any]], confusions: Mapping[str, Sequence[Sequence[int]]],
    examples: Sequence[Mapping[str, Any]], single: Mapping[str, float] | None = None,
) -> str:  # fmt: skip
    """The report as HTML.

    summary     accuracy {model: share} (models as in ROWS; others are shown by their own name), seconds {stage: s} (a "total" is left out),
                counts {what: number, {kind: number} or {stage: {kind: number}}}, versions {package: version}, recipe, contract;
                commands [shell line] is optional
    curves      {model: {"steps": [{"step", "loss", "ce_cls"?, "ce_rea"?, "kl_cls"?, "kl_rea"?}], "validation": [{"step", "epoch", "accuracy"}]}}
    confusions  {model: 3 × 4 counts} as `label_scores` gives them
    examples    {"image": PNG or JPEG bytes | None, "text", "aspect", "gold", "label", "probabilities": {label: p} | None,
                "sections": {header: text} | None, "teacher": the same | None, "relation"}
    single      what a perfect reader of one modality reaches: text_only, image_only, majority (or have them in summary's accuracy)
    """
    accuracy = {k: v for k, v in {**summary["accuracy"], **(single or {})}.items() if v is not None}
    order = [*(k for k in ROWS if k in accuracy), *(k for k in accuracy if k not in ROWS)]
    tested = {name: sum(map(sum, rows)) for name, rows in confusions.items()}
    rows = [_accuracy_row(k, accuracy[k], tested.get(k), k in YARDSTICKS) for k in order]
    seconds = {k: v for k, v in summary["seconds"].items() if k != "total"}
    return environment(Path(__file__).parent).get_template("report.html.j2").render(
        rows=rows,
        accuracy=accuracy,
        tested=tested.get("student"),
        uses_both=_uses_both(accuracy, tested.get("student")),
        accuracy_plot=bars([(r["name"], r["share"], r["bound"]) for r in rows], "accuracy", percent),
        scalars={k: v for k, v in summary["counts"].items() if not isinstance(v, Mapping)},
        groups=dict(_groups(summary["counts"])),
        seconds=seconds,
        seconds_plot=bars([(words(k), v, False) for k, v in seconds.items()], "seconds", duration) if seconds else None,
        curves=[(ROWS.get(k, (words(k),))[0], c, curve(k, c)) for k, c in curves.items() if c.get("steps")],
        confusions=[(ROWS.get(k, (words(k),))[0], m) for k, m in sorted(confusions.items(), key=lambda x: x[0] != "student")],
        examples=[_example(e) for e in examples],
        right=sum(e["label"] == e["gold"] for e in examples),
        commands=summary.get("commands", ["mulcot demo"]),
        versions=summary["versions"],
        recipe=summary["recipe"],
        contract=summary["contract"],
        labels=[*LABELS, NONE],
    )  # fmt: skip


def _groups(counts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each innermost mapping with its heading: {"rejects": {"teach": {...}}} is "Rejects, teach"."""
    for key, value in counts.items():
        if isinstance(value, Mapping):
            heading = f"{above}, {key}" if above else key
            numbers = {k: v for k, v in value.items() if not isinstance(v, Mapping)}
            if numbers or not value:
                yield heading, numbers
            yield from _groups(value, heading)


def _accuracy_row(key: str, share: float, count: int | None, bound: bool) -> dict[str, Any]:
    name, what = ROWS.get(key, (words(key), ""))
    interval = wilson(share, count) if count else None
    return {"key": key, "name": name, "what": what, "share": share, "interval": interval, "bound": bound}


def _uses_both(accuracy: Mapping[str, float], count: int | None) -> bool:
    """Better than any reader of one modality, and not by the luck of the draw."""
    if not {"student", "text_only", "image_only"} <= set(accuracy):
        return False
    low = wilson(accuracy["student"], count)[0] if count else accuracy["student"]
    return low > max(accuracy["text_only"], accuracy["image_only"])


def _example(e: Mapping[str, Any]) -> dict[str, Any]:
    p = {str(k): v for k, v in (e["probabilities"] or {}).items()}
    told = {name: e[who] for name, who in (("Student", "sections"), ("Teacher", "teacher")) if e[who]}
    headers = list(dict.fromkeys(h for sections in told.values() for h in sections))
    return {
        "image": data_uri(e["image"]) if e["image"] else None, "fault": "no picture",
        "post_id": None, "text": e["text"], "aspect": e["aspect"] or None, "relation": e["relation"],
        "gold": str(e["gold"]), "label": str(e["label"]), "right": e["label"] == e["gold"],
        "probabilities": [(s.value, p[s]) for s in reversed(LABELS) if s in p],
        "sections": [(words(h), [sections.get(h) for sections in told.values()]) for h in headers], "names": list(told),
    }  # fmt: skip
