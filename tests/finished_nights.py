"""Finished nights made by hand: a manifest as labeling/night.py writes it, with or without the labels that it speaks of."""

from __future__ import annotations

import hashlib
from typing import Any

from mulcot_ray.artifacts import Manifest, Run, begin, parquet_bytes
from mulcot_ray.records import LABELS, Fate, Labelled, to_table
from mulcot_ray.storage import Store

VERSION = "student-3f9a1c2b"


def stats(date: str = "2026-11-22", rows: int = 1000, **changes: Any) -> dict[str, Any]:
    """Of a night on which nothing happened: 43 % positive, 33 % neutral, 24 % negative, sure, 2 % without a picture, 1 % rejects."""
    positive, neutral = round(0.43 * rows), round(0.33 * rows)
    rejects = rows // 100
    fates = {"scored": rows - rows // 10 - rows // 20, "carried": rows // 10, "copied": rows // 20, "repeated": 0, "deferred": 0, "rejected": rejects}
    return {
        "date": date, "version": VERSION, "revision": 1, "model": "student", "input": f"s3://dump/dt={date}", "units": 4, "fates": fates, "repeated": 0, "deferred": 0,
        "labels": {"negative": rows - positive - neutral, "neutral": neutral, "positive": positive}, "answered_by": {"student": rows},
        "confidence": confidence_of({19: rows - rows // 5 - rows // 20, 17: rows // 5, 10: rows // 20}), "images": {"with": rows + rejects - rows // 50, "without": rows // 50}, "image_faults": 0,
        "explained": 0, "tokens": {"in": 300 * rows, "out": rows}, "engine": {"student": {"asked": fates["scored"], "reused": 0}},
        "seconds_by_step": {"intake": 2.5, "match": 3.0, "score": 61.2, "assemble": 1.4}, "rate": 812.4, "usd": 1.234, "usd_per_1k": 0.0123, "pace": {}, "canary": None,
        **changes,
    }  # fmt: skip


def confidence_of(bins: dict[int, int]) -> dict[str, Any]:
    """So many rows in these of the 20 bins, as a night counts them."""
    mean = sum((i + 0.5) / 20 * n for i, n in bins.items()) / max(1, sum(bins.values()))
    return {"mean": round(mean, 4), "histogram": [bins.get(i, 0) for i in range(20)]}


def canary(accuracy: float, posts: int = 400, fingerprint: str = "c1") -> dict[str, Any]:
    by_class = {s.value: {"posts": posts // 4, "right": round(accuracy * posts / 4)} for s in LABELS}
    return {"name": "canary", "fingerprint": fingerprint, "posts": posts, "accuracy": accuracy, "macro_f1": accuracy - 0.01, "by_class": by_class}


def manifest(date: str = "2026-11-22", rows: int = 1000, *, rejects: int | None = None, repeated: int = 0, deferred: int = 0, version: str = VERSION,
             revision: int = 1, reasons: dict[str, int] | None = None, **changes: Any) -> Manifest:  # fmt: skip
    """A manifest alone, for what reads nothing else. Counts add up."""
    s = stats(date, rows, version=version, revision=revision, repeated=repeated, deferred=deferred)
    rejected = s["fates"]["rejected"] if rejects is None else rejects
    s["fates"] |= {"rejected": rejected, "repeated": repeated, "deferred": deferred}
    return Manifest(
        kind="nights", name=f"{date}.{version}.{revision}", fingerprint="f" * 12, identity={"date": date, "decides": {"chain": [version]}},
        rows_in=rows + rejected + repeated + deferred, rows=rows, rejects=rejected, rejects_by_reason=reasons or ({"bad_line": rejected} if rejected else {}), files={},
        stats={**s, **changes}, versions={"mulcot-ray": "0.2.0"}, commit="abc", started=f"{date}T01:00:00+00:00", finished=f"{date}T02:00:00+00:00", seconds=3600.0,
    )  # fmt: skip


def rows(date: str, count: int, label: int = 0) -> list[Labelled]:
    share = {"negative": 0.1, "neutral": 0.2, "positive": 0.7}
    return [
        Labelled(f"{date}-{i}", None, LABELS[(i + label) % 3], **share, label_mass=0.9, answered_by="student", fate=Fate.SCORED, scored_on=date, copied_of=None,
                 content=f"{i:032x}", model=VERSION, contract="c")
        for i in range(count)
    ]  # fmt: skip


def finished(store: Store, date: str = "2026-11-22", count: int = 30, *, version: str = VERSION, revision: int = 1, parts: int = 3) -> Manifest:
    """A night with its labels under the root; each revision has labels of its own."""
    run = begin(store, "nights", f"{date}.{version}.{revision}", {"date": date, "revision": revision})
    assert isinstance(run, Run)
    files, made = {}, rows(date, count, revision)
    with run:
        for part in range(parts if count else 0):
            key = f"labels/dt={date}/version={version}.{revision}/part-{part:03d}.parquet"
            table = to_table(Labelled, made[part::parts])
            data = parquet_bytes(table)
            store.create(key, data)
            files[key] = {"bytes": len(data), "rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()}
        files[f"ledger/{version}/{run.name}/part-000.parquet"] = {"bytes": 1, "rows": count, "sha256": ""}
        return run.seal(count, count, 0, {}, files, stats(date, count, version=version, revision=revision))
