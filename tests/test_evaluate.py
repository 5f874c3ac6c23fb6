"""The evaluate stage over hand-made tables, on real rationales, and over the prompts that lead to the answers."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mulcot_ray.artifacts import Run, begin, find, need, read_rows
from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, open_engine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import ArtifactMissing, ConfigError, InputError, RecipeChanged, RowFault
from mulcot_ray.evaluation import matching
from mulcot_ray.evaluation.evaluate import evaluate
from mulcot_ray.evaluation.metrics import words
from mulcot_ray.evaluation.show import show
from mulcot_ray.posts.importing import import_posts
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import EngineRuntime, load_recipe, load_runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Reason, Reject, Sentiment, Source, Split, Task, from_row, to_table
from mulcot_ray.storage import Store
from mulcot_ray.teaching.teach import teach

NEG, NEU, POS = Sentiment.NEGATIVE, Sentiment.NEUTRAL, Sentiment.POSITIVE
RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
CONTRACT = RECIPE.contract
CHEAP = ("bleu", "meteor", "rouge_l")
DATA = Path(os.environ.get("MULCOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
GOLD = {"a": POS, "b": NEG, "c": NEU, "d": POS, "e": NEG}


def _publish(
    store: Store, kind: Any, name: str, rows: list[Any], rejects: list[Reject] | None = None, stats: dict[str, Any] | None = None, **identity: Any
) -> None:
    rejects = rejects or []
    run = begin(store, kind, name, {"stage": "by hand", "name": name, **identity})
    assert isinstance(run, Run)
    with run:
        types = {"posts": Post, "predictions": Prediction, "rationales": Rationale}
        for part in range(0, len(rows), 100):
            run.write_table(f"part-{part:05d}", to_table(types[kind], rows[part : part + 100]))
        if rejects:
            run.write_table("part-00000", to_table(Reject, rejects), rejects=True)
        run.commit(len(rows) + len(rejects), stats=stats)


def _sections(word: str) -> dict[str, Any]:
    return {s: f"{word} {s}" for s in ("text_analysis", "image_analysis", "conflict_resolution", "final_conclusion")}


def _rationale(post: str, label: Sentiment, source: Source = Source.PREDICTED, word: str = "the") -> Rationale:
    return Rationale(post, source, "teacher", CONTRACT.hash, **_sections(word), prediction=label)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    s = Store(str(tmp_path))
    posts = [Post(p, p, f"text {p}", "x", label=y, split=Split.TEST) for p, y in GOLD.items()]
    posts += [Post("t", "t", "text", "x", label=POS, split=Split.TRAIN), Post("u", "u", "text", "x", split=Split.TEST)]
    _publish(s, "posts", "sample", posts)
    answers = [
        Prediction("a", POS, "student", CONTRACT.hash, label_mass=0.9, **_sections("the"), stated=POS),
        Prediction("b", POS, "student", CONTRACT.hash, label_mass=0.7, **_sections("its"), stated=NEG),
        Prediction("c", NEU, "student", CONTRACT.hash, label_mass=0.8, rationale_fault="sections_missing"),
        Prediction("t", NEG, "student", CONTRACT.hash, label_mass=0.1),
        Prediction("u", NEG, "student", CONTRACT.hash, label_mass=0.1),
    ]
    _publish(s, "predictions", "student", answers, [Reject("d", "label", Reason.IMAGE_UNREADABLE, "broken")])
    _publish(s, "rationales", "refs", [_rationale("a", POS), _rationale("b", NEG, Source.EXPLAINED), _rationale("t", POS)])
    return s


def _evaluate(store: Store, name: str = "e", **changes: Any) -> Any:
    settings: dict[str, Any] = {"posts": "sample", "answers": "student", "answers_kind": "predictions", "references": None, "split": Split.TEST}
    return evaluate(store, name, **{**settings, "contract": CONTRACT, "runtime": RUNTIME, **changes})


def test_unanswered_posts_are_wrong(store: Store) -> None:
    manifest, report, fresh = _evaluate(store)
    assert fresh
    assert report["counts"] == {"gold": 5, "answered": 3, "rejected": 1, "missing": 1}
    assert report["rejects_by_reason"] == {"image_unreadable": 1}
    assert report["labels"]["accuracy"] == 2 / 5
    assert report["labels"]["confusion"] == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert report["predictions"] == {"label_mass": pytest.approx(0.8), "stated": 2, "consistency": 0.5, "rationale_faults": pytest.approx(1 / 3)}
    assert report["labels"]["intervals"]["accuracy"][0] < 2 / 5 < report["labels"]["intervals"]["accuracy"][1]
    assert report["rationales"]["texts"] == 2 and 0 < report["rationales"]["distinct_1"] < 1
    assert report["references_label_conditioned"] is None
    assert (manifest.rows_in, manifest.stats["accuracy"], manifest.stats["gold"]) == (5, 2 / 5, 5)
    assert "report.json" in manifest.files


def test_again_does_nothing(store: Store) -> None:
    first = _evaluate(store)
    second = _evaluate(store)
    assert (first[2], second[2]) == (True, False)
    assert first[:2] == second[:2]
    with pytest.raises(RecipeChanged, match="split"):
        _evaluate(store, split=None)


def test_resumes_after_a_kill_between_report_and_manifest(store: Store, tmp_path: Path) -> None:
    _, report, _ = _evaluate(store)
    (tmp_path / "evaluations/e/manifest.json").unlink()
    assert find(store, "evaluations", "e") is None
    assert _evaluate(store)[1:] == (report, True)


def test_all_splits(store: Store) -> None:
    assert _evaluate(store, split=None)[1]["counts"] == {"gold": 6, "answered": 4, "rejected": 1, "missing": 1}


def test_rationales_against_references(store: Store) -> None:
    _, report, _ = _evaluate(store, references="refs")
    assert report["rationales"]["pairs"] == 2
    assert 0.4 < report["rationales"]["rouge_l"] < 1 and 0.5 < report["rationales"]["embedding_similarity"] <= 1
    assert report["references_label_conditioned"] is True
    assert need(store, "evaluations", "e").stats["meteor"] == report["rationales"]["meteor"]
    clean = [_rationale("a", POS), _rationale("t", POS, Source.EXPLAINED)]  # t is of another split
    _publish(store, "rationales", "clean", clean)
    assert _evaluate(store, "e2", references="clean")[1]["references_label_conditioned"] is False


def test_predictions_of_a_teacher_as_references(store: Store) -> None:
    unseen = [Prediction("a", NEG, "teacher", "another", **_sections("the"), stated=NEG), Prediction("b", NEG, "teacher", "another")]
    _publish(store, "predictions", "teacher", unseen)
    _, report, _ = _evaluate(store, references="teacher")
    assert report["references"] == "predictions/teacher" and report["references_label_conditioned"] is False
    assert report["rationales"]["pairs"] == 1 and report["rationales"]["rouge_l"] == 1.0


def test_rationales_as_answers(store: Store) -> None:
    _publish(store, "rationales", "given", [_rationale("a", POS, Source.IMPORTED), _rationale("b", NEU, Source.IMPORTED)])
    _, report, _ = _evaluate(store, answers="given", answers_kind="rationales")
    assert report["counts"]["missing"] == 3 and report["labels"]["accuracy"] == 1 / 5
    assert report["answers_by_source"] == {"imported": 2} and report["answers_label_conditioned"] is True
    assert "predictions" not in report


def test_answers_without_any_rationale_are_scored_all_the_same(store: Store) -> None:
    _publish(store, "predictions", "mute", [Prediction("a", POS, "student", CONTRACT.hash)])
    _, report, _ = _evaluate(store, answers="mute", references="refs")
    assert report["rationales"] == {"texts": 0, "pairs": 0}
    assert report["predictions"] == {"label_mass": None, "stated": 0, "consistency": None, "rationale_faults": 0.0}


def test_named_errors(store: Store) -> None:
    with pytest.raises(ArtifactMissing, match="nobody"):
        _evaluate(store, answers="nobody")
    with pytest.raises(InputError, match="no post with a gold label in split validation"):
        _evaluate(store, "v", split=Split.VALIDATION)
    assert _evaluate(store, "v", split=Split.TEST)[2], "a failed attempt keeps no hold on the name"
    _publish(store, "predictions", "elsewhere", [Prediction("zzz", POS, "student", CONTRACT.hash)])
    with pytest.raises(InputError, match="about none of the 5 gold posts"):
        _evaluate(store, "w", answers="elsewhere")
    with pytest.raises(ConfigError, match=rf"contract {CONTRACT.hash}, not"):
        _evaluate(store, "x", contract=Contract.model_validate(CONTRACT.model_dump() | {"name": "other"}))
    _publish(store, "predictions", "twice", [Prediction("a", POS, "student", CONTRACT.hash)] * 2)
    with pytest.raises(InputError, match="'a' twice"):
        _evaluate(store, "y", answers="twice")
    _publish(store, "rationales", "far", [_rationale("t", POS)])
    with pytest.raises(InputError, match="reference for none of the 5"):
        _evaluate(store, "z", references="far")


def test_show_in_the_terminal(store: Store) -> None:
    console = Console(record=True, width=100)
    console.print(show(_evaluate(store, references="refs")[1]))
    text = console.export_text()
    assert "0.4000" in text and "whole sources drawn" in text and "METEOR" in text and "image_unreadable" in text and "gold label in view" in text


# --- slices, form, examples ------------------------------------------------------------------------------------------


def _sections_of(p: Rationale) -> dict[str, str]:
    return {s: getattr(p, s) for s in SECTIONS}


def _answered(posts: list[Post], seed: int, accuracy: float) -> list[Prediction]:
    """Answers with probabilities and rationales, some wrong, some without sections; two posts are left out."""
    rng, made = random.Random(seed), []
    for p in posts[2:]:
        assert p.label is not None
        label = p.label if rng.random() < accuracy else rng.choice([x for x in LABELS if x is not p.label])
        sure = rng.uniform(0.4, 0.98)
        share = {str(x): sure if x is label else (1 - sure) / 2 for x in LABELS}
        told = _sections_of(reference_rationale(p, label)) if rng.random() < 0.9 else {}
        made.append(Prediction(p.post_id, label, "student", CONTRACT.hash, **share, label_mass=rng.random(), tokens_in=10, tokens_out=20, **told,
                               stated=label if told else None, rationale_fault=None if told else "sections_missing: no Text_analysis"))  # fmt: skip
    return made


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """posts/p (300 test, 200 validation posts of the sample corpus, without pictures), answers to both, references."""
    s = Store(str(tmp_path_factory.mktemp("corpus")))
    posts = [
        dataclasses.replace(p, image_bytes=None)
        for split in (Split.TEST, Split.VALIDATION)
        for p in sample_posts(300 if split is Split.TEST else 200, split, 1)
    ]
    test, validation = posts[:300], posts[300:]
    _publish(s, "posts", "p", posts)
    _publish(s, "predictions", "a", _answered(test, 1, 0.8), [Reject(test[0].post_id, "label", Reason.ANSWER_UNPARSED, "?")], {"model": "m"})
    _publish(s, "predictions", "v", _answered(validation, 2, 0.8))
    references = [dataclasses.replace(reference_rationale(p), source=Source.PREDICTED, contract=CONTRACT.hash) for p in posts]
    _publish(s, "rationales", "refs", references)
    return s


def _corpus(store: Store, name: str, **changes: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"posts": "p", "answers": "a", "references": "refs", "scores": CHEAP}
    return dict(_evaluate(store, name, **{**common, **changes})[1])


def test_slices_are_the_posts_that_they_name(corpus: Store) -> None:
    report = _corpus(corpus, "slices", slices=("relation", "text_cue", "nowhere"))
    posts = {p.post_id: p for p in (from_row(Post, r) for r in read_rows(corpus, need(corpus, "posts", "p"))) if p.split is Split.TEST}
    said = {p.post_id: p.label for p in (from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", "a")))}
    for name, of in (("relation", lambda p: p.meta["relation"]), ("text_cue", lambda p: p.meta["text_cue"]), ("image", lambda _: "with image"),
                     ("length", lambda p: "up to 60 characters" if len(p.text) <= 60 else "61 to 120" if len(p.text) <= 120 else "over 120")):  # fmt: skip
        groups: dict[str, list[bool]] = {}
        for i, p in posts.items():
            groups.setdefault(of(p), []).append(said.get(i) == p.label)
        found = report["slices"][name]
        assert {k: (v["count"], v["accuracy"]) for k, v in found.items()} == {k: (len(g), sum(g) / len(g)) for k, g in groups.items()}
        assert all(v["interval"][0] <= v["accuracy"] <= v["interval"][1] for v in found.values())
    assert set(report["slices"]) == {"aspect", "image", "length", "split", "relation", "text_cue"}
    assert len(report["slices"]["relation"]) == 5 and len(report["slices"]["length"]) > 1


def test_a_slice_needs_few_values(corpus: Store) -> None:
    posts = [dataclasses.replace(p, image_bytes=None, meta={**p.meta, "id": p.post_id}) for p in sample_posts(60, Split.TEST, 3)]
    _publish(corpus, "posts", "many", posts)
    _publish(corpus, "predictions", "many", _answered(posts, 1, 0.8))
    with pytest.raises(ConfigError, match="slice 'id' has over 50 values"):
        _evaluate(corpus, "s", posts="many", answers="many", slices=("id",))
    with pytest.raises(ConfigError, match="none of .*'aspect'"):
        _evaluate(corpus, "s", posts="many", answers="many", slices=("aspect",))
    with pytest.raises(ConfigError, match=r"scores \['rouge'\]: only bleu, meteor"):
        _evaluate(corpus, "s", posts="many", answers="many", scores=("rouge",))


def test_duplicates_are_a_slice(corpus: Store) -> None:
    import pyarrow as pa

    table = need(corpus, "posts", "p")
    for name, of in (("d", table.fingerprint), ("other", "another table")):
        run = begin(corpus, "duplicates", name, {"posts": of})
        assert isinstance(run, Run)
        with run:
            ids = [r["post_id"] for r in read_rows(corpus, table, columns=["post_id"])][:5]
            run.write_table("part-00000", pa.table({"post_id": ids, "kind": ["exact"] * 3 + ["near"] * 2, "similarity": [1.0] * 5}))
            run.commit(5)
    found = _corpus(corpus, "duplicates", duplicates="d")["slices"]["duplicate"]
    assert {k: v["count"] for k, v in found.items()} == {"exact": 3, "near": 2, "unique": 295}
    with pytest.raises(ConfigError, match="among other posts than 'p'"):
        _corpus(corpus, "duplicates-2", duplicates="other")


def test_form_and_cost_are_counted(corpus: Store) -> None:
    told_of: list[tuple[int, int, int]] = []
    report = _corpus(corpus, "form", progress=lambda *x: told_of.append(x))
    assert told_of == [(300, 300, 1)]
    said = [from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", "a"))]
    told = sum(p.stated is not None for p in said)
    assert report["counts"] == {"gold": 300, "answered": 298, "rejected": 1, "missing": 1}
    assert report["form"] == {
        "tried": 299, "formed": told, "format_valid": told / 299, "contradictions": 0, "sections_consistent": 1.0,
        "faults": {"sections_missing": 298 - told}, "malformed_rejects": 1,
    }  # fmt: skip
    assert report["rationales"]["pairs"] == report["rationales"]["texts"] == told
    assert (report["cost"]["tokens_in"], report["cost"]["tokens_out"], report["cost"]["rows"]) == (2980, 5960, 298)
    assert report["lineage"]["answers"]["stats"] == {"model": "m"} and report["lineage"]["contract"]["hash"] == CONTRACT.hash
    assert report["version"] == 2 and json.loads(json.dumps(report)) == report


def test_a_conclusion_that_names_another_label_is_counted(store: Store) -> None:
    liar = {**_sections("the"), "final_conclusion": "Taken together the post is negative."}
    sober = {**_sections("the"), "final_conclusion": "Not negative: it is positive."}
    _publish(store, "predictions", "liar", [Prediction(p, POS, "m", CONTRACT.hash, **told, stated=POS) for p, told in (("a", liar), ("b", sober))])
    form = _evaluate(store, answers="liar")[1]["form"]
    assert (form["contradictions"], form["sections_consistent"], form["format_valid"]) == (1, 0.5, 1.0)


def test_examples_are_the_surest_and_the_least_sure(corpus: Store) -> None:
    examples = _corpus(corpus, "examples")["examples"]
    gold = {r["post_id"]: r["label"] for r in read_rows(corpus, need(corpus, "posts", "p"))}
    said = [from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", "a"))]
    sure = {p.post_id: getattr(p, p.label) for p in said}
    for kind, right in (("right", True), ("wrong", False)):
        of = sorted((p.post_id for p in said if (p.label == gold[p.post_id]) == right), key=lambda i: -sure[i])
        assert [e["post_id"] for e in examples[kind]] == of[:8]
    assert [e["post_id"] for e in examples["unsure"]] == sorted(sure, key=lambda i: sure[i])[:8]
    first = examples["wrong"][0]
    assert first["gold"] == gold[first["post_id"]] != first["label"] and first["confidence"] == sure[first["post_id"]]


# --- calibration -----------------------------------------------------------------------------------------------------


def test_a_temperature_is_fitted_on_validation_and_judged_on_test(corpus: Store) -> None:
    report = _corpus(corpus, "calibrated", calibration="v")
    c = report["calibration"]
    assert c["fitted_on"] == {"predictions": "v", "posts": 198} and c["temperature"] > 0
    assert c["before"]["count"] == c["after"]["count"] == 298
    assert c["after"]["accuracy"] == c["before"]["accuracy"], "no label changes"
    assert c["after"]["nll"] < c["before"]["nll"]
    assert need(corpus, "evaluations", "calibrated").stats["ece"] == c["after"]["ece"]
    plain = _corpus(corpus, "uncalibrated")["calibration"]
    assert (plain["temperature"], plain["fitted_on"], plain["after"]) == (None, None, None) and plain["before"] == c["before"]


def test_the_temperature_of_the_model_is_undone_for_before(corpus: Store) -> None:
    """Probabilities in a table may carry the temperature of the model's folder; `before` is without it, whoever fits."""
    from mulcot_ray.evaluation.calibration import scaled

    def warmed(name: str) -> list[Prediction]:
        rows = [from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", name))]
        shares = scaled([[getattr(r, x) for x in LABELS] for r in rows], 1.6)
        return [dataclasses.replace(r, **dict(zip(map(str, LABELS), map(float, p), strict=True))) for r, p in zip(rows, shares, strict=True)]

    for name in ("a", "v"):
        _publish(corpus, "predictions", f"{name}-warm", warmed(name), stats={"temperature": 1.6})
    raw, own, fitted = (
        _corpus(corpus, f"c-{i}", **x)["calibration"]
        for i, x in enumerate(({"calibration": "v"}, {"answers": "a-warm"}, {"answers": "a-warm", "calibration": "v-warm"}))
    )
    assert own["temperature"] == 1.6 and own["fitted_on"] is None
    assert own["before"]["ece"] == pytest.approx(raw["before"]["ece"], abs=1e-9) and own["after"]["nll"] != own["before"]["nll"]
    assert fitted["temperature"] == pytest.approx(raw["temperature"], rel=1e-4)


def test_calibration_on_posts_that_are_scored_is_refused(corpus: Store) -> None:
    for split in (None, Split.VALIDATION):
        with pytest.raises(ConfigError, match="cannot be scored as well"):
            _corpus(corpus, "x", calibration="v", split=split)
    with pytest.raises(ConfigError, match="of the test split, which is scored"):
        _corpus(corpus, "x", calibration="a")
    _publish(
        corpus,
        "predictions",
        "mute-v",
        [Prediction(r["post_id"], POS, "m", CONTRACT.hash) for r in read_rows(corpus, need(corpus, "predictions", "v"))],
    )
    with pytest.raises(InputError, match="predictions/mute-v hold probabilities for no validation post"):
        _corpus(corpus, "x", calibration="mute-v")
    rows = [from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", "v"))]
    _publish(corpus, "predictions", "b", rows, model="another")
    _publish(
        corpus, "predictions", "a-of-one", [Prediction(p.post_id, POS, "m", CONTRACT.hash) for p in sample_posts(20, Split.TEST, 1)], model="one"
    )
    with pytest.raises(ConfigError, match="of another model"):
        _corpus(corpus, "x", answers="a-of-one", calibration="b")
    with pytest.raises(ConfigError, match="hold no probabilities"):
        _corpus(corpus, "x", answers="a-of-one", calibration="v")


# --- many buckets ----------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_buckets_on_ray_give_the_digits_of_one_batch(corpus: Store, monkeypatch: pytest.MonkeyPatch, ray_session: None) -> None:
    quick: dict[str, Any] = {"scores": ("bleu", "rouge_l")}  # METEOR would load WordNet in each worker
    whole = _corpus(corpus, "whole", calibration="v", **quick)
    monkeypatch.setattr(matching, "ROWS_PER_BUCKET", 300)
    monkeypatch.setattr(matching, "ROWS_HERE", 300)
    assert _corpus(corpus, "buckets", calibration="v", **quick) == whole
    rows = [from_row(Prediction, r) for r in read_rows(corpus, need(corpus, "predictions", "a"))]
    _publish(corpus, "predictions", "double", [*rows, rows[7]])
    with pytest.raises(InputError, match=f"'{rows[7].post_id}' twice"):
        _corpus(corpus, "doubly", answers="double", references=None)


# --- real answers ----------------------------------------------------------------------------------------------------


def _json_of(path: Path, answers: list[tuple[str, str]]) -> Path:
    """The authors' format: one object per answer."""
    rows = [
        {"id": i, "text": f"a text {i}", "label": gold, "aspect": "it", "image_id": f"{i}", "image_path": f"{i}.jpg", "cot": cot}
        for i, (gold, cot) in enumerate(answers)
    ]
    path.write_text(json.dumps(rows))
    return path


def test_every_shape_of_answer_is_scored_right(tmp_path: Path) -> None:
    """METHOD.md: label quoted, bare, the whole in a code fence, prose after the label, no sections at all."""
    sections = '"Text_analysis": "a b"\n"Image_analysis": "c d"\n"Conflict_resolution": "e"\n"Final_conclusion": "f"\n'
    bare = "Text_analysis: a b\nImage_analysis: c d\nConflict_resolution: e\nFinal_conclusion: f\nPrediction: negative"
    shapes = [
        ("positive", sections + '"Prediction": "positive"'),
        ("positive", bare),  # wrong
        ("neutral", f'```json\n{sections}"Prediction": "neutral"\n```'),
        ("negative", sections + '"Prediction": "negative", because the driver shouts at the bank.'),
        ("neutral", "It is a plain photo, so I would call it neutral."),  # no sections
        ("negative", '"Prediction": "negative"'),  # no sections, and a label
        ("positive", sections + '"Prediction": "mixed"'),  # none of the three labels
    ]
    s = Store(str(tmp_path / "root"))
    manifest, _ = import_posts(s, "shapes", "mulcot-json", str(_json_of(tmp_path / "answers.json", shapes)), contract=CONTRACT)
    assert manifest.rows == 7
    _, imported, _ = _evaluate(s, posts="shapes", answers="shapes", answers_kind="rationales", split=None)

    # The same answers from a model's mouth: `label --mode generate`.
    rows: list[Prediction] = []
    rejects: list[Reject] = []
    for r, (_, cot) in zip(read_rows(s, manifest), shapes, strict=True):
        spec = EngineSpec("fake", "fake", CONTRACT, "float32", 4096, 42, "cpu", EngineRuntime(), "scripted", script=lambda m, s, cot=cot: cot)
        try:
            rows.append(asyncio.run(LabelWork(CONTRACT, "generate", 200, 42, "m")(open_engine(spec), from_row(Post, r), None)))
        except RowFault as f:
            rejects.append(Reject(r["post_id"], "label", f.reason, f.detail, f.raw))
    _publish(s, "predictions", "said", rows, rejects)
    _, said, _ = _evaluate(s, "said", posts="shapes", answers="said", split=None)

    for report in (imported, said):
        assert report["counts"] == {"gold": 7, "answered": 4, "rejected": 3, "missing": 0}
        assert report["rejects_by_reason"] == {"answer_unparsed": 2, "sections_missing": 1}
        assert report["labels"]["confusion"] == [[1, 0, 0, 1], [0, 1, 0, 1], [1, 0, 1, 1]]
        assert report["labels"]["accuracy"] == 3 / 7
        assert report["form"]["format_valid"] == 4 / 7 and report["rationales"]["texts"] == 4
    assert said["predictions"]["consistency"] == 1.0


@pytest.mark.skipif(not (DATA / "t15" / "val_rationales.json").exists(), reason="the Twitter-2015 rationales are not here (MULCOT_DATA)")
def test_real_rationales_score_as_the_libraries_called_by_hand(tmp_path: Path) -> None:
    """Labels: all 1,122 imported answers. Rationales: 120 of them against those of other posts, so that no score is 1."""
    import sacrebleu
    from nltk.translate.meteor_score import meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sklearn.metrics import accuracy_score, f1_score

    from mulcot_ray.evaluation.metrics import _wordnet

    s = Store(str(tmp_path))
    import_posts(s, "t15", "mulcot-json", str(DATA / "t15" / "val_rationales.json"), contract=CONTRACT)
    gold = {r["post_id"]: r["label"] for r in read_rows(s, need(s, "posts", "t15"))}
    told = [from_row(Rationale, r) for r in read_rows(s, need(s, "rationales", "t15"))]
    _, report, _ = _evaluate(s, posts="t15", answers="t15", answers_kind="rationales", split=None)
    said = {r.post_id: str(r.prediction) for r in told}
    y, z = list(gold.values()), [said.get(p, "none") for p in gold]
    names = list(LABELS)
    assert report["labels"]["accuracy"] == accuracy_score(y, z)
    assert report["labels"]["macro_f1"] == f1_score(y, z, labels=names, average="macro")
    assert report["labels"]["weighted_f1"] == f1_score(y, z, labels=names, average="weighted")
    tokens = [t.lower() for r in told for t in words("\n".join(_sections_of(r).values()))]
    assert report["rationales"]["distinct_1"] == len(set(tokens)) / len(tokens)

    references = told[:120]
    answers = [dataclasses.replace(x, post_id=r.post_id) for r, x in zip(references, told[1:121], strict=True)]
    for name, rows in (("references", references), ("answers", answers)):
        _publish(s, "rationales", name, rows)
    _, report, _ = _evaluate(s, "r", posts="t15", answers="answers", answers_kind="rationales", references="references", split=None, scores=CHEAP)
    r, p = (["\n".join(_sections_of(x).values()) for x in xs] for xs in (references, answers))
    rouge = RougeScorer(["rougeL"])
    found = report["rationales"]
    assert found["pairs"] == 120 and report["references_label_conditioned"]
    assert found["bleu"] == sacrebleu.corpus_bleu(p, [r]).score
    assert found["rouge_l"] == pytest.approx(sum(rouge.score(a, b)["rougeL"].fmeasure for a, b in zip(r, p, strict=True)) / 120, abs=1e-14)
    by_hand = [meteor_score([words(a)], words(b), wordnet=_wordnet()) for a, b in zip(r, p, strict=True)]
    assert found["meteor"] == pytest.approx(sum(by_hand) / 120, abs=1e-14)


# --- gold stays out of prompts ---------------------------------------------------------------------------------------

CANARIES = {NEG: "zq-canary-neg", NEU: "zq-canary-neu", POS: "zq-canary-pos"}
CANARY = Contract.model_validate(CONTRACT.model_dump() | {"name": "canary", "label_words": CANARIES})


class Recorder:
    """A real engine that remembers every message that it is asked with."""

    def __init__(self) -> None:
        word = CANARIES[NEU]
        lines = "\n".join(f'"{s.capitalize()}": "x"' for s in SECTIONS)
        spec = EngineSpec(
            "fake", "fake", CANARY, "float32", 4096, 42, "cpu", EngineRuntime(), "scripted", script=lambda m, s: f'{lines}\n"Prediction": "{word}"'
        )
        self.engine, self.seen = open_engine(spec), list[str]()

    async def generate(self, messages: Messages, image: Any, sampling: Sampling) -> Completion:
        self.seen.append(json.dumps(messages))
        return await self.engine.generate(messages, image, sampling)

    async def score(self, messages: Messages, image: Any, written: str = "") -> Any:
        self.seen.append(json.dumps(messages) + written)
        return await self.engine.score(messages, image, written)

    def check(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize("mode", ["score", "explain", "generate"])
@pytest.mark.parametrize("aspect", ["the Old Mill", None])
def test_gold_is_in_no_prompt_of_the_labeler_and_the_endpoint(mode: Any, aspect: str | None) -> None:
    """LabelWork asks for both (and so for what is evaluated): its prompts are the same whatever the gold label, and no gold word is in them."""
    work = LabelWork(CANARY, mode, 200, 42, "m")
    prompts = set()
    for label in (*LABELS, None):
        engine = Recorder()
        meta = {"label": CANARIES[label], "text_sentiment": CANARIES[label]} if label else {}
        post = Post("same", "same", "a text about it", aspect, label=label, split=Split.TEST, meta=meta)
        answer = asyncio.run(work(engine, post, None))
        assert answer.label is NEU and engine.seen
        assert not any(word in seen for word in (*CANARIES.values(), "zq-") for seen in engine.seen)
        prompts.add(tuple(engine.seen))
    assert len(prompts) == 1


def test_gold_enters_by_the_explain_prompt_alone() -> None:
    post = Post("p", "p", "a text", "it", label=POS, split=Split.TEST)
    for task in set(Task) - {Task.EXPLAIN}:
        assert "zq-" not in json.dumps(CANARY.messages(task, post))
        with pytest.raises(ValueError, match="nowhere else"):
            CANARY.messages(task, post, POS)
    assert CANARIES[POS] in json.dumps(CANARY.messages(Task.EXPLAIN, post, POS)), "the canary would be seen"


@pytest.mark.parametrize("split", [Split.VALIDATION, Split.TEST])
def test_the_teacher_explains_no_gold_of_posts_that_models_are_judged_on(corpus: Store, split: Split) -> None:
    with pytest.raises(ConfigError, match=str(split)):
        teach(corpus, "told", posts="p", recipe=RECIPE, runtime=RUNTIME, split=split, progress=lambda *_: None)
    assert find(corpus, "rationales", "told") is None
