"""Bulk labels: posts/NAME → predictions/NAME, every row accounted for.

`score` weighs the label words after one prefill: label and probabilities, no text. `explain` adds a rationale by the reasoning
prompt; a rationale that fails is recorded beside the label, which stands. `generate` lets the model write the whole answer by the
predict prompt, as a teacher does, and takes the label from it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from PIL import Image

from mulcot_ray.artifacts import Manifest, Store, begin, need, resolve_model
from mulcot_ray.engines.ask import ask, row_seed, score
from mulcot_ray.engines.base import Engine, EngineSpec, Sampling, spec
from mulcot_ray.engines.chunks import Progress, run_chunks
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Split, Task

Mode = Literal["score", "explain", "generate"]


@dataclass(frozen=True)
class LabelWork:
    """One post's prediction. The endpoint uses the same object, so that both give the same label."""

    contract: Contract
    mode: Mode
    max_tokens: int
    seed: int
    model: str

    kind: ClassVar[type[Prediction]] = Prediction

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Prediction:
        sampling = Sampling(self.max_tokens, seed=row_seed(self.seed, post.post_id, 0))
        if self.mode == "generate":
            answer, done = await ask(engine, self.contract, Task.PREDICT, post, image, sampling)
            return Prediction(
                post.post_id, answer.label, self.model, self.contract.hash, stated=answer.label, finish_reason=done.finish_reason,
                tokens_in=done.tokens_in, tokens_out=done.tokens_out, **{s: answer.sections[s] for s in SECTIONS},
            )  # fmt: skip
        scores = await score(engine, self.contract, post, image)
        p = scores.probabilities
        rationale: dict[str, Any] = {}
        if self.mode == "explain":
            try:
                answer, done = await ask(engine, self.contract, Task.REASONING, post, image, sampling)
                rationale = {**{s: answer.sections[s] for s in SECTIONS}, "stated": answer.label, "finish_reason": done.finish_reason, "tokens_out": done.tokens_out}
            except RowFault as f:
                if f.raw is None:
                    raise
                rationale = {"rationale_fault": f"{f.reason}: {f.detail}"}
        return Prediction(
            post.post_id, LABELS[p.index(max(p))], self.model, self.contract.hash, *p, label_mass=scores.mass, tokens_in=scores.tokens_in, **rationale
        )


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
        return run.commit(total, stats={"labels": _labels(store, name), "mode": mode, "model": model}), True


def _labels(store: Store, name: str) -> dict[str, int]:
    import pyarrow.dataset as ds

    files = [store.path(f"predictions/{name}/{f}") for f in store.files(f"predictions/{name}") if f.endswith(".parquet") and "/" not in f]
    counts: Counter[str] = Counter()
    for batch in ds.dataset(files, filesystem=store.fs).to_batches(columns=["label"]):
        counts.update(batch["label"].to_pylist())
    return dict(sorted(counts.items()))
