"""A model behind OpenAI's chat API as an Engine: a hosted model, a gateway, or a `vllm serve` of one's own.

Dialect `vllm` gives what engines/vllm.py gives on the same model folder: labels, probabilities and token counts agree, up to
floating-point order. Dialect `openai` uses what all servers have. Faults and retries: engines/chat.py.

A prepared picture of 280 × 280 travels as a PNG of at most 0.24 MB (0.32 MB as base64), and is kept while its row is in flight.
"""

from __future__ import annotations

import asyncio
import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from openai import APIStatusError
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from PIL import Image

from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, Scores
from mulcot_ray.engines.chat import QUESTION, QUESTION_TOKENS, REFUSED, Ask, ChatServer
from mulcot_ray.errors import ConfigError, EngineError, RowFault
from mulcot_ray.records import LABELS, Reason, Sentiment

LABEL_TOKENS = 16  # enough for `"Prediction": "positive"` with a fence around it
# vLLM's server fills what a request leaves open from the model's generation_config.json, which for Qwen2.5-VL says top_k 1 (greedy,
# whatever the temperature) and repetition_penalty 1.05. The in-process engine samples without them, and so must the server.
PLAIN = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}


class EndpointEngine:
    """Asks the endpoint of the spec's runtime for the model that the spec names. For one asyncio loop; any number of calls at a time.

    Opening asks the server for its models and for a word: EngineError where it refuses the key or the connection, does not have the model,
    or does not speak the dialect. `requests_per_minute` is divided by the number of replicas (its upper end): a replica that idles leaves
    its share unused.
    """

    def __init__(self, s: EngineSpec) -> None:
        r = s.runtime
        if r.endpoint is None:
            raise ConfigError(f"model {s.model!r} is at an endpoint, but the runtime has no `endpoint:` section to say where")
        self.url, self.vllm, self.contract = r.endpoint.url, r.endpoint.dialect == "vllm", s.contract
        self.server = ChatServer(r.endpoint, s.model, r.replicas if isinstance(r.replicas, int) else r.replicas[1])
        self.label_ids: list[int] = []
        self.top_logprobs = 0
        with self.server.opening() as ask:
            if self.vllm:
                self._learn_label_ids(ask)
            else:
                self._learn_logprobs(ask)

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        if sampling.guide and not self.vllm:
            raise EngineError(
                f"the endpoint {self.url} is of dialect 'openai', which has no structured decoding by a regular expression; "
                "set `guided: false` in the recipe, or `dialect: vllm` in the runtime where the server is vLLM"
            )
        body = self.server.body(await _with_picture(messages, image), sampling.max_tokens, sampling.temperature) | {"top_p": sampling.top_p}
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if self.vllm:
            body["extra_body"] = PLAIN | ({"structured_outputs": {"regex": sampling.guide}} if sampling.guide else {})
        try:
            reply = await self.server.ask(body)
        except RowFault as f:
            if f.reason is not Reason.PROMPT_TOO_LONG:
                raise
            # Servers refuse a prompt that leaves less room than `max_tokens`. Without it the answer gets what room there is, as in engines/vllm.py.
            reply = await self.server.ask({k: v for k, v in body.items() if k != "max_tokens"})
        choice = reply.choices[0]
        return Completion(_said(choice), "length" if choice.finish_reason == "length" else "stop", *_usage(reply))

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        """Dialect vllm: as engines/vllm.py. Dialect openai: the label words' probabilities where the model, asked the messages, writes one
        of them; 1 for the stated label and mass None where the server gives no log-probabilities. Raises RowFault ANSWER_UNPARSED."""
        shown = await _with_picture(messages, image)
        if self.vllm:
            reply = await self.server.ask(self._scoring(shown, written))
            logs = self._label_logs(reply)
            return _scores([math.exp(x - max(logs)) for x in logs], sum(math.exp(x) for x in logs), reply)
        if written:
            raise EngineError(f"the endpoint {self.url} is of dialect 'openai', which cannot go on from an answer that is begun")
        more = {"logprobs": True, "top_logprobs": self.top_logprobs} if self.top_logprobs else {}
        reply = await self.server.ask(self.server.body(shown, LABEL_TOKENS, 0.0) | more)
        choice = reply.choices[0]
        stated = self.contract.parse(_said(choice), sections=False).label
        found = label_weights(choice.logprobs.content or [], self.contract.label_words) if choice.logprobs else None
        return _scores(found, sum(found), reply) if found else _scores([float(x is stated) for x in LABELS], None, reply)

    def check(self) -> None:
        self.server.check()

    def close(self) -> None:
        self.server.close()

    # --- dialect openai ------------------------------------------------------------------------------------------------

    def _learn_logprobs(self, ask: Ask) -> None:
        """How many alternatives a token the server gives: 20 at OpenAI, 5 at some others, none where it refuses to be asked."""
        body = self.server.body(QUESTION, QUESTION_TOKENS, 0.0) | {"top_p": 1.0, "seed": 0}
        for k in (20, 5):
            try:
                ask(body | {"logprobs": True, "top_logprobs": k})
                self.top_logprobs = k
                return
            except APIStatusError as x:
                if x.status_code not in REFUSED:
                    raise
        ask(body)

    # --- dialect vllm --------------------------------------------------------------------------------------------------

    def _learn_label_ids(self, ask: Ask) -> None:
        """First token of each label word behind the prefix, read off the server's own prompts: no tokenizer is needed here.

        Raises ConfigError as `prompts.label_token_ids` does, EngineError where the server is no vLLM or its chat template adds to an answer
        that is begun.
        """
        prefix, words = self.contract.label_prefix, [self.contract.label_words[x] for x in LABELS]
        empty, *begun = [self._prompt_ids(ask, prefix + w) for w in ("", *words)]
        if any(len(b) <= len(empty) or b[: len(empty)] != empty for b in begun):
            raise ConfigError(f"one of the label words {words} merges with the text before it")
        self.label_ids = [b[len(empty)] for b in begun]
        if len(set(self.label_ids)) < len(LABELS):
            raise ConfigError(f"label words {words} start with the same token")
        self._label_logs(ask(self._scoring(QUESTION, "")))

    def _prompt_ids(self, ask: Ask, begun: str) -> list[int]:
        body = self._continuing(QUESTION, begun, {"return_token_ids": True, "return_prompt_text": True})
        more = ask(body).model_extra or {}
        ids, text = more.get("prompt_token_ids"), more.get("prompt_text")
        if not isinstance(ids, list) or not isinstance(text, str):
            raise self._no_vllm("does not return prompt tokens and text")
        if not text.endswith(begun):
            raise EngineError(f"the chat template at {self.url} adds to an answer that is begun (it ends in {text[-40:]!r}): labels cannot be scored")
        return ids

    def _continuing(self, messages: Messages, begun: str, more: dict[str, Any]) -> dict[str, Any]:
        """Asks for one token more of an answer that begins so."""
        rest = {"add_generation_prompt": False, "continue_final_message": True, **more}
        return self.server.body([*messages, {"role": "assistant", "content": begun}], 1, 0.0) | {"extra_body": PLAIN | rest}

    def _scoring(self, messages: Messages, written: str) -> dict[str, Any]:
        ids = {"logprob_token_ids": self.label_ids, "allowed_token_ids": self.label_ids, "return_tokens_as_token_ids": True}
        return self._continuing(messages, written + self.contract.label_prefix, ids) | {"logprobs": True}

    def _label_logs(self, reply: ChatCompletion) -> list[float]:
        """Log-probabilities of the label words over the whole vocabulary, in the order of LABELS."""
        logprobs = reply.choices[0].logprobs
        found = {t.token: t.logprob for t in logprobs.content[0].top_logprobs} if logprobs and logprobs.content else {}
        try:
            return [found[f"token_id:{i}"] for i in self.label_ids]
        except KeyError:
            raise self._no_vllm("does not return the log-probabilities of named tokens") from None

    def _no_vllm(self, what: str) -> EngineError:
        return EngineError(f"the endpoint {self.url} {what}; `dialect: vllm` wants vLLM 0.29 or later, `openai` suits others")


