"""A server that speaks OpenAI's chat API: questions in, answers out, and a verdict where there is none. What is asked: engines/endpoint.py.

Retries are the `openai` package's: 408, 409, 429, 5xx, timeouts and broken connections, `retries` times, after what Retry-After says
(up to two minutes) or 0.5 to 8 s with jitter. What is left over is either the row's fault or the server's, and the two must not be
confused: an outage must not reject rows, and one bad row must not end a run. That others were answered while the row was tried proves
little: they may have been answered before the outage. So a plain question of our own decides. Where the server does not answer it, nor
anybody else by then, it is dead (EngineError). Where it does, the row is asked once more, and is at fault when that fails too.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from aiolimiter import AsyncLimiter
from httpx2 import Limits
from openai import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AsyncOpenAI,
    DefaultAsyncHttpxClient,
    DefaultHttpxClient,
    OpenAI,
    Timeout,
)
from openai import OpenAIError as OpenAIFault
from openai.types.chat import ChatCompletion

from mulcot_ray.engines.base import Messages
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.recipe import Endpoint
from mulcot_ray.records import Reason

PATIENCE = 4  # retries of our own questions, which decide whether there is a server at all: 7 s where it refuses connections
QUESTION: Messages = [{"role": "user", "content": "Say yes."}]
QUESTION_TOKENS = 16  # of an answer that is about one word
Ask = Callable[[dict[str, Any]], ChatCompletion]
REFUSED = (400, 413, 422)  # about this request, not about the server
# As vLLM, OpenAI, SGLang, llama.cpp, Anthropic and Google put it.
_TOO_LONG = re.compile(r"context[ _]?(length|window|size)|max_model_len|maximum.{0,24}(length|tokens)|(prompt|input) is too long", re.IGNORECASE)


class ChatServer:
    """The model `model` at the endpoint, asked from one asyncio loop; any number of questions at a time, which the caller bounds.

    Raises EngineError where the server refuses the key or the connection, or does not have the model. The key is read from the environment
    of this process, and is nowhere but here and in the requests' header.

    `requests_per_minute` is divided by `replicas`, as they do not know of one another, and is kept by even spacing, retries included.
    """

    def __init__(self, e: Endpoint, model: str, replicas: int) -> None:
        self.endpoint, self.model = e, model
        self._key = _key(e)
        self.dead = ""
        self.answered = 0.0  # when the server last answered anyone, time.monotonic()
        self.judging = asyncio.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        timeout = Timeout(e.timeout_s, connect=min(10.0, e.timeout_s), pool=None)
        self._options: dict[str, Any] = {"base_url": e.url, "api_key": "see _authorize", "timeout": timeout}
        # No proxies of the environment, and posts go to no other address than the one named.
        self._http: dict[str, Any] = {
            "trust_env": False, "follow_redirects": False, "limits": Limits(max_connections=None), "auth": self._authorize,
        }  # fmt: skip
        with self._asking() as client:
            self._find_model(client)
        hooks: dict[str, Any] = {}
        if e.requests_per_minute is not None:
            # One at a time: a bucket that holds a minute's requests would let twice as many through in the first minute.
            limiter = AsyncLimiter(1, 60 * replicas / e.requests_per_minute)

            async def wait(request: Any) -> None:
                await limiter.acquire()

            hooks = {"request": [wait]}
        self.client = AsyncOpenAI(**self._options, max_retries=e.retries, http_client=DefaultAsyncHttpxClient(**self._http, event_hooks=hooks))

    def body(self, messages: Messages, max_tokens: int, temperature: float) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature}

    @contextmanager
    def opening(self) -> Iterator[Ask]:
        """A blocking call for the questions of an opening. It raises APIStatusError; what leaves the context is EngineError."""
        with self._asking() as client:
            yield lambda body: _checked(client.chat.completions.create(**body))

    @contextmanager
    def _asking(self) -> Iterator[OpenAI]:
        retries = min(self.endpoint.retries, PATIENCE)
        with OpenAI(**self._options, max_retries=retries, http_client=DefaultHttpxClient(**self._http)) as client:
            try:
                yield client
            except (OpenAIFault, ValueError) as x:
                raise EngineError(self._verdict(x)) from None

    async def ask(self, body: dict[str, Any]) -> ChatCompletion:
        """An answer with a choice in it. Raises RowFault where the row is at fault, EngineError where the server is."""
        self.check()
        self.loop = asyncio.get_running_loop()
        try:
            return await self._send(self.client, body)
        except (OpenAIFault, ValueError) as x:
            self._refusal(x)
            attempts = _attempts(x)
        await self._alive(time.monotonic())
        try:
            return await self._send(self.client.with_options(max_retries=0), body)
        except (OpenAIFault, ValueError) as x:
            self._refusal(x)
            what = f"the endpoint answers others, but not this row after {attempts + 1} attempts: {self._says(x)}"
            raise RowFault(Reason.ENGINE_ERROR, what) from None

    def check(self) -> None:
        if self.dead:
            raise EngineError(self.dead)

    def close(self) -> None:
        """From any thread, inside the loop or after it."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            if self.loop is None or self.loop.is_closed():
                with suppress(RuntimeError):  # connections of a loop that has ended cannot be closed politely
                    asyncio.run(self.client.close())
            elif self.loop.is_running():
                asyncio.run_coroutine_threadsafe(self.client.close(), self.loop).result(10)
            else:
                self.loop.run_until_complete(self.client.close())
        else:
            self.closing = asyncio.ensure_future(self.client.close())

    def _authorize(self, request: Any) -> Any:
        """The last word on the header: the package's own would also send OPENAI_API_KEY or OPENAI_CUSTOM_HEADERS, to whatever server."""
        request.headers.pop("Authorization", None)
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    async def _send(self, client: AsyncOpenAI, body: dict[str, Any]) -> ChatCompletion:
        reply = _checked(await client.chat.completions.create(**body))
        self.answered = time.monotonic()
        return reply

    async def _alive(self, since: float) -> None:
        """Returns when the server has answered anyone later than `since`; asks it itself where it has not. Raises EngineError."""
        async with self.judging:
            self.check()
            if self.answered > since:
                return
            try:
                patient = self.client.with_options(max_retries=min(self.endpoint.retries, PATIENCE))
                await self._send(patient, self.body(QUESTION, QUESTION_TOKENS, 0.0))
            except (OpenAIFault, ValueError) as x:
                if self.answered > since:
                    return
                self.dead = self._verdict(x)
                raise EngineError(self.dead) from None

    def _find_model(self, client: OpenAI) -> None:
        listed = getattr(client.models.list(), "data", None)
        if not isinstance(listed, list):
            raise EngineError(f"the endpoint {self.endpoint.url} lists no models at /models: it does not speak OpenAI's API")
        names = sorted(m.id for m in listed)
        if self.model not in names:
            shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
            raise EngineError(f"the endpoint {self.endpoint.url} has no model {self.model!r}; it has {shown or 'none'}")

    def _refusal(self, x: Exception) -> None:
        """Raises RowFault where the server says that the request itself is wrong."""
        if isinstance(x, APIStatusError) and x.status_code in REFUSED:
            text = self._message(x)
            if _TOO_LONG.search(text) or x.code == "context_length_exceeded":
                raise RowFault(Reason.PROMPT_TOO_LONG, text[:200]) from None
            raise RowFault(Reason.ENGINE_ERROR, f"the endpoint refuses the row: {text[:200]}") from None

    def _verdict(self, x: Exception) -> str:
        """What is wrong with the server and, where that is known, what to do."""
        where, status = f"the endpoint {self.endpoint.url}", x.status_code if isinstance(x, APIStatusError) else 0
        if status in (401, 403):
            key = f"the key in {self.endpoint.key_env}" if self.endpoint.key_env else "to answer without a key (name its variable as `key_env`)"
            return f"{where} refuses {key}: {self._says(x)}"
        if status == 404 or 300 <= status < 400:
            return f"{where} is not there: {self._says(x)}; a URL goes up to and with the version, as http://host:8000/v1"
        if status in REFUSED:
            return f"{where} refuses a plain question to {self.model!r}: {self._says(x)}"
        return f"{where} does not answer: {self._says(x)}"

    def _says(self, x: Exception) -> str:
        if isinstance(x, APIStatusError):
            return f"status {x.status_code}: {self._message(x)[:200]}"
        if isinstance(x, APITimeoutError):
            return f"nothing within {self.endpoint.timeout_s:g} s"
        fault = x.__cause__ if isinstance(x, APIConnectionError) and x.__cause__ else x
        return self._hide(f"{type(fault).__name__}: {fault}")[:200]

    def _message(self, x: APIStatusError) -> str:
        """The error's text, of whichever form."""
        body = x.body.get("message", x.body) if isinstance(x.body, dict) else x.body
        return self._hide(" ".join(str(body or x.response.text).split()))

    def _hide(self, text: str) -> str:
        """Some servers repeat the key that they refuse."""
        return text.replace(self._key, "[key]") if self._key else text


def _checked(reply: ChatCompletion) -> ChatCompletion:
    """Raises ValueError where there is no choice: some gateways report errors so, and a web page comes as a str."""
    if not getattr(reply, "choices", None):
        raise ValueError(f"an answer without choices: {getattr(reply, 'model_extra', None) or reply}")
    return reply


def _key(e: Endpoint) -> str:
    """The key from the environment; "" where none is to be sent."""
    if e.key_env is None:
        return ""
    key = os.environ.get(e.key_env, "").strip()
    if not key:
        raise EngineError(f"the environment variable {e.key_env}, which is to hold the key of {e.url}, is not set here; `key_env: null` sends none")
    if not (key.isascii() and key.isprintable()):
        raise EngineError(f"the environment variable {e.key_env} holds what cannot be a key: characters outside printable ASCII")
    return key


def _attempts(x: Exception) -> int:
    """How often the request was sent, by the header in which the `openai` package counts its retries."""
    request = getattr(x, "request", None)
    return 1 + int(request.headers.get("x-stainless-retry-count", 0)) if request is not None else 1
