"""The label-aware loop over one post, and the table of what it finds. `teach` and `augment` differ only in the attempts they make.

An attempt fails where the answer was cut, has no prediction or lacks a section, where its conclusion names another label than its
prediction, where it does not end on the gold label, and where an explanation says that it was told. The next attempt then asks again,
warmer and with another seed. What never succeeds is a Reject with the last fault and the last answer.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pyarrow.parquet as pq
from PIL import Image

from mulcot_ray.artifacts import Manifest, Run, begin
from mulcot_ray.console import Progress
from mulcot_ray.engines.ask import Asked, ask, sampling
from mulcot_ray.engines.base import Engine, EngineSpec
from mulcot_ray.engines.chunks import run_chunks
from mulcot_ray.engines.scope import Chunk, Selection, source_of, target_of
from mulcot_ray.errors import ConfigError, InputError, RowFault
from mulcot_ray.parts import commit_part, read_commits
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import SECTIONS, Post, Prediction, Rationale, Reason, Reject, Sentiment, Source, Task, from_row, to_table
from mulcot_ray.storage import Store
from mulcot_ray.teaching.card import card


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to ask, and what a success is called."""

    task: Task
    temperature: float
    source: Source


@dataclass(frozen=True)
class RationaleWork:
    """The loop's settings. `first` is the number of the first attempt: a retry goes on counting, and so draws other seeds."""

    contract: Contract
    attempts: tuple[Attempt, ...]
    top_p: float
    max_tokens: int
    guided: bool
    leaks: tuple[str, ...]
    seed: int
    model: str
    first: int = 0
    contract_hash: str = field(init=False)

    kind: ClassVar[type[Rationale] | type[Prediction]] = Rationale

    def __post_init__(self) -> None:
        object.__setattr__(self, "contract_hash", self.contract.hash)

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Rationale:
        if post.label is None:
            raise RowFault(Reason.NO_LABEL, "a rationale is kept where it ends on the gold label, and there is none")
        guide = self.contract.guide if self.guided else None
        fault, tokens_in, tokens_out = None, 0, 0
        for i, attempt in enumerate(self.attempts):
            how = sampling(
                self.max_tokens, self.seed, post, self.first + i, temperature=attempt.temperature, top_p=self.top_p, guide=guide
            )  # fmt: skip
            asked = await ask(engine, self.contract, attempt.task, post, image, how, post.label if attempt.task is Task.EXPLAIN else None)
            tokens_in, tokens_out = tokens_in + asked.done.tokens_in, tokens_out + asked.done.tokens_out
            fault = self._fault(asked, post, attempt)
            if fault is None:
                assert asked.answer is not None
                sections = {s: asked.answer.sections[s] for s in SECTIONS}
                return Rationale(
                    post.post_id, attempt.source, self.model, self.contract_hash, prediction=asked.answer.label, attempts=i + 1,
                    finish_reason=asked.done.finish_reason, tokens_in=tokens_in, tokens_out=tokens_out, **sections,
                )  # fmt: skip
        assert fault is not None
        count = f"{len(self.attempts)} attempts; the last: " if len(self.attempts) > 1 else ""
        raise RowFault(fault.reason, count + fault.detail, fault.raw, len(self.attempts))

    def _fault(self, asked: Asked, post: Post, attempt: Attempt) -> RowFault | None:
        if asked.answer is None:
            return asked.fault
        answer, raw = asked.answer, asked.done.text
        if said := self.contract.contradiction(answer.sections, answer.label):
            return RowFault(Reason.CONCLUSION_CONTRADICTS, f"Final_conclusion says {said}, Prediction {answer.label}", raw)
        if answer.label is not post.label:
            return RowFault(Reason.LABEL_MISMATCH, f"says {answer.label}, gold is {post.label}", raw)
        if attempt.task is Task.EXPLAIN:
            text = "\n".join(answer.sections[s] for s in SECTIONS)
            if found := next((m for leak in self.leaks if (m := re.search(leak, text, re.IGNORECASE))), None):
                return RowFault(Reason.LABEL_LEAKED, f"an explanation may not say {found[0]!r}", raw)
        return None

    def plain(self) -> RationaleWork:
        """A rationale is all there is: nothing can be left out."""
        return self

    def tally(self, post: Post, result: Rationale | Reject) -> Iterator[str]:
        if post.label is not None:
            yield f"gold/{post.label}"
        if isinstance(result, Rationale):
            yield f"sources/{result.source}"
            yield f"labels/{result.prediction}"
            yield f"attempts/{result.attempts}"
            if result.source is not Source.EXPLAINED:
                yield f"found/{result.prediction}"


