"""Answers as events, rationales by section while they are written, and clients that leave."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving_parts import AUTH, RECIPE, Failing, Stepping, app, b64, picture, scripted, served, wait_for

from mulcot_ray.engines.base import Sampling
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.prompts import KEYS
from mulcot_ray.serving.sections import Splitter

T15 = Path(__file__).parents[2] / "shared" / "data" / "t15" / "val_rationales.json"
SHAPES = {
    "as the contract has it": lambda s: s,
    "in a fence": lambda s: f"```json\n{s}\n```",
    "as JSON": lambda s: "{" + s.replace('"\n"', '",\n"') + "}",
    "as one line of JSON": lambda s: "{" + s.replace('"\n"', '", "') + "}",
    "bare": lambda s: "\n".join(": ".join(x.strip('"') for x in line.split(": ", 1)) for line in s.splitlines()),
    "in bold": lambda s: "\n".join(f"**{k}**: {v}" for k, v in (line.replace('"', "").split(": ", 1) for line in s.splitlines())),
    "under headings": lambda s: "\n".join(f"## {k}\n{v}" for k, v in (line.replace('"', "").split(": ", 1) for line in s.splitlines())),
}


def events(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def split(text: str, cuts: list[int]) -> dict[str, str]:
    splitter, found = Splitter(), dict[str, str]()
    for cut in [*cuts, len(text)]:
        for section, delta in splitter.feed(text[:cut], end=cut == len(text)):
            found[section] = found.get(section, "") + delta
    return found


# --- sections --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_what_is_streamed_is_what_is_parsed(shape: Any) -> None:
    said = {k: f"It says 'so', and {k} is \"meant\", as Te, pre and {{all}}" for k in KEYS}
    text = shape("\n".join(f'"{KEYS[k]}": "{v}"' for k, v in said.items()) + '\n"Prediction": "positive"')
    parsed = RECIPE.contract.parse(text)
    assert len(parsed.sections) == 4
    rng = random.Random(7)
    for _ in range(20):
        cuts = sorted(rng.sample(range(len(text)), rng.randint(1, len(text) - 1)))
        found = split(text, cuts)
        assert found.pop("prediction") == "positive" and found == parsed.sections
    assert split(text, list(range(len(text)))).keys() >= parsed.sections.keys()


def test_a_key_is_not_shown_before_it_is_known_to_be_none() -> None:
    text = '"Text_analysis": "One.\n"Imagine that.'
    splitter = Splitter()
    shown = ""
    for cut in range(len(text) + 1):
        for _, delta in splitter.feed(text[:cut]):
            shown += delta
        assert not shown.endswith('"Ima'), "it may yet be Image_analysis"
    assert shown == 'One.\n"Imagine that.'


@pytest.mark.skipif(not T15.exists(), reason="the Twitter-2015 posts are not here")
def test_real_rationales_stream_as_they_parse() -> None:
    rng, n = random.Random(1), 0
    for row in json.loads(T15.read_text())[::3]:
        try:
            parsed = RECIPE.contract.parse(row["cot"])
        except RowFault:
            continue
        found = split(row["cot"], sorted(rng.sample(range(len(row["cot"])), 40)))
        assert found.pop("prediction").lower().startswith(parsed.label) and found == parsed.sections
        n += 1
    assert n > 350


# --- events ----------------------------------------------------------------------------------------------------------


def test_label_first_then_the_rationale_then_all() -> None:
    engine = Stepping()
    with served(app(engine)) as url, httpx.Client(headers=AUTH, timeout=20, trust_env=False) as c:
        body = {"id": "p1", "text": "Lovely", "image": b64(picture()), "stream": True}
        engine.go()  # the label alone
        with c.stream("POST", f"{url}/v1/sentiment", json=body) as answer:
            assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
            stream = events(answer.iter_lines())
            name, label = next(stream)
            assert name == "label" and label["label"] == "positive" and label["id"] == "p1" and label["model_version"] == "f1"
            assert engine.under_way == 1, "the rationale is not there yet"
            engine.go(1000)
            rest = list(stream)
    sections: dict[str, str] = {}
    for name, data in rest[:-1]:
        assert name == "rationale"
        sections[data["section"]] = sections.get(data["section"], "") + data["delta"]
    assert sections == {**{s: f"About {k}." for s, k in KEYS.items()}, "prediction": "positive"}
    name, whole = rest[-1]
    assert name == "done" and whole["rationale"]["Prediction"] == "positive" and whole["timings"]["rationale"] > 0
    assert {k: whole[k] for k in label} == label


def test_the_whole_is_what_is_answered_without_a_stream() -> None:
    with TestClient(app(), headers=AUTH) as c:
        streamed = list(events(c.post("/v1/sentiment", json={"id": "p", "text": "awful", "stream": True}).iter_lines()))[-1][1]
        plain = c.post("/v1/sentiment", json={"id": "p", "text": "awful", "explain": True}).json()
    for answer in (streamed, plain):
        del answer["timings"], answer["seconds"]
    assert streamed == plain and plain["usage"]["tokens_out"] > 0


def test_an_engine_that_does_not_stream_tells_all_at_once() -> None:
    class Plain:
        def __init__(self) -> None:
            inner = ScriptedEngine(scripted())
            self.generate, self.score, self.check, self.close = inner.generate, inner.score, inner.check, inner.close

    with TestClient(app(Plain()), headers=AUTH) as c:
        found = list(events(c.post("/v1/sentiment", json={"text": "x", "stream": True}).iter_lines()))
    assert [n for n, _ in found] == ["label", *["rationale"] * 5, "done"]


def test_what_goes_wrong_before_the_label_is_a_plain_answer() -> None:
    cases = [(Failing(EngineError("inner workings")), 503, "engine_error"), (Failing(ValueError("inner workings")), 500, "internal")]
    for engine, status, code in cases:
        with TestClient(app(engine), headers=AUTH, raise_server_exceptions=False) as c:
            answer = c.post("/v1/sentiment", json={"text": "x", "stream": True})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code) and "inner" not in answer.text
    with TestClient(app(Failing(seconds=5), timeout_s=0.05), headers=AUTH) as c:
        assert c.post("/v1/sentiment", json={"text": "x", "stream": True}).status_code == 504
        bad = c.post("/v1/sentiment", json={"text": "x", "image": "%%%", "stream": True})
    assert bad.status_code == 422 and bad.json()["error"]["field"] == "image"


def test_what_goes_wrong_after_it_is_an_event() -> None:
    engine = Stepping(EngineError("inner workings"))
    engine.go(1000)
    with TestClient(app(engine), headers=AUTH) as c:
        answer = c.post("/v1/sentiment", json={"text": "x", "stream": True})
        found = list(events(answer.iter_lines()))
        counts = c.get("/metrics").text
    assert [n for n, _ in found] == ["label", "error"] and found[1][1]["code"] == "engine_error" and "inner" not in answer.text
    assert 'mulcot_refusals_total{code="engine_error",replica="-"} 1.0' in counts
    slow = Stepping()
    slow.go()
    with TestClient(app(slow, timeout_s=0.2), headers=AUTH) as c:
        found = list(events(c.post("/v1/sentiment", json={"text": "x", "stream": True}).iter_lines()))
    assert [n for n, _ in found] == ["label", "error"] and found[1][1]["code"] == "timeout" and slow.under_way == 0


# --- clients that leave ----------------------------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_place() -> None:
    engine = Stepping()
    with served(app(engine, running=1)) as url, httpx.Client(headers=AUTH, trust_env=False) as c:
        with pytest.raises(httpx.ReadTimeout):
            c.post(f"{url}/v1/sentiment", json={"text": "x"}, timeout=0.3)
        wait_for(lambda: engine.broken_off == 1)
        engine.go(2)
        assert c.post(f"{url}/v1/sentiment", json={"text": "y"}, timeout=5).status_code == 200, "the one place is free again"
        assert 'status="499"' in c.get(f"{url}/metrics").text


def test_a_client_that_leaves_a_stream_ends_the_writing() -> None:
    engine = Stepping()
    engine.go(4)  # the label and three words
    with served(app(engine, running=1)) as url, httpx.Client(headers=AUTH, timeout=5, trust_env=False) as c:
        with c.stream("POST", f"{url}/v1/sentiment", json={"text": "x", "stream": True}) as answer:
            stream = events(answer.iter_lines())
            assert [next(stream)[0] for _ in range(2)] == ["label", "rationale"]
        wait_for(lambda: engine.broken_off == 1 and engine.under_way == 0)
        engine.go()
        assert c.post(f"{url}/v1/sentiment", json={"text": "y"}).status_code == 200


def test_closing_the_generator_ends_the_work() -> None:
    async def run() -> int:
        engine = Stepping()
        engine.go(2)
        stream = engine.stream([{"role": "user", "content": "x"}], None, Sampling(50))
        await anext(stream)
        await stream.aclose()
        return engine.under_way

    assert asyncio.run(run()) == 0
