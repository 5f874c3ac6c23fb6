"""What the sums of an evaluation say.

report.json, VERSION 2. Shares are from 0 to 1; `interval` is [low, high], 95 %; null where there is nothing to say.

    version, posts, answers, references, split      what was scored: names of tables, "predictions/NAME" or "rationales/NAME"
    counts              gold, answered, rejected, missing: posts. Those without an answer count as wrong
    rejects_by_reason   of the rejected ones
    labels              count, accuracy, weighted_f1, macro_f1; per_class {label: precision, recall, f1, support}; confusion 3 × 4;
                        intervals {accuracy, weighted_f1, macro_f1} by the bootstrap over source_id (statistics.py), wilson: [low, high] of
                        the accuracy as if all posts were independent
    slices              {slice: {value: count, accuracy, interval (Wilson), macro_f1}}; slices are aspect, image, length, split, duplicate
                        (with `duplicates`) and the keys of meta that were asked for and that posts have
    calibration         null without probabilities. temperature: that of `after`, fitted_on {predictions, posts} with `calibration`, else (null)
                        that of the model's folder; null where it has none. before (the model's own probabilities; any temperature that is
                        in the table is undone) and after (null without a temperature): count, ece,
                        ece_by_chance (that of faultless probabilities on as many posts), nll, brier, accuracy, confidence,
                        bins [{low, high, count, confidence, accuracy}], coverage [{threshold, kept, coverage, accuracy}] (calibration.py)
    rationales          null without any text; texts, pairs (those with a reference), bleu, meteor, rouge_l, embedding_similarity over the
                        pairs, distinct_1, distinct_2 over the texts (metrics.py)
    form                tried (answers that have or should have a rationale, and rejects whose answer was malformed), formed (all five sections
                        there), format_valid: their ratio; contradictions (the conclusion names other labels only), sections_consistent:
                        share of complete ones without; faults {reason: count}, malformed_rejects
    predictions         of predictions only: label_mass (mean share of the vocabulary that the label words had), stated (rationales that end
                        on a label), consistency (share of them that state the label predicted), rationale_faults (share of answers)
    answers_by_source, answers_label_conditioned    of rationales only: a label under an explanation of gold is no evidence of accuracy
    references_label_conditioned                    null without references
    examples            right, wrong (surest first), unsure (least sure first): up to 8 [{post_id, gold, label, confidence}] each
    cost                of making the answers: seconds (of the run that finished them), rows, rows_per_s; tokens_in, tokens_out of those
                        scored here; stats of their manifest
    lineage             contract {name, hash}; posts, answers, references, calibration, duplicates, model: what their manifests say
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mulcot_ray.artifacts import Manifest, find
from mulcot_ray.evaluation.metrics import label_scores
from mulcot_ray.evaluation.statistics import Counts, confusion_scores, interval, wilson
from mulcot_ray.evaluation.tally import Question, Tally
from mulcot_ray.prompts import Contract
from mulcot_ray.records import Source, Split
from mulcot_ray.storage import Store

VERSION = 2
LABEL_CONDITIONED = (Source.EXPLAINED, Source.IMPORTED)  # written by someone who saw the gold label, or may have


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that stand in the manifest and in a log line."""
    labels, counts, rationales, calibration = report["labels"], report["counts"], report["rationales"] or {}, report["calibration"]
    sure = (calibration["after"] or calibration["before"]) if calibration else {}
    return {
        "accuracy": labels["accuracy"], "weighted_f1": labels["weighted_f1"], "macro_f1": labels["macro_f1"],
        "gold": counts["gold"], "answered": counts["answered"], **{k: v for k, v in rationales.items() if k not in ("pairs", "texts")},
        **({"ece": sure["ece"]} if sure else {}),
    }  # fmt: skip


