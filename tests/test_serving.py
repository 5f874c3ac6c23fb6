"""The endpoint: over HTTP against the scripted engine, and once as a whole on Ray Serve with vLLM."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import socket
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from fastapi import FastAPI
from fastapi.testclient import TestClient
from PIL import Image

from mulcot_ray.engines.base import EngineSpec, Messages, Sampling, Scores, spec
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import ArtifactMissing, ConfigError, EngineError
from mulcot_ray.prompts import KEYS
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Post, Sentiment
from mulcot_ray.serving.api import MAX_BODY, MAX_IMAGE, MAX_TEXT, make_api
from mulcot_ray.serving.app import build, warm_up
from mulcot_ray.serving.guards import configured_tokens, is_loopback, token_digest
from mulcot_ray.serving.run import Endpoint, example, serving
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
WORK = LabelWork(RECIPE.contract, "score", RECIPE.explain_tokens, RECIPE.seed, "scripted")
TOKEN = "a-token-for-the-tests"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
MODEL = os.environ.get("MULCOT_TEST_MODEL", "builtin:student")


def script(messages: Messages, sampling: Sampling) -> str:
    """Negative where the prompt has the word "awful", else positive; a bare label where it has "terse"."""
    text = json.dumps(messages)
    label = "negative" if "awful" in text else "positive"
    sections = "" if "terse" in text else "".join(f'"{key}": "About {key}."\n' for key in KEYS.values())
    return f'{sections}"Prediction": "{label}"'


def scripted(**changes: Any) -> EngineSpec:
    return replace(spec(RECIPE, RUNTIME, "student", "none"), backend="scripted", script=script, **changes)


class Seen(ScriptedEngine):
    """Keeps the pictures it was shown."""

    def __init__(self) -> None:
        super().__init__(scripted())
        self.images: list[Image.Image | None] = []

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        self.images.append(image)
        return await super().score(messages, image, written)


class Failing(ScriptedEngine):
    """Scores by raising, or by taking its time."""

    def __init__(self, fault: Exception | None = None, seconds: float = 0.0) -> None:
        super().__init__(scripted())
        self.fault, self.seconds = fault, seconds

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        await asyncio.sleep(self.seconds)
        if self.fault:
            raise self.fault
        return await super().score(messages, image, written)


def app(engine: Any = None, **options: Any) -> FastAPI:
    return make_api(engine or ScriptedEngine(scripted()), WORK, "f1", [token_digest("another-token-of-it"), token_digest(TOKEN)], **options)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(app(), headers=AUTH) as c:
        yield c


def picture(form: str = "JPEG", size: tuple[int, int] = (60, 40)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, form)
    return out.getvalue()


def b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def bomb(side: int) -> bytes:
    """A PNG of some bytes that says side × side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(bytes(99)))


# --- answers ---------------------------------------------------------------------------------------------------------


