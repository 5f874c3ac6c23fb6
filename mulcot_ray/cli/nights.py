"""The night: dated partitions of a dump, labelled, judged and published; and what can be asked about them afterwards."""

from __future__ import annotations

import contextlib
import datetime
import re
import time
from typing import Annotated, Any

import typer

from mulcot_ray.artifacts import Manifest
from mulcot_ray.cli.common import Prices, RecipeOption, Root, RuntimeOption, app, stage
from mulcot_ray.console import console, rows
from mulcot_ray.errors import ConfigError
from mulcot_ray.recipe import load_recipe, load_runtime, load_settings
from mulcot_ray.storage import Store

Input = Annotated[str, typer.Option("--input", help="The dump: a folder or s3://… with dt=YYYY-MM-DD partitions of JSONL (plain, .gz, .zst) or Parquet.")]  # fmt: skip
Images = Annotated[str | None, typer.Option("--images", help="Folder (or s3:// prefix) that the keys of pictures are relative to.")]
Model = Annotated[str, typer.Option("--model", help="The student: `builtin:student`, a model folder, or a trained model's name.")]
Settings = Annotated[str, typer.Option("--settings", help="What a night does beside labelling (rationales, cascade, canary, gates): `default` or a YAML file.")]  # fmt: skip
Deadline = Annotated[str | None, typer.Option("--deadline", help="06:00 (the next one here), +90m, +2h, or 2026-11-23T06:00. What has not begun by then is deferred.")]  # fmt: skip
Budget = Annotated[float | None, typer.Option("--budget", min=0, help="US dollars for the engines' machines, by the price table. Beyond it the rest is deferred.")]  # fmt: skip
Date = Annotated[str, typer.Argument(help="The date of the night, YYYY-MM-DD.")]