def summarise(t: Tally, tables: Mapping[str, Manifest], split: Split | None, question: Question, fitted: dict[str, Any] | None) -> dict[str, Any]:
    answers, references, c = tables["answers"], tables.get("references"), t.counts
    missing = c["gold"] - c["answered"] - c["rejected"]
    conditioned = [s for s in LABEL_CONDITIONED if t.by["reference_sources"][s]]
    return {
        "version": VERSION,
        "posts": tables["posts"].name,
        "answers": f"{answers.kind}/{answers.name}",
        "references": f"{references.kind}/{references.name}" if references else None,
        "split": split,
        "counts": {"gold": c["gold"], "answered": c["answered"], "rejected": c["rejected"], "missing": missing},
        "rejects_by_reason": dict(sorted(t.by["rejects"].items())),
        "labels": labels(t.labels, t.bootstrap),
        "slices": _slices(t.slices),
        "calibration": _calibration(t, question, fitted),
        "rationales": {"texts": t.texts.texts, "pairs": t.texts.pairs, **t.texts.scores(question.scores)} if t.texts.texts or references else None,
        "references_label_conditioned": bool(conditioned) if references else None,
        "form": _form(t),
        **_by_kind(t, question),
        "examples": {kind: [e for _, _, e in some] for kind, some in t.examples.items()},
        "cost": {
            "seconds": answers.seconds, "rows": answers.rows, "rows_per_s": answers.rows / answers.seconds if answers.seconds else None,
            "tokens_in": c["tokens_in"], "tokens_out": c["tokens_out"], "stats": answers.stats,
        },
    }  # fmt: skip


def labels(counts: Counts, bootstrap: Counts) -> dict[str, Any]:
    """Scores of a confusion matrix, with intervals."""
    scores = label_scores(counts)
    spread = {name: list(interval(values)) for name, values in confusion_scores(bootstrap).items()}
    return {**scores, "intervals": spread, "wilson": list(wilson(scores["accuracy"], scores["count"]))}


def _slices(slices: Mapping[tuple[str, str], Counts]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for (name, value), counts in sorted(slices.items()):
        s = label_scores(counts)
        facts = {"count": s["count"], "accuracy": s["accuracy"], "interval": list(wilson(s["accuracy"], s["count"])), "macro_f1": s["macro_f1"]}
        found.setdefault(name, {})[value] = facts
    return found


def _calibration(t: Tally, question: Question, fitted: dict[str, Any] | None) -> dict[str, Any] | None:
    if not t.before.count.any():
        return None
    posts = t.counts["gold"]
    after = t.after.facts(posts) if question.temperature is not None else None
    fitted_on = fitted["fitted_on"] if fitted else None
    return {"temperature": question.temperature, "fitted_on": fitted_on, "before": t.before.facts(posts), "after": after}


def _form(t: Tally) -> dict[str, Any]:
    c, tried = t.counts, t.counts["tried"] + t.counts["malformed"]
    return {
        "tried": tried,
        "formed": c["formed"],
        "format_valid": c["formed"] / tried if tried else None,
        "contradictions": c["contradicting"],
        "sections_consistent": 1 - c["contradicting"] / t.texts.texts if t.texts.texts else None,
        "faults": dict(sorted(t.by["faults"].items())),
        "malformed_rejects": c["malformed"],
    }


def _by_kind(t: Tally, question: Question) -> dict[str, Any]:
    c = t.counts
    if question.kind == "rationales":
        conditioned = any(t.by["sources"][s] for s in LABEL_CONDITIONED)
        return {"answers_by_source": dict(sorted(t.by["sources"].items())), "answers_label_conditioned": conditioned}
    facts = {
        "label_mass": float(t.sums["label_mass"]) / c["massed"] if c["massed"] else None,
        "stated": c["stated"],
        "consistency": c["consistent"] / c["stated"] if c["stated"] else None,
        "rationale_faults": t.by["faults"].total() / c["answered"] if c["answered"] else None,
    }
    return {"predictions": facts}


def lineage(store: Store, tables: Mapping[str, Manifest], contract: Contract) -> dict[str, Any]:
    model, made_by = tables["answers"].stats.get("model"), tables["answers"].identity.get("model")
    known = find(store, "models", model) if isinstance(model, str) and not set(model) & set("/:") else None
    found = {**tables, "model": known} if known is not None and known.fingerprint == made_by else tables
    facts = {what: m.model_dump(mode="json", exclude={"files"}) for what, m in found.items()}
    return {"contract": {"name": contract.name, "hash": contract.hash}, **facts}
