"""Stage 1: the teacher writes rationales over the training posts (METHOD: D_rea^t).

Per post: predict (no label in the prompt); if the answer is sound and ends on the gold label it is kept. If not, explain: the
gold label is given and the answer must end on it, at a rising temperature, a bounded number of times.
"""

from __future__ import annotations

from mulcot_ray.artifacts import Manifest, need
from mulcot_ray.console import Progress
from mulcot_ray.engines.base import EngineSpec, engine_spec
from mulcot_ray.engines.scope import Selection
from mulcot_ray.errors import ConfigError
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Source, Split, Task
from mulcot_ray.storage import Store
from mulcot_ray.teaching.rationales import Attempt, RationaleWork, round_of, write_rationales


def teach(
    store: Store, name: str, *, posts: str, recipe: Recipe, runtime: Runtime, split: Split = Split.TRAIN, retry_rejects: str | None = None,
    duplicates: str | None = None, progress: Progress, engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write rationales/NAME from posts/POSTS. Returns the manifest, and False where it was there already.

    `retry_rejects` names an earlier table: its rows are taken over, and only its rejects are asked again, with new seeds. `duplicates`
    names a duplicates table: a duplicate with its representative's gold label gets its representative's rationale.
    Raises ConfigError for the splits that a model is judged on: explain shows the gold label.
    """
    if split in (Split.VALIDATION, Split.TEST):
        raise ConfigError(f"split {split}: the teacher is shown gold labels, so it writes over training posts only; `mulcot label` asks without gold")
    source = need(store, "posts", posts)
    redo = need(store, "rationales", retry_rejects) if retry_rejects is not None else None
    apart = need(store, "duplicates", duplicates) if duplicates is not None else None
    if apart is not None and apart.identity["posts"] != source.fingerprint:
        raise ConfigError(f"duplicates {duplicates!r} were found among other posts than {posts!r}")
    spec = engine or engine_spec(store, recipe, runtime, "teacher", recipe.models.teacher)
    t = recipe.teach
    identity = {
        "stage": "teach", "posts": source.fingerprint, "split": split, "model": spec.fingerprint, "contract": recipe.contract.hash,
        "teach": t.model_dump(mode="json"), "seed": recipe.seed, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
        "duplicates": apart.fingerprint if apart else None, "round": round_of(redo),
    }  # fmt: skip
    tasks = [(Task.PREDICT, Source.PREDICTED), *[(Task.EXPLAIN, Source.EXPLAINED)] * (len(t.temperatures) - 1)]
    attempts = tuple(Attempt(task, temperature, source) for (task, source), temperature in zip(tasks, t.temperatures, strict=True))
    work = RationaleWork(
        recipe.contract, attempts, t.top_p, t.max_tokens, t.guided, t.leaks, recipe.seed, recipe.models.teacher, round_of(redo) * len(attempts)
    )  # fmt: skip
    return write_rationales(store, name, source, Selection(split, redo, apart), identity, spec, work, recipe, runtime, progress)
