"""A night: one dated partition of a dump, labelled with one version, once (docs/decisions/0007-exactly-once.md).

    dump ──► intake ──► match ──► score ──► assemble ──► manifest ──► (gates, pointer: nightly.py)
             by unit    by bucket  by chunk  by bucket      │
                          ▲                                 ▼
                          └────────────── ledger ◄──────────┘

Each step is made of tasks whose commit is the creation of an object that cannot be replaced, and starts from what has been committed before.
So a night may be killed anywhere and begun again, and two that run at once write the same objects, of which one stands; the lease of the run
keeps them from wasting each other's time. Rows in = labels + rejects + repeated + deferred, checked by bucket and again for the whole.

A partition that has grown since (late files), or of which rows were deferred, gets another *revision*: a whole night again, in which the
ledger knows all but the new rows.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest, Run, begin, find, need
from mulcot_ray.console import Progress
from mulcot_ray.engines.pace import Pace
from mulcot_ray.errors import ConservationError, InputError
from mulcot_ray.labeling.assemble import HISTOGRAM, assemble, intake_rejects
from mulcot_ray.labeling.intake import buckets_for, intake, read_markers
from mulcot_ray.labeling.ledger import Ledger
from mulcot_ray.labeling.match import match
from mulcot_ray.labeling.scoring import CANARY, Scored, score
from mulcot_ray.labeling.version import NightSettings, Version
from mulcot_ray.posts.dumps import Unit, list_units
from mulcot_ray.prompts import digest
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, Fate
from mulcot_ray.storage import Store

Steps = Callable[[str], AbstractContextManager[Progress]]  # the name of a step → its progress


def night(
    store: Store, date: str, path: str, *, version: Version, settings: NightSettings, runtime: Runtime, images: str | None = None,
    pace: Pace | None = None, steps: Steps,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Label the partition at `path` (a folder or s3://…). Returns the manifest, and False where it was there already.

    `images`: the folder or s3:// prefix that the keys of pictures are relative to. Raises InputError, Busy, EngineError, ConservationError.
    """
    units = list_units(path)
    canary = need(store, "posts", settings.canary) if settings.canary else None
    run = _begin(store, date, version, units, images, runtime, canary)
    ledger = Ledger(store, version.name)
    if isinstance(run, Manifest):
        _enter(ledger, run)  # a kill may have come between manifest and ledger
        _clear(store, run.name)
        return run, False
    planned = [Unit(**u) for u in run.plan["units"]]
    buckets = int(run.plan["buckets"])
    pace, folder = pace or Pace(), f"dt={date}/version={version.name}.{run.identity['revision']}"
    seconds: dict[str, float] = {}
    with run:
        store.create(f"{run.prefix}/contract.json", version.chain[0].work.contract.model_dump_json(indent=1).encode())
        clock = _Clock(seconds)
        with steps(f"{date} intake") as progress, clock("intake"):
            taken = intake(run, path, images, planned, buckets, runtime, progress)
            markers = read_markers(run)
        with steps(f"{date} match") as progress, clock("match"):
            match(run, buckets, markers, ledger, runtime, progress)
        with steps(f"{date} score") as progress, clock("score"):
            scored = score(run, buckets, version, canary, runtime, pace, progress)
        with clock("assemble"):
            marks = assemble(run, date, folder, version, buckets, scored, runtime)
            slices = [f"{m['unit']:05d}-{s['slice']:04d}" for m in markers for s in m["slices"] if s["rejects"]]
            files = intake_rejects(store, run.prefix, folder, slices)
        stats = _stats(date, version, run, path, units, taken, marks, scored, _canary(run, version, canary, scored), pace, seconds)
        manifest = _seal(run, taken, marks, files, stats)
    _enter(ledger, manifest)
    _clear(store, run.name)
    return manifest, True


def night_rows(store: Store, manifest: Manifest, kind: str = "labels", columns: list[str] | None = None) -> Any:
    """The rows of a night as dicts, streamed: its labels, or its rejects, repeated or deferred rows."""
    for key in manifest.files:
        if key.startswith(f"{kind}/"):
            with pq.ParquetFile(store.path(key), filesystem=store.fs) as f:
                for batch in f.iter_batches(batch_size=4096, columns=columns):
                    yield from batch.to_pylist()


