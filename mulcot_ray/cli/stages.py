"""The stages: what makes tables and models, and serves them."""

from __future__ import annotations

import itertools
from enum import StrEnum
from typing import Annotated, Any

import typer

from mulcot_ray.artifacts import need
from mulcot_ray.cli.common import (
    DryRun,
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
    app,
    default_name,
    done,
    failed,
    show_plan,
    stage,
)
from mulcot_ray.cli.nights import Budget, Deadline, Images, Settings, one_night, pace_of
from mulcot_ray.console import console, counter, rows, training
from mulcot_ray.engines.work import Explain
from mulcot_ray.errors import ConfigError
from mulcot_ray.recipe import load_recipe, load_runtime, load_settings
from mulcot_ray.records import Sentiment, Split


class Format(StrEnum):
    TOMBERT = "tombert"
    MULCOT_JSON = "mulcot-json"
    MVSA = "mvsa"
    JSONL = "jsonl"
    PARQUET = "parquet"


@app.command()
def demo(
    root: Root = "runs/demo", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop",
    posts: Annotated[int, typer.Option("--posts", min=48, help="Training posts of the sample corpus.")] = 960,
) -> None:  # fmt: skip
    """Run the whole way on the sample corpus and write report.html and summary.json under --root."""
    from mulcot_ray.demo import run_demo

    with stage(root, "demo") as store:
        run_demo(store, load_recipe(recipe), load_runtime(runtime), posts)


@app.command("import")
def import_(
    path: Annotated[str, typer.Argument(help="The file or folder to read (or s3://… for jsonl and parquet).")],
    format: Annotated[Format, typer.Option("--format", help="Layout of the source.")],
    name: Annotated[str, typer.Option("--name", help="Name of the posts table.")],
    root: Root = "runs",
    recipe: RecipeOption = "tiny",
    images: Annotated[str | None, typer.Option("--images", help="Folder (or s3:// prefix) that image names are relative to.")] = None,
    split: SplitOption = None,
    ratios: Annotated[str | None, typer.Option("--ratios", help="Make a grouped split, e.g. 8:1:1 for train:validation:test.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of --ratios.")] = 42,
    embed_images: Annotated[bool, typer.Option("--embed-images", help="Copy the image bytes into the table, instead of referring to them.")] = False,
    model: Annotated[str, typer.Option("--model", help="Who wrote the rationales of a mulcot-json file.")] = "imported",
) -> None:
    """Read posts (and, from mulcot-json, rationales). What can't be read becomes a reject with its reason."""
    from mulcot_ray.posts.importing import import_posts

    contract = load_recipe(recipe).contract
    with stage(root, f"import-{name}") as store, counter(f"import {name}") as progress:
        manifest, fresh = import_posts(
            store, name, format.value, path, contract=contract, images=images, split=split, ratios=_ratios(ratios), seed=seed,
            embed_images=embed_images, model=model, progress=progress,
        )  # fmt: skip
    done(store, manifest, fresh)
    if format is Format.MULCOT_JSON:
        done(store, need(store, "rationales", name), fresh)


@app.command()
def duplicates(
    posts: Posts, root: Root = "runs", runtime: RuntimeOption = "laptop", name: Name = None,
    text_similarity: Annotated[float, typer.Option("--text-similarity", help="Share of MinHash values that must agree.")] = 0.85,
    image_distance: Annotated[int, typer.Option("--image-distance", help="Bits of the 64-bit perceptual hash that may differ.")] = 4,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Only posts with the same text, aspect and picture.")] = False,
) -> None:  # fmt: skip
    """Find exact and near duplicates, for `teach --duplicates` and `evaluate --duplicates`; report gold labels that conflict."""
    from mulcot_ray.posts.duplicates import conflicts
    from mulcot_ray.posts.duplicates import duplicates as run

    with stage(root, f"duplicates-{name or posts}") as store:
        with rows("duplicates") as progress:
            manifest, fresh = run(
                store, name or posts, posts=posts, runtime=load_runtime(runtime), text_similarity=text_similarity, image_distance=image_distance,
                exact_only=exact_only, progress=progress,
            )  # fmt: skip
        done(store, manifest, fresh)
        for d in itertools.islice(conflicts(store, manifest), 10):
            console.print(f"  gold conflict: {d.post_id} is {d.label}, {d.representative} is {d.rep_label} ({d.kind})", markup=False, soft_wrap=True)


