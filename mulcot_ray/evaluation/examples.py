"""The posts that a page shows: which ones, with what was answered and, side by side, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mulcot_ray.artifacts import Manifest, find, need
from mulcot_ray.evaluation.origin import who
from mulcot_ray.evaluation.tally import BUILT_IN_SLICES
from mulcot_ray.html import words
from mulcot_ray.posts.shown import clip, picture, rows_by_id
from mulcot_ray.prompts import KEYS
from mulcot_ray.records import LABELS, SECTIONS, Post, Source, from_row
from mulcot_ray.storage import Store

Example = dict[str, Any]
KINDS = {"wrong": "wrong, and sure of it", "unsure": "unsure", "right": "right, and sure of it"}
NAME = 80  # characters of an aspect or of a value of meta shown
TOLD = {Source.EXPLAINED: "was given the label", Source.IMPORTED: "may have seen the label"}


def model_examples(store: Store, report: Mapping[str, Any], teacher: str | None, count: int) -> list[Example]:
    """Up to `count` of a report's examples, a third each of the surest wrong, the least sure and the surest right answers where there are as many.

    Beside each stands what `teacher` wrote (rationales of that name, or else predictions), or else the reference of the report.
    Raises ArtifactMissing where a table is gone.
    """
    chosen = _choose(report["examples"], count)
    ids = [e["post_id"] for _, e in chosen]
    answers, other = _table(store, report["answers"]), _beside(store, report, teacher)
    said, told = rows_by_id(store, answers, ids), rows_by_id(store, other, ids) if other else {}
    names = (who(report["lineage"]["answers"]), other.name if other else "")
    meta = [s for s in report["slices"] if s not in BUILT_IN_SLICES]
    return [
        shown | {"kind": KINDS[kind] if e["confidence"] is not None else kind, "right": e["label"] == e["gold"]} | _side_by_side(names, said[i], told.get(i))
        for (kind, e), shown in zip(chosen, _posts(store, report, ids, meta), strict=True)
        for i in [e["post_id"]]
    ]  # fmt: skip


def disagreements(store: Store, report: Mapping[str, Any]) -> list[Example]:
    """The examples of a comparison, with both answers. Raises ArtifactMissing where a table is gone."""
    ids = [e["post_id"] for e in report["examples"]]
    tables = [_table(store, report[x]) for x in ("a", "b")]
    rows = [rows_by_id(store, t, ids) for t in tables]
    names = (tables[0].name, tables[1].name)
    return [
        shown | {"a": e["a"], "b": e["b"], "who": e["right"]} | _side_by_side(names, rows[0][e["post_id"]], rows[1][e["post_id"]])
        for e, shown in zip(report["examples"], _posts(store, report, ids, []), strict=True)
    ]


def _choose(examples: Mapping[str, list[Example]], count: int) -> list[tuple[str, Example]]:
    """One of each kind in turn, no post twice; then the kinds in the order of KINDS."""
    queues = {kind: list(examples[kind]) for kind in KINDS}
    chosen: dict[str, tuple[str, Example]] = {}
    while any(queues.values()) and len(chosen) < count:
        for kind, queue in queues.items():
            e = next((e for e in queue if e["post_id"] not in chosen), None)
            queues[kind] = queue[queue.index(e) + 1 :] if e else []
            if e and len(chosen) < count:
                chosen[e["post_id"]] = (kind, e)
    return sorted(chosen.values(), key=lambda x: list(KINDS).index(x[0]))


def _table(store: Store, shown: str) -> Manifest:
    """Of "predictions/NAME" or "rationales/NAME"."""
    kind, _, name = shown.partition("/")
    return need(store, "rationales" if kind == "rationales" else "predictions", name)


def _beside(store: Store, report: Mapping[str, Any], teacher: str | None) -> Manifest | None:
    if teacher is not None:
        return find(store, "rationales", teacher) or need(store, "predictions", teacher)
    return _table(store, report["references"]) if report["references"] else None


def _posts(store: Store, report: Mapping[str, Any], ids: list[str], meta: list[str]) -> Iterator[Example]:
    rows = rows_by_id(store, need(store, "posts", report["posts"]), ids)
    for i in ids:
        post = from_row(Post, rows[i])
        image, fault = picture(post)
        yield {
            "post_id": i, "text": clip(post.text), "aspect": None if post.aspect is None else clip(post.aspect, NAME), "gold": post.label.value if post.label else None, "image": image,
            "fault": fault, "tags": [clip(post.meta[m], NAME) for m in meta if m in post.meta],
        }  # fmt: skip


def _side_by_side(names: tuple[str, str], first: Mapping[str, Any], second: Mapping[str, Any] | None) -> Example:
    """label, probabilities and fault of the first answer; the rationales of both as sections [(header, texts)] under names, where there are any."""
    rows = [(n, r) for n, r in zip(names, (first, second), strict=True) if r and all(r[s] for s in SECTIONS)]
    sections = [(words(KEYS[s]), [clip(r[s]) for _, r in rows]) for s in SECTIONS]
    return {
        "label": _label(first),
        "stated": first.get("stated"),
        "fault_of_rationale": first.get("rationale_fault"),
        "probabilities": [(s.value, first[s]) for s in reversed(LABELS)] if first.get(LABELS[0]) is not None else [],
        "sections": [*sections, ("Prediction", [r.get("stated") or _label(r) for _, r in rows])] if rows else [],
        "names": [n + (f", who {TOLD[Source(r['source'])]}" if r.get("source") in TOLD else "") for n, r in rows],
    }


def _label(row: Mapping[str, Any]) -> str:
    return str(row["label"] if "label" in row else row["prediction"])
