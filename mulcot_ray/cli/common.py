"""What the commands share: the program, its options, the store with its log, errors as one line."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from mulcot_ray.artifacts import Manifest, find, need
from mulcot_ray.console import console, log_to
from mulcot_ray.errors import ConfigError, MulcotError
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Split
from mulcot_ray.storage import Store

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Distil multimodal sentiment reasoning from a large teacher into a small student, and label posts with it.

The way: **import** → **teach** → **assistant** → **augment** → **student** → **evaluate** → **label** → **serve**.
Start with `mulcot demo`: it runs all of it on a sample corpus, without a GPU. Before money is spent: `mulcot plan` and `mulcot doctor`.

Every command can be repeated: what is done is skipped, what was interrupted goes on, and a name that was made with other
settings is refused.""",
)


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
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan (what would be asked, how long, what it costs), and stop.")]
Mode = Annotated[LabelMode, typer.Option("--mode", help="`score`: label and probabilities. `explain`: and a rationale. `generate`: the whole answer is written, as a teacher does.")]  # fmt: skip
RoleOption = Annotated[Role, typer.Option("--role", help="Whose engine settings of the runtime to use.")]
Prices = Annotated[str | None, typer.Option("--prices", help="A YAML file with your prices; it goes over the built-in table.")]


@contextlib.contextmanager
def stage(root: str, log: str) -> Iterator[Store]:
    """The store, with logs in files and our own errors as one line."""
    path: Path | None = None
    try:
        store = Store(root)
        folder = logs_of(store)
        try:
            path = log_to(folder, "".join(c if c.isalnum() or c in "._-" else "_" for c in log))
        except OSError as e:
            raise ConfigError(f"--root {root!r}: cannot write there: {e}") from e
        yield store
    except MulcotError as e:
        logging.getLogger("mulcot_ray").error("%s: %s", type(e).__name__, e)
        raise failed(e, path) from None
    except KeyboardInterrupt:
        console.print("\n[yellow]Interrupted.[/] Nothing is lost: the same command goes on from here.")
        raise typer.Exit(130) from None


def logs_of(store: Store) -> Path:
    """Where the commands of this machine leave their logs: under the root, or in a temporary folder where that is on S3."""
    return Path(store.base) / "logs" if not store.is_s3 else Path(tempfile.gettempdir()) / f"mulcot-{os.getuid()}" / "logs"


def failed(error: MulcotError, log: Path | None = None) -> typer.Exit:
    """Say the error in one line; the exit to raise."""
    err = type(console)(stderr=True, highlight=False)
    err.print(f"[bold red]{type(error).__name__}:[/] ", end="")
    err.print(str(error), markup=False, soft_wrap=True)
    if log is not None:
        err.print(f"[dim]log: {log}[/]", soft_wrap=True)
    return typer.Exit(1)


def done(store: Store, m: Manifest, fresh: bool) -> None:
    """Say what a stage has made, or that it was there."""
    where = f"{store.root}/{m.kind}/{m.name}"
    if not fresh:
        console.print(f"[green]✓[/] {where}: already done ({m.finished}), nothing to do", soft_wrap=True)
        return
    reasons = f" ({', '.join(f'{k} {v}' for k, v in m.rejects_by_reason.items())})" if m.rejects else ""
    counts = f"{m.rows} rows, {m.rejects} rejected{reasons}"
    if m.kind in ("models", "evaluations", "duplicates"):
        counts = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in m.stats.items() if isinstance(v, int | float))
    console.print(f"[green]✓[/] {where}: {counts} ({m.seconds:.1f} s)", soft_wrap=True)
    from mulcot_ray.run_page import write_page

    console.print(f"  [dim]{store.root}/{write_page(store, m)}[/]", soft_wrap=True)
    if (answers := m.stats.get("answers", {})).get("reused"):
        spared = f"{answers['reused']} answers were there already ({answers['spared_tokens_in']} + {answers['spared_tokens_out']} tokens spared)"
        console.print(f"  asked the engine {answers['asked']} times; {spared}", soft_wrap=True)


def show_plan(store: Store, recipe: Recipe, runtime: Runtime, what: Any, posts: str, name: str, **options: Any) -> None:
    from mulcot_ray.plan import plan
    from mulcot_ray.plan_table import show

    console.print(show(plan(store, recipe, runtime, stage=what, posts=posts, name=name, **options)))
    console.print("Nothing was started or written.")


def answers_of(store: Store, answers: str, posts: str | None) -> tuple[Manifest, str]:
    """The table of the answers (predictions of that name, or else rationales), and the posts that they were made for."""
    table = find(store, "predictions", answers) or need(store, "rationales", answers)
    if posts is None:
        posts = next((n for n in store.names("posts") if need(store, "posts", n).fingerprint == table.identity.get("posts")), None)
        if posts is None:
            raise ConfigError(f"{table.kind} {answers!r} were made for posts that are not under {store.root}; name them with --posts")
    return table, posts


def split_of(table: Manifest) -> Split | None:
    """The split that a table was made over: posts of another one were never asked, and must not count as wrong."""
    split = table.identity.get("split")
    return Split(split) if split in list(Split) else None


def default_name(posts: str, model: str) -> str:
    return f"{posts}.{Path(model.replace(':', '-')).name}"
