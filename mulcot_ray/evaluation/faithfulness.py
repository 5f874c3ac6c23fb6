"""Does the answer follow from what the model saw, and the label from what it wrote?

Each post of a seeded sample gets a partner with another gold label, and the model is asked about the post as it is, with the partner's
picture, and with the partner's text (and aspect). Then its label words are scored behind the four sections that it wrote itself, and behind
those that it wrote about the partner. Under a root:

    posts/NAME.swaps, predictions/NAME.swaps    plain/ID, picture/ID, text/ID: the post and its two exchanges, and the answers
    posts/NAME.told, predictions/NAME.told      own/ID, other/ID: the post as it is, with the sections to stand before the label in `meta`
    evaluations/NAME/report.json                the measures

Each is finished by itself, so an interrupted run goes on where it was. The sample is held in memory, pictures included: 500 posts of 50 KB
are 25 MB, three times that in the table written, and of each row group that holds one of them (256 rows) all is read.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pyarrow.parquet as pq
from PIL import Image

from mulcot_ray.artifacts import Manifest, begin, find, need, read_rows
from mulcot_ray.console import Progress
from mulcot_ray.engines.base import Engine, EngineSpec, Role, engine_spec
from mulcot_ray.engines.chunks import run_chunks
from mulcot_ray.engines.scope import Selection, source_of, target_of
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.evaluation.evaluate import load_report
from mulcot_ray.evaluation.faithfulness_measures import Case, ruled, summarise
from mulcot_ray.prompts import Contract, digest
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Source, Split, Task, from_row, to_table
from mulcot_ray.storage import Store

Mode = Literal["explain", "generate"]
_Place = tuple[str, str, str, int]  # rank, post id, file, row group
SEARCH = 1000  # places looked through for a partner: a bound for 100,000 posts of which most have one label
WRITTEN, PARTNER = "written", "partner"  # keys of meta: the sections to stand before the label; who it was exchanged with


def faithfulness(
    store: Store, name: str, *, posts: str, model: str, recipe: Recipe, runtime: Runtime, split: Split, limit: int | None, progress: Progress,
    role: Role = "student", mode: Mode = "explain", engine: EngineSpec | None = None,
) -> tuple[Manifest, dict[str, Any], bool]:  # fmt: skip
    """Write evaluations/NAME/report.json. Returns its manifest, the report, and whether this call made it.

    `limit` posts of the split, one of a source, are drawn by recipe.seed (None: one of every source). mode `explain` asks as the labeler does
    (label scored, rationale by the reasoning prompt), `generate` as a teacher is asked (everything written, by the predict prompt;
    probabilities are scored behind it). Posts without gold are paired with any other of them.
    Raises InputError when no two posts can be paired, ConfigError for an endpoint that cannot score behind a begun answer.
    """
    source = need(store, "posts", posts)
    spec = engine or engine_spec(store, recipe, runtime, role, model)
    if spec.backend == "endpoint" and spec.runtime.endpoint is not None and spec.runtime.endpoint.dialect == "openai":
        raise ConfigError(f"model {model!r} is behind an endpoint of dialect 'openai', which cannot score a label behind a rationale; 'vllm' can")
    drawn = {"stage": "faithfulness", "posts": source.fingerprint, "split": split, "limit": limit, "seed": recipe.seed}
    asked = {
        "model": spec.fingerprint, "contract": recipe.contract.hash, "mode": mode, "explain_tokens": recipe.explain_tokens, "dtype": recipe.dtype,
        "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    # Drawn before the name is taken: a wrong --split leaves nothing behind that would stand in the way of the right one.
    cases = {} if find(store, "evaluations", name) else paired(_sample(store, source, split, limit, recipe.seed))
    run = begin(store, "evaluations", name, drawn | asked)
    if isinstance(run, Manifest):
        return run, load_report(store, name), False
    work = Asked(recipe.contract, mode, recipe.explain_tokens, recipe.seed, model, spec.temperature)
    behind = Told(recipe.contract, Task.PREDICT if mode == "generate" else Task.REASONING, model)
    with run:
        rejects = Counter[str]()
        for part, rows, doing, identity in (("swaps", _swaps, work, drawn), ("told", _told, behind, drawn | asked)):
            table = _write_posts(store, f"{name}.{part}", identity, list(rows(cases.values(), recipe.contract)))
            if table.rows == 0:  # no answer has sections
                continue
            answers = _answer(store, f"{name}.{part}", asked, table, spec, doing, runtime, progress)
            rejects.update(answers.rejects_by_reason)
            for row in read_rows(store, answers):
                variant, _, post = row["post_id"].partition("/")
                cases[post].answers[variant] = from_row(Prediction, row)
        report = {
            "stage": "faithfulness", "posts": source.name, "split": split, "model": model, "mode": mode, "seed": recipe.seed,
            "rejects_by_reason": dict(rejects), **summarise(list(cases.values())),
        }  # fmt: skip
        store.create(f"{run.prefix}/report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
        manifest = run.commit(len(cases), stats=_headline(report))
    return manifest, load_report(store, name), True


# --- the sample and its partners -------------------------------------------------------------------------------------


def _sample(store: Store, posts: Manifest, split: Split, limit: int | None, seed: int) -> list[Post]:
    """One post of each of the sources with the lowest hash of seed and source: the same whatever else is in the table.

    Two aspects of one post are not independent draws, and an interval over both would be too narrow.
    """
    drawn: dict[str, _Place] = {}
    for source, place in _places(store, posts, split, seed):
        drawn[source] = min(place, drawn.get(source, place))
        if limit is not None and len(drawn) > 2 * limit + 1024:  # what falls out here has `limit` others before it
            drawn = dict(heapq.nsmallest(limit, drawn.items(), key=lambda x: x[1]))
    chosen = heapq.nsmallest(limit or len(drawn), drawn.values())
    wanted: dict[tuple[str, int], set[str]] = defaultdict(set)
    for _, post, file, group in chosen:
        wanted[file, group].add(post)
    found: dict[str, Post] = {}
    for (file, group), ids in sorted(wanted.items()):
        with pq.ParquetFile(store.path(f"posts/{posts.name}/{file}"), filesystem=store.fs) as f:
            found |= {r["post_id"]: from_row(Post, r) for r in f.read_row_group(group).to_pylist() if r["post_id"] in ids}
    return [found[post] for _, post, _, _ in chosen]


def _places(store: Store, posts: Manifest, split: Split, seed: int) -> Iterator[tuple[str, _Place]]:
    """Source and place of every post of the split."""
    for file in posts.parts():
        with pq.ParquetFile(store.path(f"posts/{posts.name}/{file}"), filesystem=store.fs) as f:
            for group in range(f.metadata.num_row_groups):
                for r in f.read_row_group(group, columns=["post_id", "source_id", "split"]).to_pylist():
                    if r["split"] == split:
                        yield r["source_id"], (digest([seed, r["source_id"]]), r["post_id"], file, group)


def paired(posts: Sequence[Post]) -> dict[str, Case]:
    """Each post with a partner, by post id: of the same granularity, from another source, with another text, picture and gold label.

    Each is partner once as long as no label has more than half of the posts; else some serve several times. Posts without gold meet any other
    such post. What finds no partner is left out. Decided by the order of `posts`. Raises InputError when nothing can be paired.
    """
    groups: dict[tuple[bool, ...], list[Post]] = defaultdict(list)
    for p in posts:
        groups[p.aspect is None, p.has_image, p.label is None].append(p)
    cases: dict[str, Case] = {}
    for group in groups.values():
        found: list[Post | None] = [*group[1:], *group[:1]]
        for i, p in enumerate(group):
            if _differ(p, found[i]):
                continue
            near = [(i + t) % len(group) for t in range(1, min(len(group), SEARCH))]
            # Two whose partners suit the other change them. There are such two, unless p's label has more than half of the posts.
            change = next((j for j in near if _differ(p, found[j]) and _differ(group[j], found[i])), None)
            if change is not None:
                found[i], found[change] = found[change], found[i]
            else:
                found[i] = next((group[j] for j in near if _differ(p, group[j])), None)
        cases |= {p.post_id: Case(p, q) for p, q in zip(group, found, strict=True) if q is not None}
    if not cases:
        raise InputError(f"none of the {len(posts)} posts of the split has a partner of another label, source, text and picture to exchange with")
    return cases


def _differ(a: Post, b: Post | None) -> bool:
    if b is None:
        return False
    text = (a.text, a.aspect) != (b.text, b.aspect)
    picture = not a.has_image or (a.image_sha256 or a.image_ref or a.image_bytes) != (b.image_sha256 or b.image_ref or b.image_bytes)
    return a.source_id != b.source_id and text and picture and (a.label is None or a.label is not b.label)


# --- what is asked ---------------------------------------------------------------------------------------------------


def _swaps(cases: Iterable[Case], contract: Contract) -> Iterator[Post]:
    """The post as it is; with the partner's picture; with its text and aspect, for an aspect has to occur in its text."""
    for c in cases:
        p, q = c.post, c.partner
        plain = replace(p, post_id=f"plain/{p.post_id}", meta={**p.meta, PARTNER: q.post_id})
        yield plain
        if p.has_image:
            picture = replace(plain, image_bytes=q.image_bytes, image_ref=q.image_ref, image_sha256=q.image_sha256)
            yield replace(picture, post_id=f"picture/{p.post_id}", label=ruled(c, "picture"))
        yield replace(plain, post_id=f"text/{p.post_id}", label=ruled(c, "text"), text=q.text, aspect=q.aspect)


