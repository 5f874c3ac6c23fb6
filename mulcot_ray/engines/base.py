"""What a stage may ask of a model: write an answer, or weigh the label words. One narrow interface, several backends.

`vllm` is the production backend (engines/vllm.py, the only module that imports vLLM). `scripted` is a fake for unit tests: it
answers from a function and says so in its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL import Image

from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import EngineRuntime, Recipe, Runtime

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to write: temperature 0 is greedy; `max_tokens` new tokens at most; the same seed gives the same answer."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `finish_reason` is "stop" at its end and "length" where the token limit cut it."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Probabilities over LABELS, summing to 1, and the share of the whole vocabulary that the label words had."""

    probabilities: tuple[float, float, float]
    mass: float
    tokens_in: int


class Engine(Protocol):
    """Both calls raise RowFault (PROMPT_TOO_LONG) for a row that cannot be asked, and EngineError when the engine is gone.

    `image` is the contract's prepared picture, or None where the messages have no image part.
    """

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion: ...

    async def score(self, messages: Messages, image: Image.Image | None) -> Scores: ...

    def check(self) -> None:
        """Raises EngineError when the engine can answer no more."""

    def close(self) -> None: ...


Script = Callable[[Messages, Sampling], str]


@dataclass(frozen=True)
class EngineSpec:
    """All that is needed to open an engine in another process. `model` is a local folder."""

    model: str
    contract: Contract
    dtype: str
    max_model_len: int
    seed: int
    device: Literal["cpu", "cuda"]
    runtime: EngineRuntime
    backend: Literal["vllm", "scripted"] = "vllm"
    script: Script | None = None


def spec(recipe: Recipe, runtime: Runtime, role: Literal["teacher", "assistant", "student"], model: str) -> EngineSpec:
    return EngineSpec(model, recipe.contract, recipe.dtype, recipe.max_model_len, recipe.seed, runtime.device, getattr(runtime, role))


def open_engine(s: EngineSpec) -> Engine:
    """Load the model. Takes seconds to minutes. Raises EngineError."""
    if s.backend == "scripted":
        from mulcot_ray.engines.scripted import ScriptedEngine

        return ScriptedEngine(s)
    from mulcot_ray.engines.vllm import VLLMEngine

    return VLLMEngine(s)
