"""One question to a model about one post: prompt by the contract, answer parsed by the contract. Shared by every stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from PIL import Image

from mulcot_ray.engines.base import Completion, Engine, Sampling, Scores
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Answer, Contract
from mulcot_ray.records import Post, Reason, Sentiment, Task


@dataclass(frozen=True, slots=True)
class Asked:
    """What was paid for: the completion, with the answer in it or else the fault that makes it none."""

    done: Completion
    answer: Answer | None
    fault: RowFault | None = None


async def ask(
    engine: Engine, contract: Contract, task: Task, post: Post, image: Image.Image | None, sampling: Sampling, label: Sentiment | None = None
) -> Asked:
    """Ask for a five-section answer. Its faults are ANSWER_TRUNCATED, ANSWER_UNPARSED and SECTIONS_MISSING; those of the prompt are raised."""
    done = await engine.generate(contract.messages(task, post, label), image, sampling)
    if done.finish_reason == "length":
        return Asked(done, None, RowFault(Reason.ANSWER_TRUNCATED, f"cut after {done.tokens_out} tokens", done.text))
    try:
        return Asked(done, contract.parse(done.text))
    except RowFault as f:
        return Asked(done, None, f)


async def score(engine: Engine, contract: Contract, post: Post, image: Image.Image | None) -> Scores:
    """Label probabilities by the classification prompt."""
    return await engine.score(contract.messages(Task.CLASSIFICATION, post), image)


def sampling(
    max_tokens: int, seed: int, post: Post, attempt: int, *, temperature: float = 0.0, top_p: float = 1.0, guide: str | None = None
) -> Sampling:
    """Sampling with a seed fixed by the post's content and the attempt: the same whatever else is in the batch, the run or the data set.

    A greedy answer needs no seed, and so is the same in every attempt.
    """
    if temperature == 0:
        return Sampling(max_tokens, guide=guide)
    fixed = int.from_bytes(hashlib.sha256(f"{seed}/{post.content}/{attempt}".encode()).digest()[:4], "big")
    return Sampling(max_tokens, temperature, top_p, fixed, guide)
