"""Variants over seeds: means, their intervals, and paired differences from the first variant; as a report, a CSV file and a table.

With three seeds Student's t is 4.3, and an interval is as wide as that: it says what three runs can say.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

PARTS = ("n", "mean", "sd", "low", "high")
Scores = Mapping[str, float]  # by metric


def summarise(variants: Sequence[str], metrics: Sequence[str], seeds: Sequence[int], results: Mapping[tuple[str, int], Scores]) -> dict[str, Any]:
    """By variant and metric: interval(), the value of each seed, and interval() of the differences (variant minus first variant, seed by seed).
    `results` by variant and seed may have gaps."""
    first, table = variants[0], dict[str, dict[str, Any]]()
    for v in variants:
        table[v] = {}
        for metric in metrics:
            values = {s: float(results[v, s][metric]) for s in seeds if (v, s) in results}
            differences = [x - float(results[first, s][metric]) for s, x in values.items() if (first, s) in results]
            by_seed = {str(s): x for s, x in values.items()}
            table[v][metric] = {**interval(list(values.values())), "values": by_seed, "difference": None if v == first else interval(differences)}
    return {"seeds": list(seeds), "metrics": list(metrics), "compared_with": first, "variants": table}


def interval(values: Sequence[float]) -> dict[str, Any]:
    """n, mean, standard deviation (n - 1) and the mean's 95 % interval by Student's t; None where there are too few values for one."""
    import numpy as np
    from scipy.stats import t  # type: ignore[import-untyped]

    n = len(values)
    mean = float(np.mean(values)) if n else None
    if mean is None or n < 2:
        return {"n": n, "mean": mean, "sd": None, "low": None, "high": None}
    sd = float(np.std(values, ddof=1))
    reach = float(t.ppf(0.975, n - 1)) * sd / n**0.5
    return {"n": n, "mean": mean, "sd": sd, "low": mean - reach, "high": mean + reach}


def as_csv(report: Mapping[str, Any]) -> str:
    """One line for each variant and metric; empty where there is no number."""
    seeds = [str(s) for s in report["seeds"]]
    out = io.StringIO()
    lines = csv.writer(out, lineterminator="\n")
    lines.writerow(["variant", "metric", *PARTS, *(f"difference_{p}" for p in PARTS), *(f"seed_{s}" for s in seeds)])
    for variant, metrics in report["variants"].items():
        for metric, m in metrics.items():
            d = m["difference"] or {}
            lines.writerow([variant, metric, *(m[p] for p in PARTS), *(d.get(p) for p in PARTS), *(m["values"].get(s) for s in seeds)])
    return out.getvalue()


def show(report: Mapping[str, Any]) -> RenderableType:
    """A row for each variant: every metric with its interval, and its difference from the first variant. Failures below."""
    seeds = ", ".join(str(s) for s in report["seeds"])
    table = Table("variant", title=f"posts/{report['posts']}, {report['split']}, recipe {report['recipe']}, seeds {seeds}: mean (95 % interval)")
    for metric in report["metrics"]:
        table.add_column(metric.replace("_", " "), justify="right")
        table.add_column(f"minus {report['compared_with']}", justify="right")
    for variant, metrics in report["variants"].items():
        table.add_row(variant, *(c for m in metrics.values() for c in (_cell(m, ".3f"), _cell(m["difference"], "+.3f") if m["difference"] else "")))
    return Group(table, *(Text(f"✗ {what}: {why}", style="red") for what, why in report["failed"].items()))


def _cell(m: Mapping[str, Any], form: str) -> str:
    if m["mean"] is None:
        return "–"
    return f"{m['mean']:{form}} " + (f"({m['low']:{form}} to {m['high']:{form}})" if m["low"] is not None else f"(n = {m['n']})")
