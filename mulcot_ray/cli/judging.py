"""What is looked at before and after: plan, doctor, evaluate, compare, faithfulness, sweep."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from mulcot_ray.cli.common import (
    LabelMode,
    Mode,
    Name,
    Posts,
    Prices,
    RecipeOption,
    Role,
    RoleOption,
    Root,
    RuntimeOption,
    SplitOption,
    answers_of,
    app,
    default_name,
    done,
    failed,
    split_of,
    stage,
)
from mulcot_ray.console import console, rows
from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Split


class PlanStage(StrEnum):
    TEACH = "teach"
    AUGMENT = "augment"
    LABEL = "label"


def _result(what: PlanStage, posts: str, model: str | None) -> str:
    """The name that the stage would give its result."""
    if what is PlanStage.LABEL:
        return default_name(posts, model or "")
    return f"{posts}.teacher" if what is PlanStage.TEACH else f"{posts}.augmented"


@app.command()
def plan(
    posts: Posts,
    what: Annotated[PlanStage, typer.Option("--stage", help="Which stage to plan.")] = PlanStage.TEACH,
    model: Annotated[str | None, typer.Option("--model", help="For augment and label; teach takes the recipe's teacher.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
    mode: Mode = LabelMode.SCORE,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Rows to look at, spread over the table.")] = 200,
    shown: Annotated[int, typer.Option("--shown", min=0, help="Prompts to show whole.")] = 1,
    prices: Prices = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:  # fmt: skip
    """Counts, real prompts, token lengths, time and cost of a stage, before anything is spent. Starts nothing and writes nothing."""
    from mulcot_ray.plan import plan as run
    from mulcot_ray.plan_table import show
    from mulcot_ray.prices import load_prices

    r, t = load_recipe(recipe), load_runtime(runtime)
    chosen = split or (Split.TRAIN if what is not PlanStage.LABEL else None)
    with stage(root, f"plan-{posts}") as store:
        made = run(
            store, r, t, stage=what.value, posts=posts, name=name or _result(what, posts, model), model=model, split=chosen, mode=mode.value, sample=sample,
            shown=shown, prices=load_prices(prices) if prices else None,
        )  # fmt: skip
    if as_json:
        print(made.as_json())
        return
    console.print(show(made))
    console.print("Nothing was started or written.")


@app.command()
def doctor(
    posts: Annotated[str | None, typer.Option("--posts", help="Look at these posts instead of the sample corpus.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop",
    parity: Annotated[int, typer.Option("--parity", min=0, help="Posts that transformers and vLLM must agree on; 0 loads no model.")] = 8,
    roles: Annotated[list[Role] | None, typer.Option("--role", help="Only these roles; repeat for several.")] = None,
    ask: Annotated[bool, typer.Option("--ask", help="Allow one request of one token to each endpoint.")] = False,
    prices: Prices = None,
) -> None:  # fmt: skip
    """Check everything that can be checked before anything is spent: models, contract, vocabularies, memory, storage, machines."""
    from mulcot_ray import doctor as d
    from mulcot_ray.prices import load_prices

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, "doctor") as store:
        checks = d.doctor(
            store, r, t, posts=posts, parity=parity, roles=[x.value for x in roles or list(Role)], ask=ask, prices=load_prices(prices) if prices else None,
            say=lambda c: console.print(d.line(c), soft_wrap=True),
        )  # fmt: skip
    if d.failed(checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    answers: Annotated[str | None, typer.Option("--answers", help="Predictions or rationales that exist, by name.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Or a model: its answers are made first, with `label --mode explain`.")] = None,
    posts: Annotated[str | None, typer.Option("--posts", help="Posts with gold labels; with --answers, those that they were made for.")] = None,
    references: Annotated[str | None, typer.Option("--references", help="Rationale table to compare rationales with.")] = None,
    calibrate_on: Annotated[str | None, typer.Option("--calibrate-on", help="The same model's predictions over validation posts: fit a temperature there. Without, that of the model's folder is judged.")] = None,
    duplicates: Annotated[str | None, typer.Option("--duplicates", help="A table of `mulcot duplicates`, for a slice of its own.")] = None,
    teacher: Annotated[str | None, typer.Option("--teacher", help="Rationales or predictions to show beside the model's own; without, the references.")] = None,
    faithful: Annotated[str | None, typer.Option("--faithfulness", help="An evaluation by `mulcot faithfulness`, to show in the report.")] = None,
    slices: Annotated[list[str] | None, typer.Option("--slice", help="A key of the posts' meta to slice by; repeat for several.")] = None,
    scores: Annotated[str | None, typer.Option("--scores", help="Of bleu,meteor,rouge_l,embedding_similarity; all if not given. Embeddings take 20 to 90 ms a text.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
    mode: Mode = LabelMode.EXPLAIN,
    role: RoleOption = Role.STUDENT,
) -> None:  # fmt: skip
    """Score answers against gold: accuracy, weighted and macro F1, confusion; for rationales BLEU, METEOR, ROUGE-L, similarity, Distinct-1/2."""
    from mulcot_ray.evaluation.evaluate import evaluate as run
    from mulcot_ray.evaluation.metrics import SCORES
    from mulcot_ray.evaluation.pages import load_faithfulness, model_files
    from mulcot_ray.evaluation.show import show
    from mulcot_ray.labeling.label import label as make

    if (answers is None) == (model is None) or (model is not None and posts is None):
        raise failed(ConfigError("give --answers NAME, or --model NAME with --posts NAME"))
    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"evaluate-{name or answers or 'model'}") as store:
        if model is not None and posts is not None:
            answers = default_name(posts, model) + ("" if split is None else f".{split}")
            with rows("label") as progress:
                manifest, fresh = make(
                    store, answers, posts=posts, model=model, recipe=r, runtime=t, mode=mode.value, split=split, role=role.value, progress=progress
                )
            done(store, manifest, fresh)
        assert answers is not None
        table, source = answers_of(store, answers, posts)
        with rows("evaluate") as progress:
            manifest, report, fresh = run(
                store, name or answers, posts=source, answers=answers, answers_kind=table.kind, references=references,  # type: ignore[arg-type, misc]
                split=split or split_of(table), contract=r.contract, runtime=t, calibration=calibrate_on, duplicates=duplicates,
                slices=tuple(slices or ("relation",)), scores=SCORES if scores is None else tuple(x for x in scores.split(",") if x),  # type: ignore[arg-type, misc]
                progress=progress,
                pages=partial(model_files, teacher=teacher, faithfulness=load_faithfulness(store, faithful) if faithful else None),
            )  # fmt: skip
    console.print(show(report))
    done(store, manifest, fresh)
    console.print(f"  for people: {store.root}/evaluations/{manifest.name}/report.html", soft_wrap=True)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Predictions or rationales, by name.")],
    b: Annotated[str, typer.Argument(help="The other ones.")],
    posts: Annotated[str | None, typer.Option("--posts", help="The posts that both were made for.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
) -> None:  # fmt: skip
    """Two models over the same posts: difference with interval, McNemar's test, where they disagree. Works without gold, too."""
    from mulcot_ray.evaluation.compare import compare as run
    from mulcot_ray.evaluation.pages import compare_files
    from mulcot_ray.evaluation.show import show_comparison

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"compare-{name or a}") as store:
        table, source = answers_of(store, a, posts)
        with rows("compare") as progress:
            manifest, report, fresh = run(
                store, name or f"{a}.against.{b}", posts=source, a=a, b=b, split=split or split_of(table), contract=r.contract, runtime=t,
                progress=progress, pages=compare_files,
            )  # fmt: skip
    console.print(show_comparison(report))
    done(store, manifest, fresh)
    console.print(f"  for people: {store.root}/evaluations/{manifest.name}/report.html", soft_wrap=True)


