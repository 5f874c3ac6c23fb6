"""Places, deadlines, counts, versions and shadows: what keeps an endpoint on its feet, and what it says of itself."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving_parts import AUTH, WORK, Failing, Stepping, app, script, scripted, served, wait_for

from mulcot_ray.engines.base import Messages, Sampling
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import EngineError, RowFault
from mulcot_ray.records import Reason
from mulcot_ray.serving.answering import Version
from mulcot_ray.serving.versions import Compared, Remote


def contrary(messages: Messages, sampling: Sampling) -> str:
    return '"Prediction": "neutral"' if "twist" in str(messages) else script(messages, sampling)


def version(name: str, share: float, engine: Any = None) -> Version:
    work = LabelWork(WORK.contract, "score", WORK.max_tokens, WORK.seed, name)
    return Version(engine or ScriptedEngine(scripted()), work, f"f-{name}", share)


def counted(text: str, name: str, **labels: str) -> float:
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if re.match(rf"{name}[{{ ]", line) and all(f'{k}="{v}"' in line for k, v in labels.items())
    )


# --- places ----------------------------------------------------------------------------------------------------------


def test_what_has_no_place_is_refused_and_what_waits_is_answered() -> None:
    engine = Stepping()

    async def run(url: str) -> tuple[Counter[int], httpx.Response, httpx.Response, Counter[int]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=url, headers=AUTH, timeout=20, trust_env=False, limits=limits) as c:
            asked = [asyncio.create_task(c.post("/v1/sentiment", json={"text": "x"})) for _ in range(4)]
            while engine.under_way < 2 or counted((await c.get("/metrics")).text, "mulcot_places", state="waited_for") < 2:
                await asyncio.sleep(0.01)
            many = await asyncio.gather(*(c.post("/v1/sentiment", json={"text": "x"}) for _ in range(40)))
            ready = await c.get("/readyz")
            engine.go(1000)
            return Counter(a.status_code for a in many), many[0], ready, Counter([(await a).status_code for a in asked])

    with served(app(engine, running=2)) as url:
        many, refused, ready, asked = asyncio.run(run(url))
        assert httpx.get(f"{url}/readyz", trust_env=False).json() == {"status": "ready"}
        counts = httpx.get(f"{url}/metrics", headers=AUTH, trust_env=False).text
    assert many == {503: 40} and asked == {200: 4} and engine.most == 2
    assert refused.json()["error"]["code"] == "over_capacity" and int(refused.headers["retry-after"]) >= 1
    assert ready.status_code == 503
    assert counted(counts, "mulcot_refusals_total", code="over_capacity") >= 40


def test_the_deadline_holds_while_a_request_waits() -> None:
    engine = Stepping()

    async def run(url: str) -> list[int]:
        async with httpx.AsyncClient(base_url=url, headers=AUTH, timeout=20, trust_env=False) as c:
            return [a.status_code for a in await asyncio.gather(*(c.post("/v1/sentiment", json={"text": "x"}) for _ in range(2)))]

    with served(app(engine, running=1, timeout_s=0.2)) as url:
        assert asyncio.run(run(url)) == [504, 504]
        wait_for(lambda: engine.under_way == 0)


def test_a_slow_body_is_not_waited_for() -> None:
    def slowly() -> Any:
        yield b'{"text": '
        time.sleep(0.6)
        yield b'"x"}'

    with served(app(body_s=0.2)) as url:
        answer = httpx.post(f"{url}/v1/sentiment", content=slowly(), headers=AUTH | {"Content-Type": "application/json"}, trust_env=False)
    assert answer.status_code == 408 and answer.json()["error"]["code"] == "body_too_slow"


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts() -> None:
    with TestClient(app(replica="r7"), headers=AUTH) as c:
        for body in ({"text": "Lovely"}, {"text": "awful", "explain": True}, {"text": ""}, {}):
            c.post("/v1/sentiment", json=body)
        c.post("/v1/sentiment/batch", content=b'{"text": "awful"}\n{"text": 7}\n', headers={"Content-Type": "application/x-ndjson"})
        c.get("/nowhere/7")
        c.get("/v1/model", headers={"Authorization": "Bearer wrong-token-of-it"})
        text = c.get("/metrics").text
    assert counted(text, "mulcot_requests_total", route="/v1/sentiment", status="200") == 2
    assert counted(text, "mulcot_requests_total", route="/v1/sentiment", status="422") == 2
    assert (
        counted(text, "mulcot_requests_total", route="none", status="401") == 1 == counted(text, "mulcot_requests_total", route="none", status="404")
    )
    assert counted(text, "mulcot_labels_total", label="negative", model="scripted") == 2
    assert counted(text, "mulcot_labels_total", label="positive") == 1
    assert counted(text, "mulcot_tokens_total", direction="out") > 0 < counted(text, "mulcot_tokens_total", direction="in")
    assert counted(text, "mulcot_refusals_total", code="invalid_request") == 2 and counted(text, "mulcot_refusals_total", code="empty_text") == 1
    assert counted(text, "mulcot_step_seconds_count", step="rationale") == 1 and counted(text, "mulcot_step_seconds_count", step="score") == 3
    assert counted(text, "mulcot_request_seconds_count", route="/v1/sentiment") == 4
    assert counted(text, "mulcot_requests_open") == 1, "this one"
    assert "nowhere" not in text and all('replica="r7"' in x for x in text.splitlines() if x and not x.startswith("#"))


def test_counts_ask_for_the_token_unless_told_otherwise() -> None:
    with TestClient(app()) as c:
        assert c.get("/metrics").status_code == 401
    with TestClient(app(metrics_open=True)) as c:
        assert c.get("/metrics").status_code == 200 and c.get("/v1/model").status_code == 401


# --- versions and shadows --------------------------------------------------------------------------------------------


def test_each_version_answers_its_share_and_the_same_posts_again() -> None:
    others = [version("second", 0.3), version("third", 0.2)]
    with TestClient(app(others=others, share=0.5), headers=AUTH) as c:
        said = [c.post("/v1/sentiment", json={"text": f"post {i}"}).json() for i in range(400)]
        again = [c.post("/v1/sentiment", json={"text": f"post {i}"}).json()["model"] for i in range(50)]
        by_name = c.post("/v1/chat/completions", json={"model": "third", "messages": [{"role": "user", "content": "x"}]}).json()
        assert [m["id"] for m in c.get("/v1/models").json()["data"]] == ["scripted", "second", "third"]
        counts = c.get("/metrics").text
    share = Counter(a["model"] for a in said)
    assert 150 < share["scripted"] < 250 and 80 < share["second"] < 160 and 45 < share["third"] < 115
    assert again == [a["model"] for a in said[:50]] and by_name["model"] == "third"
    assert all(a["model_version"] == {"scripted": "f1"}.get(a["model"], f"f-{a['model']}") for a in said)
    assert counted(counts, "mulcot_labels_total", model="second") == share["second"] + again.count("second")


def test_where_another_version_fails_the_first_answers() -> None:
    others = [version("second", 1.0, Failing(EngineError("gone")))]
    with TestClient(app(others=others), headers=AUTH) as c:
        answer = c.post("/v1/sentiment", json={"text": "x"})
        streamed = c.post("/v1/sentiment", json={"text": "x", "stream": True})
    assert answer.status_code == 200 and answer.json()["model"] == "scripted"
    assert streamed.status_code == 503, "a stream cannot change its mind"


def test_a_version_may_join_later() -> None:
    others: list[Version] = []
    with TestClient(app(others=others), headers=AUTH) as c:
        assert c.post("/v1/sentiment", json={"text": "x"}).json()["model"] == "scripted"
        others.append(version("second", 1.0))
        assert c.post("/v1/sentiment", json={"text": "x"}).json()["model"] == "second"


def test_a_shadow_is_compared_and_never_shown() -> None:
    shadow = Compared(version("shadow", 1.0, ScriptedEngine(scripted())), at_once=8)
    shadow.version.engine.script = contrary  # type: ignore[attr-defined]
    with TestClient(app(shadows=[shadow]), headers=AUTH) as c:
        shown = [c.post("/v1/sentiment", json={"text": t}).json()["label"] for t in ("Lovely", "Lovely twist", "awful twist")]
        wait_for(lambda: not shadow.tasks)
        text = c.get("/metrics").text
    assert shown == ["positive", "positive", "negative"]
    assert counted(text, "mulcot_shadow_total", outcome="agrees") == 1 and counted(text, "mulcot_shadow_total", outcome="differs") == 2
    assert counted(text, "mulcot_shadow_difference_count") == 3 and counted(text, "mulcot_shadow_difference_sum") == pytest.approx(1.4)
    assert counted(text, "mulcot_labels_total", model="shadow") == 0


def test_a_shadow_harms_nobody() -> None:
    stuck, dead = Compared(version("stuck", 1.0, Stepping()), at_once=2), Compared(version("dead", 1.0, Failing(EngineError("gone"))), at_once=8)
    some = Compared(version("some", 0.25), at_once=100)
    with TestClient(app(shadows=[stuck, dead, some]), headers=AUTH) as c:
        assert [c.post("/v1/sentiment", json={"text": f"post {i}"}).status_code for i in range(40)] == [200] * 40
        wait_for(lambda: not dead.tasks)
        text = c.get("/metrics").text
        for task in list(stuck.tasks):
            task.get_loop().call_soon_threadsafe(task.cancel)
    assert counted(text, "mulcot_shadow_total", model="stuck", outcome="passed_over") == 38
    assert counted(text, "mulcot_shadow_total", model="dead", outcome="failed") == 40
    assert 3 <= counted(text, "mulcot_shadow_total", model="some", outcome="agrees") <= 20


class Handle:
    """A deployment's handle: each call gives the next of `outcomes`."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.asked = list(outcomes), list[str]()

    def options(self, method_name: str, stream: bool = False) -> Handle:
        self.asked.append(method_name)
        return self

    def remote(self, *_: Any) -> Any:
        async def result() -> Any:
            found = self.outcomes.pop(0)
            if isinstance(found, Exception) and not isinstance(found, RowFault):
                raise found
            return found

        return result()


def test_a_call_whose_replica_is_lost_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import RayActorError
    from ray.serve.exceptions import BackPressureError

    monkeypatch.setattr("mulcot_ray.serving.versions.FIRST_WAIT_S", 0.0)
    lost = RayActorError()
    handle = Handle(lost, lost, "scores")
    assert asyncio.run(Remote(handle, "v").score([], None)) == "scores" and handle.asked == ["score"] * 3
    with pytest.raises(EngineError, match="v"):
        asyncio.run(Remote(Handle(lost, lost, lost), "v").score([], None))
    with pytest.raises(EngineError):
        asyncio.run(Remote(Handle(BackPressureError(num_queued_requests=3, max_queued_requests=2)), "v").score([], None))
    with pytest.raises(RowFault):
        asyncio.run(Remote(Handle(RowFault(Reason.PROMPT_TOO_LONG, "long")), "v").generate([], None, Sampling(1)))
