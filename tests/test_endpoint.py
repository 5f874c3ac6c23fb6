"""Asking an OpenAI-compatible server: against a scripted one, through a proxy that spoils answers, and once against real vLLM."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import math
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from faulty_proxy import FAULTS, faulty_proxy
from PIL import Image
from vllm_server import vllm_server

from mulcot_ray.engines.ask import score
from mulcot_ray.engines.base import Completion, EngineSpec, Sampling, Scores, engine_spec, open_engine, spec
from mulcot_ray.engines.chat import QUESTION
from mulcot_ray.engines.endpoint import EndpointEngine
from mulcot_ray.errors import ConfigError, EngineError, RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import Endpoint, load_recipe, load_runtime
from mulcot_ray.records import LABELS, Post, Reason, Split, Task
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
CONTRACT = RECIPE.contract
KEY = "a-key-for-the-tests"
MODEL = "some-model"
ASKED = [{"role": "user", "content": "How are you?"}]
GREEDY = Sampling(max_tokens=20)


class Server:
    """What the scripted server does: `answer` gets the request's body and returns (status, body, headers)."""

    def __init__(self) -> None:
        self.url = ""
        self.reset()

    def reset(self) -> None:
        self.answer: Callable[[dict[str, Any]], tuple[int, Any, dict[str, str]]] = lambda body: said("fine")
        self.models: Any = {"object": "list", "data": [{"id": MODEL, "object": "model"}, {"id": "another", "object": "model"}]}
        self.status = 200  # of everything, before `answer` is asked
        self.seen: list[dict[str, Any]] = []  # bodies of chat requests
        self.headers: list[dict[str, str]] = []  # of all requests

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def any_route(path: str, request: Request) -> Response:
            self.headers.append(dict(request.headers))
            authorization = request.headers.get("authorization")
            if authorization not in (f"Bearer {KEY}", None):
                return Response(json.dumps({"error": {"message": f"wrong: {authorization}"}}), 401, media_type="application/json")
            if self.status != 200:
                return Response("down", self.status)
            if path == "v1/models":
                return Response(self.models if isinstance(self.models, str) else json.dumps(self.models), media_type="application/json")
            if path != "v1/chat/completions":
                return Response("no such page", 404)
            body = await request.json()
            self.seen.append(body)
            status, found, headers = await asyncio.to_thread(self.answer, body)
            return Response(json.dumps(found), status, headers, "application/json")

        return app


def said(text: str | None, finish: str = "stop", logprobs: Any = None, **message: Any) -> tuple[int, Any, dict[str, str]]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish, "logprobs": logprobs}
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    return 200, {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice], "usage": usage}, {}


def refused(status: int, message: str, headers: dict[str, str] | None = None, **more: Any) -> tuple[int, Any, dict[str, str]]:
    return status, {"error": {"message": message, **more}}, headers or {}


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    scripted = Server()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    web = uvicorn.Server(uvicorn.Config(scripted.app(), "127.0.0.1", port, log_level="critical"))
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        time.sleep(0.01)
    scripted.url = f"http://127.0.0.1:{port}/v1"
    yield scripted
    web.should_exit = True
    thread.join(10)


