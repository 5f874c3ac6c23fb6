"""Score answers (predictions, or rationales that end on a label) against the gold of a posts table.

Posts, answers and references are brought together by post_id (matching.py), each bucket of posts is counted in a Ray task (tally.py), and
the counts are added up here: of 100,000 answers this process holds counts, sums and the hashes of distinct n-grams.

The structure of report.json is in summary.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from mulcot_ray.artifacts import Manifest, Run, begin, find, need
from mulcot_ray.console import Progress
from mulcot_ray.errors import ArtifactError, ConfigError, InputError
from mulcot_ray.evaluation.calibration import scaled, temperature
from mulcot_ray.evaluation.matching import RECORDS, Bucket, match, table
from mulcot_ray.evaluation.matching import answers as answer_rows
from mulcot_ray.evaluation.matching import posts as post_rows
from mulcot_ray.evaluation.metrics import SCORES, Score
from mulcot_ray.evaluation.statistics import Floats
from mulcot_ray.evaluation.summary import VERSION, headline, lineage, summarise
from mulcot_ray.evaluation.tally import BUILT_IN_SLICES, Question, Tally, probabilities, tally
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, SECTIONS, Reject, Sentiment, Split
from mulcot_ray.storage import Store

SLOW = {"meteor", "embedding_similarity"}  # 1 to 200 ms a post
Pages = Callable[[Run, Mapping[str, Any]], Mapping[str, str]]  # file name → text, of a report that is about to be committed
DUPLICATES = pa.schema([("post_id", pa.string()), ("kind", pa.string())])


def evaluate(
    store: Store, name: str, *, posts: str, answers: str, answers_kind: Literal["predictions", "rationales"], references: str | None,
    split: Split | None, contract: Contract, runtime: Runtime, calibration: str | None = None, duplicates: str | None = None,
    slices: tuple[str, ...] = ("relation",), scores: tuple[Score, ...] = SCORES, progress: Progress | None = None,
    pages: Pages | None = None,
) -> tuple[Manifest, dict[str, Any], bool]:  # fmt: skip
    """Write evaluations/NAME/report.json, and what `pages` makes of it. Returns its manifest, the report, and whether this call made it.

    A gold post that the answers rejected or never saw counts as wrong. Where `references` are given (rationales of that name or else
    predictions, for instance a teacher's that was not shown the label), rationales are scored too, on the posts where both have one, by
    `scores`; without them only Distinct-1/2 are. `split` None: every post with gold. `calibration` names the same model's predictions over
    validation posts of the same table, on which a temperature is fitted (without, that of the model's folder is judged); `duplicates` a
    duplicates table, `slices` keys of meta.

    Raises ArtifactMissing; InputError when the split has no gold or a table is about other posts; ConfigError when predictions
    were made under another contract than `contract`, since the two would not have answered the same question, when `calibration` is of
    another model or answers a post that is scored, and for a slice or score that there cannot be.
    """
    if (wrong := set(slices) & set(BUILT_IN_SLICES)) or len(set(slices)) < len(slices):
        raise ConfigError(
            f"slices {list(slices)}: each a key of meta, once, and none of {list(BUILT_IN_SLICES)}, which are always there ({wrong or 'twice'})"
        )
    if unknown := set(scores) - set(SCORES):
        raise ConfigError(f"scores {sorted(unknown)}: only {', '.join(SCORES)} are known")
    tables = {"posts": need(store, "posts", posts), "answers": need(store, answers_kind, answers)}
    if references is not None:
        tables["references"] = either(store, references)
    if calibration is not None:
        tables["calibration"] = need(store, "predictions", calibration)
    if duplicates is not None:
        tables["duplicates"] = need(store, "duplicates", duplicates)
        if tables["duplicates"].identity.get("posts") not in (None, tables["posts"].fingerprint):
            raise ConfigError(f"duplicates {duplicates!r} were found among other posts than {posts!r}")
    identity = {
        "stage": "evaluate", "report": VERSION, **{k: m.fingerprint for k, m in tables.items()}, "split": split, "contract": contract.hash,
        "slices": slices, "scores": scores,
    }  # fmt: skip
    make = partial(_score, store, tables, split, contract, slices, scores, runtime, progress)
    return publish(store, name, identity, make, "gold", headline, pages)


def publish(
    store: Store, name: str, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]], counted: str,
    headline: Callable[[Mapping[str, Any]], dict[str, float]], pages: Pages | None,
) -> tuple[Manifest, dict[str, Any], bool]:  # fmt: skip
    """evaluations/NAME with the report that `make` gives, unless it is there. `counted` of the report's counts is the result's rows."""
    # Made before the name is taken: a wrong --split or --posts leaves nothing behind that would stand in the way of the right one.
    report = None if find(store, "evaluations", name) else make()
    run = begin(store, "evaluations", name, identity)
    if isinstance(run, Manifest):
        return run, load_report(store, name), False
    assert report is not None
    with run:
        store.create(f"{run.prefix}/report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
        for file, text in (pages(run, report) if pages else {}).items():
            store.write(f"{run.prefix}/{file}", text.encode())  # one that a killed attempt left is replaced
        manifest = run.commit(rows_in=report["counts"][counted], stats=headline(report))
    return manifest, load_report(store, name), True


def load_report(store: Store, name: str) -> dict[str, Any]:
    """The report of a finished evaluation. Raises ArtifactError when its file is gone."""
    data = store.read(f"evaluations/{name}/report.json")
    if data is None:
        raise ArtifactError(f"evaluations/{name} is finished but has no report.json: delete the folder and run again")
    return dict(json.loads(data))


def either(store: Store, name: str) -> Manifest:
    """Rationales of that name, or else predictions."""
    found = find(store, "rationales", name) or find(store, "predictions", name)
    return found or need(store, "rationales", name)  # which says what is missing and how to make it


def _score(
    store: Store, tables: Mapping[str, Manifest], split: Split | None, contract: Contract, slices: tuple[str, ...], scores: tuple[Score, ...],
    runtime: Runtime, progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    answers, references = tables["answers"], tables.get("references")
    fitted = _fit(store, tables["posts"], answers, tables["calibration"], split, contract, runtime) if "calibration" in tables else None
    inputs = [
        post_rows(tables["posts"], None if split is None else [split], slices, gold=True),
        answer_rows("answer", answers),
        table("reject", answers, Reject.schema, ("post_id", "reason"), rejects=True),
    ]
    if references is not None:
        source = ["source"] if references.kind == "rationales" else []
        inputs.append(table("reference", references, RECORDS[references.kind].schema, ("post_id", *source, *SECTIONS)))
    if "duplicates" in tables:
        inputs.append(table("duplicate", tables["duplicates"], DUPLICATES, ("post_id", "kind")))
    given = given_temperature(answers)
    t = fitted["temperature"] if fitted else given if given != 1 else None
    question = Question(answers.kind, answers.name, contract, slices, "duplicates" in tables, scores, given, t)
    total = Tally()
    for part in match(store, inputs, partial(tally, question), runtime, quick=references is None or not SLOW & set(scores)):
        total.merge(part)
        if progress is not None:
            progress(total.counts["gold"], max(total.counts["gold"], posts_of(tables["posts"], split)), total.counts["rejected"])
    _check(total, tables, split)
    return summarise(total, tables, split, question, fitted) | {"lineage": lineage(store, tables, contract)}


def posts_of(posts: Manifest, split: Split | None) -> int:
    """How many posts there are, with gold or without."""
    return posts.rows if split is None else int(posts.stats.get("splits", {}).get(split, 0))


def given_temperature(predictions: Manifest) -> float:
    """The temperature that is in the probabilities already: that of the model's folder (mulcot_ray/calibration.py)."""
    return float(predictions.stats.get("temperature") or 1.0)


def _check(t: Tally, tables: Mapping[str, Manifest], split: Split | None) -> None:
    gold, answers = t.counts["gold"], tables["answers"]
    if not gold:
        where = f"split {split}" if split else "any split"
        raise InputError(f"posts/{tables['posts'].name} has no post with a gold label in {where}: nothing to score against")
    if not t.counts["answered"] and not t.counts["rejected"]:
        raise InputError(f"{answers.kind}/{answers.name} is about none of the {gold} gold posts: another --posts or --split is meant")
    if (r := tables.get("references")) is not None and not t.counts["references"]:
        raise InputError(f"{r.kind}/{r.name} has a reference for none of the {gold} gold posts: another --references or --split is meant")
    if "calibration" in tables and not t.before.count.any():
        raise ConfigError(f"{answers.kind}/{answers.name} hold no probabilities (label them with --mode score or explain): nothing to calibrate")


# --- the temperature -------------------------------------------------------------------------------------------------


def _fit(
    store: Store, posts: Manifest, answers: Manifest, validation: Manifest, split: Split | None, contract: Contract, runtime: Runtime
) -> dict[str, Any]:
    """The temperature that suits the validation posts best, and on how many it was fitted. 32 bytes of each are held here."""
    name = f"predictions/{validation.name}"
    if split in (None, Split.VALIDATION):
        raise ConfigError(f"{name} calibrate on validation posts, so these cannot be scored as well: name another --split, such as test")
    for key, what in (("posts", "posts"), ("model", "model")):
        a, b = (answers.identity.get(key) if key == "model" else posts.fingerprint), validation.identity.get(key)
        if a is not None and b is not None and a != b:
            raise ConfigError(f"{name} are of another {what} ({b}) than predictions/{answers.name} ({a}): a temperature carries over to neither")
    inputs = [post_rows(posts, [Split.VALIDATION, split], (), gold=True), answer_rows("answer", validation)]
    found: list[tuple[Floats, list[int]]] = []
    for p, gold, shared in match(store, inputs, partial(_fit_bucket, contract.hash, str(split)), runtime):
        if shared:
            raise ConfigError(f"{name} answer post {shared!r} of the {split} split, which is scored: calibrate on validation posts alone")
        found.append((p, gold))
    gold = [g for _, some in found for g in some]
    if not gold:
        raise InputError(f"{name} hold probabilities for no validation post with gold of posts/{posts.name}")
    t = temperature(scaled(np.concatenate([p for p, _ in found]), 1 / given_temperature(validation)), gold)
    return {"temperature": t, "fitted_on": {"predictions": validation.name, "posts": len(gold)}}


def _fit_bucket(contract: str, split: str, bucket: Bucket) -> tuple[Floats, list[int], str | None]:
    """Probabilities and gold of a bucket's validation posts, and a post of the split under evaluation that is answered too."""
    answers = {a["post_id"]: a for a in bucket["answer"]}
    met = [(p, answers[p["post_id"]]) for p in bucket["post"] if p["post_id"] in answers]
    if wrong := next((a for _, a in met if a["contract"] != contract), None):
        raise ConfigError(f"the predictions to calibrate on were made under contract {wrong['contract']}, not {contract}")
    sure = [(p, a) for p, a in met if p["split"] == Split.VALIDATION and a["negative"] is not None]
    shared = next((p["post_id"] for p, _ in met if p["split"] == split), None)
    return probabilities([a for _, a in sure]), [LABELS.index(Sentiment(p["label"])) for p, _ in sure], shared