@app.command()
def teach(
    posts: Posts, root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
    split: Annotated[Split, typer.Option("--split", help="Posts to teach on; validation and test are refused, since gold is shown.")] = Split.TRAIN,
    retry_rejects: Annotated[str | None, typer.Option("--retry-rejects", help="An earlier table: keep its rows, ask again for its rejects alone.")] = None,
    duplicates: Annotated[str | None, typer.Option("--duplicates", help="A table of `mulcot duplicates`: a duplicate gets its representative's rationale.")] = None,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """The teacher writes rationales over labelled posts (predict, and where that misses the gold label, explain)."""
    from mulcot_ray.teaching.teach import teach as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"teach-{name or posts}") as store:
        if dry_run:
            return show_plan(store, r, t, "teach", posts, name or f"{posts}.teacher", split=split)
        target = name or (f"{posts}.teacher" if retry_rejects is None else f"{retry_rejects}.retried")
        with rows("teach") as progress:
            manifest, fresh = run(
                store, target, posts=posts, recipe=r, runtime=t, split=split, retry_rejects=retry_rejects, duplicates=duplicates, progress=progress
            )
    done(store, manifest, fresh)
    if manifest.rejects:
        console.print(f"  its rejects can be asked again: mulcot teach --posts {posts} --retry-rejects {manifest.name}", soft_wrap=True)


