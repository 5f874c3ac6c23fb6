"""OpenAI's chat API on the same engine, for clients that speak it already: messages of text and one picture, plain or streamed.

The subset is our own and not vLLM's handler: docs/decisions/0006-endpoint.md. What is not in it is refused by name, never passed over in
silence. A picture is a data: URI, prepared as the contract says; control tokens in texts are broken up, as in a post.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request
from PIL import Image
from pydantic import ValidationError

from mulcot_ray.engines.base import Completion, Messages, Sampling
from mulcot_ray.errors import RowFault
from mulcot_ray.posts.images import prepare
from mulcot_ray.prompts import neutralise
from mulcot_ray.serving.answering import Answering, Version, parts
from mulcot_ray.serving.chat_schemas import ChatAnswer, ChatRequest, ChatResponse, ChatUsage, Choice, TextPart
from mulcot_ray.serving.events import Emit, emitted
from mulcot_ray.serving.faults import invalid
from mulcot_ray.serving.guards import Refused
from mulcot_ray.serving.leaving import Written, while_there
from mulcot_ray.serving.reading import image_bytes, media_type


async def chat(request: Request, answering: Answering) -> ChatResponse | Written:
    """Raises Refused, RowFault, EngineError and TimeoutError."""
    if media_type(request) != "application/json":
        raise Refused(415, "unsupported_media_type", "the header `Content-Type: application/json` is wanted")
    try:
        asked = ChatRequest.model_validate_json(await request.body())
    except ValidationError as e:
        raise invalid(e) from e
    version = next((v for v in answering.versions if v.name == asked.model), None)
    if version is None:
        raise Refused(404, "model_not_found", f"the models here are {', '.join(v.name for v in answering.versions)}", "model")
    if asked.stream:
        return await _streamed(request, answering, version, asked)
    done = await while_there(request.receive, _written(answering, version, asked, None))
    choice = Choice(message=ChatAnswer(content=done.text), finish_reason="length" if done.finish_reason == "length" else "stop")
    return ChatResponse(id=_name(), created=int(time.time()), model=version.name, choices=[choice], usage=_usage(done))


async def _streamed(request: Request, answering: Answering, version: Version, asked: ChatRequest) -> Written:
    """OpenAI's chunks. A fault on the way is a chunk with `error`, as vLLM gives it."""
    head = {"id": _name(), "object": "chat.completion.chunk", "created": int(time.time()), "model": version.name}

    async def work(emit: Emit) -> None:
        sent = -1

        def chunk(delta: dict[str, str], finish_reason: str | None = None) -> None:
            emit(_data(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}))

        def told(text: str) -> None:
            nonlocal sent
            if sent < 0:
                chunk({"role": "assistant", "content": ""})
                sent = 0
            if len(text) > sent:
                chunk({"content": text[sent:]})
                sent = len(text)

        done = await _written(answering, version, asked, told)
        told(done.text)
        chunk({}, "length" if done.finish_reason == "length" else "stop")
        if asked.stream_options and asked.stream_options.include_usage:
            emit(_data(head | {"choices": [], "usage": _usage(done).model_dump()}))
        emit(b"data: [DONE]\n\n")

    return await emitted(request, answering, work, lambda fault: _data({"error": fault.model_dump()}))


async def _written(answering: Answering, version: Version, asked: ChatRequest, told: Callable[[str], None] | None) -> Completion:
    """The answer, up to its first stop. `told` hears it grow, as far as no stop can begin in it."""
    most = asked.max_completion_tokens or asked.max_tokens or version.work.max_tokens
    sampling = Sampling(most, asked.temperature, asked.top_p, asked.seed if asked.temperature else None)
    engine, hold = version.engine, max((len(s) for s in asked.stops), default=1) - 1
    async with asyncio.timeout(answering.timeout_s), answering.places.place(patient=False):
        messages, image = await asyncio.to_thread(_messages, asked, answering.side)
        if told or asked.stops:
            async with aclosing(parts(engine, messages, image, sampling)) as written:
                async for done in written:
                    if _first(done.text, asked.stops) is not None:
                        break
                    if told and not done.finish_reason:
                        told(done.text[: max(0, len(done.text) - hold)])
        else:
            done = await engine.generate(messages, image, sampling)
    answering.meters.written(version.name, done.tokens_in, done.tokens_out)
    at = _first(done.text, asked.stops)
    return done if at is None else replace(done, text=done.text[:at], finish_reason="stop")


def _messages(asked: ChatRequest, side: int) -> tuple[Messages, Image.Image | None]:
    """The engine's messages and the picture, of which there is at most one. Blocks: decodes. Raises RowFault and Refused."""
    messages: Messages = []
    image: Image.Image | None = None
    for i, m in enumerate(asked.messages):
        if isinstance(m.content, str):
            messages.append({"role": m.role, "content": neutralise(m.content)})
            continue
        content: list[dict[str, Any]] = []
        for j, part in enumerate(m.content):
            field = f"messages.{i}.content.{j}"
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": neutralise(part.text)})
            elif m.role != "user" or image is not None:
                raise Refused(422, "invalid_request", "one picture is taken, in a message of the user", field)
            elif part.image_url.url[:5].lower() != "data:":
                raise Refused(422, "bad_value", "image_url is not a data: URI; nothing is fetched", f"{field}.image_url.url")
            else:
                try:
                    image = prepare(image_bytes(part.image_url.url), side)
                except RowFault as f:
                    raise Refused(422, str(f.reason), f.detail, f"{field}.image_url.url") from f
                content.append({"type": "image"})
        messages.append({"role": m.role, "content": content})
    return messages, image


def _first(text: str, stops: list[str]) -> int | None:
    """Where the first of the stops begins."""
    return min((at for at in (text.find(s) for s in stops) if at >= 0), default=None)


def _usage(done: Completion) -> ChatUsage:
    return ChatUsage(prompt_tokens=done.tokens_in, completion_tokens=done.tokens_out, total_tokens=done.tokens_in + done.tokens_out)


def _name() -> str:
    return f"chatcmpl-{uuid.uuid4().hex}"


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"
