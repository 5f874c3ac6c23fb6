"""The middle of a night: the engines are asked, first the student, then, for the least sure, whoever comes after it.

    work/todo/…        the posts to ask, one a content (match.py)         work/student/part-BBB-SSSS-…   answers, kept and named by chunk
    work/todo-ROLE/…   those of them that are asked again of ROLE         work/ROLE/…

When all is asked, or put off, `work/scored.json` says which parts count. It is written once: what is assembled from it is the same on every
attempt, whatever a later one would have had time for.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest, Run, parquet_bytes
from mulcot_ray.cluster import tasks
from mulcot_ray.console import Progress
from mulcot_ray.engines.chunks import run_chunks
from mulcot_ray.engines.pace import Pace
from mulcot_ray.engines.scope import Selection, Source, Target
from mulcot_ray.engines.work import BINS
from mulcot_ray.labeling.match import matched
from mulcot_ray.labeling.version import Answerer, Version
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Post
from mulcot_ray.storage import Store

CANARY = "canary"


@dataclass(frozen=True)
class Scored:
    """Answers of a night. `parts`: by role, in the order in which they were asked, the files under work/ROLE; `tallies` likewise.

    `hurried`: rationales were left out, or the cascade was cut short, for want of time or money; `said`: what was decided about that.
    """

    parts: dict[str, list[str]]
    tallies: dict[str, Counter[str]]
    hurried: bool
    said: list[str]

    def of_bucket(self, role: str, bucket: int) -> list[str]:
        return [p for p in self.parts[role] if p.startswith(f"part-{bucket:03d}-")]


def score(run: Run, buckets: int, version: Version, canary: Manifest | None, runtime: Runtime, pace: Pace, progress: Progress) -> Scored:
    """Ask what is to be asked. Rows that the pace leaves out have no answer."""
    store, key = run.store, f"{run.prefix}/work/scored.json"
    if (there := store.read(key)) is None:
        tallies: dict[str, Counter[str]] = {}
        files = {name: n for found in matched(run, buckets) for name, n in found["todo_parts"]}
        if canary is not None:
            files |= _copy_canary(run, canary)
        for i, step in enumerate(version.chain):
            if i:
                files = _escalate(run, version.chain[i - 1], step, tallies[version.chain[i - 1].role], buckets, runtime)
            target = Target(store, f"{run.prefix}/work/{step.role}", "label", run.owner, int(run.plan["rows_per_chunk"]))
            source = Source(_todo(run, step), files, sum(files.values()))
            tallies[step.role] = run_chunks(target, source, Selection(), step.spec, step.work, runtime, progress, pace) if files else Counter()
        parts = {s.role: sorted(f for f in store.files(f"{run.prefix}/work/{s.role}") if f.startswith("part-")) for s in version.chain}
        store.create(key, json.dumps({"parts": parts, "tallies": tallies, "hurried": pace.plain or pace.deferring, "said": pace.said}).encode())
        there = store.read(key)
    found = json.loads(there or b"{}")
    return Scored(found["parts"], {role: Counter(t) for role, t in found["tallies"].items()}, found["hurried"], found["said"])


def confidence(table: pa.Table) -> pa.ChunkedArray:
    """The largest of a row's three probabilities."""
    return pc.max_element_wise(table["negative"], table["neutral"], table["positive"])


def _todo(run: Run, step: Answerer) -> str:
    return f"{run.prefix}/work/{'todo' if step.role == 'student' else f'todo-{step.role}'}"


def _copy_canary(run: Run, canary: Manifest) -> dict[str, int]:
    """The canary's posts beside the night's. Their gold goes along in the row, and into no prompt."""
    files = {}
    for i, (name, rows) in enumerate(canary.sizes.items()):
        part = f"part-{CANARY}-{i:04d}.parquet"
        run.store.create(f"{run.prefix}/work/todo/{part}", run.store.read(f"posts/{canary.name}/{name}") or b"")
        files[part] = rows
    return files


def cut_at(histogram: Counter[str], below: float, most: float) -> float:
    """The largest confidence, up to `below`, under which at most `most` answers lie. `histogram`: "confidence/BIN" → answers."""
    counts, cut = 0, 0.0
    for b in range(BINS):
        edge = (b + 1) / BINS
        counts += histogram[f"confidence/{b}"]
        if counts > most or edge > below + 1e-9:
            break
        cut = edge
    return cut


def _escalate(run: Run, last: Answerer, step: Answerer, tally: Counter[str], buckets: int, runtime: Runtime) -> dict[str, int]:
    """Write the posts that `step` is asked; returns their files with their rows."""
    cut = cut_at(tally, step.below, step.share * tally["rows_in"])
    if cut == 0.0:
        return {}
    args = (run.store, _todo(run, last), f"{run.prefix}/work/{last.role}", _todo(run, step), cut)
    todo = [{"bucket": b} for b in range(buckets) if run.store.read(f"{_todo(run, step)}/{b:03d}.json") is None]
    for _ in tasks(runtime, _Unsure, args, todo):
        pass
    files: dict[str, int] = {}
    for b in range(buckets):
        files |= json.loads(run.store.read(f"{_todo(run, step)}/{b:03d}.json") or b"{}")
    return files


class _Unsure:
    """A Ray Data task: of one bucket, the posts whose answers are less sure than `cut`."""

    def __init__(self, store: Store, todo: str, answers: str, target: str, cut: float) -> None:
        self.store, self.todo, self.answers, self.target, self.cut = store, todo, answers, target, cut

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        head, files = f"part-{row['bucket']:03d}-", dict[str, int]()
        unsure = set[str]()
        for name in self.store.files(self.answers):
            if name.startswith(head):
                t = pq.read_table(
                    self.store.path(f"{self.answers}/{name}"), columns=["post_id", "negative", "neutral", "positive"], filesystem=self.store.fs
                )
                unsure |= set(t.filter(pc.less(confidence(t), self.cut))["post_id"].to_pylist())
        wanted, number = pa.array(sorted(unsure), pa.string()), 0
        for name in self.store.files(self.todo) if unsure else ():
            if name.startswith(head) and name.endswith(".parquet"):
                with pq.ParquetFile(self.store.path(f"{self.todo}/{name}"), filesystem=self.store.fs) as f:
                    some = [t for g in range(f.num_row_groups) if (t := _among(f.read_row_group(g), wanted)).num_rows]
                if some:
                    table = pa.concat_tables(some).cast(Post.schema)
                    part = f"{head}{number:04d}.parquet"
                    self.store.create(f"{self.target}/{part}", parquet_bytes(table, 256))
                    files[part], number = table.num_rows, number + 1
        self.store.create(f"{self.target}/{row['bucket']:03d}.json", json.dumps(files).encode())
        return {"bucket": row["bucket"]}


def _among(table: pa.Table, ids: pa.Array) -> pa.Table:
    return table.filter(pc.is_in(table["post_id"], ids))
