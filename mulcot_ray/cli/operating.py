"""Running it on a cluster: submitting stages as jobs, and looking at what is going on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from mulcot_ray.cli.common import Root, app, logs_of, stage
from mulcot_ray.console import console


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False})
def submit(
    command: Annotated[list[str], typer.Argument(help="A stage and its options, as they stand behind `mulcot`: label --posts mine --root s3://…", metavar="STAGE …")],
    address: Annotated[str | None, typer.Option("--address", help="The cluster's dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, http://127.0.0.1:8265.")] = None,
    working_dir: Annotated[str, typer.Option("--working-dir", help="The folder that travels along.")] = ".",
    installed: Annotated[bool, typer.Option("--installed", help="Nothing travels: the package is installed on the nodes.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", help="NAME (its value here) or NAME=VALUE for the job; no secrets: the dashboard shows them.")] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", help="KEY=VALUE, kept with the job.")] = None,
    cpus: Annotated[float, typer.Option("--cpus", min=0, help="Reserved for the driver itself; with none it runs on the head node.")] = 0,
    gpus: Annotated[float, typer.Option("--gpus", min=0, help="The same.")] = 0,
    attempts: Annotated[int, typer.Option("--attempts", min=1, help="How often the job is started where it was killed; each start goes on where the last one stopped.")] = 1,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and end with the job's exit code.")] = True,
) -> None:  # fmt: skip
    """Run a stage on a cluster as a Ray job, and follow it. Options of `submit` stand before the stage, those of the stage behind it."""
    from mulcot_ray.errors import ConfigError
    from mulcot_ray.submit import submit as run

    tags = dict(t.partition("=")[::2] for t in tag or ())
    if bad := [k for k, v in tags.items() if not k or not v]:
        raise ConfigError(f"--tag {bad[0]!r}: KEY=VALUE is wanted")
    sys.exit(
        run(
            command,
            address=address,
            working_dir=None if installed else working_dir,
            env=env or (),
            tags=tags,
            cpus=cpus,
            gpus=gpus,
            wait=wait,
            attempts=attempts,
        )  # fmt: skip
    )


@app.command()
def status(
    root: Root = "runs",
    nights: Annotated[int, typer.Option("--nights", min=0, help="So many of the latest nights.")] = 14,
    results: Annotated[int, typer.Option("--results", min=0, help="So many of the latest finished results.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    textfile: Annotated[Path | None, typer.Option("--textfile", help="Also write the figures of the last finished night here (…/mulcot.prom), for Prometheus's textfile collector.")] = None,
) -> None:  # fmt: skip
    """What is at work, what was interrupted, what is finished; the nights and their gates; the last errors."""
    from mulcot_ray.status import show, write_textfile
    from mulcot_ray.status import status as run

    with stage(root, "status") as store:
        if textfile is not None:
            write_textfile(store, textfile)
        found = run(store, nights=nights, results=results, logs=logs_of(store))
    typer.echo(json.dumps(found.as_dict(), indent=1, ensure_ascii=False)) if as_json else console.print(show(found))
