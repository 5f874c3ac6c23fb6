"""What FastAPI cannot see of routes that read their bodies and write their answers themselves, for the OpenAPI document."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mulcot_ray.serving.batch import NDJSON
from mulcot_ray.serving.chat_schemas import ChatRequest
from mulcot_ray.serving.schemas import MAX_IMAGE, BadLine, Delta, ErrorResponse, Fault, Scored, SentimentRequest, SentimentResponse, faults

EVENTS = "text/event-stream"
REF = "#/components/schemas/"
DOCUMENTED: tuple[type[BaseModel], ...] = (SentimentRequest, SentimentResponse, Scored, Delta, Fault, ErrorResponse, BadLine, ChatRequest)


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": REF + model.__name__}


def _body(content: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": content}}


_FORM = {
    "type": "object", "additionalProperties": False, "required": ["text"],
    "properties": {
        **{name: {"type": "string"} for name in ("id", "text", "aspect", "image_key")},
        **{name: {"type": "string", "enum": ["true", "false"]} for name in ("explain", "stream")},
        "image": {"type": "string", "format": "binary", "description": f"The picture as a file of at most {MAX_IMAGE} bytes, or as base64."},
    },
}  # fmt: skip


def _events(description: str, *names: str) -> dict[str, Any]:
    """The schema of each event."""
    data = {"type": "string", "contentMediaType": "application/json", "description": description}
    return {"schema": {"type": "object", "required": ["data"], "properties": {"event": {"type": "string", "enum": [*names]}, "data": data}}}


_STREAM = _events("Scored, Delta, SentimentResponse or Fault, by the event's name", "label", "rationale", "done", "error")
_CHUNKS = _events("OpenAI's chunks, and [DONE] at the end", "message")
_LINES = {"schema": {"type": "string", "description": "A SentimentResponse or a BadLine a line, in the order of the request's lines."}}

SENTIMENT = _body({"application/json": {"schema": _ref(SentimentRequest)}, "multipart/form-data": {"schema": _FORM}})
SENTIMENT_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"description": "The answer", "content": {EVENTS: _STREAM}}, **faults()}
BATCH = _body({NDJSON: {"schema": {"type": "string", "description": "A SentimentRequest a line, without `stream`."}}})
BATCH_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answers", "content": {NDJSON: _LINES}},
    **faults(401, 403, 413, 415, 503),
}
CHAT = _body({"application/json": {"schema": _ref(ChatRequest)}})
CHAT_RESPONSES: dict[int | str, dict[str, Any]] = {200: {"description": "The answer", "content": {EVENTS: _CHUNKS}}, **faults()}
METRICS_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"description": "The counts of one replica", "content": {"text/plain": {"schema": {"type": "string"}}}}, **faults(401, 403),
}  # fmt: skip


def complete(api: FastAPI, open_paths: Collection[str] | None) -> None:
    """Give the document the schemas that no signature names, and the tokens (`open_paths` None: there are none)."""

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            made = get_openapi(title=api.title, version=api.version, routes=api.routes)
            _, more = models_json_schema([(m, "validation") for m in DOCUMENTED], ref_template=REF + "{model}")
            parts = made.setdefault("components", {})
            parts["schemas"] = {**more["$defs"], **parts.get("schemas", {})}
            if open_paths is not None:
                parts["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
                for path, operations in made["paths"].items():
                    for operation in operations.values() if path not in open_paths else ():
                        operation["security"] = [{"token": []}]
            api.openapi_schema = made
        return api.openapi_schema

    api.openapi = document  # type: ignore[method-assign]
