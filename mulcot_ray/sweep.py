"""Ablations and seeds as one command: every variant of a recipe with every seed, and a table of means with their intervals.

A combination of variant and seed is a chain of steps, each one stage. A step's name is made of a digest of what decides its result, so steps
that combinations share are one step, done once and found by the next sweep too. The teacher writes with the seed of the recipe, whatever
the sweep's seeds are: they vary what the assistant and the student make of its rationales, and the intervals are over that.

Steps run as Ray tasks, several at once, none twice. A step that fails takes those with it that need it; the others go on, and the same
command again does what is missing.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator
from rich.console import RenderableType
from rich.table import Table

from mulcot_ray.artifacts import Kind, Manifest, begin, find, need, resolve_model
from mulcot_ray.cluster import own_error, session
from mulcot_ray.errors import ConfigError
from mulcot_ray.evaluation.ablation import as_csv, summarise
from mulcot_ray.evaluation.evaluate import load_report
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.prompts import Frozen, digest
from mulcot_ray.recipe import HERE, Recipe, Runtime, load_recipe, model_folder
from mulcot_ray.records import Split
from mulcot_ray.storage import Store

T = TypeVar("T", bound=Frozen)
Stage = Callable[..., tuple[Any, ...]]  # (store, name, *, recipe, runtime, progress, and the step's inputs) -> (manifest, …, fresh)
Combination = tuple[str, int]  # variant and seed
Note = Callable[[str], None]  # a line for a person
KINDS: dict[str, Kind] = {
    "teach": "rationales", "assistant": "models", "augment": "rationales", "student": "models", "labels_only": "models",
    "label": "predictions", "evaluate": "evaluations",
}  # fmt: skip


class Variant(Frozen):
    """How a variant differs from the base recipe: settings over it, and the parts of the method that it goes without."""

    recipe: dict[str, Any] = {}
    labels_only: bool = False  # no teacher, no assistant: the student's base on the labels alone
    no_augment: bool = False  # the teacher's rationales, not the assistant's own
    no_soft_labels: bool = False  # no assistant behind the student's loss, which is lam = 0

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.labels_only and (self.no_augment or self.no_soft_labels):
            raise ValueError("labels_only has neither rationales nor soft labels: no_augment and no_soft_labels say nothing beside it")
        if "seed" in self.recipe:
            raise ValueError("the seeds are the sweep's, not a variant's: list them under `seeds`")
        return self


class Sample(Frozen):
    """Posts of the sample corpus by split."""

    train: int = Field(gt=0)
    validation: int = Field(ge=0)
    test: int = Field(ge=0)


class Sweep(Frozen):
    """A sweep file. The first variant is the one that the others are compared with."""

    recipe: str  # a built-in one or a file
    posts: str
    sample: Sample | None = None  # make `posts` from the sample corpus
    split: Split = Split.TEST
    metrics: tuple[Literal["accuracy", "macro_f1", "weighted_f1"], ...] = Field(("accuracy", "macro_f1"), min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    variants: dict[str, Variant] = Field(min_length=1)

    @model_validator(mode="after")
    def _seeds(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: each once")
        return self


@dataclass(frozen=True)
class Step:
    """One stage of one or several combinations. `needs` are the names of steps, which come before it in a plan."""

    stage: str
    name: str
    recipe: Recipe
    inputs: dict[str, Any]
    needs: tuple[str, ...]

    @property
    def kind(self) -> Kind:
        return KINDS[self.stage]


def load_sweep(name: str) -> Sweep:
    """A built-in sweep by name, or a YAML file. Raises ConfigError with the offending key."""
    path = HERE / "recipes" / "sweeps" / f"{name}.yaml"
    path = path if path.exists() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (HERE / "recipes" / "sweeps").glob("*.yaml")))
        raise ConfigError(f"no sweep {name!r}: neither a file nor one of {known}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    return _valid(Sweep, data, f"sweep {name!r}")


# --- what is to be done ----------------------------------------------------------------------------------------------


def plan(store: Store, sweep: Sweep) -> dict[Combination, list[Step]]:
    """The chain of every combination, seed by seed. Raises ConfigError where a variant's recipe is wrong, ArtifactMissing without posts."""
    base = load_recipe(sweep.recipe)
    posts = find(store, "posts", sweep.posts) if sweep.sample else need(store, "posts", sweep.posts)
    fingerprint = posts.fingerprint if posts else "to be made"
    chains = {}
    for seed in sweep.seeds:
        for name, variant in sweep.variants.items():
            recipe = _valid(Recipe, _over(base.model_dump(mode="json"), variant.recipe), f"variant {name!r}")
            chains[name, seed] = list(_chain(store, sweep, variant, recipe, recipe.model_copy(update={"seed": seed}), fingerprint))
    return chains


