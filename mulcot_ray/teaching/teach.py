"""Stage 1: the teacher writes rationales over the training posts (METHOD: D_rea^t).

Per post: predict (no label in the prompt); if the answer is complete and ends on the gold label it is kept. If not, explain: the
gold label is given and the answer must end on it, at a rising temperature, a bounded number of times. What never succeeds is a
Reject with the last fault. One engine serves all attempts of a post, so the picture and instruction are cached between them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from mulcot_ray.artifacts import Manifest, Run, begin, need, resolve_model
from mulcot_ray.engines.ask import as_rationale, ask, row_seed
from mulcot_ray.engines.base import Engine, EngineSpec, Sampling, spec
from mulcot_ray.engines.chunks import Progress, run_chunks
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Recipe, Runtime, Teach
from mulcot_ray.records import Post, Prediction, Rationale, Reason, Source, Split, Task
from mulcot_ray.storage import Store


@dataclass(frozen=True)
class TeachWork:
    """The label-aware loop for one post."""

    contract: Contract
    settings: Teach
    seed: int
    model: str

    kind: ClassVar[type[Rationale] | type[Prediction]] = Rationale

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Rationale:
        if post.label is None:
            raise RowFault(Reason.NO_LABEL, "teaching needs a gold label")
        fault, tokens_in, tokens_out = None, 0, 0
        for attempt, temperature in enumerate(self.settings.temperatures):
            task, given = (Task.PREDICT, None) if attempt == 0 else (Task.EXPLAIN, post.label)
            sampling = Sampling(self.settings.max_tokens, temperature, self.settings.top_p, row_seed(self.seed, post.post_id, attempt))
            try:
                answer, done = await ask(engine, self.contract, task, post, image, sampling, given)
            except RowFault as f:
                if f.raw is None:  # the prompt is at fault, not the answer: asking again cannot help
                    raise
                fault = f
                continue
            tokens_in, tokens_out = tokens_in + done.tokens_in, tokens_out + done.tokens_out
            if answer.label is post.label:
                source = Source.PREDICTED if attempt == 0 else Source.EXPLAINED
                return as_rationale(post, source, self.model, self.contract, answer, done, attempt + 1, (tokens_in, tokens_out))
            fault = RowFault(Reason.LABEL_MISMATCH, f"says {answer.label}, gold is {post.label}", done.text)
        assert fault is not None
        raise RowFault(fault.reason, f"{len(self.settings.temperatures)} attempts; the last: {fault.detail}", fault.raw)


def teach(
    store: Store,
    name: str,
    *,
    posts: str,
    recipe: Recipe,
    runtime: Runtime,
    split: Split = Split.TRAIN,
    progress: Progress,
    engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:
    """Write rationales/NAME from posts/POSTS. Returns the manifest, and False where it was there already."""
    source = need(store, "posts", posts)
    model, fingerprint = resolve_model(store, recipe.models.teacher)
    identity = {
        "stage": "teach", "posts": source.fingerprint, "split": split, "model": fingerprint, "contract": recipe.contract.hash,
        "teach": recipe.teach.model_dump(mode="json"), "seed": recipe.seed, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    work = TeachWork(recipe.contract, recipe.teach, recipe.seed, recipe.models.teacher)
    return write_rationales(store, name, source, split, identity, engine or spec(recipe, runtime, "teacher", str(model)), work, runtime, progress)


def write_rationales(
    store: Store,
    name: str,
    posts: Manifest,
    split: Split,
    identity: dict[str, Any],
    engine: EngineSpec,
    work: Any,
    runtime: Runtime,
    progress: Progress,
) -> tuple[Manifest, bool]:
    """Run the work over the posts and commit the table, with counts by source, attempts and label, and tokens."""
    run = begin(store, "rationales", name, identity, {"rows_per_chunk": runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run, False
    with run:
        total = run_chunks(run, posts, split, engine, work, runtime, progress)
        return run.commit(total, stats=_stats(run)), True


def _stats(run: Run) -> dict[str, Any]:
    counts: dict[str, Counter[str]] = {"sources": Counter(), "labels": Counter(), "attempts": Counter()}
    tokens: Counter[str] = Counter()
    for r in run.written(["source", "prediction", "attempts", "tokens_in", "tokens_out"]):
        counts["sources"][r["source"]] += 1
        counts["labels"][r["prediction"]] += 1
        counts["attempts"][str(r["attempts"])] += 1
        tokens["in"] += r["tokens_in"]
        tokens["out"] += r["tokens_out"]
    return {**{k: dict(sorted(v.items())) for k, v in counts.items()}, "tokens": dict(tokens)}
