"""What a stage may ask of a model: write an answer, or weigh the label words. One narrow interface, several backends.

`vllm` runs a model folder in this process (engines/vllm.py; it and engines/inputs.py alone import vLLM). `endpoint` asks a server that speaks
OpenAI's API (engines/endpoint.py). `scripted` is a fake for unit tests: it answers from a function and says so in its name.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

from PIL import Image

from mulcot_ray import calibration
from mulcot_ray.artifacts import resolve_model
from mulcot_ray.errors import ConfigError
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import EngineRuntime, Recipe, Runtime
from mulcot_ray.storage import Store

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to write: temperature 0 is greedy; `max_tokens` new tokens at most; the same seed gives the same answer.

    `guide` is a regular expression that the engine's structured decoding holds the answer to; None: it writes freely.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    guide: str | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer. `finish_reason` is "stop" at its end and "length" where the token limit cut it."""

    text: str
    finish_reason: str
    tokens_in: int
    tokens_out: int


@dataclass(frozen=True, slots=True)
class Scores:
    """Probabilities over LABELS, summing to 1, and the share of the whole vocabulary that the label words had (None: not known)."""

    probabilities: tuple[float, float, float]
    mass: float | None
    tokens_in: int


class Engine(Protocol):
    """Both calls raise RowFault (PROMPT_TOO_LONG) for a row that cannot be asked, and EngineError when the engine is gone.

    `image` is the contract's prepared picture, or None where the messages have no image part. `score` weighs the label words behind
    the contract's label prefix; `written` is what the model is taken to have written before that (a rationale, for instance).
    """

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion: ...

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores: ...

    def check(self) -> None:
        """Raises EngineError when the engine can answer no more."""

    def close(self) -> None: ...


@runtime_checkable
class Streams(Engine, Protocol):
    """An Engine whose answers can be followed while they are written."""

    def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """The answer as far as it is written, again and again; the last is what `generate` gives, and only it has a finish_reason.

        Same faults as `generate`. Closing the generator ends the work on the answer.
        """


Script = Callable[[Messages, Sampling], str]


@dataclass(frozen=True)
class EngineSpec:
    """All that is needed to open an engine in another process.

    `model` is a local folder or, for an endpoint, its name there; `fingerprint` is what stands for the model in identities and cache keys.
    """

    model: str
    fingerprint: str
    contract: Contract
    dtype: str
    max_model_len: int
    seed: int
    device: Literal["cpu", "cuda"]
    runtime: EngineRuntime
    backend: Literal["vllm", "endpoint", "scripted"] = "vllm"
    quantization: str | None = None
    temperature: float = 1.0  # of calibration, not of sampling
    script: Script | None = None


Role = Literal["teacher", "assistant", "student"]
ENDPOINT = "endpoint:"


def spec(recipe: Recipe, runtime: Runtime, role: Role, model: str, fingerprint: str = "") -> EngineSpec:
    """The spec of a model folder, run as `role` of the runtime says."""
    return EngineSpec(
        model, fingerprint, recipe.contract, recipe.dtype, recipe.max_model_len, recipe.seed, runtime.device, getattr(runtime, role),
        quantization=recipe.teach.quantization if role == "teacher" else None,
    )  # fmt: skip


def engine_spec(store: Store, recipe: Recipe, runtime: Runtime, role: Role, name: str) -> EngineSpec:
    """The spec of a model by name: `builtin:NAME`, a folder, a model under the root, or `endpoint:NAME` at the role's endpoint.

    Raises ArtifactMissing or ConfigError where there is no such model.
    """
    if not name.startswith(ENDPOINT):
        folder, fingerprint = resolve_model(store, name)
        return replace(spec(recipe, runtime, role, str(folder), fingerprint), temperature=calibration.read(folder))
    if getattr(runtime, role).endpoint is None:
        raise ConfigError(f"model {name!r} is at an endpoint, but runtime {runtime.name!r} has no `endpoint:` section under {role!r} to say where")
    return replace(spec(recipe, runtime, role, name.removeprefix(ENDPOINT), name), backend="endpoint", quantization=None)


def open_engine(s: EngineSpec) -> Engine:
    """Load the model, or connect. Takes seconds to minutes. Raises EngineError."""
    if s.backend == "scripted":
        from mulcot_ray.engines.scripted import ScriptedEngine

        return ScriptedEngine(s)
    if s.backend == "endpoint":
        from mulcot_ray.engines.endpoint import EndpointEngine

        return EndpointEngine(s)
    from mulcot_ray.engines.vllm import VLLMEngine

    return VLLMEngine(s)
