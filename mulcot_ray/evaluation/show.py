"""Reports in the terminal: of an evaluation, and of a comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulcot_ray.evaluation.metrics import NONE
from mulcot_ray.records import LABELS

NAMES = {
    "accuracy": "accuracy", "weighted_f1": "weighted F1", "macro_f1": "macro F1", "bleu": "BLEU (0–100)", "meteor": "METEOR", "rouge_l": "ROUGE-L",
    "embedding_similarity": "MiniLM cosine", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2", "label_mass": "label mass",
    "consistency": "rationale states the label", "rationale_faults": "unusable rationales", "format_valid": "all five sections",
    "sections_consistent": "conclusion fits the label",
}  # fmt: skip


def show(report: Mapping[str, Any]) -> RenderableType:
    """Headline numbers, scores by class, the confusion matrix, and what to know before trusting them."""
    labels = report["labels"]
    parts = [_headline(report), _per_class(labels), _confusion(labels["confusion"])]
    if report["calibration"]:
        parts.append(_calibration(report["calibration"]))
    return Group(*parts, *(Text(n, style="yellow") for n in notes(report)))


def show_comparison(report: Mapping[str, Any]) -> RenderableType:
    """Who is better and how surely, where they agree, and posts on which they do not."""
    c, agreement = report["counts"], report["agreement"]
    where = f"posts/{report['posts']}, {report['split'] or 'all splits'}: {c['posts']} posts"
    said = f"Both answered {c['both']}, A alone {c['only_a']}, B alone {c['only_b']}, neither {c['neither']}."
    if agreement["share"] is not None:
        said += " They agree on {:.4f} [{:.4f}, {:.4f}] of what both answered.".format(agreement["share"], *agreement["interval"])
    matrix = _table("A ↓  B →", *LABELS)
    for name, row in zip(LABELS, agreement["matrix"], strict=True):
        matrix.add_row(name, *map(str, row))
    examples = _table("they differ on", "gold", "A", "B")
    for e in report["examples"][:8]:
        examples.add_row(e["post_id"], e["gold"] or "", e["a"], e["b"])
    title = Text(f"A = {report['a']}\nB = {report['b']}\non {where}", style="bold")
    return Group(title, *([_difference(report["gold"])] if report["gold"] else []), Text(said), matrix, *([examples] if report["examples"] else []))


def _difference(gold: Mapping[str, Any]) -> Table:
    table = _table(f"{gold['count']} posts with gold", "A", "B", "A - B")
    for key in ("accuracy", "macro_f1", "weighted_f1"):
        cells = [(gold[x][key], gold[x]["intervals"][key]) for x in ("a", "b")] + [(gold["difference"][key], gold["intervals"][key])]
        table.add_row(NAMES[key], *(Text(f"{value:.4f}\n[{low:.4f}, {high:.4f}]") for value, (low, high) in cells))
    table.caption = f"only A right {gold['only_a_right']}, only B right {gold['only_b_right']}: McNemar's exact p = {gold['mcnemar_p']:.3g}"
    return table


def notes(report: Mapping[str, Any]) -> Iterator[str]:
    c = report["counts"]
    if c["rejected"] or c["missing"]:
        why = ", ".join(f"{n} {reason}" for reason, n in report["rejects_by_reason"].items())
        yield f"{c['rejected']} rejected{f' ({why})' if why else ''} and {c['missing']} missing of {c['gold']} posts count as wrong."
    if report.get("answers_label_conditioned"):
        yield "Some of these rationales were written with the gold label in view: their labels say nothing about the model's accuracy."
    if report["references_label_conditioned"]:
        yield "Some reference rationales were written with the gold label in view."


def _headline(report: Mapping[str, Any]) -> Table:
    where = f"posts/{report['posts']}, {report['split'] or 'all splits'}: {report['counts']['gold']} posts"
    table = Table(title=f"{report['answers']} on {where}", show_header=False, caption="in brackets: 95 %, whole sources drawn")
    table.add_column()
    table.add_column(justify="right")
    intervals = report["labels"]["intervals"]
    for part in ("labels", "predictions", "form", "rationales"):
        for key, value in (report.get(part) or {}).items():
            if key in NAMES and value is not None:
                spread = f"  [{intervals[key][0]:.4f}, {intervals[key][1]:.4f}]" if part == "labels" else ""
                table.add_row(NAMES[key], Text((f"{value:.2f}" if key == "bleu" else f"{value:.4f}") + spread))
    return table


def _calibration(calibration: Mapping[str, Any]) -> Table:
    t, fitted = calibration["temperature"], calibration["fitted_on"]
    table = _table("probabilities", "ECE", "by chance", "NLL", "Brier", "confidence", "accuracy")
    for name, facts in (("model's own", calibration["before"]), (f"T = {t:.3f}" if t else "", calibration["after"])):
        if facts:
            table.add_row(name, *(f"{facts[k]:.4f}" for k in ("ece", "ece_by_chance", "nll", "brier", "confidence", "accuracy")))
    table.caption = f"fitted on {fitted['posts']} validation posts" if fitted else None
    return table


def _per_class(labels: Mapping[str, Any]) -> Table:
    table = _table("class", "precision", "recall", "F1", "posts")
    for name, s in labels["per_class"].items():
        table.add_row(name, *(f"{s[k]:.4f}" for k in ("precision", "recall", "f1")), str(s["support"]))
    return table


def _confusion(rows: list[list[int]]) -> Table:
    table = _table("gold ↓  answer →", *LABELS, NONE)
    for i, (name, row) in enumerate(zip(LABELS, rows, strict=True)):
        table.add_row(name, *(f"[bold]{n}[/]" if j == i else str(n) for j, n in enumerate(row)))
    return table


def _table(first: str, *rest: str) -> Table:
    table = Table(first)
    for header in rest:
        table.add_column(header, justify="right")
    return table
