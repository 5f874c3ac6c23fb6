"""Stage 3: the assistant's own rationales (METHOD: D_rea^a). Sampled over the training posts, kept where they end on the gold label."""

from __future__ import annotations

from mulcot_ray.artifacts import Manifest, need
from mulcot_ray.console import Progress
from mulcot_ray.engines.base import EngineSpec, engine_spec
from mulcot_ray.engines.scope import Selection
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Source, Split, Task
from mulcot_ray.storage import Store
from mulcot_ray.teaching.rationales import Attempt, RationaleWork, write_rationales


def augment(
    store: Store, name: str, *, posts: str, model: str, recipe: Recipe, runtime: Runtime, split: Split = Split.TRAIN, progress: Progress,
    engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write rationales/NAME sampled from the trained assistant MODEL over posts/POSTS."""
    source = need(store, "posts", posts)
    spec = engine or engine_spec(store, recipe, runtime, "assistant", model)
    a = recipe.augment
    identity = {
        "stage": "augment", "posts": source.fingerprint, "split": split, "model": spec.fingerprint, "contract": recipe.contract.hash,
        "augment": a.model_dump(mode="json"), "seed": recipe.seed, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    attempts = (Attempt(Task.REASONING, a.temperature, Source.AUGMENTED),) * a.samples
    work = RationaleWork(recipe.contract, attempts, a.top_p, a.max_tokens, a.guided, (), recipe.seed, model)
    return write_rationales(store, name, source, Selection(split), identity, spec, work, recipe, runtime, progress)