def _chain(store: Store, sweep: Sweep, variant: Variant, taught: Recipe, seeded: Recipe, posts: str) -> Iterator[Step]:
    """The steps of one combination, in order."""

    def step(stage: str, recipe: Recipe, decides: Iterable[str], needs: Sequence[Step] = (), **inputs: Any) -> Step:
        settings = recipe.model_dump(mode="json", include={"seed", "dtype", "max_model_len", *decides})
        models = recipe.models
        base = {"teach": models.teacher, "assistant": models.assistant, "student": models.student, "labels_only": models.student}.get(stage)
        facts = [stage, posts, recipe.contract.hash, settings, base and _model(store, base), inputs]
        return Step(
            stage, f"sweep-{stage.replace('_', '-')}-{digest(facts)[:12]}", recipe, {"posts": sweep.posts, **inputs}, tuple(s.name for s in needs)
        )

    if variant.labels_only:
        yield (trained := step("labels_only", seeded, ["student"]))
    else:
        yield (teacher := step("teach", taught, ["teach"]))
        sources, assistant = [teacher], None
        if not (variant.no_augment and variant.no_soft_labels):
            yield (assistant := step("assistant", seeded, ["assistant"], [teacher], rationales=[teacher.name]))
            if not variant.no_augment:
                yield (augmented := step("augment", seeded, ["augment"], [assistant], model=assistant.name))
                sources.append(augmented)
        soft = None if variant.no_soft_labels else assistant
        yield (
            trained := step(
                "student", seeded, ["student", *(["distill"] if soft else [])], [*sources, *([soft] if soft else [])],
                rationales=[s.name for s in sources], assistant=soft.name if soft else None,
            )
        )  # fmt: skip
    yield (labelled := step("label", seeded, [], [trained], model=trained.name, split=sweep.split))
    yield step("evaluate", seeded, [], [labelled], answers=labelled.name, split=sweep.split)


def _model(store: Store, name: str) -> str:
    """What stands for a model in a digest."""
    if name.startswith("endpoint:"):
        return name
    return resolve_model(store, name)[1] if model_folder(name) is not None else need(store, "models", name).fingerprint


# --- doing it --------------------------------------------------------------------------------------------------------


