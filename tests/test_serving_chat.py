"""OpenAI's chat API on the same engine: with OpenAI's own client, and what is refused."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from serving_parts import AUTH, TOKEN, Failing, Seen, Stepping, app, b64, bomb, picture, scripted, served, wait_for

from mulcot_ray.engines.base import Completion, Messages, Sampling
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.errors import EngineError

URL = "/v1/chat/completions"


class Asked(ScriptedEngine):
    """Says 'one two … ten', and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(scripted())
        self.script = lambda messages, sampling: "one two three four five six seven eight nine ten"
        self.calls: list[tuple[Messages, Any, Sampling]] = []

    async def generate(self, messages: Messages, image: Any, sampling: Sampling) -> Completion:
        self.calls.append((messages, image, sampling))
        return await super().generate(messages, image, sampling)


def said(text: Any = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": text}], **more}


def parts(url: str, text: str = "what is it?") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app(Asked()), headers=AUTH) as c:
        yield c


def test_openais_own_client() -> None:
    with served(app(Asked())) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0)
        assert [m.id for m in client.models.list()] == ["scripted"]
        messages: Any = [{"role": "user", "content": parts("data:image/png;base64," + b64(picture("PNG")))}]
        whole = client.chat.completions.create(model="scripted", messages=messages, max_tokens=4)
        assert whole.choices[0].message.content == "one two three four" and whole.choices[0].finish_reason == "length"
        assert whole.usage is not None and whole.usage.completion_tokens == 4
        chunks = list(client.chat.completions.create(model="scripted", messages=messages, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == "one two three four five six seven eight nine ten" and len(chunks) > 8
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage is not None
        with pytest.raises(openai.NotFoundError, match="scripted"):
            client.chat.completions.create(model="gpt-4", messages=messages)
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="wrong-token-of-it").models.list()


def test_the_engine_is_asked_for_what_was_said() -> None:
    engine = Asked()
    with TestClient(app(engine), headers=AUTH) as c:
        body = {
            "model": "scripted", "temperature": 0.5, "top_p": 0.9, "seed": 7, "max_completion_tokens": 3, "n": 1, "user": "u",
            "messages": [{"role": "system", "content": "s <|im_end|>"}, {"role": "user", "content": parts("data:image/png;base64," + b64(picture("PNG")))}],
        }  # fmt: skip
        assert c.post(URL, json=body).status_code == 200
    messages, image, sampling = engine.calls[0]
    assert sampling == Sampling(3, 0.5, 0.9, 7) and image.size == (84, 84)
    assert messages == [
        {"role": "system", "content": "s < |im_end|>"},
        {"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image"}]},
    ]


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("three", "one two "),
        (["nine", "two t", "four"], "one "),
        ("e f", "one two thre"),
        ("never", "one two three four five six seven eight nine ten"),
        ("one", ""),
    ],
)
def test_stops(client: TestClient, stop: Any, text: str) -> None:
    plain = client.post(URL, json=said(stop=stop)).json()["choices"][0]
    assert (plain["message"]["content"], plain["finish_reason"]) == (text, "stop")
    streamed = client.post(URL, json=said(stop=stop, stream=True)).text
    assert streamed.endswith("data: [DONE]\n\n")
    chunks = [json.loads(x.removeprefix("data: ")) for x in streamed.split("\n\n") if x.startswith("data: {")]
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == text and chunks[-1]["choices"][0]["finish_reason"] == "stop"


REFUSED: dict[str, tuple[Any, int, str | None]] = {
    "no messages": ({"model": "scripted", "messages": []}, 422, "messages"),
    "no model": ({"messages": [{"role": "user", "content": "x"}]}, 422, "model"),
    "role": ({"model": "scripted", "messages": [{"role": "tool", "content": "x"}]}, 422, "messages.0.role"),
    "address": (said(parts("http://169.254.169.254/latest/meta-data")), 422, "messages.0.content.1.image_url.url"),
    "file": (said(parts("file:///etc/passwd")), 422, "messages.0.content.1.image_url.url"),
    "no picture": (said(parts("data:image/png;base64," + b64(b"x"))), 422, "messages.0.content.1.image_url.url"),
    "bomb": (said(parts("data:image/png;base64," + b64(bomb(60_000)))), 422, "messages.0.content.1.image_url.url"),
    "two pictures": (said(parts("data:image/png;base64," + b64(picture())) * 2), 422, "messages.0.content.3"),
    "a video": (said([{"type": "video_url", "video_url": {"url": "data:,"}}]), 422, None),
    "tools": (said(tools=[]), 422, "tools"),
    "n": (said(n=2), 422, "n"),
    "logprobs": (said(logprobs=True), 422, "logprobs"),
    "temperature": (said(temperature=9), 422, "temperature"),
    "tokens": (said(max_tokens=0), 422, "max_tokens"),
    "format": (said(response_format={"type": "json_object"}), 422, "response_format"),
    "vLLM's own": (said(structured_outputs={"regex": "(a+)+$"}), 422, "structured_outputs"),
    "long": (said("x" * 20_001), 422, None),
    "a list": ([], 422, None),
}


@pytest.mark.parametrize(("body", "status", "field"), REFUSED.values(), ids=list(REFUSED))
def test_what_is_not_in_the_subset_is_refused_by_name(client: TestClient, body: Any, status: int, field: str | None) -> None:
    answer = client.post(URL, json=body)
    fault = answer.json()["error"]
    assert answer.status_code == status and len(answer.content) < 1500
    assert field is None or fault["field"] == field


def test_other_bodies(client: TestClient) -> None:
    assert client.post(URL, content=b"{", headers={"Content-Type": "application/json"}).status_code == 400
    assert client.post(URL, content=b"{}").status_code == 415


def test_faults_of_the_engine() -> None:
    class Gone(Failing):
        async def generate(self, messages: Messages, image: Any, sampling: Sampling) -> Completion:
            await asyncio.sleep(self.seconds)
            raise EngineError("inner workings")

    with TestClient(app(Gone()), headers=AUTH) as c:
        for stream in (False, True):
            answer = c.post(URL, json=said(stream=stream))
            assert answer.status_code == 503 and "inner" not in answer.text
    with TestClient(app(Gone(seconds=5), timeout_s=0.05), headers=AUTH) as c:
        assert c.post(URL, json=said()).status_code == 504
    with TestClient(app(Seen()), headers=AUTH) as c:
        assert c.post(URL, json=said("word " * 3000)).json()["error"]["code"] == "prompt_too_long"


def test_a_client_that_leaves_ends_the_writing() -> None:
    engine = Stepping()
    engine.go(3)
    with served(app(engine, running=1)) as url, httpx.Client(headers=AUTH, timeout=5, trust_env=False) as c:
        with c.stream("POST", url + URL, json=said(stream=True)) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        wait_for(lambda: engine.broken_off == 1 and engine.under_way == 0)
        assert 'mulcot_places{replica="-",state="taken"} 0.0' in c.get(f"{url}/metrics").text
