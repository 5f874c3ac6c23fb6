"""Sweeps: what a file means, which steps are shared, and how they run; on a local Ray with recording fakes in the place of the stages."""

from __future__ import annotations

import csv
import io
import json
import sys
import time
from collections import Counter
from inspect import signature
from typing import Any

import pytest
import yaml
from rich.console import Console

from mulcot_ray.artifacts import Manifest, begin, find, need
from mulcot_ray.errors import ArtifactMissing, ConfigError, TrainingError
from mulcot_ray.evaluation.ablation import as_csv, interval, show, summarise
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.recipe import load_runtime
from mulcot_ray.storage import Store
from mulcot_ray.sweep import KINDS, Sweep, Variant, load_sweep, places, plan, real_stages, run_sweep, show_plan

RUNTIME = load_runtime("laptop")
SHIPPED = load_sweep("ablation")
VARIANTS = {
    "full method": {},
    "no augmentation": {"no_augment": True},
    "no soft labels": {"no_soft_labels": True},
    "labels only": {"labels_only": True},
}
ABLATION = SHIPPED.model_copy(update={"variants": {k: Variant(**v) for k, v in VARIANTS.items()}})
SMALL = ABLATION.model_copy(update={"sample": ABLATION.sample.model_copy(update={"train": 4, "validation": 2, "test": 3})})
T2 = 4.302653  # Student's t, two degrees of freedom, 97.5 %


@pytest.fixture(scope="module", autouse=True)
def _fakes_travel_by_value():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def sweep_file(tmp_path, **settings: Any) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"recipe": "tiny", "posts": "p", "seeds": [1, 2], "variants": {"full": {}}, **settings}))
    return str(path)


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_built_in_ablation():
    """Each variant has one part of the method more than the one before it."""
    assert list(SHIPPED.variants) == ["labels only", "+ rationales", "+ augmentation", "+ soft labels"]
    parts = [{k for k, v in x.model_dump().items() if v is True} for x in SHIPPED.variants.values()]
    assert parts == [{"labels_only"}, {"no_augment", "no_soft_labels"}, {"no_soft_labels"}, set()]
    assert (SHIPPED.recipe, SHIPPED.posts, SHIPPED.seeds, SHIPPED.split) == ("tiny", "sample", (42, 43, 44), "test")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"sedes": [1]}, "sedes: Extra inputs are not permitted"),
        ({"variants": {"a": {"no_agument": True}}}, "variants.a.no_agument: Extra inputs"),
        ({"variants": {}}, "variants: Dictionary should have at least 1 item"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\]: each once"),
        ({"metrics": ["rouge"]}, "metrics.0: Input should be 'accuracy'"),
        ({"variants": {"a": {"labels_only": True, "no_augment": True}}}, "labels_only has neither rationales nor soft labels"),
        ({"variants": {"a": {"recipe": {"seed": 3}}}}, "list them under `seeds`"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path, settings, fault):
    with pytest.raises(ConfigError, match=fault):
        load_sweep(sweep_file(tmp_path, **settings))


def test_other_faults_say_what_would_be_right(tmp_path, store):
    with pytest.raises(ConfigError, match="neither a file nor one of ablation"):
        load_sweep("abaltion")
    (tmp_path / "broken.yaml").write_text("{")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_sweep(str(tmp_path / "broken.yaml"))
    with pytest.raises(ArtifactMissing, match="mulcot import"):
        plan(store, load_sweep(sweep_file(tmp_path)))
    with pytest.raises(ConfigError, match="variant 'wild': student.lr: Input should be a valid number"):
        plan(
            store,
            load_sweep(
                sweep_file(tmp_path, sample={"train": 2, "validation": 0, "test": 0}, variants={"wild": {"recipe": {"student": {"lr": "x"}}}})
            ),
        )


# --- the plan --------------------------------------------------------------------------------------------------------


