"""The evaluate stage over hand-made tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mulcot_ray.artifacts import Run, begin, find, need
from mulcot_ray.errors import ArtifactMissing, ConfigError, InputError, RecipeChanged
from mulcot_ray.evaluation.evaluate import evaluate
from mulcot_ray.evaluation.show import show
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import Post, Prediction, Rationale, Reason, Reject, Sentiment, Source, Split, to_table
from mulcot_ray.storage import Store

NEG, NEU, POS = Sentiment.NEGATIVE, Sentiment.NEUTRAL, Sentiment.POSITIVE
CONTRACT = load_recipe("tiny").contract
GOLD = {"a": POS, "b": NEG, "c": NEU, "d": POS, "e": NEG}


def _publish(store: Store, kind: Any, name: str, rows: list[Any], rejects: list[Reject] | None = None) -> None:
    rejects = rejects or []
    run = begin(store, kind, name, {"stage": "by hand", "rows": [r.post_id for r in rows]})
    assert isinstance(run, Run)
    with run:
        types = {"posts": Post, "predictions": Prediction, "rationales": Rationale}
        run.write_table("part-00000", to_table(types[kind], rows))
        if rejects:
            run.write_table("part-00000", to_table(Reject, rejects), rejects=True)
        run.commit(len(rows) + len(rejects))


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
    return evaluate(store, name, **{**settings, "contract": CONTRACT, **changes})


def test_unanswered_posts_are_wrong(store: Store) -> None:
    manifest, report, fresh = _evaluate(store)
    assert fresh
    assert report["counts"] == {"gold": 5, "answered": 3, "rejected": 1, "missing": 1}
    assert report["rejects_by_reason"] == {"image_unreadable": 1}
    assert report["labels"]["accuracy"] == 2 / 5
    assert report["labels"]["confusion"] == [[0, 0, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]]
    assert report["predictions"] == {"label_mass": pytest.approx(0.8), "stated": 2, "consistency": 0.5, "rationale_faults": pytest.approx(1 / 3)}
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
    assert report["rationales"] == {"pairs": 0}
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
    assert "0.4000" in text and "METEOR" in text and "image_unreadable" in text and "gold label in view" in text