@app.command()
def nightly(
    input: Input, model: Model, root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", images: Images = None,
    settings: Settings = "default", deadline: Deadline = None, budget: Budget = None, prices: Prices = None,
    date: Annotated[list[str] | None, typer.Option("--date", help="Only this date; repeat for several.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="Only dates from this one on.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which partitions would be labelled, and stop.")] = False,
) -> None:  # fmt: skip
    """Label every partition that is new, has grown or is unfinished; judge it; publish it. Ends with an error where a gate holds one back."""
    from mulcot_ray.labeling.nightly import nightly as run
    from mulcot_ray.labeling.nightly import pending
    from mulcot_ray.labeling.version import NightSettings, version_of

    r, t, s = load_recipe(recipe), load_runtime(runtime), load_settings(NightSettings, settings, "nights")
    for d in [*(date or ()), *([since] if since else ())]:
        _check_date(d)
    with stage(root, "nightly") as store:
        version = version_of(store, model, r, t, s)
        if dry_run:
            for line in pending(store, input, version=version, dates=date, since=since):
                console.print(f"  {line}", markup=False, soft_wrap=True)
            console.print("Nothing was started or written.")
            return
        pace = pace_of(deadline, budget, s.late, prices)
        run(
            store, input, version=version, settings=s, runtime=t, images=images, dates=date, since=since, pace=pace, steps=rows,
            told=lambda o: say(store, o.manifest, o.fresh, o.state),
        )  # fmt: skip


@app.command()
def publish(
    date: Date, root: Root = "runs",
    night: Annotated[str | None, typer.Option("--night", help="Which night of that date, by name; the latest that is finished if not given.")] = None,
    settings: Settings = "default",
    force: Annotated[bool, typer.Option("--force", help="Publish although a gate holds it back, or over a newer one.")] = False,
) -> None:  # fmt: skip
    """Make a finished night the one that readers see."""
    from mulcot_ray.labeling.nightly import release
    from mulcot_ray.labeling.publishing import newest
    from mulcot_ray.labeling.version import NightSettings

    _check_date(date)
    s = load_settings(NightSettings, settings, "nights")
    with stage(root, "publish") as store:
        done = release(store, night or newest(store, date), s.gates, force=force)
    say(store, done.manifest, False, done.state)


@app.command()
def rollback(date: Date, root: Root = "runs") -> None:
    """Take a date back to what was published before."""
    from mulcot_ray.labeling.publishing import rollback as run

    _check_date(date)
    with stage(root, "rollback") as store:
        now = run(store, date)
    console.print(f"[green]✓[/] {date} is {now.night} again ({now.rows} rows)", soft_wrap=True)


@app.command()
def published(
    root: Root = "runs",
    sql: Annotated[bool, typer.Option("--sql", help="A DuckDB query over exactly the published parts.")] = False,
    athena: Annotated[bool, typer.Option("--athena", help="CREATE TABLE for Athena.")] = False,
) -> None:
    """What readers see: each date with its night."""
    from mulcot_ray.labeling.publishing import current
    from mulcot_ray.labeling.reading import athena_sql, duckdb_sql

    with stage(root, "published") as store:
        if sql or athena:
            typer.echo((athena_sql if athena else duckdb_sql)(store))
            return
        for day, entry in sorted(current(store).items()):
            forced = " (forced)" if entry.forced else ""
            console.print(f"{day}  {entry.night}  {entry.rows} rows, {entry.published}{forced}", soft_wrap=True)


@app.command()
def replay(
    date: Date, input: Input, old: Annotated[str, typer.Option("--old", help="The student of then, by name.")],
    new: Annotated[str, typer.Option("--new", help="The student to compare with it.")],
    root: Root = "runs", recipe: RecipeOption = "tiny", runtime: RuntimeOption = "laptop", images: Images = None, settings: Settings = "default",
    deadline: Deadline = None, budget: Budget = None, prices: Prices = None,
) -> None:  # fmt: skip
    """Run an old and a new student over a past night and say on which posts they disagree. Publishes nothing."""
    import json

    from mulcot_ray.labeling.version import NightSettings, version_of
    from mulcot_ray.posts.dumps import partitions
    from mulcot_ray.replay import replay as run
    from mulcot_ray.replay import show

    _check_date(date)
    r, t, s = load_recipe(recipe), load_runtime(runtime), load_settings(NightSettings, settings, "nights")
    with stage(root, "replay") as store:
        folder = partitions(input).get(date)
        if folder is None:
            raise ConfigError(f"{input} has no partition dt={date}")
        a, b = (version_of(store, m, r, t, s) for m in (old, new))
        if a.name == b.name:
            raise ConfigError(f"--old {old!r} and --new {new!r} are the same version, {a.name}: there is nothing to compare")
        manifest, _ = run(store, date, folder, a, b, settings=s, runtime=t, images=images, pace=pace_of(deadline, budget, s.late, prices), steps=rows)
        report = json.loads(store.read(f"evaluations/{manifest.name}/report.json") or b"{}")
    console.print(show(report))
    console.print(f"{store.root}/evaluations/{manifest.name}/report.html", markup=False, soft_wrap=True)


@app.command()
def lineage(
    post_id: Annotated[str, typer.Argument(help="The post, by its id in the dump.")], root: Root = "runs",
    date: Annotated[str | None, typer.Option("--date", help="The night's date; the latest published one with the post if not given.")] = None,
    aspect: Annotated[str | None, typer.Option("--aspect", help="Where the post has several.")] = None,
    night: Annotated[str | None, typer.Option("--night", help="A night by name, published or not.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:  # fmt: skip
    """From a post's label back to student, assistant, teacher, rationales, prompts and settings."""
    import json

    from mulcot_ray.lineage import lineage as run
    from mulcot_ray.lineage import show

    with stage(root, "lineage") as store:
        found = run(store, post_id, date=date, aspect=aspect, night=night)
    typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False)) if as_json else console.print(show(found))


def pace_of(deadline: str | None, budget: float | None, late: Any, prices: str | None) -> Any:
    from mulcot_ray.engines.pace import Pace
    from mulcot_ray.prices import load_prices

    return Pace(parse_deadline(deadline) if deadline else None, budget, late, load_prices(prices))


def parse_deadline(text: str, now: float | None = None) -> float:
    """Seconds since the epoch. Raises ConfigError."""
    now = time.time() if now is None else now
    if m := re.fullmatch(r"\+(\d+)([mh])", text):
        return now + int(m[1]) * (60 if m[2] == "m" else 3600)
    with contextlib.suppress(ValueError):
        if re.fullmatch(r"\d\d:\d\d", text):
            here = datetime.datetime.fromtimestamp(now)
            at = datetime.datetime.combine(here.date(), datetime.time.fromisoformat(text))
            return (at if at > here else at + datetime.timedelta(days=1)).timestamp()
        at = datetime.datetime.fromisoformat(text)
        if at.timestamp() <= now:
            raise ConfigError(f"--deadline {text!r} has passed")
        return at.timestamp()
    raise ConfigError(f"--deadline {text!r}: 06:00, +90m, +2h or 2026-11-23T06:00 is wanted")


def say(store: Store, m: Manifest, fresh: bool, state: str) -> None:
    """A night in a few lines."""
    s = m.stats
    colour = {"held": "[red]✗[/]", "labelled": "[green]✓[/]"}.get(state, "[green]✓[/]")
    console.print(f"{colour} {m.name}: {state}{'' if fresh else ', was labelled before'}", soft_wrap=True)
    parts = [f"{m.rows} labels", f"{m.rejects} rejected", f"{s['repeated']} repeated", f"{s['deferred']} deferred"]
    console.print(f"  {m.rows_in} rows in = {' + '.join(parts)}; {s['fates']['scored']} asked, {s['fates']['carried']} known before", soft_wrap=True)
    if fresh and s["rate"]:
        cost = f", {s['usd_per_1k']:.4f} USD per 1,000" if s["usd_per_1k"] else ""
        console.print(f"  {s['rate']:.0f} posts/s of the engine{cost}", soft_wrap=True)
    for line in s["pace"].get("said", []):
        console.print(f"  [yellow]{line}[/]", soft_wrap=True)
    console.print(f"  {store.root}/labels/{s['folder']}", markup=False, soft_wrap=True)


def one_night(
    store: Store, input: str, date: str | None, model: str, recipe: Any, runtime: Any, images: str | None, settings: Any, pace: Any
) -> None:
    """`mulcot label --input`: one partition, labelled, and neither judged nor published."""
    from mulcot_ray.labeling.night import night
    from mulcot_ray.labeling.version import version_of

    if date is None:
        found = re.search(r"dt=(\d{4}-\d\d-\d\d)/?$", input)
        if found is None:
            raise ConfigError(f"--input {input!r} is no dt=YYYY-MM-DD folder: say with --date which night it belongs to")
        date = found[1]
    _check_date(date)
    version = version_of(store, model, recipe, runtime, settings)
    manifest, fresh = night(store, date, input, version=version, settings=settings, runtime=runtime, images=images, pace=pace, steps=rows)
    say(store, manifest, fresh, "labelled, not published")


def _check_date(text: str) -> None:
    try:
        if datetime.date.fromisoformat(text).isoformat() != text:
            raise ValueError
    except ValueError:
        raise ConfigError(f"date {text!r}: YYYY-MM-DD is wanted") from None
