"""Bulk labels: posts/NAME → predictions/NAME, every row accounted for."""

from __future__ import annotations

from mulcot_ray.artifacts import Manifest, begin, need
from mulcot_ray.console import Progress
from mulcot_ray.engines.base import EngineSpec, Role, engine_spec
from mulcot_ray.engines.chunks import run_chunks
from mulcot_ray.engines.scope import Selection, source_of, target_of
from mulcot_ray.engines.work import LabelWork, Mode
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Split
from mulcot_ray.storage import Store


def label(
    store: Store, name: str, *, posts: str, model: str, recipe: Recipe, runtime: Runtime, mode: Mode = "score", split: Split | None = None,
    role: Role = "student", progress: Progress, engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write predictions/NAME. Returns the manifest, and False where it was there already."""
    source = need(store, "posts", posts)
    spec = engine or engine_spec(store, recipe, runtime, role, model)
    identity = {
        "stage": "label", "posts": source.fingerprint, "split": split, "model": spec.fingerprint, "contract": recipe.contract.hash, "mode": mode,
        "explain_tokens": None if mode == "score" else recipe.explain_tokens, "seed": recipe.seed, "dtype": recipe.dtype,
        "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    run = begin(store, "predictions", name, identity, {"rows_per_chunk": runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run, False
    work = LabelWork(recipe.contract, mode, recipe.explain_tokens, recipe.seed, model, spec.temperature)
    with run:
        tally = run_chunks(target_of(run), source_of(source, split), Selection(split), spec, work, runtime, progress)
        stats = {
            "labels": {k.removeprefix("labels/"): n for k, n in sorted(tally.items()) if k.startswith("labels/")}, "mode": mode, "model": model, "temperature": spec.temperature,
            "tokens": {"in": tally["tokens_in"], "out": tally["tokens_out"]},
            "answers": {k: tally[k] for k in ("scored", "asked", "reused", "spared_tokens_in", "spared_tokens_out")},
        }  # fmt: skip
        return run.commit(tally["rows_in"], stats=stats), True
