"""A fake engine for tests: no model, the answer comes from a function of the messages. Same interface, same faults."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator

from PIL import Image

from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, Scores
from mulcot_ray.errors import ConfigError, RowFault
from mulcot_ray.records import LABELS, Reason


class ScriptedEngine:
    """Answers with `spec.script(messages, sampling)`; a word counts as a token. Scores the label that the script would state."""

    def __init__(self, s: EngineSpec) -> None:
        if s.script is None:
            raise ConfigError("the scripted engine needs a script")
        self.spec, self.script = s, s.script

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        n = self._length(messages)
        words = self.script(messages, sampling).split(" ")
        cut = len(words) > sampling.max_tokens
        return Completion(" ".join(words[: sampling.max_tokens]), "length" if cut else "stop", n, min(len(words), sampling.max_tokens))

    async def stream(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> AsyncGenerator[Completion, None]:
        done = await self.generate(messages, image, sampling)
        words = done.text.split(" ")
        for n in range(1, len(words)):
            yield Completion(" ".join(words[:n]), "", done.tokens_in, n)
            await asyncio.sleep(0)
        yield done

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        n = self._length(messages)
        label = self.spec.contract.parse(self.script(messages, Sampling(1)), sections=False).label
        p = tuple(0.8 if x is label else 0.1 for x in LABELS)
        return Scores((p[0], p[1], p[2]), 1.0, n)

    def check(self) -> None:
        """A function cannot die."""

    def close(self) -> None:
        """Nothing to close."""

    def _length(self, messages: Messages) -> int:
        text = " ".join(p.get("text", "") for m in messages for p in (m["content"] if isinstance(m["content"], list) else [{"text": m["content"]}]))
        n = len(re.findall(r"\S+", text))
        if n > self.spec.max_model_len:
            raise RowFault(Reason.PROMPT_TOO_LONG, f"{n} tokens, at most {self.spec.max_model_len}")
        return n