def test_equal_work_is_one_step(store):
    chains = plan(store, ABLATION)
    steps = {s.name: s for chain in chains.values() for s in chain}
    assert Counter(s.stage for s in steps.values()) == {
        "teach": 1, "assistant": 3, "augment": 3, "student": 9, "labels_only": 3, "label": 12, "evaluate": 12,
    }  # fmt: skip
    assert [s.stage for s in chains["full method", 42]] == ["teach", "assistant", "augment", "student", "label", "evaluate"]
    assert [s.stage for s in chains["labels only", 43]] == ["labels_only", "label", "evaluate"]
    for (_, seed), chain in chains.items():
        before: set[str] = set()
        for s in chain:
            assert set(s.needs) <= before and s.recipe.seed == (42 if s.stage == "teach" else seed)
            before.add(s.name)
    full, bare, hard = (chains[v, 44][-3] for v in ("full method", "no augmentation", "no soft labels"))
    assert len(full.inputs["rationales"]) == 2 == len(hard.inputs["rationales"]) and len(bare.inputs["rationales"]) == 1
    assert full.inputs["assistant"] == bare.inputs["assistant"] is not None and hard.inputs["assistant"] is None
    assert plan(store, ABLATION) == chains


def test_settings_change_the_steps_that_they_decide_and_those_after(store, tmp_path):
    variants: dict[str, Any] = {
        "full": {},
        "lr": {"recipe": {"student": {"lr": 1.0e-3}}}, "words": {"recipe": {"teach": {"max_tokens": 99}}},
        "lam": {"recipe": {"distill": {"lam": 0.5}}}, "hard": {"no_soft_labels": True},
        "hard lam": {"no_soft_labels": True, "recipe": {"distill": {"lam": 0.5}}},
        "teacher alone": {"no_augment": True, "no_soft_labels": True}, "explain": {"recipe": {"explain_tokens": 99}},
    }  # fmt: skip
    sweep = load_sweep(sweep_file(tmp_path, sample={"train": 4, "validation": 0, "test": 4}, variants=variants, seeds=[7]))
    chains = {v: {s.stage: s.name for s in chain} for (v, _), chain in plan(store, sweep).items()}
    same = {v: {k for k in names if names[k] == chains["full"].get(k)} for v, names in chains.items()}
    assert same["lr"] == same["lam"] == same["hard"] == {"teach", "assistant", "augment"} and same["words"] == set()
    assert chains["hard"] == chains["hard lam"] and chains["explain"] == chains["full"]
    assert list(chains["teacher alone"]) == ["teach", "student", "label", "evaluate"]
    import_sample(store, "p", train=4, validation=0, test=4, seed=42)
    assert not {*chains["full"].values()} & {s.name for s in plan(store, sweep)["full", 7]}, "other posts, other names"


def test_every_step_fits_the_stage_that_it_names(store):
    stages = real_stages()
    assert set(stages) == set(KINDS)
    for chain in plan(store, ABLATION).values():
        for s in chain:
            signature(stages[s.stage]).bind(store, s.name, **s.inputs, recipe=s.recipe, runtime=RUNTIME, progress=print)


# --- the runs, with fakes --------------------------------------------------------------------------------------------


def fake_stages(seconds: float = 0.0, broken: str = "") -> dict[str, Any]:
    """Recording fakes: each writes an empty result of the right kind and a line on who made what when. `broken` (a stage, a slash and a seed)
    raises. Accuracy is 0.9, less 0.1 without the assistant's rationales, 0.05 without soft labels and 0.3 with neither; and 0.01 by seed."""

    def stage(what: str) -> Any:
        def fake(store: Store, name: str, *, posts: str, recipe: Any, runtime: Any, progress: Any, **inputs: Any) -> tuple[Any, ...]:
            started = time.time()
            run = begin(store, KINDS[what], name, {"stage": f"fake {what}", "seed": recipe.seed, **inputs})
            assert not isinstance(run, Manifest), "a finished step was run again"
            with run:
                time.sleep(seconds)
                if broken == f"{what}/{recipe.seed}":
                    raise TrainingError("the loss is not finite")
                manifest = run.commit(0, stats=scores(store, inputs, recipe.seed) if what == "evaluate" else {})
            store.create(f"log/{name}", json.dumps([started, time.time()]).encode())
            return (manifest, {}, True) if what == "evaluate" else (manifest, True)

        return fake

    return {what: stage(what) for what in KINDS}


