"""vLLM as an Engine: one AsyncLLM per actor or replica, all requests batched continuously by it.

Why AsyncLLM inside our own Ray Data actor and not `ray.data.llm`'s processor: docs/decisions/0002-engine-in-the-actor.md.
"""

from __future__ import annotations

import math
import os
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from PIL import Image

from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, Scores
from mulcot_ray.engines.sizing import sequences
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.prompts import label_token_ids, render_chat
from mulcot_ray.records import Reason

MIN_ANSWER = 8  # tokens that must fit behind a prompt


class VLLMEngine:
    """Opens the model folder of the spec. Only bytes that we decoded ourselves reach it: no URLs, no video, no remote code."""

    def __init__(self, s: EngineSpec) -> None:
        cpu = s.device == "cpu"
        if cpu:
            # One thread: two made requests ten times slower where something else was running (STACK: serving).
            os.environ.update(OMP_NUM_THREADS="1", VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_ENABLE_V1_MULTIPROCESSING="0")
        if not s.runtime.compile:
            # Some of vLLM's helpers are compiled whatever `enforce_eager` says: 25 s of g++ in the first request.
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_CONFIGURE_LOGGING="0")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from mulcot_ray.engines.inputs import Inputs

        r = s.runtime
        options: dict[str, Any] = dict(
            model=s.model, dtype=s.dtype, max_model_len=s.max_model_len, seed=s.seed, max_num_seqs=sequences(s), enforce_eager=not r.compile,
            tensor_parallel_size=r.tensor_parallel, pipeline_parallel_size=r.pipeline_parallel, enable_prefix_caching=True,
            limit_mm_per_prompt={"image": 1, "video": 0}, trust_remote_code=False, load_format="safetensors",
            mm_processor_cache_gb=0,  # of what the renderer makes: ours goes past it
            enable_log_requests=False, disable_log_stats=True,
        )  # fmt: skip
        if cpu:
            # The CPU default of 128 tokens a block leaves nothing of a short prompt to share; 16 fails.
            # Prompts whole: a seeded request whose prompt is cut over two steps kills the engine ("CPU Generator does not use offset").
            whole = {"enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, s.max_model_len)}
            options |= {"block_size": 32, "distributed_executor_backend": "uni", **whole}
        if s.quantization is not None:
            options["quantization"] = s.quantization
        if r.kv_cache_mb is not None:
            options["kv_cache_memory_bytes"] = r.kv_cache_mb << 20
        try:
            config = AsyncEngineArgs(**(options | r.extra)).create_engine_config()
            self.llm = AsyncLLM.from_vllm_config(config)
        except Exception as e:  # vLLM fails in many types; what matters to a user is which model and why
            raise EngineError(f"vLLM cannot open {s.model}: {type(e).__name__}: {e}") from e
        self.spec = s
        self.image_tokens = s.contract.image.tokens
        try:
            self.tokenizer: Any = self.llm.get_tokenizer()
            self.label_ids = label_token_ids(self.tokenizer, s.contract)
            self.inputs = Inputs(self.llm, s.contract.image.side)
        except BaseException:
            self.llm.shutdown()
            raise

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        ids, params = self._writing(messages, image, sampling, "FINAL_ONLY")
        return _completion(await self._run(ids, image, params))

    async def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
        ids, params = self._writing(messages, image, sampling, "CUMULATIVE")
        async with aclosing(self._outputs(ids, image, params)) as outputs:
            async for out in outputs:
                yield _completion(out)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        """One prefill: the distribution of the token after `"Prediction": "`, restricted to the three label words."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        ids, _ = self._tokens(render_chat(self.tokenizer, messages) + written + self.spec.contract.label_prefix, image)
        # allowed_token_ids with logprobs=3 would give the top 3 of the whole vocabulary, not these three.
        params = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=self.label_ids, allowed_token_ids=self.label_ids, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip
        out = await self._run(ids, image, params)
        found = out.outputs[0].logprobs[0]
        logs = [found[t].logprob for t in self.label_ids]
        top = max(logs)
        weights = [math.exp(x - top) for x in logs]
        p = [w / sum(weights) for w in weights]
        return Scores((p[0], p[1], p[2]), sum(math.exp(x) for x in logs), len(out.prompt_token_ids))

    def check(self) -> None:
        if self.llm.errored:
            raise EngineError(f"the vLLM engine of {self.spec.model} has died; see the worker's log")

    def close(self) -> None:
        self.llm.shutdown()

    def _writing(self, messages: Messages, image: Image.Image | None, sampling: Sampling, kind: str) -> tuple[list[int], Any]:
        """Token ids of the prompt, and vLLM's sampling parameters for an answer; `kind` is how its outputs come."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        ids, room = self._tokens(render_chat(self.tokenizer, messages), image)
        params = SamplingParams(
            max_tokens=min(sampling.max_tokens, room), temperature=sampling.temperature, top_p=sampling.top_p, seed=sampling.seed,
            output_kind=RequestOutputKind[kind],
            structured_outputs=StructuredOutputsParams(regex=sampling.guide) if sampling.guide else None,
        )  # fmt: skip
        return ids, params

    def _tokens(self, prompt: str, image: Image.Image | None) -> tuple[list[int], int]:
        """Token ids (the picture still one token) and how many tokens an answer may have."""
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        n = len(ids) + (self.image_tokens - 1 if image is not None else 0)
        room = self.spec.max_model_len - n
        if room < MIN_ANSWER:
            raise RowFault(Reason.PROMPT_TOO_LONG, f"{n} tokens, and the model takes {self.spec.max_model_len} with the answer")
        return ids, room

    async def _run(self, ids: list[int], image: Image.Image | None, params: Any) -> Any:
        """The last output."""
        last = None
        async with aclosing(self._outputs(ids, image, params)) as outputs:
            async for out in outputs:
                last = out
        assert last is not None
        return last

    async def _outputs(self, ids: list[int], image: Image.Image | None, params: Any) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request. Raises EngineError and RowFault in place of vLLM's errors; closing it aborts the request."""
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with aclosing(self.llm.generate(await self.inputs(ids, image), params, uuid.uuid4().hex)) as outputs:
                async for out in outputs:
                    yield out
        except EngineDeadError as e:
            raise EngineError(f"the vLLM engine of {self.spec.model} has died; see the worker's log") from e
        except VLLMClientError as e:
            raise RowFault(Reason.ENGINE_ERROR, f"the engine refuses the row: {e}") from e


def _completion(out: Any) -> Completion:
    first = out.outputs[0]
    return Completion(first.text, (first.finish_reason or "stop") if out.finished else "", len(out.prompt_token_ids), len(first.token_ids))
