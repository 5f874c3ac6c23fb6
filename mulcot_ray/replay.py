"""An old and a new version over a past night: on how many posts they disagree, on which classes, by how much, and on which posts the most.

Both label the partition as a night does, and neither is published by it; what a version has labelled before it knows. The two tables are cut
into the same buckets by content, and are compared bucket by bucket, on as many machines as there are.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mulcot_ray.artifacts import Manifest, begin
from mulcot_ray.cluster import tasks
from mulcot_ray.engines.pace import Pace
from mulcot_ray.evaluation.statistics import wilson
from mulcot_ray.html import environment
from mulcot_ray.labeling.night import Steps, night
from mulcot_ray.labeling.version import NightSettings, Version
from mulcot_ray.posts.dumps import Unit, list_units, read_unit
from mulcot_ray.posts.shown import clip
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, Post
from mulcot_ray.storage import Store

EXAMPLES = 24
NAMES = [str(s) for s in LABELS]


def replay(
    store: Store, date: str, path: str, old: Version, new: Version, *, settings: NightSettings, runtime: Runtime, images: str | None = None,
    pace: Pace | None = None, steps: Steps,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write evaluations/replay-DATE-OLD-NEW: report.json, report.html. Returns the manifest, and False where it was there already."""
    nights = [
        night(store, date, path, version=v, settings=settings, runtime=runtime, images=images, pace=pace, steps=steps)[0] for v in (old, new)
    ]  # fmt: skip
    identity = {"stage": "replay", "nights": [m.fingerprint for m in nights]}
    run = begin(store, "evaluations", f"replay-{date}-{nights[0].name.removeprefix(date + '.')}-{nights[1].name.removeprefix(date + '.')}", identity)
    if isinstance(run, Manifest):
        return run, False
    with run:
        parts = sorted({k.rpartition("/")[2] for m in nights for k in m.files if k.startswith("labels/")})
        keys = [[f"labels/{m.stats['folder']}/{p}" if f"labels/{m.stats['folder']}/{p}" in m.files else None for m in nights] for p in parts]
        found = list(tasks(runtime, _Compare, (store,), [{"keys": k} for k in keys]))
        examples = heapq.nlargest(EXAMPLES, (e for f in found for e in f["examples"]), key=lambda e: (e["moved"], e["post_id"]))
        texts = _texts(runtime, path, images, examples)
        for e in examples:
            e["text"] = texts.get(f"{e['post_id']}\0{e['aspect']}")
        report = _report(date, nights, [old, new], found, examples)
        store.write(f"{run.prefix}/report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
        page = environment(Path(__file__).parent).get_template("replay.html.j2").render(r=report, labels=NAMES)
        store.write(f"{run.prefix}/report.html", page.encode())
        stats = {
            "posts": report["posts"],
            "disagree": report["disagree"],
            "rate": report["rate"]["value"],
            "old": nights[0].name,
            "new": nights[1].name,
        }
        return run.commit(report["posts"], stats=stats), True


def show(report: dict[str, Any]) -> RenderableType:
    """The table and the worst examples, for a terminal."""
    low, high = report["rate"]["interval"]
    title = f"{report['date']}: {report['disagree']} of {report['posts']} posts get another label ({report['rate']['value']:.2%}, 95 % interval {low:.2%} to {high:.2%})"
    table = Table(f"{report['old']['version']} ↓", *NAMES, "disagree", title=title)
    for label in NAMES:
        row = report["by_class"][label]
        table.add_row(label, *(str(report["matrix"][label][n]) for n in NAMES), f"{row['rate']:.2%}" if row["rate"] is not None else "–")
    lines = [Text(f"{e['post_id']}: {e['old']} → {e['new']} ({e['moved']:.2f})  {clip(e['text'] or '', 90)}") for e in report["examples"][:8]]
    only = [Text(f"{n} posts have a label from {who} alone", style="yellow") for who, n in report["only"].items() if n]
    return Group(table, *only, *lines)


@dataclass(frozen=True)
class _Example:
    """A post on which they differ. `moved` is the total variation distance between the two distributions (1 where there are none)."""

    post_id: str
    aspect: str | None
    old: str
    new: str
    moved: float
    old_probabilities: list[float | None]
    new_probabilities: list[float | None]


@dataclass(frozen=True)
class _Compare:
    """A Ray Data task: one bucket of both nights. A few hundred bytes a row are held."""

    store: Store

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        old, new = (self._read(k) for k in row["keys"])
        at = {(i, a): n for n, (i, a) in enumerate(zip(old["post_id"].to_pylist(), old["aspect"].to_pylist(), strict=True))}
        before, p_before = old["label"].to_pylist(), self._probabilities(old)
        matrix, moved, examples, met = Counter[str](), 0.0, list[_Example](), 0
        ids, aspects, labels, p_after = new["post_id"].to_pylist(), new["aspect"].to_pylist(), new["label"].to_pylist(), self._probabilities(new)
        for post_id, aspect, label, p in zip(ids, aspects, labels, p_after, strict=True):
            n = at.get((post_id, aspect))
            if n is None:
                continue
            met += 1
            far = _distance(p_before[n], p)
            moved += far
            matrix[f"{before[n]}/{label}"] += 1
            if before[n] != label:
                examples.append(_Example(post_id, aspect, before[n], label, round(far, 4), p_before[n], p))
        worst = heapq.nlargest(EXAMPLES, examples, key=lambda e: (e.moved, e.post_id))
        return {"matrix": matrix, "moved": moved, "only_old": len(at) - met, "only_new": len(ids) - met, "examples": [asdict(e) for e in worst]}

    def _read(self, key: str | None) -> pa.Table:
        columns = ["post_id", "aspect", "label", *NAMES]
        if key is None:
            return pa.table({c: pa.array([], pa.string()) for c in columns})
        return pq.read_table(self.store.path(key), columns=columns, filesystem=self.store.fs)

    def _probabilities(self, table: pa.Table) -> list[list[float | None]]:
        return [list(p) for p in zip(*(table[n].to_pylist() for n in NAMES), strict=True)]


def _distance(a: Sequence[float | None], b: Sequence[float | None]) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return sum(abs(x - y) for x, y in pairs) / 2 if len(pairs) == len(a) else 1.0


def _texts(runtime: Runtime, path: str, images: str | None, examples: list[dict[str, Any]]) -> dict[str, str]:
    """The texts of the examples, out of the dump: it is read once more, by units."""
    wanted = {f"{e['post_id']}\0{e['aspect']}" for e in examples}
    if not wanted:
        return {}
    found: dict[str, str] = {}
    for texts in tasks(runtime, _Find, (path, images, wanted), [asdict(u) for u in list_units(path)]):
        found |= texts
    return found


@dataclass(frozen=True)
class _Find:
    """A Ray Data task: the texts of some posts in one unit of a dump."""

    path: str
    images: str | None
    wanted: set[str]

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for _, p in read_unit(self.path, Unit(**row), self.images):
            if isinstance(p, Post) and (key := f"{p.post_id}\0{p.aspect}") in self.wanted:
                found.setdefault(key, clip(p.text, 280))
        return found


def _report(
    date: str, nights: list[Manifest], versions: list[Version], found: list[dict[str, Any]], examples: list[dict[str, Any]]
) -> dict[str, Any]:
    matrix = sum((Counter(f["matrix"]) for f in found), Counter[str]())
    posts, same = matrix.total(), sum(matrix[f"{n}/{n}"] for n in NAMES)
    by_class = {}
    for n in NAMES:
        said = sum(matrix[f"{n}/{m}"] for m in NAMES)
        by_class[n] = {"old": said, "new": sum(matrix[f"{m}/{n}"] for m in NAMES), "rate": (said - matrix[f"{n}/{n}"]) / said if said else None}
    return {
        "date": date, "posts": posts, "disagree": posts - same,
        "rate": {"value": (posts - same) / posts if posts else 0.0, "interval": list(wilson((posts - same) / max(1, posts), posts))},
        "moved": sum(f["moved"] for f in found) / posts if posts else 0.0, "matrix": {a: {b: matrix[f"{a}/{b}"] for b in NAMES} for a in NAMES},
        "by_class": by_class, "only": {"old": sum(f["only_old"] for f in found), "new": sum(f["only_new"] for f in found)}, "examples": examples,
        **{
            who: {"night": m.name, "version": m.stats["version"], "model": v.chain[0].work.model, "labels": m.stats["labels"], "confidence": m.stats["confidence"]["mean"]}
            for who, m, v in zip(("old", "new"), nights, versions, strict=True)
        },
    }  # fmt: skip
