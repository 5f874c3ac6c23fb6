"""The dataset card: what a table of rationales is, how it was made, what is missing from it and how it reads. One HTML file beside the table.

The written parts are streamed once, without their texts: 50 bytes a row pass through memory, and what stays are counts and, per source and
class, the few rows to show. These, and their posts, are then fetched by their ids, a row group at a time.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest, Run, git_commit, versions
from mulcot_ray.errors import ConservationError
from mulcot_ray.html import environment, words
from mulcot_ray.posts.shown import clip, picture
from mulcot_ray.prompts import KEYS, digest
from mulcot_ray.recipe import Recipe
from mulcot_ray.records import LABELS, SECTIONS, Post, Rationale, Reason, Reject, Source, from_row
from mulcot_ray.storage import Store

REJECTS = 3  # shown
PARTS = 256  # opened together; a part that was read keeps some 20 KB of metadata until its data set is gone
COPIES = "copies-"  # parts with the rationales of duplicates
QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "max": 1.0}

SOURCES = {
    Source.PREDICTED: "ended on the gold label without having seen it",
    Source.EXPLAINED: "was given the gold label and explained it",
    Source.AUGMENTED: "sampled from the assistant, which had not seen the label",
}
REASONS = {
    Reason.EMPTY_TEXT: "The post has no text; nothing was asked.",
    Reason.IMAGE_MISSING: "The picture is not where the post says, or the prompts want one and the post has none.",
    Reason.IMAGE_UNREADABLE: "The picture is damaged, or no picture.",
    Reason.IMAGE_TOO_LARGE: "The picture has too many bytes or pixels.",
    Reason.IMAGE_BAD_SHAPE: "The picture is too small, or too far from square.",
    Reason.BAD_VALUE: "The post’s reference to its picture is neither a path nor an s3:// key.",
    Reason.NO_LABEL: "The post has no gold label that an answer could end on.",
    Reason.PROMPT_TOO_LONG: "The post’s prompt does not fit the model’s context.",
    Reason.ANSWER_TRUNCATED: "The answer was cut by the token limit.",
    Reason.ANSWER_UNPARSED: "No label could be read from the answer, or two different ones.",
    Reason.SECTIONS_MISSING: "The answer lacks one of the four sections.",
    Reason.LABEL_MISMATCH: "The answer ends on another label than gold.",
    Reason.CONCLUSION_CONTRADICTS: "The conclusion speaks for another label than the answer ends on. A student would learn that reasons need not carry the label.",
    Reason.LABEL_LEAKED: "The explanation says that it was told the label, which is no reason. A student, who is never told, would learn to claim it.",
    Reason.ENGINE_ERROR: "The engine died each time this post was asked.",
}


def card(run: Run, posts: Manifest, recipe: Recipe, stats: Mapping[str, Any], examples: int = 6) -> str:
    """The card of a table whose parts are all written, as HTML. `stats` are the table's (rationales.write_rationales); `examples` rows are shown.

    The same table gives the same card under the same versions. Raises ConservationError where rows and rejects do not add up to the posts that were to be asked.
    """
    split = run.identity["split"]
    rows_in = int(posts.stats["splits"].get(split, 0))
    kept, refused = _kept(run, Draw(recipe.seed, examples)), _refused(run, Draw(recipe.seed, REJECTS))
    rejects = refused.reasons.total()
    if kept.rows + rejects != rows_in:
        raise ConservationError(
            f"{run.prefix}: {rows_in} posts in, {kept.rows} kept and {rejects} rejected. Nothing is published; please report this."
        )
    chosen, chosen_rejects = kept.draw.pick(), refused.draw.pick()
    rationales = _fetch(run.store, run.prefix, chosen)
    answers = _fetch(run.store, f"{run.prefix}/rejects", chosen_rejects)
    ids = [i for i, _ in (*chosen, *chosen_rejects)]
    files = posts.parts()
    found = _fetch(run.store, f"posts/{posts.name}", [(i, f) for f in files for i in ids])
    gold, told = {k: int(n) for k, n in stats["gold"].items()}, {k: int(n) for k, n in stats["found"].items()}
    stage, settings = run.identity["stage"], run.identity[run.identity["stage"]]
    models = dict(kept.models.most_common()) or ({recipe.models.teacher: 0} if stage == "teach" else {})
    return environment(Path(__file__).parent).get_template("card.html.j2").render(
        name=run.name, stage=stage, who="teacher" if stage == "teach" else "assistant", posts=posts, split=split, models=models,
        rows_in=rows_in, rows=kept.rows, rejects=rejects, rounds=int(run.identity.get("round", 0)), copied=(kept.copies, refused.copies),
        sources=[(s, kept.sources[s], SOURCES.get(Source(s), "")) for s in Source if kept.sources[s]],
        reasons=[(r, n, REASONS.get(Reason(r), "")) for r, n in sorted(refused.reasons.items(), key=lambda x: (-x[1], x[0]))],
        attempts=[(i, how, kept.attempts[i]) for i, how in enumerate(_asked(stage, settings), 1)], early=refused.early,
        labels=[(s.value, gold.get(s, 0), kept.labels[s], told.get(s, 0)) for s in LABELS], gold=sum(gold.values()), found=sum(told.values()),
        lengths=[(what, why, _quantiles(counts)) for what, why, counts in kept.lengths(settings["max_tokens"]) if counts], quantiles=list(QUANTILES),
        tokens=stats["tokens"], answers=stats["answers"],
        facts=_facts(run, posts, recipe, models, settings), leaks=settings.get("leaks", ()),
        identity=json.dumps(run.identity, indent=1, ensure_ascii=False), versions=versions() | {"source": git_commit() or "installed package"},
        examples=[_example(from_row(Rationale, rationales[i]), from_row(Post, found[i])) for i, _ in chosen],
        shown=[_reject(from_row(Reject, answers[i]), from_row(Post, found[i])) for i, _ in chosen_rejects],
    )  # fmt: skip


# --- one pass over what was written ------------------------------------------------------------------------------------


class Draw:
    """A sample of a stream: of each group the rows with the smallest hash of seed and id, in whatever order they come."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size
        self.groups: dict[tuple[str, ...], list[tuple[bytes, str, str]]] = {}

    def add(self, group: tuple[str, ...], post_id: str, file: str) -> None:
        best = self.groups.setdefault(group, [])
        key = hashlib.sha256(f"{self.seed}/{post_id}".encode()).digest()
        if len(best) < self.size or (best and key < best[-1][0]):
            bisect.insort(best, (key, post_id, file))
            del best[self.size :]

    def pick(self) -> list[tuple[str, str]]:
        """`size` rows (post_id, file), or all: next comes always a group that was taken from least, and of these one whose members were."""
        left = {g: list(rows) for g, rows in self.groups.items() if rows}
        taken, parts, picked = Counter[tuple[str, ...]](), Counter[str](), list[tuple[str, str]]()
        while left and len(picked) < self.size:
            group = min(left, key=lambda g: (taken[g], sum(parts[p] for p in g), left[g][0]))
            _, post_id, file = left[group].pop(0)
            picked.append((post_id, file))
            taken[group] += 1
            parts.update(group)
            left = {g: rows for g, rows in left.items() if rows}
        return picked


