"""Plots as inline SVG: text stays text, colours are the page's own and follow its light or dark theme, nothing is linked."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from mulcot_ray.evaluation.statistics import wilson
from mulcot_ray.html import percent

# Colours that stand for CSS variables: matplotlib draws with them, the page's light or dark theme decides what they are.
INK, MUTED, C1, C2, C3, C4 = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {INK: "--ink", MUTED: "--line", C1: "--c1", C2: "--c2", C3: "--c3", C4: "--c4"}
COMPONENTS = {"ce_cls": "CE, label", "ce_rea": "CE, rationale", "kl_cls": "KL, label", "kl_rea": "KL, rationale"}
STYLES = [(C2, "-"), (C3, "-"), (C2, (0, (3, 2))), (C3, (0, (3, 2)))]
TEXT: dict[str, Any] = {"fontsize": 11, "color": INK}
FEW = 10  # posts: below, the share right of those kept is mostly luck
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 11, "labelcolor": INK}


def bars(rows: Sequence[tuple[str, float, bool]], unit: str, show: Callable[[float], str]) -> Markup:
    """Horizontal bars, first row on top, the value beside each. Rows marked True are no models: drawn as outlines."""
    figure = _figure(0.36 * len(rows) + 0.3)
    ax = _axes(figure)
    places = range(len(rows))
    drawn = ax.barh(places, [v for _, v, _ in rows], height=0.64, color=C1)
    for bar, (_, _, bound) in zip(drawn, rows, strict=True):
        if bound:
            bar.set(facecolor="none", edgecolor=C1, linestyle=(0, (3, 2)))
    ax.bar_label(drawn, [show(v) for _, v, _ in rows], padding=4, **TEXT)
    ax.set_yticks(places, [name for name, _, _ in rows])
    ax.set_xticks([])
    ax.set_xlim(0, 1.28 * max([v for _, v, _ in rows] + [1e-9]))
    ax.spines["bottom"].set_visible(False)
    ax.grid(visible=False)
    ax.invert_yaxis()
    return _svg(figure, f"plot-{unit}", f"{unit}: " + ", ".join(f"{name} {show(v)}" for name, v, _ in rows))


def curve(name: str, history: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    """Loss and its parts by step (running means, so that a noisy batch does not hide the trend); below, validation accuracy.

    {"steps": [{"step", "loss", "ce_cls"?, "ce_rea"?, "kl_cls"?, "kl_rea"?}], "validation": [{"step", "accuracy"}]}, at least one step.
    """
    steps, validation = history["steps"], history.get("validation") or []
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
    ax.set_title("loss" + (f" (mean of {window} steps)" if window > 1 else ""), loc="left", **TEXT)
    ax.legend(**LEGEND, ncols=2, handlelength=1.6, columnspacing=1.0)
    said = f"{name}: loss from {steps[0]['loss']:.2f} to {steps[-1]['loss']:.2f}"
    if validation:
        below = _axes(figure, grid[1])
        below.sharex(ax)
        ax.tick_params(labelbottom=False)
        best = max(validation, key=lambda v: v["accuracy"])
        below.plot([v["step"] for v in validation], [v["accuracy"] for v in validation], color=C4, marker="o", markersize=4, linewidth=1.6)
        below.annotate(percent(best["accuracy"]), (best["step"], best["accuracy"]), (0, 7), textcoords="offset points", ha="center", **TEXT)
        below.margins(x=0.08, y=0.4)
        below.yaxis.set_major_formatter(_share)
        below.set_title("validation accuracy", loc="left", **TEXT)
        below.set_xlabel("step", **TEXT)
        said += f", best validation accuracy {percent(best['accuracy'])}"
    else:
        ax.set_xlabel("step", **TEXT)
    return _svg(figure, f"plot-{re.sub(r'[^a-z0-9]+', '-', name.lower())}", said)


def reliability(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Markup:
    """Share right by confidence; the diagonal is where both agree. Whiskers: 95 % (Wilson); below, how many posts have which confidence.

    before, after: `calibration` of an evaluation's report.
    """
    figure = _figure(4.6, 360)
    grid = figure.add_gridspec(2, 1, height_ratios=(4, 1))
    ax, below = _axes(figure, grid[0]), _axes(figure, grid[1])
    shown = _named(before, after)
    least = min(1 / 3, *(b["low"] for _, facts, _, _ in shown for b in facts["bins"]))
    ax.plot([least, 1], [least, 1], color=INK, linewidth=1, linestyle=(0, (2, 3)))
    for name, facts, colour, marker in shown:
        bins = facts["bins"]
        x, y = [b["confidence"] for b in bins], [b["accuracy"] for b in bins]
        ends = [wilson(b["accuracy"], b["count"]) for b in bins]
        ax.vlines(x, [low for low, _ in ends], [high for _, high in ends], color=colour, linewidth=1)
        ax.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=1.6, label=name)
        solid = {"color": colour, "alpha": 0.75} if name == shown[-1][0] else {"fill": False, "edgecolor": colour}
        below.bar([b["low"] for b in bins], [b["count"] for b in bins], [b["high"] - b["low"] for b in bins], align="edge", **solid)
    below.sharex(ax)
    ax.tick_params(labelbottom=False)
    ax.set(xlim=(least, 1), ylim=(0, 1.02))
    for axis in (ax.yaxis, below.xaxis):
        axis.set_major_formatter(_share)
    below.yaxis.set_major_locator(_few())
    ax.set_title("share right", loc="left", **TEXT)
    below.set_title("posts", loc="left", **TEXT)
    below.set_xlabel("confidence", **TEXT)
    _legend(ax, shown, "upper left")
    said = "; ".join(f"{name}: confidence {percent(f['confidence'])}, right {percent(f['accuracy'])}" for name, f, _, _ in shown)
    return _svg(figure, "plot-reliability", f"Reliability. {said}")


def coverage(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Markup:
    """Share right of the answers that are kept, by the share that a threshold of confidence keeps; from FEW posts on. Band: 95 % (Wilson)."""
    figure = _figure(4.6, 360)
    ax = _axes(figure)
    shown = _named(before, after)
    for name, facts, colour, _ in shown:
        points = sorted((p for p in facts["coverage"] if p["kept"] >= FEW), key=lambda p: p["coverage"]) or facts["coverage"]
        x, ends = [p["coverage"] for p in points], [wilson(p["accuracy"], p["kept"]) for p in points]
        if name == shown[-1][0]:
            ax.fill_between(x, [low for low, _ in ends], [high for _, high in ends], color=colour, alpha=0.18, linewidth=0)
        ax.plot(x, [p["accuracy"] for p in points], color=colour, linewidth=1.8, label=name)
    ax.set_xlim(0, 1)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(_share)
    ax.set_title("share right of the answers kept", loc="left", **TEXT)
    ax.set_xlabel("share of posts kept", **TEXT)
    _legend(ax, shown, "lower left")
    last = max(shown[-1][1]["coverage"], key=lambda p: p["coverage"])
    return _svg(figure, "plot-coverage", f"Coverage and accuracy, down to {percent(last['accuracy'])} where {percent(last['coverage'])} are kept")


# --- parts -----------------------------------------------------------------------------------------------------------


def _named(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> list[tuple[str, Mapping[str, Any], str, str]]:
    """Name, facts, colour, marker of each set of probabilities."""
    if after is None:
        return [("the model’s own", before, C1, "o")]
    return [("the model’s own", before, C2, "s"), ("after temperature scaling", after, C1, "o")]


def _legend(ax: Any, shown: Sequence[Any], where: str) -> None:
    if len(shown) > 1:
        ax.legend(**LEGEND, loc=where, handlelength=1.6)


def _share(value: float, _: int) -> str:
    return f"{round(100 * value, 6):g} %"


def _few() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=2, integer=True)


def _running(values: Sequence[float], window: int) -> list[float]:
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def _figure(height: float, width: float = 420) -> Any:
    """A figure `width` points wide: at 420 and the width of a phone its 11-point text is still near 10 pixels. `height` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height), layout="constrained")


def _axes(figure: Any, *grid: Any) -> Any:
    ax = figure.add_subplot(*grid)
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(MUTED)
    ax.tick_params(colors=INK, labelsize=11, length=0)
    ax.grid(axis="both", color=MUTED, linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


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