def revisions(store: Store, date: str, version: str) -> list[str]:
    """Names of the nights of a date and version that were begun, oldest first."""
    names: list[str] = []
    while store.read(f"nights/{(name := f'{date}.{version}.{len(names) + 1}')}/identity.json") is not None:
        names.append(name)
    return names


def listing(units: list[Unit]) -> str:
    """Digest of what a partition holds."""
    return digest([[u.file, u.lo, u.hi, u.tag] for u in units])


def _begin(
    store: Store, date: str, version: Version, units: list[Unit], images: str | None, runtime: Runtime, canary: Manifest | None
) -> Run | Manifest:
    """The finished night, the one to resume, or a new revision."""
    known = revisions(store, date, version.name)
    listed = listing(units)
    if known:
        intent = json.loads(store.read(f"nights/{known[-1]}/identity.json") or b"{}")
        last = find(store, "nights", known[-1])
        if last is not None and last.identity["units"] == listed and not last.stats["deferred"]:
            return last
        if last is None and {(u["file"], u["tag"]) for u in intent["plan"]["units"]} <= {(u.file, u.tag) for u in units}:
            return begin(store, "nights", known[-1], intent["identity"])  # what came since is for the next revision
    revision = len(known) + 1
    identity = {
        "stage": "night", "date": date, "version": version.name, "decides": version.decides, "units": listed, "images": images, "revision": revision,
        "canary": canary.fingerprint if canary else None,
    }  # fmt: skip
    cut = {"rows_per_chunk": runtime.rows_per_chunk, "buckets": buckets_for(units), "units": [asdict(u) for u in units]}
    return begin(store, "nights", f"{date}.{version.name}.{revision}", identity, cut)


def _seal(run: Run, taken: Counter[str], marks: list[dict[str, Any]], files: dict[str, dict[str, Any]], stats: dict[str, Any]) -> Manifest:
    reasons = Counter({k.removeprefix("reasons/"): n for k, n in taken.items() if k.startswith("reasons/")})
    for m in marks:
        files |= m["files"]
        reasons.update(m["reasons"])
    labels, rejects = sum(m["labels"] for m in marks), sum(reasons.values())
    accounted = labels + rejects + stats["repeated"] + stats["deferred"]
    rows_in = taken["rows"] + taken["rejects"]
    if rows_in != accounted or rejects != taken["rejects"] + sum(m["rejects"] for m in marks):
        raise ConservationError(
            f"{run.prefix}: {rows_in} rows in; {labels} labels, {rejects} rejects, {stats['repeated']} repeated and {stats['deferred']} deferred "
            "do not add up to it. Nothing is published; please report this."
        )
    return run.seal(rows_in, labels, rejects, reasons, dict(sorted(files.items())), stats)


