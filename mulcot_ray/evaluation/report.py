"""The demo's report: one HTML file that needs nothing beside it. Pictures are data: URIs, plots inline SVG, no script."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mulcot_ray.evaluation.metrics import NONE
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
NB = "\u202f"  # a number stays with its unit
YARDSTICKS = ("text_only", "image_only", "majority")
SHAPES = {"positive": "▲", "neutral": "●", "negative": "▼"}  # so that a label is not told by its colour alone
# Colours that stand for CSS variables: matplotlib draws with them, the page's light or dark theme decides what they are.
INK, MUTED, C1, C2, C3, C4 = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "--ink", MUTED: "--line", C1: "--c1", C2: "--c2", C3: "--c3", C4: "--c4"}
COMPONENTS = {"ce_cls": "CE, label", "ce_rea": "CE, rationale", "kl_cls": "KL, label", "kl_rea": "KL, rationale"}
STYLES = [(C2, "-"), (C3, "-"), (C2, (0, (3, 2))), (C3, (0, (3, 2)))]


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
    return _environment().get_template("report.html.j2").render(
        rows=rows,
        accuracy=accuracy,
        tested=tested.get("student"),
        uses_both=_uses_both(accuracy, tested.get("student")),
        accuracy_plot=_bars([(r["name"], r["share"], r["bound"]) for r in rows], "accuracy", percent),
        scalars={k: v for k, v in summary["counts"].items() if not isinstance(v, Mapping)},
        groups=dict(_groups(summary["counts"])),
        seconds=seconds,
        seconds_plot=_bars([(_words(k), v, False) for k, v in seconds.items()], "seconds", duration) if seconds else None,
        curves=[(ROWS.get(k, (_words(k),))[0], c, _curve(k, c)) for k, c in curves.items() if c.get("steps")],
        confusions=[(ROWS.get(k, (_words(k),))[0], _confusion(m)) for k, m in sorted(confusions.items(), key=lambda x: x[0] != "student")],
        examples=[_example(e) for e in examples],
        right=sum(e["label"] == e["gold"] for e in examples),
        commands=summary.get("commands", ["mulcot demo"]),
        versions=summary["versions"],
        recipe=summary["recipe"],
        contract=summary["contract"],
        labels=[*LABELS, NONE],
        shapes=SHAPES,
    )  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.1f}{NB}%"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f}{NB}s" if seconds < 10 else f"{seconds:.0f}{NB}s"
    minutes, rest = divmod(round(seconds), 60)
    parts = (minutes, "min", f"{rest:02d}", "s") if minutes < 60 else (minutes // 60, "h", f"{minutes % 60:02d}", "min")
    return NB.join(map(str, parts))


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` trials (Wilson 1927), which stays within 0 and 1."""
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, (middle - reach) / (1 + z * z / count)), min(1.0, (middle + reach) / (1 + z * z / count))


def _environment() -> Environment:
    here = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"percent": percent, "duration": duration, "words": _words, "number": lambda n: f"{n:,}".replace(",", NB)}
    return env


def _words(key: str) -> str:
    return key.replace("_", " ").strip().capitalize()


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
    name, what = ROWS.get(key, (_words(key), ""))
    interval = wilson(share, count) if count else None
    return {"key": key, "name": name, "what": what, "share": share, "interval": interval, "bound": bound}


def _uses_both(accuracy: Mapping[str, float], count: int | None) -> bool:
    """Better than any reader of one modality, and not by the luck of the draw."""
    if not {"student", "text_only", "image_only"} <= set(accuracy):
        return False
    low = wilson(accuracy["student"], count)[0] if count else accuracy["student"]
    return low > max(accuracy["text_only"], accuracy["image_only"])


def _confusion(rows: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    table = []
    for i, (label, row) in enumerate(zip(LABELS, rows, strict=True)):
        total = sum(row)
        cells = [{"count": n, "share": n / total if total else 0.0, "right": i == j} for j, n in enumerate(row)]
        table.append({"label": label.value, "cells": cells, "total": total})
    return table


def _example(e: Mapping[str, Any]) -> dict[str, Any]:
    p = {str(k): v for k, v in (e["probabilities"] or {}).items()}
    headers = list(dict.fromkeys([*(e["sections"] or {}), *(e["teacher"] or {})]))
    return {
        "image": _data_uri(e["image"]) if e["image"] else None,
        "text": e["text"], "aspect": e["aspect"], "relation": e["relation"],
        "gold": str(e["gold"]), "label": str(e["label"]), "right": e["label"] == e["gold"],
        "probabilities": [(s.value, p[s]) for s in reversed(LABELS) if s in p],
        "sections": [(_words(h), (e["sections"] or {}).get(h), (e["teacher"] or {}).get(h)) for h in headers],
        "student_spoke": bool(e["sections"]), "teacher_spoke": bool(e["teacher"]),
    }  # fmt: skip


def _data_uri(image: bytes) -> Markup:
    kind = "png" if image.startswith(b"\x89PNG") else "jpeg"
    return Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode()}")