@pytest.fixture
def server(running: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    running.reset()
    monkeypatch.setenv("SOME_KEY", KEY)
    return running


def at(url: str, model: str = MODEL, replicas: int | tuple[int, int] = 1, **settings: Any) -> EngineSpec:
    endpoint = Endpoint(**{"url": url, "key_env": "SOME_KEY", "retries": 1, "timeout_s": 5} | settings)
    runtime = RUNTIME.teacher.model_copy(update={"endpoint": endpoint, "replicas": replicas})
    return replace(spec(RECIPE, RUNTIME, "teacher", model), backend="endpoint", runtime=runtime)


def ask(s: EngineSpec, *calls: Callable[[EndpointEngine], Any]) -> list[Any]:
    """What the calls return or raise, all made at once."""

    async def together(engine: EndpointEngine) -> list[Any]:
        return await asyncio.gather(*(c(engine) for c in calls), return_exceptions=True)

    engine = EndpointEngine(s)
    try:
        return asyncio.run(together(engine))
    finally:
        engine.close()


def generate(text: str = "How are you?", sampling: Sampling = GREEDY, image: Image.Image | None = None) -> Callable[[EndpointEngine], Any]:
    return lambda e: e.generate([{"role": "user", "content": text}], image, sampling)


def content(body: dict[str, Any]) -> Any:
    return body["messages"][-1]["content"]


# --- opening -----------------------------------------------------------------------------------------------------------


def test_a_model_by_name_is_opened_at_the_role_s_endpoint(server: Server, tmp_path: Path) -> None:
    endpoint = Endpoint(url=server.url, key_env="SOME_KEY")
    runtime = RUNTIME.model_copy(update={"teacher": RUNTIME.teacher.model_copy(update={"endpoint": endpoint})})
    engine = open_engine(engine_spec(Store(str(tmp_path)), RECIPE, runtime, "teacher", f"endpoint:{MODEL}"))
    assert isinstance(engine, EndpointEngine)
    assert asyncio.run(engine.generate(ASKED, None, GREEDY)) == Completion("fine", "stop", 7, 3)
    engine.close()
    with pytest.raises(ConfigError, match="has no `endpoint:` section"):
        EndpointEngine(replace(at(server.url), runtime=RUNTIME.teacher))


def test_an_opening_says_what_is_wrong(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"has no model 'mine'; it has another, some-model$"):
        EndpointEngine(at(server.url, "mine"))
    with pytest.raises(EngineError, match="environment variable NO_KEY.*is not set"):
        EndpointEngine(at(server.url, key_env="NO_KEY"))
    with pytest.raises(EngineError, match=r"is not there: status 404.*http://host:8000/v1"):
        EndpointEngine(at(server.url.removesuffix("/v1")))
    monkeypatch.setenv("SOME_KEY", "sk-wrong")
    with pytest.raises(EngineError, match="refuses the key in SOME_KEY: status 401: wrong: Bearer \\[key\\]") as caught:
        EndpointEngine(at(server.url))
    assert "sk-wrong" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("SOME_KEY", "sk-wröng\n")
    with pytest.raises(EngineError, match="outside printable ASCII"):
        EndpointEngine(at(server.url))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
    with pytest.raises(EngineError, match=f"{nobody} does not answer: ConnectError"):
        EndpointEngine(at(nobody, key_env=None))
    server.models = "<html>Welcome</html>"
    with pytest.raises(EngineError, match="does not answer|does not speak OpenAI"):
        EndpointEngine(at(server.url, key_env=None))


def test_a_server_that_refuses_plain_questions_is_not_opened(server: Server) -> None:
    server.answer = lambda body: refused(400, "Unsupported parameter: 'max_tokens'")
    with pytest.raises(EngineError, match="refuses a plain question to 'some-model': status 400: Unsupported parameter"):
        EndpointEngine(at(server.url))


def test_no_key_goes_where_none_is_wanted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer sk-of-a-third")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert ask(at(server.url, key_env=None), generate()) == [Completion("fine", "stop", 7, 3)]
    assert len(server.headers) == 3 and not any("authorization" in h for h in server.headers)
    server.reset()
    s = at(server.url)
    ask(s, generate())
    assert {h["authorization"] for h in server.headers} == {f"Bearer {KEY}"}
    assert KEY.encode() not in pickle.dumps(s)


# --- writing -----------------------------------------------------------------------------------------------------------


def test_what_is_sent(server: Server) -> None:
    image = Image.effect_noise((84, 84), 80).convert("RGB")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "Well?"}]},
    ]
    sampling = Sampling(30, 0.7, 0.9, seed=5)
    ask(at(server.url), lambda e: e.generate(messages, image, sampling))
    sent = server.seen[-1]
    assert {k: v for k, v in sent.items() if k != "messages"} == {"model": MODEL, "max_tokens": 30, "temperature": 0.7, "top_p": 0.9, "seed": 5}
    assert sent["messages"][0] == messages[0]
    before, picture, after = sent["messages"][1]["content"]
    assert (before, after) == (messages[1]["content"][0], messages[1]["content"][2])
    kind, _, data = picture["image_url"]["url"].partition(",")
    seen = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/png;base64" and seen.mode == "RGB" and seen.tobytes() == image.tobytes()


