"""Bulk labels: posts/NAME → predictions/NAME, every row accounted for."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from mulcot_ray.artifacts import Manifest, begin, need, resolve_model
from mulcot_ray.engines.base import EngineSpec, spec
from mulcot_ray.engines.chunks import Progress, run_chunks
from mulcot_ray.engines.work import LabelWork, Mode
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Split
from mulcot_ray.storage import Store


def label(
    store: Store, name: str, *, posts: str, model: str, recipe: Recipe, runtime: Runtime, mode: Mode = "score", split: Split | None = None,
    role: Literal["teacher", "assistant", "student"] = "student", progress: Progress, engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write predictions/NAME. Returns the manifest, and False where it was there already."""
    source = need(store, "posts", posts)
    folder, fingerprint = resolve_model(store, model)
    identity = {
        "stage": "label", "posts": source.fingerprint, "split": split, "model": fingerprint, "contract": recipe.contract.hash, "mode": mode,
        "explain_tokens": None if mode == "score" else recipe.explain_tokens, "seed": recipe.seed, "dtype": recipe.dtype,
        "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    run = begin(store, "predictions", name, identity, {"rows_per_chunk": runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run, False
    work = LabelWork(recipe.contract, mode, recipe.explain_tokens, recipe.seed, model)
    with run:
        total = run_chunks(run, source, split, engine or spec(recipe, runtime, role, str(folder)), work, runtime, progress)
        labels = Counter(r["label"] for r in run.written(["label"]))
        return run.commit(total, stats={"labels": dict(sorted(labels.items())), "mode": mode, "model": model}), True
