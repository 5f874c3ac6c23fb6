"""One post to one Prediction: the same object in the bulk labeler and behind the endpoint, so that both give the same label.

`score` weighs the label words after one prefill: label and calibrated probabilities, no text. `explain` adds a rationale by the reasoning
prompt; a rationale that fails is recorded beside the label, which stands. `generate` lets the model write the whole answer by the
predict prompt, as a teacher does, and takes the label from it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from PIL import Image

from mulcot_ray.calibration import scaled
from mulcot_ray.engines.ask import Asked, ask, sampling, score
from mulcot_ray.engines.base import Engine
from mulcot_ray.prompts import Contract
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Reject, Task

Mode = Literal["score", "explain", "generate"]


@dataclass(frozen=True)
class LabelWork:
    """Settings of the answer; `model` is recorded in the row, `max_tokens` bounds a rationale."""

    contract: Contract
    mode: Mode
    max_tokens: int
    seed: int
    model: str
    temperature: float = 1.0  # of the model's calibration
    contract_hash: str = field(init=False)  # computed once, not for every row

    kind: ClassVar[type[Rationale] | type[Prediction]] = Prediction

    def __post_init__(self) -> None:
        object.__setattr__(self, "contract_hash", self.contract.hash)

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Prediction:
        how = sampling(self.max_tokens, self.seed, post, 0)
        if self.mode == "generate":
            asked = await ask(engine, self.contract, Task.PREDICT, post, image, how)
            if asked.answer is None:
                assert asked.fault is not None
                raise asked.fault
            label, tokens_in = asked.answer.label, asked.done.tokens_in
            return Prediction(post.post_id, label, self.model, self.contract_hash, tokens_in=tokens_in, **_written(asked))
        scores = await score(engine, self.contract, post, image)
        p = scaled(scores.probabilities, self.temperature)
        rationale: dict[str, Any] = {"tokens_in": scores.tokens_in}
        if self.mode == "explain":
            asked = await ask(engine, self.contract, Task.REASONING, post, image, how)
            rationale = {"tokens_in": scores.tokens_in + asked.done.tokens_in, **_written(asked)}
        best = LABELS[p.index(max(p))]
        return Prediction(post.post_id, best, self.model, self.contract_hash, *p, label_mass=scores.mass, **rationale)

    def tally(self, post: Post, result: Prediction | Reject) -> Iterator[str]:
        if isinstance(result, Prediction):
            yield f"labels/{result.label}"


def _written(asked: Asked) -> dict[str, Any]:
    """The columns of a written answer, or of its fault."""
    paid = {"finish_reason": asked.done.finish_reason, "tokens_out": asked.done.tokens_out}
    if asked.answer is None:
        assert asked.fault is not None
        return {**paid, "rationale_fault": f"{asked.fault.reason}: {asked.fault.detail}"}
    return {**paid, **{s: asked.answer.sections[s] for s in SECTIONS}, "stated": asked.answer.label}
