"""The HTTP side of the endpoint: one post in, one Prediction out, every fault a structured error. Knows nothing of Ray.

    POST /v1/sentiment   text, aspect, image → label, probabilities, on request the rationale by section
    GET  /v1/model       which model and contract answer
    GET  /healthz        200 while the engine lives; open to all, as is /openapi.json

The same `LabelWork` and picture preparation as in `mulcot label`, hence the same labels.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
import time
import uuid
from collections.abc import Collection
from dataclasses import replace
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr
from starlette.exceptions import HTTPException

from mulcot_ray.artifacts import versions
from mulcot_ray.engines.base import Engine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.records import Post, Prediction, Reason, Sentiment
from mulcot_ray.serving.guards import BearerTokens, BodyLimit, LoopbackOnly, Refused, error

MAX_BODY = 8 << 20  # bytes: the largest picture as base64, and the text
MAX_IMAGE = 4 << 20  # bytes of the compressed picture
MAX_TEXT, MAX_ASPECT, MAX_ID = 20_000, 256, 128  # characters
TIMEOUT_S = 60.0  # from the parsed request to the answer
OPEN_PATHS = ("/healthz", "/openapi.json")
TEXT_FAULTS = (Reason.EMPTY_TEXT, Reason.PROMPT_TOO_LONG)
IMAGE = f"JPEG, PNG, WebP, GIF or BMP of at most {MAX_IMAGE} bytes, as base64 or as a data: URI. Addresses are not fetched."

log = logging.getLogger("ray.serve")  # Serve writes this logger, and no other, to the replica's log file


class SentimentRequest(BaseModel):
    """One post. Without an aspect the post as a whole is judged; an empty aspect or image counts as none, as on import."""

    model_config = ConfigDict(extra="forbid")

    text: StrictStr = Field(max_length=MAX_TEXT)
    aspect: StrictStr | None = Field(None, max_length=MAX_ASPECT)
    image: StrictStr | None = Field(None, description=IMAGE)
    explain: StrictBool = Field(False, description="Also write the rationale.")
    id: StrictStr | None = Field(None, min_length=1, max_length=MAX_ID, description="Comes back in the answer; made up where absent.")


class Probabilities(BaseModel):
    negative: float
    neutral: float
    positive: float


class Sections(BaseModel):
    """The rationale. `Prediction` is the label on which it ends; it may differ from `label`."""

    Text_analysis: str
    Image_analysis: str
    Conflict_resolution: str
    Final_conclusion: str
    Prediction: Sentiment


class Usage(BaseModel):
    tokens_in: int
    tokens_out: int


class SentimentResponse(BaseModel):
    id: str
    label: Sentiment
    probabilities: Probabilities
    label_mass: float = Field(description="Share of the whole vocabulary's probability that the three label words had.")
    rationale: Sections | None
    rationale_fault: str | None = Field(description="Why a rationale that was asked for is absent.")
    model: str
    contract: str
    usage: Usage
    seconds: float


class ModelInfo(BaseModel):
    model: str
    fingerprint: str
    contract: str
    version: str


class Fault(BaseModel):
    code: str
    message: str
    field: str | None = None


class ErrorResponse(BaseModel):
    error: Fault


STATUSES = (400, 401, 403, 413, 415, 422, 500, 503, 504)
FAULTS: dict[int | str, dict[str, Any]] = {s: {"model": ErrorResponse, "description": HTTPStatus(s).phrase} for s in STATUSES}


def make_api(engine: Engine, work: LabelWork, fingerprint: str, digests: Collection[str] | None, timeout_s: float = TIMEOUT_S) -> FastAPI:
    """The application around an engine. `digests` are those of the tokens; None: no tokens, answers on loopback only."""
    api = FastAPI(title="mulcot-ray", version=_version(), docs_url=None, redoc_url=None)
    api.add_middleware(BodyLimit, limit=MAX_BODY)
    if digests is None:
        api.add_middleware(LoopbackOnly)
    else:
        api.add_middleware(BearerTokens, digests=digests, open_paths=OPEN_PATHS)  # added last: comes first
    for kind, handler in HANDLERS.items():
        api.add_exception_handler(kind, handler)
    scored, explained = replace(work, mode="score"), replace(work, mode="explain")
    # The middleware decides; this only tells readers of the OpenAPI document.
    documented = [] if digests is None else [Depends(HTTPBearer(auto_error=False))]

    @api.post("/v1/sentiment", responses=FAULTS, dependencies=documented)
    async def sentiment(asked: SentimentRequest) -> SentimentResponse:
        started = time.perf_counter()
        async with asyncio.timeout(timeout_s):
            post, image = await asyncio.to_thread(_prepared, asked, work.contract.image.side)
            answer = await (explained if asked.explain else scored)(engine, post, image)
        return _response(answer, time.perf_counter() - started)

    @api.get("/v1/model", responses={s: FAULTS[s] for s in (401, 403)}, dependencies=documented)
    async def model() -> ModelInfo:
        return ModelInfo(model=work.model, fingerprint=fingerprint, contract=work.contract.hash, version=_version())

    @api.get("/healthz", responses={503: FAULTS[503]})
    async def healthz() -> dict[str, str]:
        engine.check()
        return {"status": "ok"}

    return api


def _prepared(asked: SentimentRequest, side: int) -> tuple[Post, Image.Image | None]:
    data = _image_bytes(asked.image) if asked.image else None
    post = Post(asked.id or uuid.uuid4().hex, "-", asked.text, asked.aspect or None, image_bytes=data)
    return post, post_image(post, side)


def _image_bytes(encoded: str) -> bytes:
    """The picture's bytes. Raises RowFault; the message never has the input in it."""
    head, comma, rest = encoded[:200].partition(",")
    if head[:5].lower() == "data:":
        if not comma or not head.lower().endswith(";base64"):
            raise RowFault(Reason.BAD_VALUE, "image is a data: URI without `;base64,`")
        encoded = rest + encoded[200:]
    elif re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*:", head):
        raise RowFault(Reason.BAD_VALUE, "image is an address; nothing is fetched: send the picture itself as base64")
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise RowFault(Reason.BAD_VALUE, f"image is not base64: {e}") from e
    if len(data) > MAX_IMAGE:
        raise RowFault(Reason.IMAGE_TOO_LARGE, f"{len(data)} bytes, at most {MAX_IMAGE}")
    return data


