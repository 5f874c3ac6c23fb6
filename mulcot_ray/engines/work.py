"""One post to one Prediction: the same object in the bulk labeler and behind the endpoint, so that both give the same label.

`score` weighs the label words after one prefill: label and probabilities, no text. `explain` adds a rationale by the reasoning
prompt; a rationale that fails is recorded beside the label, which stands. `generate` lets the model write the whole answer by the
predict prompt, as a teacher does, and takes the label from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from PIL import Image

from mulcot_ray.engines.ask import ask, row_seed, score
from mulcot_ray.engines.base import Completion, Engine, Sampling
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Answer, Contract
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Task

Mode = Literal["score", "explain", "generate"]


@dataclass(frozen=True)
class LabelWork:
    """Settings of the answer; `model` is recorded in the row, `max_tokens` bounds a rationale."""

    contract: Contract
    mode: Mode
    max_tokens: int
    seed: int
    model: str

    kind: ClassVar[type[Rationale] | type[Prediction]] = Prediction

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Prediction:
        sampling = Sampling(self.max_tokens, seed=row_seed(self.seed, post.post_id, 0))
        if self.mode == "generate":
            answer, done = await ask(engine, self.contract, Task.PREDICT, post, image, sampling)
            return Prediction(post.post_id, answer.label, self.model, self.contract.hash, tokens_in=done.tokens_in, **_written(answer, done))
        scores = await score(engine, self.contract, post, image)
        p = scores.probabilities
        rationale: dict[str, Any] = {}
        if self.mode == "explain":
            try:
                rationale = _written(*await ask(engine, self.contract, Task.REASONING, post, image, sampling))
            except RowFault as f:
                if f.raw is None:  # the post is at fault, not the answer
                    raise
                rationale = {"rationale_fault": f"{f.reason}: {f.detail}"}
        best = LABELS[p.index(max(p))]
        return Prediction(post.post_id, best, self.model, self.contract.hash, *p, label_mass=scores.mass, tokens_in=scores.tokens_in, **rationale)


def _written(answer: Answer, done: Completion) -> dict[str, Any]:
    """The columns of a written answer."""
    sections = {s: answer.sections[s] for s in SECTIONS}
    return {**sections, "stated": answer.label, "finish_reason": done.finish_reason, "tokens_out": done.tokens_out}