@app.command()
def assistant(
    posts: Posts,
    rationales: Annotated[list[str], typer.Option("--rationales", help="Rationale tables to learn from; repeat for several.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
) -> None:  # fmt: skip
    """Train the assistant on labels and rationales (L_cls + L_rea)."""
    from mulcot_ray.training.stages import assistant as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"assistant-{name or posts}") as store, training("assistant") as progress:
        manifest, fresh = run(store, name or f"{posts}.assistant", posts=posts, rationales=rationales, recipe=r, runtime=t, progress=progress)
    done(store, manifest, fresh)


@app.command()
def augment(
    posts: Posts,
    model: Annotated[str, typer.Option("--model", help="The trained assistant.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
    split: Annotated[Split, typer.Option("--split", help="Posts to reason over.")] = Split.TRAIN,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """The assistant reasons over the training posts; what ends on the gold label is kept."""
    from mulcot_ray.teaching.augment import augment as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"augment-{name or posts}") as store:
        if dry_run:
            return show_plan(store, r, t, "augment", posts, name or f"{posts}.augmented", model=model, split=split)
        with rows("augment") as progress:
            manifest, fresh = run(store, name or f"{posts}.augmented", posts=posts, model=model, recipe=r, runtime=t, split=split, progress=progress)
    done(store, manifest, fresh)


@app.command()
def soften(
    posts: Posts,
    rationales: Annotated[list[str], typer.Option("--rationales", help="The rationale tables that the student will learn from; repeat for several.")],
    assistant: Annotated[str, typer.Option("--assistant", help="The trained assistant.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
) -> None:  # fmt: skip
    """Write the assistant's soft labels once, to train from without it (a recipe with `distill: {soft_labels: cached}` does so by itself)."""
    from mulcot_ray.training.soften import soften as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with stage(root, f"soften-{name or posts}") as store, rows("soften") as progress:
        manifest, fresh = run(
            store, name or f"{posts}.soft", posts=posts, rationales=rationales, assistant=assistant, recipe=r, runtime=t, progress=progress
        )
    done(store, manifest, fresh)


@app.command()
def student(
    posts: Posts,
    rationales: Annotated[list[str] | None, typer.Option("--rationales", help="Rationale tables to learn from; repeat for several.")] = None,
    assistant: Annotated[str | None, typer.Option("--assistant", help="The trained assistant, for its soft labels.")] = None,
    labels_only: Annotated[bool, typer.Option("--labels-only", help="The baseline: no rationales, no assistant.")] = False,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
) -> None:  # fmt: skip
    """Train the student on labels, rationales and the assistant's soft labels (hard + T²·soft)."""
    from mulcot_ray.training import stages

    r, t = load_recipe(recipe), load_runtime(runtime)
    if labels_only == bool(rationales or assistant):
        raise failed(ConfigError("give --rationales and --assistant, or --labels-only"))
    if not labels_only and not (rationales and assistant):
        raise failed(ConfigError("the student needs both --rationales and --assistant (or --labels-only)"))
    with stage(root, f"student-{name or posts}") as store, training("student") as progress:
        common: dict[str, Any] = dict(posts=posts, recipe=r, runtime=t, progress=progress)
        if labels_only:
            manifest, fresh = stages.labels_only(store, name or f"{posts}.labels-only", **common)
        else:
            manifest, fresh = stages.student(store, name or f"{posts}.student", rationales=rationales or [], assistant=assistant or "", **common)
    done(store, manifest, fresh)


@app.command()
def label(
    model: Annotated[str, typer.Option("--model", help="`builtin:student`, a model folder, or a trained model's name.")],
    posts: Annotated[str | None, typer.Option("--posts", help="Name of an imported posts table.")] = None,
    input: Annotated[str | None, typer.Option("--input", help="In place of --posts: one dt=YYYY-MM-DD partition of a dump, as `mulcot nightly` labels it, not published.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
    mode: Mode = LabelMode.SCORE,
    role: RoleOption = Role.STUDENT,
    dry_run: DryRun = False,
    date: Annotated[str | None, typer.Option("--date", help="--input: the night's date, where the folder does not say it.")] = None,
    images: Images = None, settings: Settings = "default", deadline: Deadline = None, budget: Budget = None, prices: Prices = None,
    explain_share: Annotated[float | None, typer.Option("--explain-share", min=0, max=1, help="--input: rationales for this share of the posts.")] = None,
    explain_labels: Annotated[list[Sentiment] | None, typer.Option("--explain-label", help="--input: rationales for posts with this label; repeat for several.")] = None,
) -> None:  # fmt: skip
    """Label posts in bulk, every row accounted for: an imported table (--posts), or a partition of a dump (--input)."""
    from mulcot_ray.labeling.label import label as run
    from mulcot_ray.labeling.version import NightSettings

    r, t = load_recipe(recipe), load_runtime(runtime)
    if (posts is None) == (input is None):
        raise failed(ConfigError("either --posts (an imported table) or --input (a partition of a dump) is wanted"))
    if input is not None:
        s = load_settings(NightSettings, settings, "nights")
        if explain_share is not None or explain_labels or mode is LabelMode.EXPLAIN:
            share = 1.0 if mode is LabelMode.EXPLAIN else explain_share or 0.0
            s = s.model_copy(update={"explain": Explain(share=share, labels=tuple(explain_labels or ()))})
        with stage(root, "label-night") as store:
            return one_night(store, input, date, model, r, t, images, s, pace_of(deadline, budget, s.late, prices))
    assert posts is not None
    with stage(root, f"label-{name or posts}") as store:
        if dry_run:
            return show_plan(
                store, r, t, "label", posts, name or default_name(posts, model), model=model, split=split, mode=mode.value, role=role.value
            )
        with rows("label") as progress:
            manifest, fresh = run(
                store, name or default_name(posts, model), posts=posts, model=model, recipe=r, runtime=t, mode=mode.value, split=split,
                role=role.value, progress=progress,
            )  # fmt: skip
    done(store, manifest, fresh)


@app.command()
def serve(
    model: Annotated[str, typer.Option("--model", help="`builtin:student`, a model folder, or a trained model's name.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Take requests without a token; on loopback only.")] = False,
) -> None:  # fmt: skip
    """Serve a model over HTTP: POST /v1/sentiment. Tokens come from MULCOT_TOKENS or MULCOT_TOKENS_FILE; else one is made and shown."""
    from mulcot_ray.serving.run import serve_model

    with stage(root, "serve") as store:
        serve_model(store, model, load_recipe(recipe), load_runtime(runtime), host=host, port=port, auth=not no_auth)


def _ratios(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        a, b, c = (int(x) for x in text.split(":"))
        if min(a, b, c) < 0 or a + b + c == 0:
            raise ValueError
    except ValueError:
        raise ConfigError(f"--ratios {text!r}: three whole numbers are wanted, train:validation:test, e.g. 8:1:1") from None
    return a, b, c