def test_dialect_openai_says_what_it_cannot_do(server: Server) -> None:
    guided, begun = ask(at(server.url), generate(sampling=replace(GREEDY, guide="a+")), lambda e: e.score(ASKED, None, "I think"))
    assert isinstance(guided, EngineError) and "no structured decoding by a regular expression" in str(guided)
    assert isinstance(begun, EngineError) and "cannot go on from an answer that is begun" in str(begun)


def test_finish_reasons_and_refusals(server: Server) -> None:
    replies = {
        "long": said("and so on", "length"),
        "no": said(None, refusal="I can't help with that."),
        "filtered": said("half an ans", "content_filter"),
        "nothing": said(None),
    }
    server.answer = lambda body: replies.get(content(body), said("fine"))
    cut, refusal, filtered, nothing = ask(at(server.url), *(generate(k) for k in replies))
    assert cut == Completion("and so on", "length", 7, 3)
    assert (refusal.reason, refusal.raw) == (Reason.ENGINE_ERROR, "I can't help with that.") and "I can't help" in refusal.detail
    assert (filtered.reason, filtered.raw) == (Reason.ENGINE_ERROR, "half an ans") and "content_filter" in filtered.detail
    assert (nothing.reason, nothing.raw) == (Reason.ENGINE_ERROR, "")


# --- faults ------------------------------------------------------------------------------------------------------------


def test_a_prompt_that_leaves_too_little_room_gets_what_there_is(server: Server) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if content(body) == "very long":
            return refused(400, "too much", code="context_length_exceeded")
        if content(body) == "long" and "max_tokens" in body:
            return refused(400, "This model's maximum context length is 1024 tokens. However, you requested 160 output tokens")
        return said("a few words", "length")

    server.answer = answer
    fits, too_long = ask(at(server.url), generate("long"), generate("very long"))
    assert fits == Completion("a few words", "length", 7, 3)
    assert too_long.reason is Reason.PROMPT_TOO_LONG and too_long.raw is None


def test_a_refused_row_is_a_reject_and_the_others_go_on(server: Server) -> None:
    replies = {
        "picture": refused(400, "Failed to load image " + "x" * 500),
        "fields": (422, {"detail": "bad field"}, {}),
        "body": refused(413, "too big"),
    }
    server.answer = lambda body: replies.get(content(body), said("fine"))
    *bad, good = ask(at(server.url), *(generate(k) for k in replies), generate())
    assert good.text == "fine"
    assert [(f.reason, f.raw) for f in bad] == [(Reason.ENGINE_ERROR, None)] * 3
    assert bad[0].detail.startswith("the endpoint refuses the row: Failed to load image xxx") and len(bad[0].detail) < 240
    assert "bad field" in bad[1].detail
    assert len(server.seen) == 1 + 4  # what cannot help is not tried again


def test_retries_wait_as_the_server_asks(server: Server) -> None:
    times: list[float] = []

    def answer(body: dict[str, Any]) -> Any:
        if content(body) == QUESTION[0]["content"]:
            return said("yes")
        times.append(time.monotonic())
        return [refused(429, "slow down", {"Retry-After": "2"}), refused(503, "restarting"), said("at last")][len(times) - 1]

    server.answer = answer
    (done,) = ask(at(server.url, retries=2), generate())
    assert done.text == "at last"
    assert times[1] - times[0] >= 2 and times[2] - times[1] > 0.3


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_retried(server: Server, fault: str) -> None:
    with faulty_proxy(server.url, 0.0, faults=[fault], stall_s=30) as proxy:
        engine = EndpointEngine(at(proxy.url, timeout_s=1 if fault == "stall" else 10, retries=3))
        proxy.counts.clear()
        proxy.share = 1.0

        async def mend() -> Completion:
            asking = asyncio.ensure_future(engine.generate(ASKED, None, GREEDY))
            while not proxy.counts[fault]:
                await asyncio.sleep(0.01)
            proxy.share = 0.0
            return await asking

        assert asyncio.run(mend()).text == "fine"
        assert proxy.counts == {fault: 1, "passed": 1}
        engine.close()


def test_a_storm_loses_no_row(server: Server) -> None:
    """200 rows at once, one request in five spoilt: all are answered, each with its own answer."""
    server.answer = lambda body: said(f"re: {content(body)}")
    with faulty_proxy(server.url, 0.2, seed=3, stall_s=30) as proxy:
        done = ask(at(proxy.url, timeout_s=3, retries=8), *(generate(str(i)) for i in range(200)))
        assert all(proxy.counts[f] > 3 for f in FAULTS)
    assert [d.text for d in done] == [f"re: {i}" for i in range(200)]