@dataclass
class _Kept:
    draw: Draw
    rows: int = 0
    copies: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    models: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    tokens_in: Counter[int] = field(default_factory=Counter)
    tokens_out: Counter[int] = field(default_factory=Counter)
    single: Counter[int] = field(default_factory=Counter)  # tokens of rationales that needed one answer

    def lengths(self, limit: int) -> Iterator[tuple[str, str, Counter[int]]]:
        yield "One answer", f"of rationales kept at the first attempt; the limit is {limit}", self.single
        yield "Answers per rationale", "all its attempts together", self.tokens_out
        yield "Prompts per rationale", "all its attempts together, with the picture’s tokens", self.tokens_in


@dataclass
class _Refused:
    draw: Draw
    copies: int = 0
    early: int = 0  # before the attempts were used up: the post or the engine was at fault
    reasons: Counter[str] = field(default_factory=Counter)


def _kept(run: Run, draw: Draw) -> _Kept:
    seen = _Kept(draw)
    for file, c in _scan(run, Rationale.schema, ["post_id", "source", "prediction", "model", "attempts", "tokens_in", "tokens_out"]):
        seen.rows += len(c["post_id"])
        for counter, name in ((seen.sources, "source"), (seen.labels, "prediction"), (seen.models, "model")):
            counter.update(c[name])
        if file.startswith(COPIES):  # they cost nothing, and read as their representatives do
            seen.copies += len(c["post_id"])
            continue
        for counts, name in ((seen.attempts, "attempts"), (seen.tokens_in, "tokens_in"), (seen.tokens_out, "tokens_out")):
            counts.update(c[name])
        seen.single.update(n for n, attempts in zip(c["tokens_out"], c["attempts"], strict=True) if attempts == 1)
        for post_id, source, label in zip(c["post_id"], c["source"], c["prediction"], strict=True):
            draw.add((source, label), post_id, file)
    return seen


def _refused(run: Run, draw: Draw) -> _Refused:
    seen = _Refused(draw)
    for file, c in _scan(run, Reject.schema, ["post_id", "reason", "attempts"], "rejects/"):
        seen.reasons.update(c["reason"])
        if file.startswith(COPIES):
            seen.copies += len(c["post_id"])
            continue
        seen.early += c["attempts"].count(0)
        for post_id, reason in zip(c["post_id"], c["reason"], strict=True):
            draw.add((reason,), post_id, file)
    return seen


