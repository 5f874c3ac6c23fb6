"""What a person sees: progress on the terminal, everything that Ray and vLLM say in a file; and the same for machines, as JSON lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

console = Console(highlight=False)
Progress = Callable[[int, int, int], None]  # rows done, rows in all, rejects
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
    with Bars(*columns, console=console) as bars:
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
    """Progress over optimizer steps: (step, steps, losses and speed, or validation figures), or over rows that get soft labels first."""
    latest, paces = dict[str, float](), deque[float](maxlen=50)
    with _bar(title, None) as bar:

        def tell(step: int, total: int, values: dict[str, float]) -> None:
            if "soft_labels" in values:
                bar(step, total, "soft labels")
                return
            latest.update(values)
            shown = [f"{k} {latest[k]:.3f}" for k in ("loss", "ce_rea", "ce_cls", "kl_rea", "kl_cls") if k in latest]
            if "tokens_s" in latest:
                shown.append(f"· {latest['tokens_s']:,.0f} tokens/s")
            if "mfu" in latest:
                shown.append(f"· MFU {latest['mfu']:.1%}")
            if "seconds" in values:
                paces.append(values["seconds"])
            if paces and not console.is_terminal:  # a terminal's bar has its own
                shown.append(f"· {_duration(median(paces) * (total - step))} to go")
            if "accuracy" in latest:
                shown.append(f"· validation {latest['accuracy']:.3f}")
            bar(step, total, " ".join(shown))

        yield tell


def _duration(seconds: float) -> str:
    """As 42 s, 7 min or 3.5 h."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


_about: ContextVar[Mapping[str, str]] = ContextVar("about", default={})  # noqa: B039  never changed, only replaced


@contextmanager
def about(**ids: str) -> Iterator[None]:
    """Lines that are logged from here say what they are about: `run`, `stage`, `chunk`, … Tasks and asyncio.to_thread take it along; empty ids are
    left out."""
    token = _about.set({**_about.get(), **{k: v for k, v in ids.items() if v}})
    try:
        yield
    finally:
        with suppress(ValueError):  # left in another thread than it was entered in, whose lines say nothing of it anyway
            _about.reset(token)


class JsonLines(logging.Formatter):
    """A line of JSON for each record: time (UTC), level, logger, message, `error` with its traceback, what it is about, and `always`."""

    def __init__(self, **always: str) -> None:
        super().__init__()
        self.always = {k: v for k, v in always.items() if v}

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{at}.{int(record.msecs):03d}Z", "level": record.levelname, "logger": record.name}
        line |= {"message": record.getMessage(), **self.always, **_about.get()}
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to(folder: Path, name: str) -> Path:
    """Send all logging and warnings of this process to FOLDER/NAME.log, for people, and to NAME.jsonl, for machines; the terminal keeps what we print.

    Returns the former, to which Ray's C++ side writes too (cluster.py).
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.log"
    text, lines = (logging.FileHandler(p, encoding="utf-8", errors="backslashreplace") for p in (path, path.with_suffix(".jsonl")))
    text.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    lines.setFormatter(JsonLines(pid=str(os.getpid())))
    _handle(text, lines)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # the C++ side writes to the terminal of the driver
    return path


def log_in_worker(**ids: str) -> None:
    """In a process of Ray's: log as JSON lines to its standard error, which Ray keeps in the session's logs (worker-….err) and shows in its dashboard.

    `ids` are what all lines of this process are about; Ray's own (node, job, actor) are added.
    """
    import ray

    context = ray.get_runtime_context()
    ids |= {"job": context.get_job_id(), "node": context.get_node_id(), "worker": context.get_worker_id(), "actor": context.get_actor_id() or ""}
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(**ids))
    _handle(handler)


def _handle(*handlers: logging.Handler) -> None:
    """These alone get what is logged."""
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    for new in handlers:
        root.addHandler(new)
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    warnings.simplefilter("default")


def quiet_libraries() -> None:
    """Libraries that put handlers of their own on the terminal, once they are imported."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("ray", "vllm", "transformers", "torch"):
            logger = logging.getLogger(name)
            for handler in list(logger.handlers):
                if isinstance(handler, logging.StreamHandler) and getattr(handler, "stream", None) in (sys.stderr, sys.stdout):
                    logger.removeHandler(handler)
            logger.propagate = True