def scores(store: Store, inputs: dict[str, Any], seed: int) -> dict[str, float]:
    model = need(store, "models", need(store, "predictions", inputs["answers"]).identity["model"]).identity
    less = 0.3 if "rationales" not in model else 0.1 * (len(model["rationales"]) < 2) + 0.05 * (model["assistant"] is None)
    return {"accuracy": 0.9 - less + 0.01 * (seed - 43), "macro_f1": 0.5, "gold": 3}


def log(store: Store) -> dict[str, tuple[float, float]]:
    return {name: tuple(json.loads(store.read(f"log/{name}"))) for name in store.files("log")}


@pytest.mark.ray
def test_a_sweep_does_each_step_once_and_in_order(store, ray_session):
    said: list[str] = []
    manifest, report, fresh = run_sweep(store, "ablation", sweep=SMALL, runtime=RUNTIME, note=said.append, at_once=3, stages=fake_stages(0.05))
    chains, ran = plan(store, SMALL), log(store)
    assert fresh and len(ran) == 43 == len({s.name for c in chains.values() for s in c}) and said[0] == "12 combinations, 43 steps, 0 there already"
    for s in (s for chain in chains.values() for s in chain):
        assert all(ran[n][1] <= ran[s.name][0] for n in s.needs), "a step began before what it needs was there"
    beside = [sum(a < end and b > start for a, b in ran.values()) for start, end in ran.values()]
    assert max(sum(a <= start < b for a, b in ran.values()) for start, _ in ran.values()) <= 3 and max(beside) > 1
    rows = report["variants"]
    assert {v: m["accuracy"]["mean"] for v, m in rows.items()} == pytest.approx(
        {"full method": 0.9, "no augmentation": 0.8, "no soft labels": 0.85, "labels only": 0.6}
    )
    full = rows["full method"]["accuracy"]
    assert full["difference"] is None and full["values"] == pytest.approx({"42": 0.89, "43": 0.9, "44": 0.91})
    assert (full["n"], full["sd"]) == (3, pytest.approx(0.01)) and full["high"] - full["mean"] == pytest.approx(T2 * 0.01 / 3**0.5, rel=1e-4)
    gap = rows["labels only"]["accuracy"]["difference"]
    assert gap["mean"] == pytest.approx(-0.3) and gap["sd"] == pytest.approx(0, abs=1e-12) and gap["high"] < 0, "paired: the seeds' spread is out"
    assert manifest.stats == pytest.approx({"full method": 0.9, "no augmentation": 0.8, "no soft labels": 0.85, "labels only": 0.6})
    lines = list(csv.DictReader(io.StringIO(store.read("evaluations/ablation/table.csv").decode())))
    assert len(lines) == 8 and float(lines[2]["difference_mean"]) == pytest.approx(-0.1) and lines[0]["difference_mean"] == ""
    assert [float(lines[6][f"seed_{s}"]) for s in (42, 43, 44)] == pytest.approx([0.59, 0.6, 0.61])

    again, same, fresh = run_sweep(store, "ablation", sweep=SMALL, runtime=RUNTIME, note=said.append, stages=fake_stages())
    assert not fresh and again == manifest and same == report and said[-1] == "12 combinations, 43 steps, 43 there already"
    more = SMALL.model_copy(update={"seeds": (42, 43, 44, 45)})
    _, wider, _ = run_sweep(store, "wider", sweep=more, runtime=RUNTIME, note=said.append, at_once=2, stages=fake_stages())
    assert len(log(store)) == 43 + 14 and wider["variants"]["full method"]["accuracy"]["n"] == 4, "only what the new seed needs"


