"""The model card of an evaluation: Markdown with the front matter that model hubs read."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from mulcot_ray.artifacts import Run
from mulcot_ray.evaluation.metrics import SCORES
from mulcot_ray.evaluation.origin import MODES, Origin, who
from mulcot_ray.html import percent, words

Report = Mapping[str, Any]
NAMES = {
    "accuracy": "Accuracy", "macro_f1": "Macro F1", "weighted_f1": "Weighted F1", "bleu": "BLEU (0–100)", "meteor": "METEOR", "rouge_l": "ROUGE-L",
    "embedding_similarity": "MiniLM cosine", "distinct_1": "Distinct-1", "distinct_2": "Distinct-2",
}  # fmt: skip
LABEL_SCORES = ("accuracy", "macro_f1", "weighted_f1")


def score_name(key: str) -> str:
    """The name of a score."""
    return NAMES.get(key) or words(key)


def model_card(run: Run, report: Report) -> str:
    """The card, of a report that is about to be committed under `run`. It shows no post. Text that others wrote is escaped."""
    name, origin = who(report["lineage"]["answers"]), Origin(run.store, report["lineage"])
    front = yaml.safe_dump(_front(report, name), sort_keys=False, allow_unicode=True, width=1000)
    parts = (
        _what(name),
        _data(origin),
        _results(report, origin.seen(report["split"])),
        _calibration(report),
        _rationales(report),
        _again(run, report, origin),
    )
    return f"---\n{front}---\n\n" + "\n".join(line for part in parts for line in part) + "\n"


def evaluate_command(run: Run, report: Report) -> str:
    """The shell line that makes this report."""
    lineage, identity = report["lineage"], run.identity
    options = [("answers", report["answers"].partition("/")[2]), ("posts", report["posts"]), ("split", report["split"])]
    options.append(("references", (report["references"] or "").partition("/")[2]))
    options += [(option, lineage[key]["name"]) for key, option in (("calibration", "calibrate-on"), ("duplicates", "duplicates")) if key in lineage]
    options += [("slice", s) for s in identity["slices"]] if list(identity["slices"]) != ["relation"] else []
    options += [("scores", ",".join(identity["scores"]))] if set(identity["scores"]) != set(SCORES) else []
    return "mulcot evaluate " + " ".join(f"--{k} {shlex.quote(v)}" for k, v in [*options, ("name", run.name)] if v)


def escaped(text: str) -> str:
    """Text as Markdown that shows it as it is, in one line."""
    return re.sub(r"([\\`*_{}\[\]<>()#+!|&~])", r"\\\1", " ".join(text.split()))


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """A table, its first column words and the others numbers."""
    rule = ("---", *("---:" for _ in head[1:]))
    return ["", *(f"| {' | '.join(row)} |" for row in (head, rule, *rows)), ""]


def _front(report: Report, name: str) -> dict[str, Any]:
    labels, rationales = report["labels"], report["rationales"] or {}
    metrics = [
        {"type": kind, "name": score_name(key), "value": labels[key]} for key, kind in zip(LABEL_SCORES, ("accuracy", "f1", "f1"), strict=True)
    ]
    metrics += [{"type": key, "name": title, "value": rationales[key]} for key, title in NAMES.items() if key in rationales]
    if report["calibration"]:
        sure = report["calibration"]["after"] or report["calibration"]["before"]
        metrics.append({"type": "ece", "name": "Expected calibration error", "value": sure["ece"]})
    result = {
        "task": {"type": "text-classification", "name": "Joint multimodal sentiment reasoning and classification"},
        "dataset": {"name": report["posts"], "type": report["posts"], "split": str(report["split"] or "all")},
        "metrics": metrics,
    }
    return {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text",
        "tags": ["sentiment-analysis", "multimodal", "chain-of-thought", "distillation", "mulcot-ray"],
        "model-index": [{"name": name, "results": [result]}],
    }  # fmt: skip


def _what(name: str) -> list[str]:
    return [
        f"# {escaped(name)}",
        "",
        "Reads a social-media post, its text and its picture, and gives the sentiment (positive, neutral or negative) of the post or toward one aspect",
        "that it names, with the reasons: what the text carries, what the picture carries, which of them decides, and a conclusion. Made with",
        "mulcot-ray, after MulCoT-RD (arXiv 2508.05234).",
        "",
        "## Intended use",
        "",
        "- Labels for many posts, to be counted: how a public feels about a product, an event, a place.",
        "- A first opinion, where answers below a threshold of confidence go on to a larger model or to a person.",
        "",
        "## Not for",
        "",
        "- Decisions about single people: who is hired, insured, suspected or barred.",
        "- Posts unlike those below, in another language or of another kind, before it was evaluated on some of them.",
        "- Evidence: a rationale is what a model wrote, and can be wrong about the text, the picture and the people in it even where the label is right.",
        "",
    ]


def _data(origin: Origin) -> list[str]:
    lines = (f"- {what}: {escaped(facts)}" + (f" ({escaped(made)})" if made else "") for what, facts, made in origin.rows())
    return ["## Where it comes from", "", *lines, ""]


def _results(report: Report, seen: str) -> list[str]:
    labels, c = report["labels"], report["counts"]
    where = f"posts/{report['posts']}, " + (f"split {report['split']}" if report["split"] else "all splits")
    mode = MODES.get(report["lineage"]["answers"]["identity"].get("mode", ""))
    scores = [(score_name(k), percent(labels[k]), _interval(labels["intervals"][k])) for k in LABEL_SCORES]
    classes = [(k, *(percent(s[x]) for x in ("precision", "recall", "f1")), str(s["support"])) for k, s in labels["per_class"].items()]
    slices = [
        (escaped(f"{words(key)}: {value}"), percent(s["accuracy"]), _interval(s["interval"]), str(s["count"]))
        for key, values in report["slices"].items() if len(values) > 1 for value, s in values.items()
    ]  # fmt: skip
    lines = ["## Evaluation", "", f"{c['gold']} posts with gold labels ({escaped(where)})" + (f"; {mode}." if mode else ".")]
    lines.append(f"{c['rejected']} of them were rejected and {c['missing']} are missing: they count as wrong.")
    if seen:
        lines += ["", f"**These posts are not new to the model.** {seen}"]
    if report.get("answers_label_conditioned"):
        lines += ["", "**Some of these rationales were written with the gold label in view: their labels are no evidence of accuracy.**"]
    lines += table(("score", "value", "95 %"), scores) + table(("class", "precision", "recall", "F1", "posts"), classes)
    lines += table(("slice", "accuracy", "95 %", "posts"), slices) if slices else []
    return [*lines, "Intervals of scores are by a bootstrap that draws whole sources, those of slices are Wilson’s.", ""]


def _calibration(report: Report) -> list[str]:
    c = report["calibration"]
    if not c:
        return ["## Calibration", "", "These answers have no probabilities.", ""]
    kinds = [("the model’s own", c["before"]), *([(f"at temperature {c['temperature']:.3f}", c["after"])] if c["after"] else [])]
    rows = [
        (
            what,
            f"{x['ece']:.4f}",
            f"{x['ece_by_chance']:.4f}",
            f"{x['nll']:.4f}",
            f"{x['brier']:.4f}",
            percent(x["confidence"]),
            percent(x["accuracy"]),
        )
        for what, x in kinds
    ]
    fitted = f"The temperature was fitted on {c['fitted_on']['posts']} validation posts." if c["fitted_on"] else ""
    return ["## Calibration", *table(("probabilities", "ECE", "by chance", "NLL", "Brier", "confidence", "right"), rows), fitted, ""]


def _rationales(report: Report) -> list[str]:
    form, r = report["form"], report["rationales"]
    if not r:
        return ["## Rationales", "", "No answer has one.", ""]
    against = f", {r['pairs']} of them scored against {escaped(report['references'])}" if report["references"] else ""
    lines = ["## Rationales", "", f"{r['texts']} rationales{against}."]
    if report["references_label_conditioned"]:
        lines += ["", "**Some references were written with the gold label in view. A model that was not shown it is measured against one that was.**"]
    rows = [(title, f"{r[key]:.2f}" if key == "bleu" else f"{r[key]:.4f}") for key, title in NAMES.items() if key in r]
    shares = {"All four sections and a label": form["format_valid"], "Conclusion fits the label": form["sections_consistent"]}
    shares["States the label predicted"] = report.get("predictions", {}).get("consistency")
    rows += [(what, percent(share)) for what, share in shares.items() if share is not None]
    return [*lines, *table(("score", "value"), rows)]


def _again(run: Run, report: Report, origin: Origin) -> list[str]:
    commands = (f"    {' '.join(c.split())}" for c in [*origin.commands(), evaluate_command(run, report)])
    return ["## How to reproduce", "", *commands, "", "Figures are those of `report.json`, which has more of them, beside this card."]


def _interval(ends: tuple[float, float]) -> str:
    return f"{100 * ends[0]:.1f} – {100 * ends[1]:.1f}"