def _told(cases: Iterable[Case], contract: Contract) -> Iterator[Post]:
    by_id = {c.post.post_id: c for c in cases}
    for c in by_id.values():
        for variant, writer in (("own", c), ("other", by_id[c.partner.post_id])):
            answer = writer.answers.get("plain")
            if answer is not None and (text := written(contract, answer)) is not None:
                yield replace(c.post, post_id=f"{variant}/{c.post.post_id}", meta={**c.post.meta, WRITTEN: text})


def written(contract: Contract, p: Prediction) -> str | None:
    """The answer's sections as the contract writes them, up to where the label's line begins; None where it has none."""
    texts = {s: getattr(p, s) for s in SECTIONS}
    if not all(texts.values()):
        return None
    whole = contract.answer(Task.REASONING, p.label, Rationale(p.post_id, Source.PREDICTED, p.model, p.contract, prediction=p.label, **texts))
    return whole.removesuffix(contract.answer(Task.CLASSIFICATION, p.label))


class Asked(LabelWork):
    """The labeler's answer; where the label was written and not scored, with the probabilities behind its own sections."""

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Prediction:
        p = await super().__call__(engine, post, image)
        before = written(self.contract, p)
        if p.positive is not None or before is None:
            return p
        scores = await engine.score(self.contract.messages(Task.PREDICT, post), image, before)
        negative, neutral, positive = scores.probabilities
        return replace(p, negative=negative, neutral=neutral, positive=positive, label_mass=scores.mass)


