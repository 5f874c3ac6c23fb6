"""A report in the terminal."""

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
    "consistency": "rationale states the label", "rationale_faults": "unusable rationales",
}  # fmt: skip


def show(report: Mapping[str, Any]) -> RenderableType:
    """Headline numbers, scores by class, the confusion matrix, and what to know before trusting them."""
    labels = report["labels"]
    return Group(_headline(report), _per_class(labels), _confusion(labels["confusion"]), *(Text(n, style="yellow") for n in notes(report)))


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
    table = Table(title=f"{report['answers']} on {where}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for part in ("labels", "predictions", "rationales"):
        for key, value in (report.get(part) or {}).items():
            if key in NAMES and value is not None:
                table.add_row(NAMES[key], f"{value:.2f}" if key == "bleu" else f"{value:.4f}")
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