def _response(p: Prediction, seconds: float) -> SentimentResponse:
    assert p.negative is not None and p.neutral is not None and p.positive is not None and p.label_mass is not None, "label words are always scored"
    rationale = None
    if p.stated is not None:
        rationale = Sections(
            Text_analysis=p.text_analysis or "", Image_analysis=p.image_analysis or "", Conflict_resolution=p.conflict_resolution or "",
            Final_conclusion=p.final_conclusion or "", Prediction=p.stated,
        )  # fmt: skip
    return SentimentResponse(
        id=p.post_id, label=p.label, probabilities=Probabilities(negative=p.negative, neutral=p.neutral, positive=p.positive),
        label_mass=p.label_mass, rationale=rationale, rationale_fault=p.rationale_fault, model=p.model, contract=p.contract,
        usage=Usage(tokens_in=p.tokens_in, tokens_out=p.tokens_out), seconds=round(seconds, 4),
    )  # fmt: skip


def _version() -> str:
    return versions().get("mulcot-ray", "source tree")


# --- faults ----------------------------------------------------------------------------------------------------------


async def _row_fault(_: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, RowFault)
    field = "text" if e.reason in TEXT_FAULTS else "image" if e.reason is Reason.BAD_VALUE or e.reason.startswith("image_") else None
    return error(422, e.reason, e.detail, field)


async def _invalid(request: Request, e: Exception) -> JSONResponse:
    """FastAPI's own handler sends the input back, a whole picture with it."""
    assert isinstance(e, RequestValidationError)
    faults = [(_field(x["loc"][1:]), str(x["msg"])) for x in e.errors()]
    if not faults[0][0] and "json" not in request.headers.get("content-type", ""):
        return error(415, "unsupported_media_type", "the header `Content-Type: application/json` is wanted")
    if e.errors()[0]["type"] == "json_invalid":
        return error(400, "invalid_json", f"the body is not JSON: {e.errors()[0]['ctx']['error']}")
    return error(422, "invalid_request", "; ".join(f"{f}: {m}" if f else m for f, m in faults[:8]), faults[0][0])


def _field(loc: tuple[int | str, ...]) -> str:
    """A field's path. Its names come from the request and may be long, or no Unicode at all."""
    return ".".join(map(str, loc))[:100].encode("utf-8", "replace").decode()


async def _http(_: Request, e: Exception) -> JSONResponse:
    assert isinstance(e, HTTPException)
    if isinstance(e, Refused):
        return error(e.status_code, e.code, str(e.detail), e.field)
    return error(e.status_code, HTTPStatus(e.status_code).name.lower(), str(e.detail), headers=e.headers)


async def _engine_error(_: Request, e: Exception) -> JSONResponse:
    log.error("engine: %s", e)
    return error(503, "engine_error", "the engine is not available; it is being restarted", headers={"Retry-After": "10"})


async def _timeout(_: Request, e: Exception) -> JSONResponse:
    return error(504, "timeout", "no answer within the time limit")


async def _internal(_: Request, e: Exception) -> JSONResponse:
    return error(500, "internal", "an error on our side; it is in the server's log")


HANDLERS = {
    RowFault: _row_fault, RequestValidationError: _invalid, HTTPException: _http, EngineError: _engine_error, TimeoutError: _timeout,
    Exception: _internal,
}  # fmt: skip
