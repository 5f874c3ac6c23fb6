"""Score answers (predictions, or rationales that end on a label) against the gold of a posts table."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mulcot_ray.artifacts import Manifest, begin, find, need, read_rows
from mulcot_ray.errors import ArtifactError, ConfigError, InputError
from mulcot_ray.evaluation.metrics import distinct, label_scores, rationale_scores
from mulcot_ray.prompts import Contract
from mulcot_ray.records import SECTIONS, Sentiment, Source, Split
from mulcot_ray.storage import Store

LABEL_CONDITIONED = (Source.EXPLAINED, Source.IMPORTED)  # written by someone who saw the gold label, or may have
FACTS = ("label_mass", "stated", "rationale_fault")


@dataclass
class Answers:
    """What is kept of an answers table, for the gold posts alone: labels, rationale texts, and sums for the means."""

    labels: dict[str, Sentiment] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    rejected: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    label_mass: float = 0.0
    scored: int = 0
    stated: int = 0
    consistent: int = 0
    faults: int = 0


def evaluate(
    store: Store, name: str, *, posts: str, answers: str, answers_kind: Literal["predictions", "rationales"], references: str | None,
    split: Split | None, contract: Contract,
) -> tuple[Manifest, dict[str, Any], bool]:  # fmt: skip
    """Write evaluations/NAME/report.json. Returns its manifest, the report, and whether this call made it.

    A gold post that the answers rejected or never saw counts as wrong. Where `references` are given (rationales of that name or else
    predictions, for instance a teacher's that was not shown the label), rationales are scored too, on the posts where both have one;
    without them only Distinct-1/2 are. `split` None: every post with gold.
    Raises ArtifactMissing; InputError when the split has no gold or a table is about other posts; ConfigError when predictions
    were made under another contract than `contract`, since the two would not have answered the same question.
    """
    gold_table, answer_table = need(store, "posts", posts), need(store, answers_kind, answers)
    reference_table = _reference_table(store, references) if references is not None else None
    identity = {
        "stage": "evaluate", "posts": gold_table.fingerprint, "answers": answer_table.fingerprint,
        "references": reference_table.fingerprint if reference_table else None, "split": split,
    }  # fmt: skip
    # Scored before the name is taken: a wrong --split or --posts leaves nothing behind that would stand in the way of the right one.
    report = None if find(store, "evaluations", name) else _score(store, gold_table, answer_table, reference_table, split, contract)
    run = begin(store, "evaluations", name, identity)
    if isinstance(run, Manifest):
        return run, load_report(store, name), False
    assert report is not None
    with run:
        store.create(f"{run.prefix}/report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
        manifest = run.commit(rows_in=report["counts"]["gold"], stats=headline(report))
    return manifest, load_report(store, name), True


def load_report(store: Store, name: str) -> dict[str, Any]:
    """The report of a finished evaluation. Raises ArtifactError when its file is gone."""
    data = store.read(f"evaluations/{name}/report.json")
    if data is None:
        raise ArtifactError(f"evaluations/{name} is finished but has no report.json: delete the folder and evaluate again")
    return dict(json.loads(data))


def headline(report: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that stand in the manifest and in a log line."""
    labels, counts, rationales = report["labels"], report["counts"], report["rationales"] or {}
    return {
        "accuracy": labels["accuracy"], "weighted_f1": labels["weighted_f1"], "macro_f1": labels["macro_f1"],
        "gold": counts["gold"], "answered": counts["answered"], **{k: v for k, v in rationales.items() if k not in ("pairs", "texts")},
    }  # fmt: skip


def _score(
    store: Store, gold_table: Manifest, answer_table: Manifest, reference_table: Manifest | None, split: Split | None, contract: Contract
) -> dict[str, Any]:
    gold = _read_gold(store, gold_table, split)
    found = _read_answers(store, answer_table, gold, contract)
    report: dict[str, Any] = {
        "posts": gold_table.name,
        "answers": f"{answer_table.kind}/{answer_table.name}",
        "references": f"{reference_table.kind}/{reference_table.name}" if reference_table else None,
        "split": split,
        "counts": _counts(gold, found),
        "rejects_by_reason": dict(found.rejected),
        "labels": label_scores(list(gold.values()), [found.labels.get(p) for p in gold]),
        "rationales": None,
        "references_label_conditioned": None,
    }
    if answer_table.kind == "predictions":
        report["predictions"] = _prediction_facts(found)
    else:
        # A label that stands under an explanation of the gold label is no evidence that the model would have found it.
        report["answers_by_source"] = dict(found.sources)
        report["answers_label_conditioned"] = any(s in found.sources for s in LABEL_CONDITIONED)
    if reference_table is not None:
        texts, sources = _read_references(store, reference_table, gold)
        both = [p for p in found.texts if p in texts]
        scores = rationale_scores([texts[p] for p in both], [found.texts[p] for p in both]) if both else {}
        report["rationales"] = {"pairs": len(both), **scores}
        report["references_label_conditioned"] = any(s in sources for s in LABEL_CONDITIONED)
    elif found.texts:
        report["rationales"] = {"texts": len(found.texts), **{f"distinct_{n}": distinct(list(found.texts.values()), n) for n in (1, 2)}}
    return report


def _reference_table(store: Store, name: str) -> Manifest:
    found = find(store, "rationales", name) or find(store, "predictions", name)
    return found or need(store, "rationales", name)  # which says what is missing and how to make it


def _read_gold(store: Store, table: Manifest, split: Split | None) -> dict[str, Sentiment]:
    rows = read_rows(store, table, columns=["post_id", "label", "split"])
    gold = {r["post_id"]: Sentiment(r["label"]) for r in rows if r["label"] is not None and (split is None or r["split"] == split)}
    if not gold:
        where = f"split {split}" if split else "any split"
        raise InputError(f"posts/{table.name} has no post with a gold label in {where}: nothing to score against")
    return gold


def _read_answers(store: Store, table: Manifest, gold: Mapping[str, Sentiment], contract: Contract) -> Answers:
    found = Answers()
    key = "label" if table.kind == "predictions" else "prediction"
    columns = ["post_id", key, "contract", *SECTIONS, *(FACTS if table.kind == "predictions" else ("source",))]
    for r in read_rows(store, table, columns=columns):
        post = r["post_id"]
        if post not in gold:
            continue
        if post in found.labels:
            raise InputError(f"{table.kind}/{table.name} answers post {post!r} twice")
        if table.kind == "predictions" and r["contract"] != contract.hash:
            raise ConfigError(
                f"predictions/{table.name} were made under contract {r['contract']}, not {contract.hash} ({contract.name}): "
                "evaluate with the recipe that made them"
            )
        found.labels[post] = Sentiment(r[key])
        if all(r[s] for s in SECTIONS):
            found.texts[post] = rationale_text(r)
        if table.kind == "rationales":
            found.sources[r["source"]] += 1
            continue
        found.label_mass += r["label_mass"] or 0.0
        found.scored += r["label_mass"] is not None
        found.stated += r["stated"] is not None
        found.consistent += r["stated"] is not None and r["stated"] == r["label"]
        found.faults += r["rationale_fault"] is not None
    rejected = {r["post_id"]: r["reason"] for r in read_rows(store, table, rejects=True, columns=["post_id", "reason"])}
    found.rejected.update(reason for post, reason in rejected.items() if post in gold and post not in found.labels)
    if not found.labels and not found.rejected:
        raise InputError(f"{table.kind}/{table.name} is about none of the {len(gold)} gold posts: another --posts or --split is meant")
    return found


def _read_references(store: Store, table: Manifest, gold: Mapping[str, Sentiment]) -> tuple[dict[str, str], set[str]]:
    texts, sources = dict[str, str](), set[str]()
    source = ["source"] if table.kind == "rationales" else []
    for r in read_rows(store, table, columns=["post_id", *source, *SECTIONS]):
        if r["post_id"] in gold and all(r[s] for s in SECTIONS):
            texts[r["post_id"]] = rationale_text(r)
            sources.update(r[s] for s in source)
    if not texts:
        raise InputError(
            f"{table.kind}/{table.name} has a reference for none of the {len(gold)} gold posts: another --references or --split is meant"
        )
    return texts, sources


def rationale_text(row: Mapping[str, Any]) -> str:
    """The four sections, one a line. Headers are left out: they are the same in every rationale and would raise each score."""
    return "\n".join(row[s] for s in SECTIONS)


def _counts(gold: Mapping[str, Sentiment], found: Answers) -> dict[str, int]:
    answered, rejected = len(found.labels), found.rejected.total()
    return {"gold": len(gold), "answered": answered, "rejected": rejected, "missing": len(gold) - answered - rejected}


def _prediction_facts(found: Answers) -> dict[str, float | int | None]:
    """label_mass: mean share of the vocabulary that the label words had. consistency: share of rationales whose last line
    states the label that the model predicts, among the `stated` ones. rationale_faults: share of answers with an unusable rationale.
    None where there is nothing to average."""
    answered = len(found.labels)
    return {
        "label_mass": found.label_mass / found.scored if found.scored else None,
        "stated": found.stated,
        "consistency": found.consistent / found.stated if found.stated else None,
        "rationale_faults": found.faults / answered if answered else None,
    }
