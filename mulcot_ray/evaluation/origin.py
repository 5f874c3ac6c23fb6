"""Where a result comes from, in words: the tables and models behind a report, and the commands that would make it again."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from mulcot_ray.artifacts import Manifest, find, resolve_model
from mulcot_ray.errors import ArtifactError
from mulcot_ray.html import duration, number, percent
from mulcot_ray.recipe import HERE, load_recipe
from mulcot_ray.records import Split
from mulcot_ray.storage import Store

Facts = Mapping[str, Any]  # a manifest as it stands in a report's lineage, without its list of files
Line = tuple[str, str, str]  # what, what is known of it, how it was made
TABLES = {
    "posts": "Posts", "answers": "Answers", "a": "Answers A", "b": "Answers B", "references": "References", "calibration": "Calibrated on",
    "duplicates": "Duplicates",
}  # fmt: skip
MODES = {
    "score": "label words scored, no rationale asked for",
    "explain": "label words scored, then a rationale written",
    "generate": "the whole answer written, and the label taken from it",
}


def who(answers: Facts) -> str:
    """The model that answered (of a path its last part), or else the name of the answers."""
    return str(answers["stats"].get("model") or answers["name"]).rstrip("/").rpartition("/")[2]


class Origin:
    """The lineage of a report. Fingerprints of models and rationales are looked up among those under the root and the shipped ones."""

    def __init__(self, store: Store, lineage: Mapping[str, Facts]) -> None:
        self.lineage = lineage
        self.contract = lineage.get("contract")
        self.model = lineage.get("model")
        self.known = dict(_known(store)) if self.model or any(self._asked(k) for k in ("answers", "a", "b")) else {}

    def rows(self) -> list[Line]:
        found = [(TABLES[key], _table(m), _made(m)) for key, m in self.lineage.items() if key in TABLES]
        if self.model:
            found += self._trained(self.model)
        for key in ("answers", "a", "b"):
            if (asked := self._asked(key)) and not (key == "answers" and self.model):
                found.append(("Model" + (f" {key.upper()}" if key != "answers" else ""), f"{asked[0]}, {self.name(asked[1])}", ""))
        if self.contract:
            found.append(("Prompts", f"contract {', '.join(self.contract.values())}", ""))
        return found

    def commands(self) -> list[str]:
        """Shell lines from the posts to the answers; a step whose inputs are not known by name is left out."""
        posts = self.lineage["posts"]
        p, identity = shlex.quote(posts["name"]), posts["identity"]
        lines = [f"export MULCOT_RECIPE={_recipe(self.contract)}"] if self.contract else []
        if identity.get("format") == "sample":
            lines.append("mulcot demo  # among the rest it makes the sample corpus")
        elif identity.get("stage") == "import":
            lines.append(f"mulcot import FILES --format {identity.get('format', 'FORMAT')} --name {p}")
        lines += self._train_command(p)
        for key in ("answers", "a", "b"):
            m = self.lineage.get(key)
            if (asked := self._asked(key)) and m:
                split = f" --split {m['identity']['split']}" if m["identity"].get("split") else ""
                model, name = shlex.quote(asked[0]), shlex.quote(m["name"])
                lines.append(f"mulcot label --posts {p}{split} --model {model} --mode {m['identity']['mode']} --name {name}")
        return lines

    def seen(self, split: str | None) -> str:
        """What the model under the root learned from the posts of this split (None: all), in words; empty where it did not."""
        if not self.model or self.model["identity"].get("posts") != self.lineage["posts"]["fingerprint"] or split == Split.TEST:
            return ""
        if split == Split.VALIDATION:
            return "The best epoch was chosen by these posts, so the figures are better than they would be on others."
        return f"{'They are' if split == Split.TRAIN else 'Among them are'} the posts that it was trained on: the figures say little about others."

    def name(self, fingerprint: str) -> str:
        """models/NAME or the like; the bare fingerprint of what is not here."""
        found = self.known.get(fingerprint)
        if found is None:
            return f"fingerprint {fingerprint}"
        return f"{found.kind}/{found.name}" if isinstance(found, Manifest) else found

    def _asked(self, key: str) -> tuple[str, str] | None:
        """Model and fingerprint of predictions that the labeler made."""
        m = self.lineage.get(key)
        if not m or m["identity"].get("stage") != "label" or "model" not in m["stats"]:
            return None
        return m["stats"]["model"], m["identity"]["model"]

    def _trained(self, m: Facts) -> Iterator[Line]:
        identity, stats = m["identity"], m["stats"]
        best = f"; best of {identity['train']['epochs']} epochs: {stats['epoch']}" if "train" in identity and "epoch" in stats else ""
        score = f", validation accuracy {percent(stats['accuracy'])}" if "accuracy" in stats else ""
        yield "Model", f"models/{m['name']}, trained on {number(m['rows_in'])} rows{best}{score}", _made(m)
        if "train" not in identity:  # a model that was brought, not trained here
            return
        same = identity["posts"] == self.lineage["posts"]["fingerprint"]
        posts = f"posts/{self.lineage['posts']['name']}" if same else f"posts with fingerprint {identity['posts']}"
        yield "Training", f"on split train of {posts}; {_recipe_facts(identity)}", ""
        yield "Base", self.name(identity["base"]), ""
        if identity["assistant"]:
            yield "Soft labels from", self.name(identity["assistant"]), ""
        for fingerprint in identity["rationales"] or ():
            r = self.known.get(fingerprint)
            facts = f": {number(r.rows)} of {number(r.rows_in)} posts, by {self.name(r.identity.get('model', ''))}" if isinstance(r, Manifest) else ""
            yield "Rationales", self.name(fingerprint) + facts, _made(r.model_dump()) if isinstance(r, Manifest) else ""

    def _train_command(self, posts: str) -> Iterator[str]:
        identity = self.model["identity"] if self.model else {}
        if not self.model or identity.get("stage") != "train":
            return
        inputs = [self.known.get(f) for f in [*(identity["rationales"] or ()), *([identity["assistant"]] if identity["assistant"] else ())]]
        if not all(isinstance(m, Manifest) for m in inputs):
            return
        names = [shlex.quote(m.name) for m in inputs if isinstance(m, Manifest)]
        tables = names[:-1] if identity["assistant"] else names
        given = "".join(f" --rationales {n}" for n in tables) + (f" --assistant {names[-1]}" if identity["assistant"] else "")
        command = "student" if identity["assistant"] or not names else "assistant"
        yield f"mulcot {command} --posts {posts}{given or ' --labels-only'} --name {shlex.quote(self.model['name'])}"


def _known(store: Store) -> Iterator[tuple[str, Manifest | str]]:
    for folder in sorted(p.parent.name for p in (HERE / "models").glob("*/config.json")):
        yield resolve_model(store, f"builtin:{folder}")[1], f"builtin:{folder}"
    for kind in ("rationales", "models"):
        for name in store.names(kind):
            with contextlib.suppress(ArtifactError):  # a manifest of another version explains nothing, and is no reason to fail
                if m := find(store, "rationales" if kind == "rationales" else "models", name):
                    yield m.fingerprint, m


def _recipe(contract: Facts) -> str:
    """A built-in recipe with this contract, or else a name to fill in."""
    names = sorted(p.stem for p in (HERE / "recipes").glob("*.yaml"))
    return next((n for n in names if load_recipe(n).contract.hash == contract["hash"]), "RECIPE.yaml")


def _table(m: Facts) -> str:
    identity, stats = m["identity"], m["stats"]
    parts = [f"{m['kind']}/{m['name']}: {number(m['rows'])} rows" + (f", {number(m['rejects'])} rejects" if m["rejects"] else "")]
    if splits := stats.get("splits"):
        parts.append(", ".join(f"{number(n)} {split}" for split, n in splits.items()))
    if (mode := identity.get("mode")) in MODES:
        parts.append(MODES[mode])
    if identity.get("split"):
        parts.append(f"split {identity['split']}")
    parts += [f"{key} {identity[key]}" for key in ("seed", "dtype") if key in identity]
    return "; ".join(parts)


def _made(m: Facts) -> str:
    commit = f", source {m['commit']}" if m["commit"] else ""
    return f"{m['identity'].get('stage', m['kind'])}, {m['finished'][:10]}, in {duration(m['seconds'])}{commit}; fingerprint {m['fingerprint']}"


def _recipe_facts(identity: Facts) -> str:
    t, d = identity["train"], identity["distill"]
    how = f"LoRA of rank {t['lora']['r']}, alpha {t['lora']['alpha']:g}" if t["lora"] else "all weights"
    soft = f"; soft labels with λ {d['lam']:g} and T {d['temperature']:g}" if d else ""
    return (
        f"{how}; learning rate {t['lr']:g}, {t['schedule']} schedule; {t['global_batch']} posts a step, {t['epochs']} epochs; {identity['dtype']}, "
        f"seed {identity['seed']}; tasks: {', '.join(identity['tasks'])}{soft}"
    )
