"""What a person sees: progress on the terminal, everything that Ray and vLLM say in a file."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(highlight=False)
QUIET_SECONDS = 10.0  # between progress lines where there is no terminal (a job's log)


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on a terminal, a line every few seconds elsewhere. Called with (done, total, note)."""
    if not console.is_terminal:
        last, said, started = 0.0, "", time.time()

        def line(done: int, of: int | None, note: str) -> None:
            nonlocal last, said
            if (time.time() - last >= QUIET_SECONDS or done == of) and said != (now := f"{done}/{of} {note}"):
                last, said = time.time(), now
                console.print(f"{title}: {done}/{of or '?'} {note} ({last - started:.0f} s)", soft_wrap=True)

        yield line
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task(title, total=total, note="starting")
        yield lambda done, of, note: bars.update(task, completed=done, total=of, note=note)


@contextmanager
def rows(title: str) -> Iterator[Callable[[int, int, int], None]]:
    """Progress over rows: (done, total, rejects)."""
    started, base = time.time(), -1
    with _bar(title, None) as bar:

        def tell(done: int, total: int, rejects: int) -> None:
            nonlocal started, base
            if base < 0:
                started, base = time.time(), done
            rate = (done - base) / max(time.time() - started, 1e-3)
            bar(done, total, f"{rate:.0f} rows/s, {rejects} rejected" if done > base else "engine starting" if done < total else "")

        yield tell


@contextmanager
def counter(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress without a known end: (rows so far, rejects so far)."""
    with _bar(title, None) as bar:
        yield lambda done, rejects: bar(done, None, f"{rejects} rejected")


@contextmanager
def training(title: str) -> Iterator[Callable[[int, int, dict[str, float]], None]]:
    """Progress over optimizer steps: (step, steps, losses or validation figures)."""
    latest: dict[str, float] = {}
    with _bar(title, None) as bar:

        def tell(step: int, total: int, values: dict[str, float]) -> None:
            latest.update(values)
            shown = " ".join(f"{k} {latest[k]:.3f}" for k in ("loss", "ce_rea", "ce_cls", "kl_rea", "kl_cls") if k in latest)
            bar(step, total, shown + (f" · validation {latest['accuracy']:.3f}" if "accuracy" in latest else ""))

        yield tell


def log_to(folder: Path, name: str) -> Path:
    """Send all logging and warnings of this process to FOLDER/NAME.log; the terminal keeps what we print."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log"
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the C++ side writes to the terminal of the driver
    return path


def quiet_libraries() -> None:
    """Libraries that put handlers of their own on the terminal, once they are imported."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("ray", "vllm", "transformers", "torch"):
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) in (sys.stderr, sys.stdout):
                    logger.removeHandler(handler)
            logger.propagate = True
