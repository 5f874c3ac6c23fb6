"""OpenAI's chat API as far as it is answered here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr

from mulcot_ray.serving.schemas import MAX_TEXT

MAX_MESSAGES, MAX_PARTS, MAX_TOKENS = 64, 16, 4096
Text = Annotated[StrictStr, Field(max_length=MAX_TEXT)]


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(Closed):
    type: Literal["text"]
    text: Text


class ImageUrl(Closed):
    url: StrictStr = Field(description="A data: URI. Addresses are not fetched.")
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(Closed):
    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(Closed):
    role: Literal["system", "user", "assistant"]
    content: Text | Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], Field(max_length=MAX_PARTS)]


class StreamOptions(Closed):
    include_usage: StrictBool = False


class ChatRequest(Closed):
    """What is answered of OpenAI's request. Fields with one value may be sent, as clients do, and say nothing."""

    model: StrictStr = Field(max_length=512)
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[StrictStr, Field(min_length=1, max_length=64)] | Annotated[
        list[Annotated[StrictStr, Field(min_length=1, max_length=64)]], Field(max_length=4)
    ] | None = None  # fmt: skip
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    user: Annotated[StrictStr, Field(max_length=256)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    index: Literal[0] = 0
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]


class ChatResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mulcot-ray"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
