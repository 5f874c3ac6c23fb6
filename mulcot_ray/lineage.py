"""From a label back to all that made it: night, model, what the model was trained on, who wrote that, prompts, settings, code.

Everything is read from manifests: each names the fingerprints of its inputs, and the artifacts under the root are found by theirs. What is not
under this root any more (a model that was deleted, a shipped base) is named by its fingerprint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.dataset as ds
from rich.text import Text
from rich.tree import Tree

from mulcot_ray.artifacts import Kind, Manifest, find, need, resolve_model
from mulcot_ray.errors import InputError, MulcotError
from mulcot_ray.labeling.publishing import current, newest
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import HERE
from mulcot_ray.records import Task
from mulcot_ray.storage import Store

DEPTH = 6  # teacher → assistant → rationales → student is four
SHIPPED = HERE / "models"


@dataclass
class Node:
    """Something that made something: what it is, facts about it, and what it was made of. `as_dict` is JSON."""

    what: str
    facts: dict[str, Any] = field(default_factory=dict)
    made_of: list[Node] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"what": self.what, **self.facts, **({"made_of": [n.as_dict() for n in self.made_of]} if self.made_of else {})}


def lineage(store: Store, post_id: str, *, date: str | None = None, aspect: str | None = None, night: str | None = None) -> Node:
    """The label of a post and what made it. Without a date: of the latest published one that has the post.

    `night` names one that need not be published. Reads the post_id column of a night's labels. Raises InputError where the post is nowhere.
    """
    names = (
        [night]
        if night
        else [newest(store, date)]
        if date and date not in current(store)
        else [p.night for d, p in reversed(current(store).items()) if date in (None, d)]
    )
    looked = []
    for name in names:
        manifest = need(store, "nights", name)
        rows = list(_rows(store, manifest, post_id, aspect))
        if len(rows) > 1:
            raise InputError(f"{post_id!r} has {len(rows)} aspects in {name}; say which with --aspect: {', '.join(repr(r['aspect']) for r in rows)}")
        if rows:
            return _label(store, manifest, rows[0])
        looked.append(manifest.stats["date"])
    where = f"{looked[0]} to {looked[-1]}" if len(looked) > 1 else "".join(looked) or "no night: none is published"
    raise InputError(f"no label of post {post_id!r}{f' and aspect {aspect!r}' if aspect else ''} under {store.root} (looked in {where})")


def show(node: Node, tree: Tree | None = None) -> Tree:
    """As a tree for people."""
    text = Text(node.what, style="bold")
    for k, v in node.facts.items():
        text.append(f"\n  {k.replace('_', ' ')}: ", style="dim").append(str(v))
    branch = Tree(text) if tree is None else tree.add(text)
    for n in node.made_of:
        show(n, branch)
    return branch


def _rows(store: Store, manifest: Manifest, post_id: str, aspect: str | None) -> Iterator[dict[str, Any]]:
    wanted = ds.field("post_id") == post_id
    if aspect is not None:
        wanted = wanted & (ds.field("aspect") == aspect)
    for kind in ("labels", "rejects", "deferred", "repeated"):
        parts = [store.path(k) for k in manifest.files if k.startswith(f"{kind}/")]
        if parts and not (kind == "rejects" and aspect is not None):
            table = ds.dataset(parts, filesystem=store.fs, format="parquet")
            for row in table.to_table(filter=wanted).to_pylist():
                yield {"kind": kind, "aspect": None, **row}
            if kind == "labels" and table.count_rows(filter=wanted):
                return


def _label(store: Store, manifest: Manifest, row: Mapping[str, Any]) -> Node:
    s, decides = manifest.stats, manifest.identity["decides"]
    facts: dict[str, Any] = {"post_id": row["post_id"], "aspect": row["aspect"]}
    if row["kind"] == "labels":
        facts |= {"label": row["label"], "probabilities": {k: round(row[k], 4) for k in ("negative", "neutral", "positive") if row[k] is not None}}
        facts |= {"answered_by": row["answered_by"], "fate": row["fate"], "asked_for_the_night_of": row["scored_on"], "copied_of": row["copied_of"]}
        facts |= {"content": row["content"], "rationale": row["final_conclusion"]}
        role = row["answered_by"]
    elif row["kind"] == "rejects":
        facts |= {"rejected_because": row["reason"], "detail": row["detail"], "stage": row["stage"]}
        role = "student"
    else:
        facts |= {"kind": row["kind"], "content": row["content"], "of": row["of"]}
        role = "student"
    root = Node(
        f"label of {row['post_id']}" if row["kind"] == "labels" else f"{row['post_id']} has no label",
        {k: v for k, v in facts.items() if v is not None},
    )
    entry = current(store).get(s["date"])
    state = "published" + (" by force" if entry.forced else "") if entry is not None and entry.night == manifest.name else "not published"
    root.made_of.append(Node(f"night {manifest.name}", {
        "date": s["date"], "state": state, "input": s["input"], "rows": manifest.rows_in, "finished": manifest.finished,
        "code": manifest.commit, "versions": ", ".join(f"{k} {v}" for k, v in manifest.versions.items()),
    }))  # fmt: skip
    step = next((c for c in decides["chain"] if c["role"] == role), decides["chain"][0])
    model = _model(store, step["model"], role, DEPTH)
    model.facts |= {"calibration_temperature": step["temperature"], "seed": decides["seed"], "dtype": decides["dtype"]}
    root.made_of += [model, _contract(store, manifest.name, decides["contract"])]
    return root


def _model(store: Store, fingerprint: str, role: str, depth: int) -> Node:
    """A model and what it was trained on."""
    made = _by_fingerprint(store, "models", fingerprint)
    if made is None:
        return Node(f"{role}: {_shipped(store, fingerprint) or f'a model that is not under this root ({fingerprint})'}")
    i = made.identity
    found = {k: round(v, 4) for k, v in made.stats.items() if k in ("accuracy", "macro_f1") and isinstance(v, float)}
    node = Node(f"{role}: models/{made.name}", {
        "fingerprint": fingerprint, "trained": made.finished, "tasks": ", ".join(i["tasks"]), "settings": i["train"], "seed": i["seed"],
        "validation": found or None, "distillation": i["distill"], "code": made.commit,
    })  # fmt: skip
    node.facts = {k: v for k, v in node.facts.items() if v is not None}
    if depth:
        node.made_of.append(_model(store, i["base"], "base", 0))
        node.made_of.append(_posts(store, i["posts"]))
        node.made_of += [_rationales(store, r, depth - 1) for r in i["rationales"] or ()]
        if i["assistant"]:
            node.made_of.append(_model(store, i["assistant"], "soft labels from the assistant", depth - 1))
    return node


def _rationales(store: Store, fingerprint: str, depth: int) -> Node:
    made = _by_fingerprint(store, "rationales", fingerprint)
    if made is None:
        return Node(f"rationales that are not under this root ({fingerprint})")
    i = made.identity
    node = Node(
        f"rationales/{made.name}",
        {"stage": i["stage"], "rows": made.rows, "rejects": made.rejects, "sources": made.stats.get("sources"), "contract": i["contract"]},
    )
    if "model" in i and depth:
        who = "teacher" if i["stage"] == "teach" else "assistant"
        node.made_of.append(_model(store, i["model"], who, depth) if i["stage"] != "import" else Node(f"written by {i['model']} (imported)"))
    return node


def _posts(store: Store, fingerprint: str) -> Node:
    made = _by_fingerprint(store, "posts", fingerprint)
    if made is None:
        return Node(f"posts that are not under this root ({fingerprint})")
    return Node(f"posts/{made.name}", {"rows": made.rows, "format": made.identity.get("format"), "splits": made.stats.get("splits")})


def _contract(store: Store, night: str, wanted: str) -> Node:
    """The prompts, from the contract that the night has kept."""
    contract = Contract.model_validate_json(store.read(f"nights/{night}/contract.json") or b"{}")
    prompt = contract.msc[Task.CLASSIFICATION]
    facts = {"instruction": prompt.instruction, "post": prompt.post, "label_words": ", ".join(contract.label_words.values())}
    return Node(f"contract {contract.name} ({wanted})", facts)


def _shipped(store: Store, fingerprint: str) -> str | None:
    for folder in sorted(SHIPPED.glob("*/config.json")):
        name = f"builtin:{folder.parent.name}"
        if resolve_model(store, name)[1] == fingerprint:
            return f"{name}, shipped with mulcot-ray"
    return None


def _by_fingerprint(store: Store, kind: Kind, fingerprint: str) -> Manifest | None:
    """The artifact of a kind with this fingerprint. Reads the manifests of the kind until it is found."""
    for name in store.names(kind):
        try:
            made = find(store, kind, name)
        except MulcotError:  # of another version of this software: not what we look for
            continue
        if made is not None and made.fingerprint == fingerprint:
            return made
    return None