@pytest.mark.ray
def test_a_failure_takes_what_needs_it_and_no_more(store, ray_session):
    said: list[str] = []
    common: dict[str, Any] = dict(sweep=SMALL, runtime=RUNTIME, note=said.append, at_once=2)
    manifest, report, fresh = run_sweep(store, "ablation", stages=fake_stages(broken="augment/43"), **common)
    assert manifest is None and not fresh and find(store, "evaluations", "ablation") is None
    assert set(report["failed"]) == {"full method / 43", "no soft labels / 43"}
    assert all(why == "TrainingError: the loss is not finite" for why in report["failed"].values())
    assert len(log(store)) == 43 - 1 - 2 * 3 and sum(line.startswith("✗") for line in said) == 1
    full, bare = (report["variants"][v]["accuracy"] for v in ("full method", "no augmentation"))
    assert (full["n"], bare["n"], bare["difference"]["n"]) == (2, 3, 2) and full["mean"] == pytest.approx(0.9)
    console = Console(record=True, width=220, file=io.StringIO())
    console.print(show(report))
    assert "✗ full method / 43: TrainingError: the loss is not finite" in console.export_text()
    before = log(store)
    manifest, report, fresh = run_sweep(store, "ablation", stages=fake_stages(), **common)
    assert fresh and manifest is not None and report["failed"] == {} and report["variants"]["full method"]["accuracy"]["n"] == 3
    assert len(log(store)) == 43 and before.items() <= log(store).items(), "what was there was not done again"


@pytest.mark.ray
def test_the_first_step_of_all_failing_names_itself(store, ray_session):
    _, report, _ = run_sweep(store, "a", sweep=SMALL, runtime=RUNTIME, note=lambda _: None, at_once=1, stages=fake_stages(broken="teach/42"))
    assert len(report["failed"]) == 9 and len(log(store)) == 9 and report["variants"]["full method"]["accuracy"]["mean"] is None
    assert as_csv(report).splitlines()[1].startswith("full method,accuracy,0,,,,,")


@pytest.mark.ray
def test_on_a_small_machine_one_step_at_a_time(ray_session):
    assert places(RUNTIME) == 1


def test_a_dry_run_shows_what_is_there(store):
    def shown() -> str:
        console = Console(record=True, width=250, file=io.StringIO())
        console.print(show_plan(store, SMALL))
        return console.export_text()

    assert "43 steps, 0 there already" in shown() and store.files("") == {}, "nothing is written"
    import_sample(store, "sample", train=4, validation=2, test=3, seed=42)
    first = plan(store, SMALL)["full method", 42][0]
    with begin(store, "rationales", first.name, {}) as run:
        run.commit(0)
    assert "43 steps, 1 there already" in shown() and first.name in shown()


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_intervals_by_students_t():
    assert interval([]) == {"n": 0, "mean": None, "sd": None, "low": None, "high": None}
    assert interval([0.5]) == {"n": 1, "mean": 0.5, "sd": None, "low": None, "high": None}
    x = interval([1.0, 2.0, 3.0])
    assert (x["mean"], x["sd"]) == (2, 1) and x["high"] - 2 == pytest.approx(T2 / 3**0.5, abs=1e-6) == 2 - x["low"]


def test_differences_are_paired_by_seed():
    results = {("a", 1): {"m": 0.5}, ("a", 2): {"m": 0.9}, ("b", 1): {"m": 0.6}, ("b", 2): {"m": 1.0}, ("b", 3): {"m": 0.1}}
    b = summarise(["a", "b"], ["m"], [1, 2, 3], results)["variants"]["b"]["m"]
    assert b["n"] == 3 and b["difference"]["n"] == 2 and b["difference"]["mean"] == pytest.approx(0.1) and b["difference"]["sd"] < 1e-9


def test_a_sweep_is_frozen_settings():
    with pytest.raises(ValueError):
        Sweep.model_validate({"recipe": "tiny"})