def _scan(run: Run, schema: pa.Schema, columns: list[str], folder: str = "") -> Iterator[tuple[str, dict[str, list[Any]]]]:
    """File name and columns of each batch of the parts in a folder. Several parts are read at once: on S3 a part costs round trips, not bytes."""
    names = [n for n in run.store.files(run.prefix) if n.endswith(".parquet") and n.rpartition("/")[0] == folder.rstrip("/")]
    for at in range(0, len(names), PARTS):
        paths = [run.store.path(f"{run.prefix}/{n}") for n in names[at : at + PARTS]]
        parts = ds.dataset(paths, schema=schema, format="parquet", filesystem=run.store.fs)
        for batch in parts.to_batches(columns=[*columns, "__filename"], fragment_readahead=16):
            if batch.num_rows:
                yield batch["__filename"][0].as_py().rpartition("/")[2], batch.select(columns).to_pydict()


def _fetch(store: Store, prefix: str, wanted: Collection[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Rows by post_id, of (post_id, file). Whole rows are read only of row groups that hold one."""
    found: dict[str, dict[str, Any]] = {}
    for file in dict.fromkeys(f for _, f in wanted):
        ids = {i for i, f in wanted if f == file} - found.keys()
        if not ids:
            continue
        with pq.ParquetFile(store.path(f"{prefix}/{file}"), filesystem=store.fs, buffer_size=1 << 20) as f:
            for group in range(f.num_row_groups):
                if ids.isdisjoint(f.read_row_group(group, columns=["post_id"])["post_id"].to_pylist()):
                    continue
                for batch in f.iter_batches(batch_size=16, row_groups=[group]):
                    rows = batch.filter(pc.is_in(batch["post_id"], pa.array(sorted(ids), pa.string()))).to_pylist()
                    found |= {r["post_id"]: r for r in rows}
    return found


def _quantiles(counts: Counter[int]) -> list[int]:
    """The least value that so large a share of the counted numbers does not exceed, for each of QUANTILES."""
    ordered, out = sorted(counts.items()), []
    for share in QUANTILES.values():
        below = 0
        for value, n in ordered:
            below += n
            if below >= share * counts.total():
                out.append(value)
                break
    return out


# --- words and pictures ------------------------------------------------------------------------------------------------


def _asked(stage: str, settings: Mapping[str, Any]) -> list[str]:
    """How each attempt asks, in order."""
    if stage == "augment":
        return [f"reason, temperature {settings['temperature']:g}"] * settings["samples"]
    first, *others = settings["temperatures"]
    return [f"predict, temperature {first:g}", *(f"explain, temperature {t:g}, label given" for t in others)]


def _facts(run: Run, posts: Manifest, recipe: Recipe, models: Mapping[str, int], settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    identity = run.identity
    temperatures = settings.get("temperatures") or [settings["temperature"]]
    names = models if len(models) == 1 else [f"{m} ({n} rationales)" for m, n in models.items()]
    facts = {
        "Stage": "teach (the teacher predicts; where that fails it is given the label and explains)"
        if identity["stage"] == "teach"
        else f"augment (the assistant’s own rationales, {settings['samples']} a post at most, kept where they are right)",
        "Model": f"{', '.join(names) or 'not known: nothing was kept'}; fingerprint {identity['model']}",
        "Prompts": f"contract {recipe.contract.name}, {identity['contract']}",
        "Recipe": recipe.name,
        "Posts": f"posts/{posts.name}, split {identity['split']}; fingerprint {posts.fingerprint}",
        "Sampling": f"temperature {', '.join(f'{t:g}' for t in temperatures)}; top-p {settings['top_p']:g}; seed {identity['seed']}",
        "Answers": f"at most {settings['max_tokens']} tokens, {'held to the form by structured decoding' if settings['guided'] else 'written freely'}",
        "Precision": f"{identity['dtype']}{', quantised: ' + settings['quantization'] if settings.get('quantization') else ''}",
        "Context": f"{identity['max_model_len']} tokens, prompt and answer together",
        "Duplicates": f"share their representative’s rationale; table with fingerprint {identity['duplicates']}"
        if identity.get("duplicates")
        else "each post was asked itself",
        "Retries": f"round {identity['round']} over rejects; the table before has fingerprint {identity['redo']}" if identity.get("redo") else "none",
        "This table": f"{run.prefix}, fingerprint {digest(identity)}",
    }
    return list(facts.items())


def _example(r: Rationale, post: Post) -> dict[str, Any]:
    return _post(post) | {
        "source": r.source.value,
        "attempts": r.attempts,
        "tokens": r.tokens_out,
        "sections": [(words(KEYS[s]), getattr(r, s)) for s in SECTIONS],
    }


def _reject(r: Reject, post: Post) -> dict[str, Any]:
    return _post(post) | {
        "reason": r.reason.value,
        "detail": clip(r.detail),
        "raw": None if r.raw is None else clip(r.raw),
        "attempts": r.attempts,
    }


def _post(post: Post) -> dict[str, Any]:
    image, fault = picture(post)
    gold = None if post.label is None else post.label.value
    return {"post_id": post.post_id, "text": clip(post.text), "aspect": post.aspect, "gold": gold, "picture": image, "fault": fault}
