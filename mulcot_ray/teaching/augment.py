"""Stage 3: the assistant's own rationales (METHOD: D_rea^a). Sampled over the training posts, kept where they end on the gold label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from mulcot_ray.artifacts import Manifest, need, resolve_model
from mulcot_ray.engines.ask import as_rationale, ask, row_seed
from mulcot_ray.engines.base import Engine, EngineSpec, Sampling, spec
from mulcot_ray.engines.chunks import Progress
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Augment, Recipe, Runtime
from mulcot_ray.records import Post, Prediction, Rationale, Reason, Source, Split, Task
from mulcot_ray.storage import Store
from mulcot_ray.teaching.teach import write_rationales


@dataclass(frozen=True)
class AugmentWork:
    """Samples for one post until one is right."""

    contract: Contract
    settings: Augment
    seed: int
    model: str

    kind: ClassVar[type[Rationale] | type[Prediction]] = Rationale

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Rationale:
        if post.label is None:
            raise RowFault(Reason.NO_LABEL, "augmentation keeps what ends on the gold label, and there is none")
        fault, tokens_in, tokens_out = None, 0, 0
        for sample in range(self.settings.samples):
            s = Sampling(self.settings.max_tokens, self.settings.temperature, self.settings.top_p, row_seed(self.seed, post.post_id, sample))
            try:
                answer, done = await ask(engine, self.contract, Task.REASONING, post, image, s)
            except RowFault as f:
                if f.raw is None:
                    raise
                fault = f
                continue
            tokens_in, tokens_out = tokens_in + done.tokens_in, tokens_out + done.tokens_out
            if answer.label is post.label:
                return as_rationale(post, Source.AUGMENTED, self.model, self.contract, answer, done, sample + 1, (tokens_in, tokens_out))
            fault = RowFault(Reason.LABEL_MISMATCH, f"says {answer.label}, gold is {post.label}", done.text)
        assert fault is not None
        raise fault


def augment(
    store: Store, name: str, *, posts: str, model: str, recipe: Recipe, runtime: Runtime, split: Split = Split.TRAIN, progress: Progress,
    engine: EngineSpec | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write rationales/NAME sampled from the trained assistant MODEL over posts/POSTS."""
    source = need(store, "posts", posts)
    folder, fingerprint = resolve_model(store, model)
    identity = {
        "stage": "augment", "posts": source.fingerprint, "split": split, "model": fingerprint, "contract": recipe.contract.hash,
        "augment": recipe.augment.model_dump(mode="json"), "seed": recipe.seed, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    work = AugmentWork(recipe.contract, recipe.augment, recipe.seed, model)
    return write_rationales(store, name, source, split, identity, engine or spec(recipe, runtime, "assistant", str(folder)), work, runtime, progress)
