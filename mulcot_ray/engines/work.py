"""One post to one Prediction: the same object in the bulk labeler and behind the endpoint, so that both give the same label.

`score` weighs the label words after one prefill: label and calibrated probabilities, no text. `explain` adds a rationale by the reasoning
prompt, for all posts or for some (`Explain`); a rationale that fails is recorded beside the label, which stands. `generate` lets the model write the whole answer by the
predict prompt, as a teacher does, and takes the label from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from PIL import Image
from pydantic import Field

from mulcot_ray.calibration import scaled
from mulcot_ray.engines.ask import Asked, ask, sampling, score
from mulcot_ray.engines.base import Engine
from mulcot_ray.prompts import Contract, Frozen
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Reject, Sentiment, Task

Mode = Literal["score", "explain", "generate"]
NOT_ASKED = "not asked"  # the fault of a rationale that was left out for want of time or money


BINS = 200  # of the counts of confidence


def bin_of(confidence: float) -> int:
    """Which of BINS equal bins from 0 to 1."""
    return min(BINS - 1, math.floor(confidence * BINS))


class Explain(Frozen):
    """Which labelled posts get a rationale too: those with one of `labels`, and a share of all, chosen by content."""

    share: float = Field(0.0, ge=0, le=1)
    labels: tuple[Sentiment, ...] = ()

    def wants(self, post: Post, label: Sentiment) -> bool:
        return label in self.labels or int(post.content[:8], 16) < self.share * 2**32


@dataclass(frozen=True)
class LabelWork:
    """Settings of the answer; `model` is recorded in the row, `max_tokens` bounds a rationale. `some` is for the mode `explain`."""

    contract: Contract
    mode: Mode
    max_tokens: int
    seed: int
    model: str
    temperature: float = 1.0  # of the model's calibration
    some: Explain = Explain(share=1.0)
    hurried: bool = False
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
        best = LABELS[p.index(max(p))]
        if self.mode == "explain" and self.some.wants(post, best):
            if self.hurried:
                return Prediction(
                    post.post_id, best, self.model, self.contract_hash, *p, label_mass=scores.mass, rationale_fault=NOT_ASKED, **rationale
                )
            asked = await ask(engine, self.contract, Task.REASONING, post, image, how)
            rationale = {"tokens_in": scores.tokens_in + asked.done.tokens_in, **_written(asked)}
        return Prediction(post.post_id, best, self.model, self.contract_hash, *p, label_mass=scores.mass, **rationale)

    def plain(self) -> LabelWork:
        """Labels without rationales. (`generate` has no label without the text.)"""
        return replace(self, hurried=True)

    def tally(self, post: Post, result: Prediction | Reject) -> Iterator[str]:
        if isinstance(result, Prediction):
            yield f"labels/{result.label}"
            if result.negative is not None and result.neutral is not None and result.positive is not None:
                yield f"confidence/{bin_of(max(result.negative, result.neutral, result.positive))}"
            if result.text_analysis is not None:
                yield "explained"


def _written(asked: Asked) -> dict[str, Any]:
    """The columns of a written answer, or of its fault."""
    paid = {"finish_reason": asked.done.finish_reason, "tokens_out": asked.done.tokens_out}
    if asked.answer is None:
        assert asked.fault is not None
        return {**paid, "rationale_fault": f"{asked.fault.reason}: {asked.fault.detail}"}
    return {**paid, **{s: asked.answer.sections[s] for s in SECTIONS}, "stated": asked.answer.label}