@app.command()
def faithfulness(
    posts: Posts,
    model: Annotated[str, typer.Option("--model", help="`builtin:teacher`, a model folder, or a trained model's name.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
    split: Annotated[Split, typer.Option("--split", help="Posts to ask about.")] = Split.TEST,
    limit: Annotated[int, typer.Option("--limit", min=2, help="So many posts at most, drawn by a seed.")] = 500,
    mode: Mode = LabelMode.EXPLAIN, role: RoleOption = Role.STUDENT,
) -> None:  # fmt: skip
    """Does the label follow from what the model saw and wrote? Pictures, texts and rationales are exchanged between posts."""
    from mulcot_ray.evaluation.faithfulness import faithfulness as run
    from mulcot_ray.evaluation.faithfulness_measures import show

    if mode is LabelMode.SCORE:
        raise failed(ConfigError("--mode score writes no rationale; explain or generate is wanted"))
    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"faithfulness-{name or posts}") as store, rows("faithfulness") as progress:
        manifest, report, fresh = run(
            store, name or f"{default_name(posts, model)}.faithful", posts=posts, model=model, recipe=r, runtime=t, split=split, limit=limit,
            progress=progress, role=role.value, mode="explain" if mode is LabelMode.EXPLAIN else "generate",
        )  # fmt: skip
    console.print(show(report))
    done(store, manifest, fresh)


@app.command()
def sweep(
    file: Annotated[str, typer.Argument(help="`ablation`, or a YAML file with variants and seeds.")] = "ablation",
    root: Root = "runs", runtime: RuntimeOption = "laptop", name: Name = None,
    at_once: Annotated[int | None, typer.Option("--at-once", min=1, help="Steps that run side by side.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run and what is there, and stop.")] = False,
) -> None:  # fmt: skip
    """Every variant of a recipe with every seed, as a table with intervals. What variants share is made once."""
    from mulcot_ray.evaluation.ablation import show
    from mulcot_ray.sweep import load_sweep, run_sweep
    from mulcot_ray.sweep import show_plan as show_steps

    settings, called = load_sweep(file), name or Path(file).stem
    with stage(root, f"sweep-{called}") as store:
        if dry_run:
            return console.print(show_steps(store, settings))
        manifest, report, fresh = run_sweep(
            store, called, sweep=settings, runtime=load_runtime(runtime), at_once=at_once, note=lambda line: console.print(line, markup=False, soft_wrap=True)
        )  # fmt: skip
    console.print(show(report))
    if manifest is None:
        raise failed(TrainingError(f"{len(report['failed'])} combinations failed; the same command again does what is missing"))
    done(store, manifest, fresh)
