"""The HTTP side of the endpoint: posts in, Predictions out, every fault a structured error. Knows nothing of Ray.

POST /v1/sentiment          text, aspect, picture → label, probabilities, on request the rationale by section, on request as events
POST /v1/sentiment/batch    the same, a line each
POST /v1/chat/completions   OpenAI's API on the same engine, and GET /v1/models
GET  /v1/model              which models and contract answer
GET  /metrics               Prometheus text
GET  /healthz, /readyz      200 while the engine lives; while it also takes requests. Open to all, as /openapi.json and the page are
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response

from mulcot_ray.artifacts import versions as installed
from mulcot_ray.engines.base import Engine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.serving import openapi, page
from mulcot_ray.serving.answering import Answer, Answering, Places, Shadow, Version
from mulcot_ray.serving.batch import KINDS, Batch
from mulcot_ray.serving.chat import chat
from mulcot_ray.serving.chat_schemas import ChatResponse, ModelCard, ModelList
from mulcot_ray.serving.events import follow
from mulcot_ray.serving.faults import add_handlers
from mulcot_ray.serving.guards import BODY_S, BearerTokens, BodyLimit, LoopbackOnly, Refused
from mulcot_ray.serving.leaving import Written, while_there
from mulcot_ray.serving.metrics import Counted, Meters
from mulcot_ray.serving.reading import media_type, read
from mulcot_ray.serving.schemas import (
    MAX_BATCH,
    MAX_BODY,
    ModelInfo,
    Probabilities,
    Scored,
    Sections,
    SentimentResponse,
    Status,
    Usage,
    faults,
)  # fmt: skip

TIMEOUT_S = 60.0  # from the read request to the answer
RUNNING = 64  # posts in the engine at once, where the caller does not say
BATCHES = 4  # at once
OPEN_PATHS = ("/healthz", "/readyz", "/openapi.json")


def make_api(
    engine: Engine, work: LabelWork, fingerprint: str, digests: Collection[str] | None, timeout_s: float = TIMEOUT_S, *,
    share: float = 1.0, others: Sequence[Version] = (), shadows: Sequence[Shadow] = (), running: int = RUNNING, image_prefixes: tuple[str, ...] = (),
    metrics_open: bool = False, replica: str = "-", body_s: float = BODY_S,
) -> FastAPI:  # fmt: skip
    """The application around an engine. `digests` are those of the tokens; None: no tokens, answers on loopback only.

    `running` posts are in the engine at once, and as many requests may wait. `others` are versions that answer a share of the posts, and
    `shadows` see all answers; both may grow later.
    """
    first = Version(engine, work, fingerprint, share)
    places, meters = Places(running, running), Meters(replica)
    meters.watch(places)
    answering = Answering(first, others, shadows, places, timeout_s, image_prefixes, meters)
    started, batches = int(time.time()), 0
    api = FastAPI(title="mulcot-ray", version=_version(), docs_url=None, redoc_url=None)
    add_handlers(api)
    open_paths = {*OPEN_PATHS, *(["/metrics"] if metrics_open else [])}

    @api.post("/v1/sentiment", openapi_extra=openapi.SENTIMENT, responses=openapi.SENTIMENT_RESPONSES, response_model=SentimentResponse)
    async def sentiment(request: Request) -> Response:
        """Label one post, and explain the label where asked."""
        came = time.perf_counter()
        asked, picture = await read(request)
        if asked.stream:
            return await follow(request, answering, asked, picture, _scored, lambda a: _whole(a, came))
        answer = await while_there(request.receive, answering.answer(asked, picture))
        return Response(_whole(answer, came).model_dump_json(), media_type="application/json")

    @api.post("/v1/sentiment/batch", openapi_extra=openapi.BATCH, responses=openapi.BATCH_RESPONSES, response_class=Response)
    async def batch(request: Request) -> Response:
        """Label many posts: a SentimentRequest a line, answered by a line each, in the same order."""
        nonlocal batches
        if media_type(request) not in KINDS:
            raise Refused(415, "unsupported_media_type", f"the header `Content-Type: {KINDS[0]}` is wanted")
        if batches >= BATCHES:
            raise Refused(503, "over_capacity", f"{BATCHES} batches are being answered", headers={"Retry-After": "10"})
        batches += 1

        def ended() -> None:
            nonlocal batches
            batches -= 1

        return Batch(answering, running, lambda a: _whole(a, None), ended)

    @api.post("/v1/chat/completions", openapi_extra=openapi.CHAT, responses=openapi.CHAT_RESPONSES, response_model=ChatResponse)
    async def chat_completions(request: Request) -> Response:
        """OpenAI's chat completions: texts and one picture, plain or streamed."""
        done = await chat(request, answering)
        return done if isinstance(done, Written) else Response(done.model_dump_json(), media_type="application/json")

    @api.get("/v1/models", responses=faults(401, 403))
    async def models() -> ModelList:
        """OpenAI's list of models."""
        return ModelList(data=[ModelCard(id=v.name, created=started) for v in answering.versions])

    @api.get("/v1/model", responses=faults(401, 403))
    async def model() -> ModelInfo:
        """The model, or the first of its versions."""
        return ModelInfo(model=first.name, fingerprint=fingerprint, contract=first.work.contract_hash, version=_version(), share=first.share)

    @api.get("/metrics", responses=openapi.METRICS_RESPONSES, response_class=Response)
    async def metrics() -> Response:
        """Prometheus text."""
        return Response(meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/healthz", responses=faults(503))
    async def healthz() -> Status:
        """Whether the engine lives."""
        engine.check()
        return Status(status="ok")

    @api.get("/readyz", responses=faults(503))
    async def readyz() -> Status:
        """Whether a request would be taken now: the engine lives, is warm, and has a place to wait in."""
        engine.check()
        if places.full:
            raise Refused(503, "over_capacity", "all places are taken", headers={"Retry-After": "1"})
        return Status(status="ready")

    page.mount(api)
    open_paths |= set(page.PATHS)
    # Added last comes first: count all, then ask who it is, then bound the body.
    api.add_middleware(BodyLimit, limit=MAX_BODY, larger={"/v1/sentiment/batch": MAX_BATCH}, seconds=body_s)
    if digests is None:
        api.add_middleware(LoopbackOnly)
    else:
        api.add_middleware(BearerTokens, digests=digests, open_paths=open_paths)
    api.add_middleware(Counted, meters=meters)
    openapi.complete(api, None if digests is None else open_paths)
    return api


def _scored(a: Answer) -> Scored:
    return Scored(**_label(a))


def _label(a: Answer) -> dict[str, Any]:
    p = a.prediction
    assert p.negative is not None and p.neutral is not None and p.positive is not None, "label words are always scored"
    return {
        "id": p.post_id, "label": p.label, "probabilities": Probabilities(negative=p.negative, neutral=p.neutral, positive=p.positive),
        "label_mass": p.label_mass, "model": p.model, "model_version": a.version.fingerprint, "contract": p.contract,
    }  # fmt: skip


def _whole(a: Answer, came: float | None) -> SentimentResponse:
    p, t = a.prediction, a.timings
    rationale = None
    if p.stated is not None:
        rationale = Sections(
            Text_analysis=p.text_analysis or "", Image_analysis=p.image_analysis or "", Conflict_resolution=p.conflict_resolution or "",
            Final_conclusion=p.final_conclusion or "", Prediction=p.stated,
        )  # fmt: skip
    seconds = time.perf_counter() - came if came is not None else (t.queue + t.prepare + t.score + (t.rationale or 0)) / 1000
    return SentimentResponse(
        **_label(a), rationale=rationale, rationale_fault=p.rationale_fault, usage=Usage(tokens_in=p.tokens_in, tokens_out=p.tokens_out),
        timings=t, seconds=round(seconds, 4),
    )  # fmt: skip


def _version() -> str:
    return installed().get("mulcot-ray", "source tree")
