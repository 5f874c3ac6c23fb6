"""One question to a model about one post: prompt by the contract, answer parsed by the contract. Shared by every stage."""

from __future__ import annotations

import hashlib

from PIL import Image

from mulcot_ray.engines.base import Completion, Engine, Sampling, Scores
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Answer, Contract
from mulcot_ray.records import SECTIONS, Post, Rationale, Reason, Sentiment, Source, Task


async def ask(
    engine: Engine, contract: Contract, task: Task, post: Post, image: Image.Image | None, sampling: Sampling, label: Sentiment | None = None
) -> tuple[Answer, Completion]:
    """A complete five-section answer. Raises RowFault: ANSWER_TRUNCATED, ANSWER_UNPARSED, SECTIONS_MISSING, or of the prompt."""
    done = await engine.generate(contract.messages(task, post, label), image, sampling)
    if done.finish_reason == "length":
        raise RowFault(Reason.ANSWER_TRUNCATED, f"cut after {done.tokens_out} tokens", done.text)
    return contract.parse(done.text), done


async def score(engine: Engine, contract: Contract, post: Post, image: Image.Image | None) -> Scores:
    """Label probabilities by the classification prompt."""
    return await engine.score(contract.messages(Task.CLASSIFICATION, post), image)


def row_seed(seed: int, post_id: str, attempt: int) -> int:
    """A sampling seed fixed by row and attempt, so that a re-run agrees whatever else is in its batch."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{post_id}/{attempt}".encode()).digest()[:4], "big")


def as_rationale(
    post: Post, source: Source, model: str, contract: Contract, answer: Answer, done: Completion, attempts: int, tokens: tuple[int, int]
) -> Rationale:
    """The record of an answer; `tokens` (in, out) over all attempts."""
    texts = {s: answer.sections[s] for s in SECTIONS}
    return Rationale(
        post.post_id, source, model, contract.hash, prediction=answer.label, attempts=attempts, finish_reason=done.finish_reason,
        tokens_in=tokens[0], tokens_out=tokens[1], **texts,
    )  # fmt: skip