def write_rationales(
    store: Store, name: str, posts: Manifest, chosen: Selection, identity: dict[str, Any], engine: EngineSpec, work: RationaleWork,
    recipe: Recipe, runtime: Runtime, progress: Progress,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Run the work over the posts and commit the table with its card; returns the manifest, and False where it was there already.

    Stats: counts by source, label, attempts, gold label and gold label found without being told; tokens; answers asked for and reused.
    """
    cut = {"rows_per_chunk": runtime.rows_per_chunk}
    if chosen.redo is not None:
        _fits(chosen.redo, identity)
        cut = json.loads(store.read(f"rationales/{chosen.redo.name}/identity.json") or b"{}")["plan"]
        identity = {**identity, "redo": chosen.redo.fingerprint}
    run = begin(store, "rationales", name, identity, cut)
    if isinstance(run, Manifest):
        return run, False
    with run:
        tally = run_chunks(target_of(run), source_of(posts, chosen.split), chosen, engine, work, runtime, progress)
        if chosen.apart is not None:
            tally += _copies(run, chosen, work)
        stats = _nested(tally)
        store.write(f"{run.prefix}/card.html", card(run, posts, recipe, stats).encode())
        return run.commit(tally["rows_in"], stats=stats), True


def round_of(redo: Manifest | None) -> int:
    """How many times rejects were replayed before, this time included."""
    return 0 if redo is None else int(redo.identity.get("round", 0)) + 1


def _fits(redo: Manifest, identity: dict[str, Any]) -> None:
    for key, what in (("stage", "stage"), ("posts", "posts"), ("split", "split"), ("contract", "contract"), ("duplicates", "duplicates table")):
        if redo.identity.get(key) != identity.get(key):
            raise ConfigError(f"the rejects of rationales/{redo.name} cannot be retried: it was made with another {what}")
    if not redo.rejects:
        raise InputError(f"rationales/{redo.name} has no rejects: there is nothing to retry")


def _copies(run: Run, chosen: Selection, work: RationaleWork) -> Counter[str]:
    """Parts copies-*: the duplicates' rows, with the rationale (or the reject) of their representatives. One part a file of the posts."""
    assert chosen.apart is not None
    there, parts = run.store.files(run.prefix), []
    for file in chosen.apart.parts():
        part = f"copies-{file.removeprefix('part-').removesuffix('.parquet')}"
        parts.append(f"{run.prefix}/{part}.parquet")
        if f"{part}.parquet" not in there:
            table = pq.read_table(run.store.path(f"duplicates/{chosen.apart.name}/{file}"), filesystem=run.store.fs)
            rows = [r for r in table.to_pylist() if r["label"] == r["rep_label"] and chosen.split in (None, r["split"])]
            _copy(run, part, rows, work, there)
    return sum((c.tally for c in read_commits(run.store, parts)), Counter[str]())


def _copy(run: Run, part: str, rows: list[dict[str, Any]], work: RationaleWork, there: Collection[str]) -> None:
    """`there`: the files of the run."""
    size = int(run.plan["rows_per_chunk"])
    by_chunk: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        lo = r["rep_row"] // size * size
        by_chunk.setdefault(Chunk(r["rep_file"], lo, lo + size).part, []).append(r)
    kept: list[Any] = []
    rejected: list[Reject] = []
    tally = Counter[str](rows_in=len(rows), copied=len(rows))
    for chunk, members in by_chunk.items():
        found: dict[str, Any] = {}
        rejects = read_commits(run.store, [f"{run.prefix}/{chunk}.parquet"])[0].rejects
        for key, kind in ((f"rejects/{rejects}", Reject), (f"{chunk}.parquet", Rationale)):
            if rejects or kind is Rationale:
                table = pq.read_table(run.store.path(f"{run.prefix}/{key}"), filesystem=run.store.fs)
                found |= {r["post_id"]: from_row(kind, r) for r in table.to_pylist()}  # type: ignore[type-var]
        for r in members:
            original = found[r["representative"]]
            if isinstance(original, Reject):
                copy: Any = Reject(r["post_id"], original.stage, original.reason, f"as {r['representative']}, its representative: {original.detail}")
                rejected.append(copy)
            else:
                copy = replace(original, post_id=r["post_id"], duplicate_of=r["representative"], attempts=0, tokens_in=0, tokens_out=0)
                kept.append(copy)
            tally.update(work.tally(Post(r["post_id"], "", "", label=Sentiment(r["label"]) if r["label"] else None), copy))
    tally["rejects"] = len(rejected)
    commit_part(run.store, run.prefix, part, to_table(Rationale, kept), rejected, tally)


def _nested(tally: Counter[str]) -> dict[str, Any]:
    """{"sources/predicted": 3, "asked": 4} → {"sources": {"predicted": 3}, …, "answers": {"asked": 4, …}}."""
    stats: dict[str, Any] = {k: {} for k in ("sources", "labels", "attempts", "gold", "found")}
    for key, n in sorted(tally.items()):
        group, _, name = key.partition("/")
        if name:
            stats[group][name] = n
    stats["tokens"] = {"in": tally["tokens_in"], "out": tally["tokens_out"]}
    stats["answers"] = {k: tally[k] for k in ("asked", "reused", "spared_tokens_in", "spared_tokens_out")}
    stats["copied"] = tally["copied"]
    return stats