def run_sweep(
    store: Store, name: str, *, sweep: Sweep, runtime: Runtime, note: Note, at_once: int | None = None, stages: Mapping[str, Stage] | None = None
) -> tuple[Manifest | None, dict[str, Any], bool]:
    """Do what is missing, and write evaluations/NAME: report.json and table.csv. Returns the manifest, the report, and whether this call made it.

    Where steps failed, the manifest is None and nothing is written: the report is of what there is, with the errors under `failed`. `at_once`
    None: as many steps as the cluster has room for. `stages` None: the real ones.
    """
    if sweep.sample is not None:
        import_sample(store, sweep.posts, **sweep.sample.model_dump(), seed=load_recipe(sweep.recipe).seed)
    chains = plan(store, sweep)
    steps = list({s.name: s for chain in chains.values() for s in chain}.values())
    todo = [s for s in steps if find(store, s.kind, s.name) is None]
    failed: dict[str, str] = {}
    note(f"{len(chains)} combinations, {len(steps)} steps, {len(steps) - len(todo)} there already")
    if todo:
        with session(runtime):
            failed = _work(store, todo, runtime, at_once or places(runtime), stages or real_stages(), note)
    found = {c: find(store, "evaluations", chain[-1].name) for c, chain in chains.items()}
    errors = {_label(c): next(failed[s.name] for s in chain if s.name in failed) for c, chain in chains.items() if found[c] is None}
    report = {
        "stage": "sweep", "recipe": sweep.recipe, "posts": sweep.posts, "split": sweep.split,
        **summarise(list(sweep.variants), sweep.metrics, sweep.seeds, {c: m.stats for c, m in found.items() if m is not None}),
        "steps": {_label(c): {s.stage: s.name for s in chain} for c, chain in chains.items()}, "failed": errors,
    }  # fmt: skip
    if errors:
        return None, report, False
    scored = {_label(c): m.fingerprint for c, m in found.items() if m is not None}
    identity = {"stage": "sweep", "sweep": sweep.model_dump(mode="json"), "evaluations": scored}
    run = begin(store, "evaluations", name, identity)
    if isinstance(run, Manifest):
        return run, load_report(store, name), False
    with run:
        store.create(f"{run.prefix}/report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
        store.create(f"{run.prefix}/table.csv", as_csv(report).encode())
        first = sweep.metrics[0]
        manifest = run.commit(len(chains), stats={v: m[first]["mean"] for v, m in report["variants"].items()})
    return manifest, load_report(store, name), True


def _work(store: Store, steps: Sequence[Step], runtime: Runtime, at_once: int, stages: Mapping[str, Stage], note: Note) -> dict[str, str]:
    """Run the steps as Ray tasks, each when what it needs is there. Returns the errors by step."""
    import ray

    task = ray.remote(num_cpus=0, max_retries=0)(run_step)  # a step starts workers of its own and waits for them
    waiting, running, failed = list(steps), dict[Any, Step](), dict[str, str]()
    while waiting or running:
        unfinished = {s.name for s in (*waiting, *running.values())}
        for s in list(waiting):
            lost = next((n for n in s.needs if n in failed), None)
            if lost is not None:
                failed[s.name] = failed[lost] if failed[lost].startswith("after ") else f"after {lost}: {failed[lost]}"
                waiting.remove(s)
            elif len(running) < at_once and not unfinished & set(s.needs):
                note(f"▸ {s.stage:<11} {s.name}")
                running[task.remote(s, store, runtime, stages)] = s
                waiting.remove(s)
        if running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            s = running.pop(ready)
            try:
                note(f"✓ {s.stage:<11} {s.name}  {ray.get(ready):.0f} s, {len(waiting) + len(running)} to go")
            except Exception as e:  # of any kind: it is shown, and the other steps go on
                cause = getattr(e, "cause", None) or e  # without Ray's traceback
                own = own_error(cause) or cause
                failed[s.name] = f"{type(own).__name__}: {(str(own).strip().splitlines() or [''])[0]}"
                note(f"✗ {s.stage:<11} {s.name}  {failed[s.name]}")
    return failed


def run_step(step: Step, store: Store, runtime: Runtime, stages: Mapping[str, Stage]) -> float:
    """One step. Returns the seconds that it took."""
    started = time.time()
    stages[step.stage](store, step.name, **step.inputs, recipe=step.recipe, runtime=runtime, progress=_silent)
    return time.time() - started


def _silent(*_: Any) -> None:
    """The progress of a step that runs beside others: its end is shown."""


def real_stages() -> dict[str, Stage]:
    from mulcot_ray.evaluation.evaluate import evaluate
    from mulcot_ray.labeling.label import label
    from mulcot_ray.teaching.augment import augment
    from mulcot_ray.teaching.teach import teach
    from mulcot_ray.training import stages

    def student(
        store: Store, name: str, *, posts: str, rationales: list[str], assistant: str | None, recipe: Recipe, runtime: Runtime, progress: Any
    ) -> tuple[Manifest, bool]:
        """Without an assistant: the same two tasks by cross-entropy alone."""
        if assistant is not None:
            return stages.student(
                store, name, posts=posts, rationales=rationales, assistant=assistant, recipe=recipe, runtime=runtime, progress=progress
            )
        return stages.train(store, name, posts, rationales, recipe.models.student, None, recipe.student, stages.BOTH, recipe, runtime, progress)

    def scored(
        store: Store, name: str, *, posts: str, answers: str, split: Split, recipe: Recipe, runtime: Runtime, progress: Any
    ) -> tuple[Manifest, dict[str, Any], bool]:
        return evaluate(
            store, name, posts=posts, answers=answers, answers_kind="predictions", references=None, split=split, contract=recipe.contract,
            runtime=runtime,
        )  # fmt: skip

    return {
        "teach": teach, "assistant": stages.assistant, "augment": augment, "student": student, "labels_only": stages.labels_only, "label": label,
        "evaluate": scored,
    }  # fmt: skip


def places(runtime: Runtime) -> int:
    """How many steps the session has room for; one where there are no more than four CPUs."""
    import ray

    there, engines = ray.cluster_resources(), (runtime.teacher, runtime.assistant, runtime.student)
    cpus = max(runtime.workers[1] * runtime.train_cpus, *(e.cpus for e in engines)) + 1
    room = there.get("CPU", 0) // cpus if there.get("CPU", 0) > 4 else 1
    if runtime.device == "cuda":
        room = min(room, there.get("GPU", 0) // max(runtime.workers[1], *(e.devices for e in engines)))
    return max(1, int(room))


def show_plan(store: Store, sweep: Sweep) -> RenderableType:
    """Every step, for which combinations it is, and whether it is there."""
    users: dict[str, list[str]] = defaultdict(list)
    steps: dict[str, Step] = {}
    for c, chain in plan(store, sweep).items():
        for s in chain:
            users[s.name].append(_label(c))
            steps[s.name] = s
    there = {n for n, s in steps.items() if find(store, s.kind, n) is not None}
    table = Table("stage", "name", "for", "", title=f"{len(steps)} steps, {len(there)} there already")
    for n, s in steps.items():
        table.add_row(s.stage, f"{s.kind}/{n}", ", ".join(users[n]), "[green]there[/]" if n in there else "to do")
    return table


def _label(c: Combination) -> str:
    return f"{c[0]} / {c[1]}"


def _over(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**under, **{k: _over(under[k], v) if isinstance(v, dict) and isinstance(under.get(k), dict) else v for k, v in over.items()}}


def _valid(kind: type[T], data: Any, what: str) -> T:
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        faults = [f"{'.'.join(map(str, x['loc'])) or 'the whole'}: {x['msg']}" for x in e.errors()]
        raise ConfigError(f"{what}: {'; '.join(faults)}") from e
