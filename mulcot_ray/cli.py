"""The command line `mulcot`. Each command is one stage: it reads finished results under --root and writes one, or says that it is there."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from mulcot_ray.artifacts import Manifest, need
from mulcot_ray.console import console, counter, log_to, rows, training
from mulcot_ray.errors import ConfigError, MulcotError
from mulcot_ray.recipe import Recipe, Runtime, load_recipe, load_runtime
from mulcot_ray.records import Split
from mulcot_ray.storage import Store

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Distil multimodal sentiment reasoning from a large teacher into a small student, and label posts with it.

The way: **import** → **teach** → **assistant** → **augment** → **student** → **evaluate** → **label** → **serve**.
Start with `mulcot demo`: it runs all of it on a sample corpus, without a GPU.

Every command can be repeated: what is done is skipped, what was interrupted goes on, and a name that was made with other
settings is refused.""",
)


class Format(StrEnum):
    TOMBERT = "tombert"
    MULCOT_JSON = "mulcot-json"
    MVSA = "mvsa"
    JSONL = "jsonl"
    PARQUET = "parquet"


class LabelMode(StrEnum):
    SCORE = "score"
    EXPLAIN = "explain"
    GENERATE = "generate"


class Role(StrEnum):
    TEACHER = "teacher"
    ASSISTANT = "assistant"
    STUDENT = "student"


Root = Annotated[str, typer.Option("--root", envvar="MULCOT_ROOT", help="Where results live: a folder or s3://bucket/prefix.")]
RecipeOption = Annotated[str, typer.Option("--recipe", envvar="MULCOT_RECIPE", help="What changes a result: `tiny`, `paper` or a YAML file.")]
RuntimeOption = Annotated[str, typer.Option("--runtime", envvar="MULCOT_RUNTIME", help="Where it runs: `laptop`, `cluster` or a YAML file.")]
Posts = Annotated[str, typer.Option("--posts", help="Name of an imported posts table.")]
Name = Annotated[str | None, typer.Option("--name", help="Name of the result; derived from the inputs if not given.")]
SplitOption = Annotated[Split | None, typer.Option("--split", help="Only the posts of this split.")]


@app.command()
def demo(
    root: Root = "runs/demo", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop",
    posts: Annotated[int, typer.Option("--posts", min=48, help="Training posts of the sample corpus.")] = 960,
) -> None:  # fmt: skip
    """Run the whole way on the sample corpus and write report.html and summary.json under --root."""
    from mulcot_ray.demo import run_demo

    with _stage(root, "demo") as store:
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
    with _stage(root, f"import-{name}") as store, counter(f"import {name}") as progress:
        manifest, fresh = import_posts(
            store, name, format.value, path, contract=contract, images=images, split=split, ratios=_ratios(ratios), seed=seed,
            embed_images=embed_images, model=model, progress=progress,
        )  # fmt: skip
    _done(store, manifest, fresh)
    if format is Format.MULCOT_JSON:
        _done(store, need(store, "rationales", name), fresh)


@app.command()
def teach(
    posts: Posts, root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
    split: Annotated[Split, typer.Option("--split", help="Posts to teach on; validation and test are refused, since gold is shown.")] = Split.TRAIN,
    retry_rejects: Annotated[str | None, typer.Option("--retry-rejects", help="An earlier table: keep its rows, ask again for its rejects alone.")] = None,
    duplicates: Annotated[str | None, typer.Option("--duplicates", help="A table of `mulcot duplicates`: a duplicate gets its representative's rationale.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked of the model, and stop.")] = False,
) -> None:  # fmt: skip
    """The teacher writes rationales over labelled posts (predict, and where that misses the gold label, explain)."""
    from mulcot_ray.teaching.teach import teach as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with _stage(root, f"teach-{name or posts}") as store:
        if dry_run:
            return _dry_run(store, posts, split, r, t, Role.TEACHER, r.models.teacher)
        target = name or (f"{posts}.teacher" if retry_rejects is None else f"{retry_rejects}.retried")
        with rows("teach") as progress:
            manifest, fresh = run(
                store, target, posts=posts, recipe=r, runtime=t, split=split, retry_rejects=retry_rejects, duplicates=duplicates, progress=progress
            )
    _done(store, manifest, fresh)