@dataclass(frozen=True)
class Told:
    """The label behind the sections that stand in the post's meta; its probabilities are as the model gives them, not calibrated."""

    contract: Contract
    task: Task
    model: str

    kind: ClassVar[type[Rationale] | type[Prediction]] = Prediction

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Prediction:
        scores = await engine.score(self.contract.messages(self.task, post), image, post.meta[WRITTEN])
        p = scores.probabilities
        best = LABELS[p.index(max(p))]
        return Prediction(post.post_id, best, self.model, self.contract.hash, *p, label_mass=scores.mass, tokens_in=scores.tokens_in)

    def tally(self, post: Post, result: Any) -> Iterable[str]:
        return ()

    def plain(self) -> Told:
        return self


def _write_posts(store: Store, name: str, identity: Mapping[str, Any], rows: list[Post]) -> Manifest:
    run = begin(store, "posts", name, identity)
    if isinstance(run, Manifest):
        return run
    with run:
        run.write_table("part-00000", to_table(Post, rows), rows_per_group=64)
        return run.commit(len(rows), stats={"splits": dict(Counter(str(p.split) for p in rows))})


def _answer(
    store: Store, name: str, asked: Mapping[str, Any], posts: Manifest, spec: EngineSpec, work: Asked | Told, runtime: Runtime, progress: Progress
) -> Manifest:
    identity = {"stage": "faithfulness", "posts": posts.fingerprint, **asked}
    run = begin(store, "predictions", name, identity, {"rows_per_chunk": runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run
    with run:
        run_chunks(target_of(run), source_of(posts, None), Selection(), spec, work, runtime, progress)
        return run.commit(posts.rows)


def _headline(report: Mapping[str, Any]) -> dict[str, float]:
    m = report["measures"]
    found = {"posts": m["posts"], **{k: m[k]["value"] for k in ("accuracy", "stated_is_label", "own_rationale_keeps", "other_rationale_drags")}}
    for what in ("picture", "text"):
        found |= {f"{what}_{k}": m[f"swap_{what}"][k]["value"] for k in ("flips", "towards_partner")}
    return {k: v for k, v in found.items() if v is not None}