@pytest.mark.parametrize("status", [500, 429, 403])
def test_a_row_that_the_server_never_answers_is_at_fault_alone(server: Server, status: int) -> None:
    server.answer = lambda body: refused(status, "cannot do this one") if content(body) == "poison" else said("fine")
    attempts = 3 if status != 403 else 2
    for others in (0, 5):  # also where it is the only one left
        fault, *good = ask(at(server.url), generate("poison"), *[generate()] * others)
        assert isinstance(fault, RowFault) and (fault.reason, fault.raw) == (Reason.ENGINE_ERROR, None)
        assert fault.detail.endswith(f"not this row after {attempts} attempts: status {status}: cannot do this one")
        assert [g.text for g in good] == ["fine"] * others


def test_a_server_that_answers_anybody_is_alive(server: Server) -> None:
    """Our own question may have bad luck too; an answer to another row will do."""
    engine, doubted = EndpointEngine(at(server.url)), threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if content(body) == QUESTION[0]["content"]:
            doubted.set()
        elif content(body) == "slow":
            doubted.wait(10)
            return said("fine")
        return refused(503, "busy")

    server.answer = answer

    async def both() -> list[Any]:
        return await asyncio.gather(generate("poison")(engine), generate("slow")(engine), return_exceptions=True)

    fault, slow = asyncio.run(both())
    assert isinstance(fault, RowFault) and fault.detail.endswith("after 3 attempts: status 503: busy") and slow.text == "fine"
    engine.check()
    engine.close()


def test_an_outage_ends_the_run_and_rejects_nothing(server: Server) -> None:
    """Rows that are under way when the server dies are not at fault, though others were answered since they began."""
    begun = threading.Event()

    def answer(body: dict[str, Any]) -> Any:
        if content(body).startswith("slow"):
            begun.wait(5)
            return refused(502, "bad gateway")
        return said("fine")

    server.answer = answer

    async def outage(engine: EndpointEngine) -> list[Any]:
        slow = [asyncio.ensure_future(engine.generate([{"role": "user", "content": f"slow {i}"}], None, GREEDY)) for i in range(5)]
        await asyncio.sleep(0.1)
        first = await engine.generate(ASKED, None, GREEDY)
        server.status = 502
        begun.set()
        return [first, *await asyncio.gather(*slow, return_exceptions=True)]

    engine = EndpointEngine(at(server.url))
    engine.check()
    first, *rest = asyncio.run(outage(engine))
    assert first.text == "fine"
    assert [type(r) for r in rest] == [EngineError] * 5
    assert {str(r) for r in rest} == {f"the endpoint {server.url} does not answer: status 502: down"}
    with pytest.raises(EngineError, match="does not answer: status 502"):
        engine.check()
    sent = len(server.headers)
    with pytest.raises(EngineError, match="does not answer: status 502"):
        asyncio.run(engine.generate(ASKED, None, GREEDY))
    assert len(server.headers) == sent
    engine.close()


def test_a_server_that_is_back_answers_the_row_after_all(server: Server) -> None:
    """The row's own attempts all fell into an outage that is over when the server is asked for a word."""

    def answer(body: dict[str, Any]) -> Any:
        return refused(500, "starting") if sum(content(b) == "mine" for b in server.seen) <= 2 and content(body) == "mine" else said("fine")

    server.answer = answer
    assert ask(at(server.url), generate("mine")) == [Completion("fine", "stop", 7, 3)]
    assert [content(b) for b in server.seen[1:]] == ["mine", "mine", QUESTION[0]["content"], "mine"]


def test_answers_that_are_none_are_faults_of_the_server(server: Server) -> None:
    engine = EndpointEngine(at(server.url))
    server.answer = lambda body: (200, {"error": {"message": "upstream is gone"}}, {})
    with pytest.raises(EngineError, match="does not answer: ValueError: an answer without choices.*upstream is gone"):
        asyncio.run(engine.generate(ASKED, None, GREEDY))
    engine.close()