@app.command()
def assistant(
    posts: Posts,
    rationales: Annotated[list[str], typer.Option("--rationales", help="Rationale tables to learn from; repeat for several.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
) -> None:  # fmt: skip
    """Train the assistant on labels and rationales (L_cls + L_rea)."""
    from mulcot_ray.training.stages import assistant as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with _stage(root, f"assistant-{name or posts}") as store, training("assistant") as progress:
        manifest, fresh = run(store, name or f"{posts}.assistant", posts=posts, rationales=rationales, recipe=r, runtime=t, progress=progress)
    _done(store, manifest, fresh)


@app.command()
def augment(
    posts: Posts,
    model: Annotated[str, typer.Option("--model", help="The trained assistant.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None,
    split: Annotated[Split, typer.Option("--split", help="Posts to reason over.")] = Split.TRAIN,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked of the model, and stop.")] = False,
) -> None:  # fmt: skip
    """The assistant reasons over the training posts; what ends on the gold label is kept."""
    from mulcot_ray.teaching.augment import augment as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with _stage(root, f"augment-{name or posts}") as store:
        if dry_run:
            return _dry_run(store, posts, split, r, t, Role.ASSISTANT, model)
        with rows("augment") as progress:
            manifest, fresh = run(store, name or f"{posts}.augmented", posts=posts, model=model, recipe=r, runtime=t, split=split, progress=progress)
    _done(store, manifest, fresh)


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
        raise _exit(ConfigError("give --rationales and --assistant, or --labels-only"))
    if not labels_only and not (rationales and assistant):
        raise _exit(ConfigError("the student needs both --rationales and --assistant (or --labels-only)"))
    with _stage(root, f"student-{name or posts}") as store, training("student") as progress:
        common: dict[str, Any] = dict(posts=posts, recipe=r, runtime=t, progress=progress)
        if labels_only:
            manifest, fresh = stages.labels_only(store, name or f"{posts}.labels-only", **common)
        else:
            manifest, fresh = stages.student(store, name or f"{posts}.student", rationales=rationales or [], assistant=assistant or "", **common)
    _done(store, manifest, fresh)


@app.command()
def label(
    posts: Posts,
    model: Annotated[str, typer.Option("--model", help="`builtin:student`, a model folder, or a trained model's name.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
    mode: Annotated[LabelMode, typer.Option("--mode", help="`score`: label and probabilities. `explain`: and a rationale. `generate`: the whole answer is written, as a teacher does.")] = LabelMode.SCORE,
    role: Annotated[Role, typer.Option("--role", help="Whose engine settings of the runtime to use.")] = Role.STUDENT,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be asked of the model, and stop.")] = False,
) -> None:  # fmt: skip
    """Label posts in bulk, every row accounted for."""
    from mulcot_ray.labeling.label import label as run

    r, t = load_recipe(recipe), load_runtime(runtime)
    with _stage(root, f"label-{name or posts}") as store:
        if dry_run:
            return _dry_run(store, posts, split, r, t, role, model)
        with rows("label") as progress:
            manifest, fresh = run(
                store, name or _default(posts, model), posts=posts, model=model, recipe=r, runtime=t, mode=mode.value, split=split,
                role=role.value, progress=progress,
            )  # fmt: skip
    _done(store, manifest, fresh)


@app.command()
def evaluate(
    answers: Annotated[str | None, typer.Option("--answers", help="Predictions or rationales that exist, by name.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="Or a model: its answers are made first, with `label --mode explain`.")] = None,
    posts: Annotated[str | None, typer.Option("--posts", help="Posts with gold labels; with --answers, those that they were made for.")] = None,
    references: Annotated[str | None, typer.Option("--references", help="Rationale table to compare rationales with.")] = None,
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", name: Name = None, split: SplitOption = None,
    mode: Annotated[LabelMode, typer.Option("--mode", help="With --model: how it answers.")] = LabelMode.EXPLAIN,
    role: Annotated[Role, typer.Option("--role", help="With --model: whose engine settings to use.")] = Role.STUDENT,
) -> None:  # fmt: skip
    """Score answers against gold: accuracy, weighted and macro F1, confusion; for rationales BLEU, METEOR, ROUGE-L, similarity, Distinct-1/2."""
    from mulcot_ray.evaluation.evaluate import evaluate as run
    from mulcot_ray.evaluation.show import show
    from mulcot_ray.labeling.label import label as make

    if (answers is None) == (model is None) or (model is not None and posts is None):
        raise _exit(ConfigError("give --answers NAME, or --model NAME with --posts NAME"))
    r, t = load_recipe(recipe), load_runtime(runtime)
    with _stage(root, f"evaluate-{name or answers or 'model'}") as store:
        if model is not None and posts is not None:
            answers = _default(posts, model) + ("" if split is None else f".{split}")
            with rows("label") as progress:
                manifest, fresh = make(
                    store, answers, posts=posts, model=model, recipe=r, runtime=t, mode=mode.value, split=split, role=role.value, progress=progress
                )
            _done(store, manifest, fresh)
        assert answers is not None
        kind, source = _answers(store, answers, posts)
        manifest, report, fresh = run(
            store,
            name or answers,
            posts=source,
            answers=answers,
            answers_kind=kind,
            references=references,
            split=split,
            contract=r.contract,
            runtime=t,
        )
    console.print(show(report))
    _done(store, manifest, fresh)


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

    with _stage(root, "serve") as store:
        serve_model(store, model, load_recipe(recipe), load_runtime(runtime), host=host, port=port, auth=not no_auth)


def run_job(stage: str) -> NoReturn:
    """Entry of jobs/STAGE.py: the command of that name with the job's arguments."""
    main([stage, *sys.argv[1:]])


def main(words: list[str] | None = None) -> NoReturn:
    """The program: our own errors as one line and exit code 1, whatever command they come from."""
    try:
        app(words)
    except MulcotError as e:
        sys.exit(_exit(e).exit_code)
    raise AssertionError("typer exits")


# --- shared by the commands ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _stage(root: str, log: str) -> Iterator[Store]:
    """The store, with logs in files and our own errors as one line."""
    path: Path | None = None
    try:
        store = Store(root)
        folder = Path(store.base) / "logs" if not store.is_s3 else Path(tempfile.gettempdir()) / f"mulcot-{os.getuid()}" / "logs"
        try:
            path = log_to(folder, "".join(c if c.isalnum() or c in "._-" else "_" for c in log))
        except OSError as e:
            raise ConfigError(f"--root {root!r}: cannot write there: {e}") from e
        yield store
    except MulcotError as e:
        raise _exit(e, path) from None
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted.[/] Nothing is lost: the same command goes on from here.")
        raise typer.Exit(130) from None


def _exit(error: MulcotError, log: Path | None = None) -> typer.Exit:
    err = type(console)(stderr=True, highlight=False)
    err.print(f"[bold red]{type(error).__name__}:[/] ", end="")
    err.print(str(error), markup=False, soft_wrap=True)
    if log is not None:
        err.print(f"[dim]log: {log}[/]", soft_wrap=True)
    return typer.Exit(1)


def _done(store: Store, m: Manifest, fresh: bool) -> None:
    where = f"{store.root}/{m.kind}/{m.name}"
    if not fresh:
        console.print(f"[green]✓[/] {where}: already done ({m.finished}), nothing to do", soft_wrap=True)
        return
    counts = f"{m.rows} rows" + (
        f", {m.rejects} rejected ({', '.join(f'{k} {v}' for k, v in m.rejects_by_reason.items())})" if m.rejects else ", 0 rejected"
    )
    if m.kind in ("models", "evaluations"):
        counts = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in m.stats.items() if isinstance(v, int | float))
    console.print(f"[green]✓[/] {where}: {counts} ({m.seconds:.1f} s)", soft_wrap=True)
    if (answers := m.stats.get("answers", {})).get("reused"):
        saved = f"{answers['reused']} answers were there already ({answers['spared_tokens_in']} + {answers['spared_tokens_out']} tokens spared)"
        console.print(f"  asked the engine {answers['asked']} times; {saved}", soft_wrap=True)
    if m.rejects and m.identity.get("stage") == "teach":
        console.print(f"  ask for the rejects again: mulcot teach --posts … --retry-rejects {m.name}", soft_wrap=True)


def _dry_run(store: Store, posts: str, split: Split | None, r: Recipe, t: Runtime, role: Role, model: str) -> None:
    """What a stage would do: how many rows, which model and machine, and the prompt of the first post."""
    from mulcot_ray.artifacts import read_rows, resolve_model
    from mulcot_ray.records import Post, Task, from_row

    source = need(store, "posts", posts)
    folder, fingerprint = resolve_model(store, model)
    n = source.rows if split is None else source.stats["splits"].get(split, 0)
    engine = getattr(t, role)
    task = {Role.TEACHER: Task.PREDICT, Role.ASSISTANT: Task.REASONING, Role.STUDENT: Task.CLASSIFICATION}[role]
    first = next((p for p in (from_row(Post, row) for row in read_rows(store, source)) if split in (None, p.split)), None)
    console.print(
        f"[bold]{n}[/] posts of {posts} (split {split or 'any'}), in {-(-source.rows // t.rows_per_chunk)} chunks of up to {t.rows_per_chunk}"
    )
    console.print(
        f"model {folder} ({fingerprint}), {r.dtype}, at most {r.max_model_len} tokens; runtime {t.name}: {t.device}, replicas {engine.replicas}, tensor × pipeline parallel {engine.tensor_parallel} × {engine.pipeline_parallel}",
        soft_wrap=True,
    )
    if first is not None:
        console.print(f"contract {r.contract.name} ({r.contract.hash}); the first {task} prompt:")
        console.print(
            "\n".join(
                p.get("text", "<image>")
                for m in r.contract.messages(task, first)
                for p in (m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}])
            ),
            markup=False,
        )
    console.print("Dry run: nothing was started or written.")


def _answers(store: Store, answers: str, posts: str | None) -> tuple[Any, str]:
    """The kind of the answers and the posts that they were made for."""
    from mulcot_ray.artifacts import find

    kind = "predictions" if find(store, "predictions", answers) is not None else "rationales"
    manifest = need(store, "rationales", answers) if kind == "rationales" else need(store, "predictions", answers)
    if posts is None:
        posts = next((n for n in store.names("posts") if need(store, "posts", n).fingerprint == manifest.identity.get("posts")), None)
        if posts is None:
            raise ConfigError(f"{kind} {answers!r} were made for posts that are not under {store.root}; name them with --posts")
    return kind, posts


def _default(posts: str, model: str) -> str:
    return f"{posts}.{Path(model.replace(':', '-')).name}"


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


if __name__ == "__main__":
    main()
