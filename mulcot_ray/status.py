"""What is going on under a root: runs that are at work or were interrupted, what is finished, the nights and their gates, the last errors.

Everything is told from listings and small objects (identity, lease, manifest, verdicts); no table is read. On S3 that is a request or two for every
result, THREADS at once, and for a run in progress one listing of its folder (10,000 objects take 0.3 s on a near server).
"""

from __future__ import annotations

import datetime
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulcot_ray.artifacts import Kind, Manifest, find, stale
from mulcot_ray.errors import ArtifactMissing
from mulcot_ray.html import duration, words
from mulcot_ray.labeling.gates import breaches
from mulcot_ray.labeling.publishing import kept_verdicts, newest, read_pointer, split_name, withdrawn
from mulcot_ray.storage import Store

THREADS = 16
TAIL = 1 << 16  # bytes at the end of a log that are looked at
SHOWN = {"published": "green", "held": "bold red", "rolled back": "yellow", "at work": "green", "interrupted": "bold red"}
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Underway:
    """A result that was begun and is not finished. `state`: "at work", or "interrupted" where nobody holds its lease.

    holder: process and host of the last lease, or None; seen: seconds since it was renewed; done of planned `unit`s: None where it cannot be told.
    """

    kind: str
    name: str
    stage: str
    state: str
    holder: str | None
    seen: float | None
    step: str
    done: int | None
    planned: int | None


@dataclass(frozen=True)
class Finished:
    kind: str
    name: str
    rows_in: int
    rows: int
    rejects: int
    finished: str
    seconds: float


@dataclass(frozen=True)
class Night:
    """A finished night. `state`: published, held (a gate is breached), rolled back, superseded (another one is published), or unpublished."""

    date: str
    version: str
    revision: int
    state: str
    forced: bool
    rows: int
    rejects: int
    deferred: int
    breached: list[str]
    judged: bool
    finished: str


@dataclass(frozen=True)
class Status:
    """`more`: how many finished results and nights there are beside those listed. `errors`: lines of the logs, oldest first."""

    root: str
    underway: list[Underway]
    finished: list[Finished]
    nights: list[Night]
    more: dict[str, int]
    errors: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status(store: Store, *, nights: int = 14, results: int = 20, logs: Path | None = None, errors: int = 5) -> Status:
    """`nights`: so many dates at most, the last ones; `results`: finished results, the last ones; `logs`: the folder with the logs of commands.

    Raises ArtifactError where the store cannot be read.
    """
    every = [(kind, name) for kind in get_args(Kind) for name in store.folders(kind)]
    dates = sorted({n.partition(".")[0] for k, n in every if k == "nights"})
    lately = set(dates[-nights:] if nights else ())
    wanted = [(k, n) for k, n in every if k != "nights" or n.partition(".")[0] in lately]
    old = [(k, n) for k, n in every if k == "nights" and n.partition(".")[0] not in lately]
    manifests = dict(zip(wanted, _each(lambda x: find(store, *x), wanted), strict=True))
    unfinished = [x for x, m in manifests.items() if m is None]
    unfinished += [x for x, there in zip(old, _each(lambda x: store.exists(f"{x[0]}/{x[1]}/manifest.json"), old), strict=True) if not there]
    posts = {m.fingerprint: m for m in manifests.values() if m is not None and m.kind == "posts"}
    begun = [u for u in _each(lambda x: _underway(store, *x, posts), unfinished) if u is not None]
    done = sorted((m for m in manifests.values() if m is not None and m.kind != "nights"), key=lambda m: m.finished)
    made = [m for m in manifests.values() if m is not None and m.kind == "nights"]
    return Status(
        store.root,
        begun,
        [Finished(m.kind, m.name, m.rows_in, m.rows, m.rejects, m.finished, m.seconds) for m in done[-results:] if results],
        _nights(store, made),
        {"finished": max(0, len(done) - results), "dates": len(dates) - len(lately)},
        list(last_errors(logs, errors)) if logs is not None else [],
    )


def show(s: Status) -> RenderableType:
    """As tables for people."""
    parts: list[RenderableType] = []
    if s.underway:
        table = Table("run", "state", "holder", "last seen", "progress", title="in progress")
        for u in s.underway:
            seen = "" if u.seen is None else f"{duration(u.seen)} ago"
            count = "" if u.done is None else f" {u.done:,}" + (f" of {u.planned:,}" if u.planned is not None else "")
            table.add_row(Text(f"{u.kind}/{u.name}"), _coloured(u.state), Text(u.holder or ""), seen, f"{u.step}{count}")
        parts.append(table)
    if s.nights:
        table = Table("date", "version", "revision", "state", title="nights")
        for header in ("rows", "rejects", "deferred"):
            table.add_column(header, justify="right")
        table.add_column("gates")
        for n in s.nights:
            gates = ", ".join(words(g) for g in n.breached) or ("passed" if n.judged else "not judged")
            state = _coloured(n.state).append(" by force" if n.forced else "")
            table.add_row(n.date, n.version, str(n.revision), state, f"{n.rows:,}", f"{n.rejects:,}", f"{n.deferred:,}", gates)
        if s.more["dates"]:
            table.caption = f"and {s.more['dates']} dates before"
        parts.append(table)
    if s.finished:
        table = Table("result", "finished", title="finished")
        for header in ("rows", "rejects", "took"):
            table.add_column(header, justify="right")
        for f in s.finished:
            table.add_row(Text(f"{f.kind}/{f.name}"), f.finished.replace("T", " ")[:16], f"{f.rows:,}", f"{f.rejects:,}", duration(f.seconds))
        if s.more["finished"]:
            table.caption = f"and {s.more['finished']} before"
        parts.append(table)
    if s.errors:
        parts.append(Text("last errors", style="bold"))
        parts += [Text(f"{e['time'].replace('T', ' ')[:19]}  {e['log']}  {e.get('run', '')}  {e['message']}".replace("   ", " ")) for e in s.errors]
    return Group(*parts) if parts else Text(f"nothing under {s.root} yet")