def _stats(
    date: str, version: Version, run: Run, path: str, units: list[Unit], taken: Counter[str], marks: list[dict[str, Any]], scored: Scored,
    canary: dict[str, Any] | None, pace: Pace, seconds: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    def total(key: str) -> Counter[str]:
        return sum((Counter(m[key]) for m in marks), Counter[str]())

    bins = [sum(m["confidence"][i] for m in marks) for i in range(HISTOGRAM)]
    answers = sum(scored.tallies.values(), Counter[str]())
    repeated, deferred = (sum(m[k] for m in marks) for k in ("repeated", "deferred"))
    rejects = taken["rejects"] + sum(m["rejects"] for m in marks)
    fates = {str(f): total("fates")[str(f)] for f in (Fate.SCORED, Fate.CARRIED, Fate.COPIED)}
    asked, spent = answers["rows_in"], seconds["score"]
    images = sum(m["images"] for m in marks)
    middles = [(i + 0.5) / HISTOGRAM for i in range(HISTOGRAM)]
    reasons = total("reasons")
    return {
        "date": date, "version": version.name, "revision": run.identity["revision"], "model": version.chain[0].work.model, "input": path,
        "units": len(units), "bytes": sum(u.weight for u in units),
        "fates": {**fates, "repeated": repeated, "deferred": deferred, "rejected": rejects}, "repeated": repeated, "deferred": deferred,
        "labels": {str(s): total("by_label")[str(s)] for s in LABELS}, "answered_by": dict(total("answered_by")),
        "confidence": {"mean": round(sum(n * x for n, x in zip(bins, middles, strict=True)) / max(1, sum(bins)), 4), "histogram": bins},
        "images": {"with": images, "without": sum(m["rows"] for m in marks) - images},
        "image_faults": sum(n for r, n in reasons.items() if r.startswith("image_")), "explained": sum(m["explained"] for m in marks),
        "not_explained": sum(m["not_explained"] for m in marks), "tokens": {"in": answers["tokens_in"], "out": answers["tokens_out"]},
        "engine": {role: {k: t[k] for k in ("rows_in", "rejects", "scored", "asked", "reused")} for role, t in scored.tallies.items()},
        "seconds_by_step": {k: round(v, 2) for k, v in seconds.items()}, "rate": round(asked / spent, 2) if asked and spent else None,
        "usd": round(pace.spent, 4), "usd_per_1k": round(1000 * pace.spent / asked, 6) if asked else None,
        "pace": {"said": scored.said, "deadline": pace.deadline, "budget": pace.budget} if scored.said else {}, "canary": canary,
        "folder": f"dt={date}/version={version.name}.{run.identity['revision']}", "ledger": [m["ledger"] for m in marks if m["ledger"]],
    }  # fmt: skip


def _canary(run: Run, version: Version, canary: Manifest | None, scored: Scored) -> dict[str, Any] | None:
    """How the student did on the posts whose gold is known. They are few: all are held in memory. A post without an answer counts as wrong."""
    if canary is None:
        return None
    from sklearn.metrics import accuracy_score, f1_score

    store, role = run.store, version.chain[0].role
    said: dict[str, str] = {}
    for name in scored.parts[role]:
        if name.startswith(f"part-{CANARY}-"):
            t = pq.read_table(store.path(f"{run.prefix}/work/{role}/{name}"), columns=["post_id", "label"], filesystem=store.fs)
            said |= dict(zip(t["post_id"].to_pylist(), t["label"].to_pylist(), strict=True))
    pairs = []
    for name in canary.parts():
        t = pq.read_table(store.path(f"posts/{canary.name}/{name}"), columns=["post_id", "label"], filesystem=store.fs)
        pairs += [(g, said.get(i, "none")) for i, g in zip(t["post_id"].to_pylist(), t["label"].to_pylist(), strict=True) if g is not None]
    if not pairs:
        raise InputError(f"the canary posts/{canary.name} has no gold label: a table whose answers are known is wanted")
    gold, given = zip(*pairs, strict=True)
    names = [str(s) for s in LABELS]
    per_class = {
        c: {"posts": gold.count(c), "right": sum(g == c == s for g, s in pairs)} for c in names
    }  # fmt: skip
    return {
        "name": canary.name, "fingerprint": canary.fingerprint, "posts": len(pairs), "accuracy": float(accuracy_score(gold, given)),
        "macro_f1": float(f1_score(gold, given, labels=names, average="macro", zero_division=0)), "by_class": per_class,
    }  # fmt: skip


def _enter(ledger: Ledger, manifest: Manifest) -> None:
    if manifest.stats["ledger"]:
        ledger.add(manifest.name, manifest.stats["ledger"])


def _clear(store: Store, name: str) -> None:
    """Working files of a finished night."""
    if not store.is_s3:
        shutil.rmtree(store.path(f"nights/{name}/work"), ignore_errors=True)
        return
    for key in store.files(f"nights/{name}/work"):
        store.delete(f"nights/{name}/work/{key}")


class _Clock:
    """Seconds by step."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds, self.step, self.began = seconds, "", 0.0

    def __call__(self, step: str) -> _Clock:
        self.step = step
        return self

    def __enter__(self) -> None:
        self.began = time.time()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.step] = time.time() - self.began