def label_weights(tokens: Sequence[ChatCompletionTokenLogprob], words: Mapping[Sentiment, str]) -> list[float] | None:
    """Probability of each label word where an answer states one, in the order of LABELS; None where that cannot be read off.

    A token counts for the word that it begins, where it begins just one. Where the model's own token begins two ("ne" of negative and
    neutral), the next token divides what that one had.
    """
    key = re.search(r"prediction\W*", "".join(t.token for t in tokens), re.IGNORECASE)
    weights, begun, share, end = dict.fromkeys(LABELS, 0.0), "", 1.0, 0
    for t in tokens if key else []:
        end += len(t.token)
        if key is None or end <= key.end():
            continue
        for option in t.top_logprobs:
            labels = _begins(begun + option.token, words)
            if len(labels) == 1:
                weights[labels[0]] += share * math.exp(option.logprob)
        begun += t.token
        if len(_begins(begun, words)) < 2:
            break
        share *= math.exp(t.logprob)
    return list(weights.values()) if any(weights.values()) else None


def _begins(piece: str, words: Mapping[Sentiment, str]) -> list[Sentiment]:
    """Labels whose word begins with the piece, or that begin the piece themselves; quotes and spaces before it do not count."""
    piece = re.sub(r"^\W+", "", piece).lower()
    return [x for x in LABELS if piece and (words[x].lower().startswith(piece) or piece.startswith(words[x].lower()))]


async def _with_picture(messages: Messages, image: Image.Image | None) -> Messages:
    """The messages with the picture in place of its part, as PNG: the same pixels as the in-process engine sees."""
    if image is None:
        return messages
    picture = {"type": "image_url", "image_url": {"url": await asyncio.to_thread(_data_uri, image)}}

    def shown(content: Any) -> Any:
        return content if isinstance(content, str) else [picture if part["type"] == "image" else part for part in content]

    return [{**m, "content": shown(m["content"])} for m in messages]


def _data_uri(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _said(choice: Choice) -> str:
    """The answer's text. Raises RowFault, with what was said, where the model gives none."""
    text, refusal = choice.message.content, choice.message.refusal
    if text is None or refusal or choice.finish_reason == "content_filter":
        said = refusal or text or ""
        raise RowFault(Reason.ENGINE_ERROR, f"the model gives no answer ({choice.finish_reason}): {said[:200]}", said)
    return text


def _scores(weights: list[float], mass: float | None, reply: ChatCompletion) -> Scores:
    negative, neutral, positive = (w / sum(weights) for w in weights)
    return Scores((negative, neutral, positive), mass, _usage(reply)[0])


def _usage(reply: ChatCompletion) -> tuple[int, int]:
    """Tokens in and out; 0 where the server does not count."""
    return (reply.usage.prompt_tokens, reply.usage.completion_tokens) if reply.usage else (0, 0)