def write_textfile(store: Store, path: Path) -> str:
    """Put the figures of the last finished night where a node exporter's textfile collector reads them (`…/mulcot.prom`); returns its name.

    The file gets the time at which the night ended, whenever this is called. Raises ArtifactMissing where no night is finished.
    """
    for date in sorted({n.partition(".")[0] for n in store.folders("nights")}, reverse=True):
        try:
            name = newest(store, date)
        except ArtifactMissing:
            continue
        night, figures = find(store, "nights", name), store.read(f"nights/{name}/metrics.prom")
        if night is not None and figures is not None:
            draft = path.with_name(f".{path.name}.{os.getpid()}")  # the collector reads *.prom, and may read at any time
            draft.write_bytes(figures)
            ended = datetime.datetime.fromisoformat(night.finished).timestamp()
            os.utime(draft, (ended, ended))
            draft.replace(path)
            return name
    raise ArtifactMissing(f"no finished night under {store.root}; `mulcot nightly` makes one")


def last_errors(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """The last lines of level ERROR and above of the JSON logs in a folder, oldest first, each with the `log` it is from."""
    found: list[dict[str, Any]] = []
    for path in folder.glob("*.jsonl"):
        with path.open("rb") as f:
            f.seek(max(0, path.stat().st_size - TAIL))
            lines = f.read().split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:  # the first may be cut, the last may be being written
                continue
            if isinstance(record, dict) and record.get("level") in ("ERROR", "CRITICAL"):
                found.append({"log": path.name, "time": "", "message": "", **record})
    yield from sorted(found, key=lambda r: str(r["time"]))[-count:] if count else ()


def _underway(store: Store, kind: Kind, name: str, posts: dict[str, Manifest]) -> Underway | None:
    """None: it was finished meanwhile, or is not ours."""
    prefix = f"{kind}/{name}"
    intent = store.read(f"{prefix}/identity.json")
    if intent is None:
        return None
    identity, plan = (json.loads(intent)[k] for k in ("identity", "plan"))
    lease = store.read(f"{prefix}/lease.json")
    if store.exists(f"{prefix}/manifest.json"):
        return None
    held = json.loads(lease) if lease else {}
    seen = max(0.0, time.time() - datetime.datetime.fromisoformat(held["time"]).timestamp()) if held else None
    state = "at work" if lease and not stale(lease) else "interrupted"
    holder = f"process {held['pid']} on {held['host'].partition('/')[0]}" if held else None
    step, done, planned = _night_step(store, prefix, plan) if kind == "nights" else _chunks(store, prefix, identity, plan, posts)
    return Underway(kind, name, str(identity.get("stage", kind)), state, holder, seen, step, done, planned)


def _chunks(
    store: Store, prefix: str, identity: dict[str, Any], plan: dict[str, Any], posts: dict[str, Manifest]
) -> tuple[str, int | None, int | None]:
    """Parts are chunks, where the plan says how rows are cut into them."""
    if "rows_per_chunk" not in plan:
        return "", None, None
    done = sum(n.startswith("part-") and n.endswith(".parquet") for n in store.files(prefix))
    source = posts.get(str(identity.get("posts")))
    return "chunks", done, None if source is None else sum(-(-n // int(plan["rows_per_chunk"])) for n in source.sizes.values())


def _night_step(store: Store, prefix: str, plan: dict[str, Any]) -> tuple[str, int | None, int | None]:
    """The first step of a night that is not done (labeling/night.py)."""
    names = store.files(f"{prefix}/work")
    count = Counter(f.partition("/")[0] for f in names if f.endswith(".json" if f.startswith(("intake/", "assembled/")) else ".parquet"))
    units, buckets = len(plan["units"]), int(plan["buckets"])
    if count["intake"] < units:
        return "intake, units", count["intake"], units
    if count["found"] < buckets:
        return "match, buckets", count["found"], buckets
    if "scored.json" not in names:
        roles = [r for r in ("teacher", "assistant", "student") if count[r]]
        chunks = sum(f.startswith(f"{roles[0]}/part-") for f in names) if roles else 0
        return f"score, chunks of the {roles[0] if roles else 'student'}", chunks, None
    return "assemble, buckets", count["assembled"], buckets


def _nights(store: Store, made: list[Manifest]) -> list[Night]:
    pointer, _ = read_pointer(store)
    back = withdrawn(store) if made else set()
    found = []
    for m, verdicts in zip(made, _each(lambda m: kept_verdicts(store, m.name), made), strict=True):
        name, bad = split_name(m.name), [v.gate for v in breaches(verdicts or [])]
        now = pointer.nights.get(name.date)
        is_now = now is not None and now.night == m.name
        state = (
            "published" if is_now else "rolled back" if m.name in back else "superseded" if now is not None else "held" if bad else "unpublished"
        )  # fmt: skip
        forced = is_now and now is not None and now.forced
        deferred = int(m.stats.get("deferred", 0))
        found.append(Night(name.date, name.version, name.revision, state, forced, m.rows, m.rejects, deferred, bad, verdicts is not None, m.finished))
    return sorted(found, key=lambda n: (n.date, n.finished))


def _each(function: Callable[[S], T], items: list[S]) -> list[T]:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


def _coloured(state: str) -> Text:
    return Text(state, style=SHOWN.get(state, ""))
