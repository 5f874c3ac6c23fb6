"""The command line `mulcot`. Each command is one stage: it reads finished results under --root and writes one, or says that it is there."""

from __future__ import annotations

import sys
from typing import NoReturn

from mulcot_ray.cli import judging, nights, operating, stages  # noqa: F401  in the order of --help; they hang their commands on the program
from mulcot_ray.cli.common import app, failed
from mulcot_ray.errors import MulcotError


def run_job(stage: str) -> NoReturn:
    """Entry of jobs/STAGE.py: the command of that name with the job's arguments."""
    main([stage, *sys.argv[1:]])


def main(words: list[str] | None = None) -> NoReturn:
    """The program: our own errors as one line and exit code 1, whatever command they come from."""
    try:
        app(words)
    except MulcotError as e:
        sys.exit(failed(e).exit_code)
    raise AssertionError("typer exits")
