"""The pages of an evaluation: how good one model's answers are, and where two differ. Each is one HTML file that needs nothing beside it.

What they say stands in report.json too (summary.py, compare.py); the pages add pictures, rationales and words. They are made before the
manifest is written, so that they are part of the result.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mulcot_ray.artifacts import Run, git_commit, need, versions
from mulcot_ray.errors import ConfigError
from mulcot_ray.evaluation.evaluate import load_report
from mulcot_ray.evaluation.examples import NAME, disagreements, model_examples
from mulcot_ray.evaluation.faithfulness_measures import NAMES as MEASURES
from mulcot_ray.evaluation.metrics import NONE
from mulcot_ray.evaluation.model_card import LABEL_SCORES, evaluate_command, model_card, score_name
from mulcot_ray.evaluation.origin import MODES, Origin, who
from mulcot_ray.evaluation.plots import coverage, curve, reliability
from mulcot_ray.html import NB, environment, number, words
from mulcot_ray.posts.shown import clip
from mulcot_ray.records import LABELS
from mulcot_ray.storage import Store

SCORES = {
    "bleu": ("BLEU", "0–100", "Runs of one to four words that it shares with the reference. It sees wording, not sense: a good reason in other words scores low."),
    "meteor": ("METEOR", "0–1", "Words that match the reference’s, also by stem or as synonyms, and whether they come in its order."),
    "rouge_l": ("ROUGE-L", "0–1", "The longest sequence of words that both have in the same order, with gaps allowed."),
    "embedding_similarity": ("Similarity", "−1–1", "Closeness in meaning to a small language model (all-MiniLM-L6-v2). It hardly notices a “not”."),
    "distinct_1": ("Distinct-1", "0–1", "Different words among all words that were written: variety. It falls as texts are added, so compare only equal numbers of them."),
    "distinct_2": ("Distinct-2", "0–1", "The same for pairs of words."),
}  # fmt: skip
SLICES = {"aspect": "Target", "image": "Picture", "length": "Length of the text", "split": "Split", "duplicate": "Duplicates"}
LENGTHS = ("up to 60 characters", "61 to 120", "over 120")
KEPT = (1.0, 0.95, 0.9, 0.8, 0.7, 0.5)  # shares of posts for which the table of thresholds has a row

AS_IT_IS = ("stated_is_label", "own_rationale_keeps", "other_rationale_keeps", "other_rationale_drags")
EXCHANGED = tuple(k for k in MEASURES if k not in (*AS_IT_IS, "accuracy", "label_mass"))


def model_files(run: Run, report: Mapping[str, Any], *, teacher: str | None = None, faithfulness: Mapping[str, Any] | None = None) -> dict[str, str]:
    """The files of an evaluation for people: report.html and model_card.md."""
    return {"report.html": model_page(run, report, teacher=teacher, faithfulness=faithfulness), "model_card.md": model_card(run, report)}


def compare_files(run: Run, report: Mapping[str, Any]) -> dict[str, str]:
    """The file of a comparison for people: report.html."""
    return {"report.html": compare_page(run, report)}


def load_faithfulness(store: Store, name: str) -> dict[str, Any]:
    """The report of a finished test of faithfulness, for `model_files`. Raises ArtifactMissing, ConfigError where it is another evaluation."""
    made = need(store, "evaluations", name)
    if made.identity.get("stage") != "faithfulness":
        raise ConfigError(f"evaluations/{name} is of stage {made.identity.get('stage')!r}; one made by `mulcot faithfulness` is wanted")
    return load_report(store, name)


def model_page(
    run: Run, report: Mapping[str, Any], *, teacher: str | None = None, faithfulness: Mapping[str, Any] | None = None, examples: int = 12
) -> str:
    """The page of one model's answers, of a report that is about to be committed under `run`.

    teacher: rationales, or else predictions, to show beside the model's own (None: the references that it was scored against).
    faithfulness: the report of evaluation/faithfulness.py on the same model. Raises ArtifactMissing where a table of the report is gone.
    """
    origin, answers = Origin(run.store, report["lineage"]), report["lineage"]["answers"]
    calibration = report["calibration"]
    history = _history(run, origin)
    sizes = [sum(row) for row in report["labels"]["confusion"]]
    slices, alike = _slices(report)
    f = faithfulness
    asked = [f"mulcot faithfulness --posts {f['posts']} --split {f['split']} --model {shlex.quote(f['model'])} --mode {f['mode']}"] if f else []
    return _render(
        "model.html.j2", run, origin, [*asked, evaluate_command(run, report)],
        r=report, who=who(answers), mode=MODES.get(answers["identity"].get("mode", ""), ""),
        seen=origin.seen(report["split"]), tiles=[(score_name(k), report["labels"][k], report["labels"]["intervals"][k]) for k in LABEL_SCORES],
        majority=(LABELS[sizes.index(max(sizes))].value, max(sizes) / sum(sizes)),
        slices=slices, alike=alike, least=_floor([s["interval"][0] for _, rows in slices for s in rows]),
        reliability=calibration and reliability(calibration["before"], calibration["after"]),
        coverage=calibration and coverage(calibration["before"], calibration["after"]),
        thresholds=calibration and _thresholds((calibration["after"] or calibration["before"])["coverage"]),
        scores=[(*about, _score(key, report["rationales"][key])) for key, about in SCORES.items() if key in (report["rationales"] or {})],
        f=f, as_it_is=AS_IT_IS, exchanged=EXCHANGED, measures=MEASURES,
        curve=curve(origin.model["name"], history) if history and origin.model else None, history=history,
        examples=model_examples(run.store, report, teacher, examples),
    )  # fmt: skip


def compare_page(run: Run, report: Mapping[str, Any]) -> str:
    """The page of a comparison that is about to be committed under `run`. Raises ArtifactMissing where a table of the report is gone."""
    a, b = (report[x].partition("/")[2] for x in ("a", "b"))
    shown = (a, b) if a != b else (report["a"], report["b"])
    split = f" --split {report['split']}" if report["split"] else ""
    command = f"mulcot compare {a} {b} --posts {report['posts']}{split} --name {run.name}"
    g = report["gold"]
    ends = [e for x in ("a", "b") for k in LABEL_SCORES for e in g[x]["intervals"][k]] if g else []
    lineage = {**report["lineage"], "contract": {"hash": run.identity["contract"]}}
    return _render(
        "compare.html.j2", run, Origin(run.store, lineage), [command],
        r=report, a=shown[0], b=shown[1], names=[(k, score_name(k)) for k in LABEL_SCORES], least=_floor(ends), chance=_chance(g["mcnemar_p"]) if g else "",
        examples=disagreements(run.store, report),
    )  # fmt: skip


def _render(template: str, run: Run, origin: Origin, last: Sequence[str], **context: Any) -> str:
    env = environment(Path(__file__).parent)
    env.filters |= {"points": _points, "signed": lambda x: _minus(f"{x:+.3f}"), "rate": lambda x: f"{x:.1f}" if x < 100 else number(round(x))}
    identity = json.dumps({"this": run.identity, **origin.lineage}, indent=1, ensure_ascii=False)
    made = versions() | {"source": git_commit() or "installed package"}
    return env.get_template(template).render(
        name=run.name, labels=[s.value for s in LABELS], columns=[*LABELS, NONE], lineage=origin.rows(), identity=identity, versions=made,
        commands=[*origin.commands(), *last], contract=origin.contract, **context,
    )  # fmt: skip


# --- parts -----------------------------------------------------------------------------------------------------------


def _slices(report: Mapping[str, Any]) -> tuple[list[tuple[str, list[dict[str, Any]]]], list[tuple[str, str]]]:
    """Slices with several values, each value marked where its interval lies wholly below or above the accuracy over all; and those with one."""
    overall = report["labels"]["accuracy"]
    several, alike = list[tuple[str, list[dict[str, Any]]]](), list[tuple[str, str]]()
    for key, values in report["slices"].items():
        name = SLICES.get(key) or words(key)
        if len(values) < 2:
            alike.extend((name, clip(value, NAME)) for value in values)
            continue
        order = sorted(values, key=lambda v: (LENGTHS.index(v), v) if v in LENGTHS else (0, v))
        marks = {v: "below" if values[v]["interval"][1] < overall else "above" if values[v]["interval"][0] > overall else "" for v in order}
        several.append((name, [{"value": clip(v, NAME), "mark": marks[v], **values[v]} for v in order]))
    return several, alike


def _floor(shares: Sequence[float]) -> float:
    """Where a line of shares begins: the tenth below the least of them."""
    return min(0.9, math.floor(10 * min(shares, default=0.0)) / 10)


def _thresholds(points: Sequence[Mapping[str, float]]) -> list[Mapping[str, float]]:
    """For each share of KEPT the point that keeps as little more as possible; each point once."""
    found = [min((p for p in points if p["coverage"] >= share - 1e-9), key=lambda p: p["coverage"], default=points[0]) for share in KEPT]
    return [p for i, p in enumerate(found) if p not in found[:i]]


def _history(run: Run, origin: Origin) -> dict[str, Any] | None:
    """The training curves of a model under the root, where it has steps."""
    data = run.store.read(f"models/{origin.model['name']}/history.json") if origin.model else None
    history: dict[str, Any] = json.loads(data) if data else {}
    return history if history.get("steps") else None


def _score(key: str, value: float) -> str:
    return _minus(f"{value:.2f}" if key == "bleu" else f"{value:.4f}" if key.startswith("distinct") else f"{value:.3f}")


def _points(difference: float) -> str:
    """0.27 → +27.0."""
    return _minus(f"{100 * difference:+.1f}")


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _chance(p: float) -> str:
    """How often luck alone would divide the posts so unevenly."""
    if p < 0.001:
        return "less than once in a thousand times"
    if p < 0.05:
        return f"about once in {round(1 / p)} times"
    return f"in {100 * p:.0f}{NB}% of all cases"