# --- plots -------------------------------------------------------------------------------------------------------------


def _figure(height: float) -> Any:
    """A figure 420 points wide: at the width of a phone its 11-point text is still near 10 pixels."""
    from matplotlib.figure import Figure

    return Figure(figsize=(420 / 72, height), layout="constrained")


def _svg(figure: Any, name: str, description: str) -> Markup:
    """The figure as inline SVG: text stays text, colours are the page's variables, ids are unique on the page, nothing is linked."""
    import matplotlib

    out = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\1{name}-", svg)
    svg = re.sub(r"font:([^;\"]*?)'[^;\"]*(?=[;\"])", r"font:\1system-ui, sans-serif", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    svg = re.sub(r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img" aria-label="@">', svg, count=1)
    return Markup(svg.replace('aria-label="@"', Markup('aria-label="{}"').format(description), 1))


def _axes(figure: Any, *grid: int) -> Any:
    ax = figure.add_subplot(*grid)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=11, length=0)
    ax.grid(axis="both", color=MUTED, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _bars(rows: Sequence[tuple[str, float, bool]], unit: str, show: Any) -> Markup:
    """Horizontal bars, first row on top, the value beside each. Rows marked True are no models: drawn as outlines."""
    figure = _figure(0.36 * len(rows) + 0.3)
    ax = _axes(figure)
    places = range(len(rows))
    bars = ax.barh(places, [v for _, v, _ in rows], height=0.64, color=C1)
    for bar, (_, _, bound) in zip(bars, rows, strict=True):
        if bound:
            bar.set(facecolor="none", edgecolor=C1, linestyle=(0, (3, 2)))
    ax.bar_label(bars, [show(v) for _, v, _ in rows], padding=4, color=INK, fontsize=11)
    ax.set_yticks(places, [name for name, _, _ in rows])
    ax.set_xticks([])
    ax.set_xlim(0, 1.28 * max([v for _, v, _ in rows] + [1e-9]))
    ax.spines["bottom"].set_visible(False)
    ax.grid(visible=False)
    ax.invert_yaxis()
    return _svg(figure, f"plot-{unit}", f"{unit}: " + ", ".join(f"{name} {show(v)}" for name, v, _ in rows))


def _curve(name: str, curve: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    """Loss and its parts by step (running means, so that a noisy batch does not hide the trend); below, validation accuracy."""
    steps, validation = curve["steps"], curve.get("validation") or []
    figure = _figure(4.3 if validation else 2.7)
    grid = figure.add_gridspec(2, 1, height_ratios=(3, 2)) if validation else [111]
    ax = _axes(figure, grid[0])
    window = max(1, len(steps) // 40)
    for key, label, colour, style, width in [
        ("loss", "total", C1, "-", 2.0), *((k, v, *s, 1.3) for (k, v), s in zip(COMPONENTS.items(), STYLES, strict=True))
    ]:  # fmt: skip
        points = [(s["step"], s[key]) for s in steps if s.get(key) is not None]
        if points:
            ax.plot([x for x, _ in points], _running([y for _, y in points], window), color=colour, linestyle=style, linewidth=width, label=label)
    ax.set_ylim(bottom=0)
    ax.set_title("loss" + (f" (mean of {window} steps)" if window > 1 else ""), loc="left", fontsize=11, color=INK)
    ax.legend(frameon=False, fontsize=11, labelcolor=INK, ncols=2, handlelength=1.6, columnspacing=1.0)
    said = f"{name}: loss from {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}"
    if validation:
        below = _axes(figure, grid[1])
        below.sharex(ax)
        ax.tick_params(labelbottom=False)
        best = max(validation, key=lambda v: v["accuracy"])
        below.plot([v["step"] for v in validation], [v["accuracy"] for v in validation], color=C4, marker="o", markersize=4, linewidth=1.6)
        below.annotate(
            percent(best["accuracy"]), (best["step"], best["accuracy"]), (0, 7), textcoords="offset points", ha="center", color=INK, fontsize=11
        )
        below.margins(x=0.08, y=0.4)
        below.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        below.set_title("validation accuracy", loc="left", fontsize=11, color=INK)
        below.set_xlabel("step", fontsize=11, color=INK)
        said += f", best validation accuracy {percent(best['accuracy'])}"
    else:
        ax.set_xlabel("step", fontsize=11, color=INK)
    return _svg(figure, f"plot-{re.sub(r'[^a-z0-9]+', '-', name.lower())}", said)


def _running(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]
