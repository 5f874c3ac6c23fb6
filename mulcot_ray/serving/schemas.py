"""What goes in and out over HTTP, as pydantic models: FastAPI's OpenAPI document is made of them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from mulcot_ray.posts.images import FORMATS
from mulcot_ray.prompts import KEYS
from mulcot_ray.records import Sentiment

MAX_BODY = 8 << 20  # bytes: the largest picture as base64, and the text
MAX_IMAGE = 4 << 20  # bytes of the compressed picture
MAX_LINES, MAX_BATCH = 20_000, 1 << 30  # of a batch: lines, and bytes in all; a line has at most MAX_BODY
MAX_TEXT, MAX_ASPECT, MAX_ID, MAX_KEY = 20_000, 256, 128, 1024  # characters
KINDS = f"{', '.join(FORMATS)} of at most {MAX_IMAGE} bytes"
ERROR_STATUSES = (400, 401, 403, 404, 405, 408, 413, 415, 422, 500, 503, 504)


class SentimentRequest(BaseModel):
    """One post. Without an aspect the post as a whole is judged; an empty aspect or image counts as none, as on import."""

    model_config = ConfigDict(extra="forbid")

    id: StrictStr | None = Field(None, min_length=1, max_length=MAX_ID, description="Comes back in the answer; made up where absent.")
    text: StrictStr = Field(max_length=MAX_TEXT)
    aspect: StrictStr | None = Field(None, max_length=MAX_ASPECT, description="The target that the sentiment is toward.")
    image: StrictStr | None = Field(None, description=f"{KINDS}, as base64 or as a data: URI. Addresses are not fetched.")
    image_key: StrictStr | None = Field(None, max_length=MAX_KEY, description="s3://bucket/key of a picture, where this endpoint reads that bucket.")
    explain: StrictBool = Field(False, description="Also write the rationale.")
    stream: StrictBool = Field(False, description="Answer with events: the label at once, then the rationale as it is written. Implies explain.")


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


class Timings(BaseModel):
    """Milliseconds. queue: for a place in the engine; prepare: the picture; score and rationale: the engine."""

    queue: float
    prepare: float
    score: float
    rationale: float | None


class Scored(BaseModel):
    """The label: all of an answer that does not wait for the rationale."""

    id: str
    label: Sentiment
    probabilities: Probabilities = Field(description="Calibrated where the model has a calibration; they sum to 1.")
    label_mass: float | None = Field(description="Share of the whole vocabulary's probability that the three label words had; null: not known.")
    model: str
    model_version: str = Field(description="The fingerprint of the model's files.")
    contract: str = Field(description="The hash of all that decides the prompt.")


class SentimentResponse(Scored):
    rationale: Sections | None
    rationale_fault: str | None = Field(description="Why a rationale that was asked for is absent.")
    usage: Usage
    timings: Timings
    seconds: float


class Delta(BaseModel):
    """A piece of one section. Sections come in the order of the answer, without their keys and quotes."""

    section: str = Field(description=f"{', '.join(KEYS)} or prediction")
    delta: str


class ModelInfo(BaseModel):
    model: str
    fingerprint: str
    contract: str
    version: str
    share: float = Field(description="The part of the posts that it answers.")


class Fault(BaseModel):
    code: str
    message: str
    field: str | None = None


class ErrorResponse(BaseModel):
    error: Fault


class BadLine(BaseModel):
    """In place of the answer to a line of a batch. `line` counts from 1, empty lines too."""

    id: str | None
    line: int
    error: Fault


class Status(BaseModel):
    status: str


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route: these errors, or all."""
    return {s: {"model": ErrorResponse, "description": HTTPStatus(s).phrase} for s in statuses or ERROR_STATUSES}
