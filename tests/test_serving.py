"""One post over HTTP against the scripted engine: answers, faults by field, who may ask."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from serving_parts import AUTH, RECIPE, TOKEN, WORK, Failing, Seen, app, b64, bomb, picture, scripted

from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.errors import EngineError
from mulcot_ray.prompts import KEYS
from mulcot_ray.records import Post
from mulcot_ray.serving.api import make_api
from mulcot_ray.serving.schemas import MAX_BODY, MAX_IMAGE, MAX_TEXT
from mulcot_ray.serving.tokens import token_digest


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app(), headers=AUTH) as c:
        yield c


# --- answers ---------------------------------------------------------------------------------------------------------


def test_label_and_probabilities(client: TestClient) -> None:
    answer = client.post("/v1/sentiment", json={"id": "p1", "text": "Lovely", "aspect": "weather", "image": b64(picture())})
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("seconds") >= 0
    assert body.pop("usage")["tokens_in"] > 5
    timings = body.pop("timings")
    assert timings.pop("rationale") is None and set(timings) == {"queue", "prepare", "score"} and all(t >= 0 for t in timings.values())
    assert body == {
        "id": "p1", "label": "positive", "probabilities": {"negative": 0.1, "neutral": 0.1, "positive": 0.8}, "label_mass": 1.0,
        "rationale": None, "rationale_fault": None, "model": "scripted", "model_version": "f1", "contract": RECIPE.contract.hash,
    }  # fmt: skip


def test_the_same_prediction_as_the_labeler(client: TestClient) -> None:
    for text in ("Lovely", "awful"):
        post = Post("p", "-", text, "weather")
        expected = asyncio.run(WORK(ScriptedEngine(scripted()), post, None))
        got = client.post("/v1/sentiment", json={"id": "p", "text": text, "aspect": "weather"}).json()
        assert (got["label"], got["probabilities"]["negative"], got["usage"]["tokens_in"]) == (expected.label, expected.negative, expected.tokens_in)


def test_explain_gives_the_sections(client: TestClient) -> None:
    body = client.post("/v1/sentiment", json={"text": "awful", "explain": True}).json()
    assert body["rationale"] == {**{k: f"About {k}." for k in KEYS.values()}, "Prediction": "negative"}
    assert body["rationale_fault"] is None and body["usage"]["tokens_out"] > 0
    assert len(body["id"]) == 32


def test_a_rationale_that_fails_leaves_the_label(client: TestClient) -> None:
    body = client.post("/v1/sentiment", json={"text": "awful, terse", "explain": True}).json()
    assert body["label"] == "negative" and body["rationale"] is None
    assert body["rationale_fault"].startswith("sections_missing")


@pytest.mark.parametrize("encode", [b64, lambda d: "data:image/png;base64," + b64(d), lambda d: base64.encodebytes(d).decode()])
def test_pictures_reach_the_engine_prepared(encode: Any) -> None:
    engine = Seen()
    with TestClient(app(engine), headers=AUTH) as c:
        for form in ("JPEG", "PNG", "WEBP"):
            assert c.post("/v1/sentiment", json={"text": "x", "image": encode(picture(form))}).status_code == 200
    side = RECIPE.contract.image.side
    assert [i.size for i in engine.images if i] == [(side, side)] * 3


@pytest.mark.parametrize("empty", [{}, {"image": None, "aspect": None}, {"image": "", "aspect": ""}])
def test_an_empty_image_or_aspect_is_none(client: TestClient, empty: dict[str, Any]) -> None:
    first = client.post("/v1/sentiment", json={"text": "x"}).json()
    answer = client.post("/v1/sentiment", json={"text": "x", **empty})
    assert answer.status_code == 200 and answer.json()["usage"] == first["usage"]


def test_health_and_model(client: TestClient) -> None:
    assert client.get("/healthz", headers={"Authorization": ""}).json() == {"status": "ok"}
    body = client.get("/v1/model").json()
    assert (body["model"], body["fingerprint"], body["contract"]) == ("scripted", "f1", RECIPE.contract.hash) and body["version"]


def test_openapi_names_every_answer(client: TestClient) -> None:
    document = client.get("/openapi.json", headers={"Authorization": ""}).json()
    operation = document["paths"]["/v1/sentiment"]["post"]
    assert {"200", "401", "413", "422", "503", "504"} <= set(operation["responses"]) and operation["security"]


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", "Bearer wrong-token-of-it", f"Basic {TOKEN}", TOKEN, f"Bearer {TOKEN}x", f"Bearer {token_digest(TOKEN)}"],
)
@pytest.mark.parametrize(("method", "path"), [("POST", "/v1/sentiment"), ("GET", "/v1/model"), ("GET", "/nowhere"), ("GET", "/v1/../healthz/")])
def test_no_token_no_answer(header: str | None, method: str, path: str) -> None:
    with TestClient(app()) as c:
        answer = c.request(method, path, headers={} if header is None else {"Authorization": header}, content=b"{")
    assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["error"]["code"] == "unauthorized"


def test_any_of_the_tokens_will_do() -> None:
    with TestClient(app()) as c:
        for token in (TOKEN, "another-token-of-it"):
            assert c.get("/v1/model", headers={"Authorization": f"bearer {token}"}).status_code == 200


def test_without_tokens_only_loopback_is_answered() -> None:
    api = make_api(ScriptedEngine(scripted()), WORK, "f1", None)
    for url, status in (("http://127.0.0.1", 200), ("http://[::1]", 200), ("http://192.0.2.7", 403), ("http://example.org", 403)):
        with TestClient(api, base_url=url) as c:
            assert c.get("/v1/model").status_code == status


IMAGE_CASES = {
    "not base64": ("%%%", "bad_value"),
    "half a group": ("abcde", "bad_value"),
    "not ASCII": ("é" * 8, "bad_value"),
    "truncated": (b64(picture(size=(400, 400))[:-300]), "image_unreadable"),
    "no picture": (b64(b"<svg/>"), "image_unreadable"),
    "bomb": (b64(bomb(8_000)), "image_too_large"),
    "bomb that Pillow refuses": (b64(bomb(60_000)), "image_too_large"),
    "a strip": (b64(picture("PNG", (2000, 10))), "image_bad_shape"),
    "a dot": (b64(picture("PNG", (4, 4))), "image_bad_shape"),
    "too many bytes": (b64(bytes(MAX_IMAGE + 1)), "image_too_large"),
    "http": ("http://169.254.169.254/latest/meta-data", "bad_value"),
    "HTTPS": ("HTTPS://example.org/a.png", "bad_value"),
    "leading blank": ("  http://example.org/a.png", "bad_value"),
    "file": ("file:///etc/passwd", "bad_value"),
    "s3": ("s3://bucket/key.jpg", "bad_value"),
    "data without base64": ("data:image/png,abc", "bad_value"),
    "data without anything": ("data:", "bad_value"),
}


@pytest.mark.parametrize(("image", "code"), IMAGE_CASES.values(), ids=list(IMAGE_CASES))
def test_bad_pictures(client: TestClient, image: str, code: str) -> None:
    answer = client.post("/v1/sentiment", json={"text": "x", "image": image})
    assert answer.status_code == 422
    fault = answer.json()["error"]
    assert (fault["code"], fault["field"]) == (code, "image")
    assert len(answer.content) < 500 and (len(image) < 50 or image[:50] not in answer.text)


FIELD_CASES: dict[str, tuple[Any, str | None]] = {
    "no text": ({}, "text"),
    "text null": ({"text": None}, "text"),
    "text a number": ({"text": 7}, "text"),
    "long text": ({"text": "x" * (MAX_TEXT + 1)}, "text"),
    "long aspect": ({"text": "x", "aspect": "y" * 257}, "aspect"),
    "long id": ({"text": "x", "id": "y" * 129}, "id"),
    "image a list": ({"text": "x", "image": [1]}, "image"),
    "explain a word": ({"text": "x", "explain": "yes"}, "explain"),
    "unknown": ({"text": "x", "image_url": "http://localhost/"}, "image_url"),
    "unknown, long": ({"text": "x", "u" * 9999: 1}, "u" * 100),
    "a list": ([], None),
    "a string": ("text", None),
}


@pytest.mark.parametrize(("body", "field"), FIELD_CASES.values(), ids=list(FIELD_CASES))
def test_bad_fields(client: TestClient, body: Any, field: str | None) -> None:
    answer = client.post("/v1/sentiment", json=body)
    assert answer.status_code == 422
    fault = answer.json()["error"]
    assert (fault["code"], fault.get("field")) == ("invalid_request", field)
    assert len(answer.content) < 1000


@pytest.mark.parametrize("text", ["", "  \n"])
def test_empty_text(client: TestClient, text: str) -> None:
    answer = client.post("/v1/sentiment", json={"text": text})
    assert answer.status_code == 422 and answer.json()["error"]["code"] == "empty_text"


@pytest.mark.parametrize("field", ["text", "aspect", "id", "image"])
def test_half_a_surrogate_pair_is_no_json(client: TestClient, field: str) -> None:
    body = json.dumps({"text": "x"} | {field: "a\ud800"})
    answer = client.post("/v1/sentiment", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "hex escape" in answer.json()["error"]["message"]


RAW_CASES = {
    "not JSON": (b'{"text": ', 400),
    "no UTF-8": (b'{"text": "\xff"}', 400),
    "deep": (b"[" * 200_000, 400),
    "surrogate as a name": (b'{"text": "x", "\\ud800": 1}', 400),
    "huge number": (b'{"text": ' + b"1" * 10_000 + b"}", 400),
    "nothing": (b"", 400),
}


@pytest.mark.parametrize(("body", "status"), RAW_CASES.values(), ids=list(RAW_CASES))
def test_bad_bodies(client: TestClient, body: bytes, status: int) -> None:
    answer = client.post("/v1/sentiment", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"]["code"]


def test_a_form_is_not_json(client: TestClient) -> None:
    answer = client.post("/v1/sentiment", content=b'{"text": "x"}', headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 415 and answer.json()["error"]["code"] == "unsupported_media_type"


def test_unknown_paths_and_methods(client: TestClient) -> None:
    assert client.get("/nowhere").json()["error"]["code"] == "not_found"
    assert client.get("/v1/sentiment").json()["error"]["code"] == "method_not_allowed"


def test_nul_and_control_tokens_are_text(client: TestClient) -> None:
    for text in ("a\0b", "<|im_end|><|image_pad|><|vision_start|>"):
        assert client.post("/v1/sentiment", json={"text": text, "aspect": text}).status_code == 200


def test_body_limit_by_length_and_by_bytes(client: TestClient) -> None:
    chunk = b" " * (1 << 20)
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(MAX_BODY // len(chunk) + 2):
            sent += len(chunk)
            yield chunk

    json_type = {"Content-Type": "application/json"}
    for answer in (
        client.post("/v1/sentiment", content=bytes(MAX_BODY + 1), headers=json_type),
        client.post("/v1/sentiment", content=endless(), headers=json_type),
    ):
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "body_too_large"
    assert sent > MAX_BODY


def test_the_largest_picture_fits_in_the_body(client: TestClient) -> None:
    data = picture("PNG") + bytes(MAX_IMAGE - len(picture("PNG")))
    assert client.post("/v1/sentiment", json={"text": "x", "image": b64(data)}).status_code == 200


def test_faults_of_the_engine() -> None:
    secret = "the inner workings"
    cases = [(EngineError(secret), 503, "engine_error"), (ValueError(secret), 500, "internal"), (RuntimeError(secret), 500, "internal")]
    for fault, status, code in cases:
        with TestClient(app(Failing(fault)), headers=AUTH, raise_server_exceptions=False) as c:
            answer = c.post("/v1/sentiment", json={"text": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code) and secret not in answer.text
    with TestClient(app(Failing(seconds=5), timeout_s=0.05), headers=AUTH) as c:
        assert c.post("/v1/sentiment", json={"text": "x"}).status_code == 504


def test_a_prompt_that_is_too_long_is_the_texts_fault() -> None:
    with TestClient(app(ScriptedEngine(scripted(max_model_len=200))), headers=AUTH) as c:
        fault = c.post("/v1/sentiment", json={"text": "word " * 300}).json()["error"]
    assert (fault["code"], fault["field"]) == ("prompt_too_long", "text")


def test_a_dead_engine_fails_the_health_check() -> None:
    class Dead(ScriptedEngine):
        def check(self) -> None:
            raise EngineError("the engine has died")

    with TestClient(app(Dead(scripted()))) as c:
        assert c.get("/healthz").status_code == 503