def test_requests_a_minute_are_shared_by_the_replicas(server: Server) -> None:
    """600 a minute over two replicas: 5 a second each, retries included."""
    server.answer = lambda body: refused(429, "no", {"Retry-After": "0.01"}) if len(server.seen) % 2 == 0 else said("fine")
    started = time.monotonic()
    done = ask(at(server.url, replicas=(1, 2), requests_per_minute=600, retries=5), *[generate()] * 4)
    assert [d.text for d in done] == ["fine"] * 4
    asked = len(server.seen) - 1
    assert asked > 5 and time.monotonic() - started >= (asked - 1) / 5


def test_closing_from_anywhere(server: Server) -> None:
    async def inside(engine: EndpointEngine) -> bool:
        await engine.generate(ASKED, None, GREEDY)
        engine.close()
        await asyncio.sleep(0.05)
        return bool(engine.server.client.is_closed())

    async def another_thread(engine: EndpointEngine) -> bool:
        await engine.generate(ASKED, None, GREEDY)
        await asyncio.to_thread(engine.close)
        return bool(engine.server.client.is_closed())

    assert asyncio.run(inside(EndpointEngine(at(server.url))))
    assert asyncio.run(another_thread(EndpointEngine(at(server.url))))
    never_asked, after = EndpointEngine(at(server.url)), EndpointEngine(at(server.url))
    asyncio.run(after.generate(ASKED, None, GREEDY))
    for engine in (never_asked, after):
        engine.close()
        assert engine.server.client.is_closed()


# --- label probabilities -----------------------------------------------------------------------------------------------


def token(text: str, **options: float) -> dict[str, Any]:
    """A token of an answer and the probabilities of its alternatives, itself among them (a certain one where none are given)."""
    given = options or {text: 1.0}
    top = [{"token": k, "logprob": math.log(p), "bytes": None} for k, p in given.items()]
    return {"token": text, "logprob": math.log(given[text]), "bytes": None, "top_logprobs": top}


HEAD = [token(t) for t in ('"', "Pred", "iction", '":', ' "')]


def scored(server: Server, tokens: list[dict[str, Any]] | None, text: str = "") -> Any:
    text = text or "".join(t["token"] for t in tokens or [])
    server.answer = lambda body: said(text, logprobs=None if tokens is None else {"content": tokens})
    return ask(at(server.url), lambda e: e.score(ASKED, None))[0]


def test_probabilities_where_the_answer_states_the_label(server: Server) -> None:
    whole = scored(server, [*HEAD, token("positive", positive=0.6, neutral=0.2, neg=0.1, happy=0.05), token('"')])
    assert whole.probabilities == pytest.approx((0.1 / 0.9, 0.2 / 0.9, 0.6 / 0.9)) and whole.mass == pytest.approx(0.9) and whole.tokens_in == 7
    pieces = [token("ne", ne=0.7, pos=0.2, n=0.1), token("utral", utral=0.75, gative=0.2, ver=0.05), token('"')]
    split = scored(server, [*HEAD, *pieces])
    assert split.probabilities == pytest.approx((0.14 / 0.865, 0.525 / 0.865, 0.2 / 0.865)) and split.mass == pytest.approx(0.865)
    bare = scored(server, [token("**Prediction"), token("**:"), token(" Negative", **{" Negative": 0.8, " Positive": 0.1}), token(".")])
    assert bare.probabilities == pytest.approx((0.8 / 0.9, 0, 0.1 / 0.9))
    assert (server.seen[-1]["logprobs"], server.seen[-1]["top_logprobs"], server.seen[-1]["temperature"]) == (True, 20, 0)


def test_without_log_probabilities_the_stated_label_has_all(server: Server) -> None:
    assert scored(server, None, '"Prediction": "neutral"') == Scores((0.0, 1.0, 0.0), None, 7)
    answer = server.answer
    for limit in (5, 0):  # servers that refuse to be asked for 20, or for any
        server.answer = lambda body, k=limit: refused(400, "top_logprobs") if body.get("top_logprobs", 0) > k else answer(body)
        assert ask(at(server.url), lambda e: e.score(ASKED, None)) == [Scores((0.0, 1.0, 0.0), None, 7)]
        assert server.seen[-1].get("top_logprobs", 0) == limit


