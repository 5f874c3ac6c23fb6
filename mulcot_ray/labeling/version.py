"""What answers for a night, and what that is called: the student, whom it may ask after it, and the settings that decide a label.

A *version* is named after the student and a digest of all that decides an answer. Labels are kept by content and version: with the same version
no post is asked twice, and with another one all are asked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mulcot_ray.engines.base import ENDPOINT, EngineSpec, engine_spec
from mulcot_ray.engines.pace import Late
from mulcot_ray.engines.work import Explain, LabelWork
from mulcot_ray.labeling.gates import Gates
from mulcot_ray.prompts import Frozen, digest
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.storage import Store


class Escalation(Frozen):
    """Posts whose label is less sure than `below` are asked again of a larger model: the least sure first, at most `share` of the posts of
    the step before. Its answer takes the label's place."""

    role: Literal["assistant", "teacher"]
    model: str
    below: float = Field(gt=0, le=1)  # largest of the three probabilities
    share: float = Field(0.1, gt=0, le=1)


class NightSettings(Frozen):
    """What a night does beside labelling. `explain` and `cascade` decide answers and are part of the version; the rest is not."""

    name: str
    explain: Explain | None = None  # None: labels alone, one prefill a post
    cascade: tuple[Escalation, ...] = ()
    canary: str | None = None  # a posts table with gold, asked along with every night
    late: Late = "defer"  # where deadline or budget would be missed: put the rest off, or leave rationales out first
    gates: Gates = Gates()


@dataclass(frozen=True)
class Answerer:
    """One step of the cascade; the first is the student."""

    role: str
    spec: EngineSpec
    work: LabelWork
    below: float = 1.0
    share: float = 1.0


@dataclass(frozen=True)
class Version:
    """`name` stands in paths and rows; `decides` is all that its digest is made of."""

    name: str
    decides: dict[str, Any]
    chain: tuple[Answerer, ...]


def version_of(
    store: Store, model: str, recipe: Recipe, runtime: Runtime, settings: NightSettings, engines: dict[str, EngineSpec] | None = None
) -> Version:
    """`engines` (by role) stand in for the models' own, in tests. Raises ArtifactMissing or ConfigError for a model that is not there."""
    chain, facts = [], []
    steps = [("student", model, 1.0, 1.0), *((e.role, e.model, e.below, e.share) for e in settings.cascade)]
    for i, (role, name, below, share) in enumerate(steps):
        spec = (engines or {}).get(role) or engine_spec(store, recipe, runtime, role, name)  # type: ignore[arg-type]
        explains = settings.explain if i == 0 else None
        mode: Literal["score", "explain"] = "score" if explains is None else "explain"
        work = LabelWork(recipe.contract, mode, recipe.explain_tokens, recipe.seed, name, spec.temperature, explains or Explain())
        chain.append(Answerer(role, spec, work, below, share))
        facts.append({"role": role, "model": spec.fingerprint, "temperature": spec.temperature, "below": below, "share": share})
    decides = {
        "chain": facts, "contract": recipe.contract.hash, "seed": recipe.seed, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
        "explain": settings.explain and {**settings.explain.model_dump(mode="json"), "tokens": recipe.explain_tokens},
    }  # fmt: skip
    short = Path(model.removeprefix("builtin:").removeprefix(ENDPOINT)).name
    clean = "".join(c if c.isalnum() or c in "_-" else "-" for c in short).strip("-")[:40] or "model"
    return Version(f"{clean}-{digest(decides, 8)}", decides, tuple(chain))