def test_label_and_probabilities(client: TestClient) -> None:
    answer = client.post("/v1/sentiment", json={"id": "p1", "text": "Lovely", "aspect": "weather", "image": b64(picture())})
    assert answer.status_code == 200
    body = answer.json()
    assert body.pop("seconds") >= 0
    assert body.pop("usage")["tokens_in"] > 5
    assert body == {
        "id": "p1", "label": "positive", "probabilities": {"negative": 0.1, "neutral": 0.1, "positive": 0.8}, "label_mass": 1.0,
        "rationale": None, "rationale_fault": None, "model": "scripted", "contract": RECIPE.contract.hash,
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
def test_half_a_surrogate_pair(client: TestClient, field: str) -> None:
    body = json.dumps({"text": "x"} | {field: "a\ud800"})
    answer = client.post("/v1/sentiment", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422 and answer.json()["error"]["field"] == field


RAW_CASES = {
    "not JSON": (b'{"text": ', 400),
    "no UTF-8": (b'{"text": "\xff"}', 400),
    "deep": (b"[" * 200_000, 400),
    "surrogate as a name": (b'{"text": "x", "\\ud800": 1}', 422),
    "huge number": (b'{"text": ' + b"1" * 10_000 + b"}", 400),
    "nothing": (b"", 422),
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


# --- set-up ----------------------------------------------------------------------------------------------------------


def test_tokens_from_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_text("# of the team\n\nfirst-token-of-all\n second-token-of-all \n")
    assert configured_tokens({}) == []
    assert configured_tokens({"MULCOT_TOKENS_FILE": str(path)}) == ["first-token-of-all", "second-token-of-all"]
    assert configured_tokens({"MULCOT_TOKENS": "third-token-of-all, fourth-token-of-all"}) == ["third-token-of-all", "fourth-token-of-all"]
    for bad in (
        {"MULCOT_TOKENS": ","},
        {"MULCOT_TOKENS": "short"},
        {"MULCOT_TOKENS": "a token with blanks"},
        {"MULCOT_TOKENS_FILE": str(tmp_path / "no")},
    ):
        with pytest.raises(ConfigError) as e:
            configured_tokens(bad)
        assert "short" not in str(e.value).partition("needs")[0]


def test_loopback() -> None:
    assert all(is_loopback(h) for h in ("127.0.0.1", "127.8.8.8", "::1", "localhost"))
    assert not any(is_loopback(h) for h in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))


def test_build_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULCOT_TOKENS", raising=False)
    monkeypatch.delenv("MULCOT_TOKENS_FILE", raising=False)
    with pytest.raises(ConfigError, match="MULCOT_TOKENS_FILE"):
        build({"model": "student", "root": str(tmp_path)})
    with pytest.raises(ConfigError, match="modle"):
        build({"modle": "student"})
    monkeypatch.setenv("MULCOT_TOKENS", TOKEN)
    with pytest.raises(ArtifactMissing, match="student"):
        build({"model": "student", "root": str(tmp_path)})


def test_serving_refuses_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="loopback"), serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME, host="0.0.0.0", auth=False):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)), serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME, port=port):
            pass


def test_the_example_keeps_the_users_token() -> None:
    assert TOKEN in example(Endpoint("http://h", TOKEN), shown=True)
    assert TOKEN not in example(Endpoint("http://h", TOKEN), shown=False)
    assert "Authorization" not in example(Endpoint("http://h", None), shown=False)


def test_warm_up_finds_a_contract_that_does_not_fit() -> None:
    asyncio.run(warm_up(ScriptedEngine(scripted()), WORK))
    with pytest.raises(EngineError, match="prompt_too_long"):
        asyncio.run(warm_up(ScriptedEngine(scripted(max_model_len=5)), WORK))


def test_serve_config_is_valid() -> None:
    from ray.serve.schema import ServeDeploySchema

    config = yaml.safe_load((Path(__file__).parents[1] / "serve_config.yaml").read_text())
    parsed = ServeDeploySchema.model_validate(config)
    assert parsed.http_options.host == "127.0.0.1"
    assert parsed.applications[0].import_path == "mulcot_ray.serving.app:build"
    assert parsed.applications[0].args["model"] == "builtin:student"  # type: ignore[index]


# --- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.engine
def test_serve_and_vllm(tmp_path: Path) -> None:
    with serving(Store(str(tmp_path)), MODEL, RECIPE, RUNTIME) as endpoint, httpx.Client(base_url=endpoint.url, timeout=60, trust_env=False) as c:
        assert c.post("/v1/sentiment", json={"text": "x"}).status_code == 401
        c.headers.update(endpoint.headers)
        assert c.get("/v1/model").json()["contract"] == RECIPE.contract.hash
        for body in ({"text": "What a day"}, {"text": "What a day", "aspect": "day", "image": b64(picture())}):
            answer = c.post("/v1/sentiment", json=body).json()
            p = answer["probabilities"]
            assert abs(sum(p.values()) - 1) < 1e-6 and answer["label"] == max(Sentiment, key=lambda s: p[s])
        explained = c.post("/v1/sentiment", json={"text": "What a day", "explain": True}).json()
        assert (explained["rationale"] is None) != (explained["rationale_fault"] is None)
        assert c.post("/v1/sentiment", json={"text": "word " * 4000}).json()["error"]["code"] == "prompt_too_long"
        assert c.post("/v1/sentiment", content=bytes(MAX_BODY + 1), headers={"Content-Type": "application/json"}).status_code == 413