def test_an_answer_without_a_label_is_unparsed(server: Server) -> None:
    fault = scored(server, None, "I feel good about this.")
    assert isinstance(fault, RowFault) and (fault.reason, fault.raw) == (Reason.ANSWER_UNPARSED, "I feel good about this.")


def test_dialect_vllm_wants_vllm(server: Server) -> None:
    with pytest.raises(EngineError, match="does not return prompt tokens and text; `dialect: vllm` wants vLLM 0.29"):
        EndpointEngine(at(server.url, dialect="vllm"))


def test_dialect_vllm_checks_template_and_label_words(server: Server) -> None:
    def vllm(adds: str = "", ids: dict[str, list[int]] | None = None, named: bool = True) -> None:
        known = {"negative": [8, 9], "neutral": [6], "positive": [7]} | (ids or {})

        def answer(body: dict[str, Any]) -> Any:
            begun = content(body)
            word = begun.removeprefix(CONTRACT.label_prefix)
            tokens = [{"token": f"token_id:{i}", "logprob": -float(i), "bytes": None} for i in body.get("logprob_token_ids", []) if named]
            status, reply, headers = said("x", logprobs={"content": [{**token("x"), "top_logprobs": tokens}]})
            return status, {**reply, "prompt_token_ids": [1, 2, *known.get(word, [])], "prompt_text": f"<user>{begun}{adds}"}, headers

        server.answer = answer

    vllm()
    (found,) = ask(at(server.url, dialect="vllm"), lambda e: e.score(ASKED, None, "So: "))
    masses = [math.exp(-8), math.exp(-6), math.exp(-7)]
    assert found.mass == pytest.approx(sum(masses)) and found.probabilities == pytest.approx([m / sum(masses) for m in masses])
    sent = server.seen[-1]
    assert sent["messages"] == [*ASKED, {"role": "assistant", "content": 'So: "Prediction": "'}]
    assert (sent["max_tokens"], sent["add_generation_prompt"], sent["continue_final_message"]) == (1, False, True)
    assert sent["logprob_token_ids"] == [8, 6, 7]
    vllm(adds="<end>")
    with pytest.raises(EngineError, match="adds to an answer that is begun .*<end>"):
        EndpointEngine(at(server.url, dialect="vllm"))
    vllm(ids={"neutral": [8]})
    with pytest.raises(ConfigError, match="start with the same token"):
        EndpointEngine(at(server.url, dialect="vllm"))
    vllm(named=False)
    with pytest.raises(EngineError, match="does not return the log-probabilities of named tokens"):
        EndpointEngine(at(server.url, dialect="vllm"))


def test_dialect_vllm_sends_the_guide_and_the_neutral_sampling(server: Server) -> None:
    vllm_ids = {"negative": 3, "neutral": 4, "positive": 5}

    def answer(body: dict[str, Any]) -> Any:
        word = str(content(body)).removeprefix(CONTRACT.label_prefix)
        tokens = [{"token": f"token_id:{i}", "logprob": -1.0, "bytes": None} for i in (3, 4, 5)]
        status, reply, headers = said("x", logprobs={"content": [{**token("x"), "top_logprobs": tokens}]})
        more = {"prompt_token_ids": [1, *([vllm_ids[word]] if word in vllm_ids else [])], "prompt_text": content(body)}
        return status, reply | more, headers

    server.answer = answer
    ask(at(server.url, dialect="vllm"), generate(sampling=replace(GREEDY, guide="a+")))
    sent = server.seen[-1]
    assert sent["structured_outputs"] == {"regex": "a+"}
    assert (sent["top_k"], sent["min_p"], sent["repetition_penalty"]) == (0, 0.0, 1.0)


# --- real vLLM ---------------------------------------------------------------------------------------------------------

TEACHER = Path(__file__).parent.parent / "mulcot_ray" / "models" / "teacher"
ANSWERS, SCORES, LONG = 200, 50, 300
WRITTEN = '"Final_conclusion": "Both say the same."\n'


async def work(engine: Any, posts: list[Post]) -> dict[str, list[Any]]:
    """Answers at temperature 0, sampled ones, scores without and with a begun answer, and a prompt that leaves less room than is asked for."""

    async def answer(p: Post, sampling: Sampling) -> Completion:
        return await engine.generate(CONTRACT.messages(Task.PREDICT, p), post_image(p, CONTRACT.image.side), sampling)

    async def begun(p: Post) -> Scores:
        return await engine.score(CONTRACT.messages(Task.CLASSIFICATION, p), post_image(p, CONTRACT.image.side), WRITTEN)

    kinds = {
        "answers": [answer(p, Sampling(160, seed=i)) for i, p in enumerate(posts)],
        "sampled": [answer(p, Sampling(160, 1.5, 0.95, seed=i)) for i, p in enumerate(posts[:20])],
        "scores": [score(engine, CONTRACT, p, post_image(p, CONTRACT.image.side)) for p in posts[:SCORES]],
        "begun": [begun(p) for p in posts[:10]],
        "long": [engine.generate([{"role": "user", "content": "word " * LONG}], None, Sampling(160))],
    }
    done = await asyncio.gather(*(c for calls in kinds.values() for c in calls))
    return {k: [done.pop(0) for _ in calls] for k, calls in kinds.items()}


def label(a: Completion) -> str:
    """What the answer states; "" where it states nothing, as even the shipped teacher does at times."""
    try:
        return CONTRACT.parse(a.text).label
    except RowFault:
        return ""


def in_process(posts: list[Post]) -> Any:
    """The same by the in-process engine, in a process of its own: vLLM leaves settings behind."""
    engine = open_engine(spec(RECIPE, RUNTIME, "teacher", str(TEACHER)))
    try:
        return asyncio.run(work(engine, posts)), engine.label_ids  # type: ignore[attr-defined]
    finally:
        engine.close()


@pytest.fixture(scope="module")
def vllm() -> Iterator[tuple[str, str]]:
    """The server's own defaults are those of a model like Qwen2.5-VL, and must not matter."""
    with vllm_server(TEACHER, "--override-generation-config", '{"top_k": 1, "repetition_penalty": 1.3}') as found:
        yield found


@pytest.mark.engine
def test_vllm_over_http_in_a_storm_is_vllm_in_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = list(sample_posts(ANSWERS, Split.TEST, 7))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        expected = pool.submit(in_process, posts)  # starts while the server does
        url, key = request.getfixturevalue("vllm")
        local, label_ids = expected.result()
    monkeypatch.setenv("SOME_KEY", key)
    with faulty_proxy(url, 0.2, seed=11, faults=(*FAULTS, "429", "500", "cut")) as proxy:  # a stall costs 20 s
        engine = EndpointEngine(at(proxy.url, TEACHER.name, dialect="vllm", retries=8, timeout_s=20))
        remote = asyncio.run(work(engine, posts))
        guided = asyncio.run(engine.generate(ASKED, None, Sampling(20, guide='"Prediction": "(positive|neutral)"')))
        with pytest.raises(RowFault, match="prompt_too_long"):
            asyncio.run(engine.generate([{"role": "user", "content": "word " * 2000}], None, GREEDY))
        engine.close()
        assert all(proxy.counts[f] > 3 for f in FAULTS)
    assert engine.label_ids == label_ids
    labels = [label(a) for a in local["answers"]]
    assert [label(a) for a in remote["answers"]] == labels and set(labels) >= set(LABELS) and labels.count("") < ANSWERS / 50
    assert sum(a.text == b.text for a, b in zip(remote["answers"], local["answers"], strict=True)) >= 0.98 * ANSWERS
    for kind in ("answers", "scores", "begun", "long"):
        assert [x.tokens_in for x in remote[kind]] == [x.tokens_in for x in local[kind]]
    for a, b in zip(remote["scores"] + remote["begun"], local["scores"] + local["begun"], strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-3) and a.mass == pytest.approx(b.mass, abs=1e-3)
    # The same seeds draw the same tokens, and do draw.
    assert sum(a.text == b.text for a, b in zip(remote["sampled"], local["sampled"], strict=True)) >= 18
    assert sum(a.text == b.text for a, b in zip(remote["sampled"], remote["answers"], strict=False)) < 15
    assert (remote["long"][0].text, remote["long"][0].finish_reason) == (local["long"][0].text, local["long"][0].finish_reason)
    assert local["long"][0].tokens_in > 1024 - 160
    assert guided.text in ('"Prediction": "positive"', '"Prediction": "neutral"')
