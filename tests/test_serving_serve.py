"""On a real Ray Serve, with a scripted engine: two versions and a shadow side by side, a replica that is killed, a token that is revoked."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_parts import RECIPE, RUNTIME, TOKEN, scripted

from mulcot_ray.engines.base import Messages, Sampling
from mulcot_ray.serving.app import Options, Share
from mulcot_ray.serving.run import Endpoint, serving
from mulcot_ray.storage import Store

pytestmark = pytest.mark.ray
OTHER = "another-token-of-it"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("secret") / "tokens"
    path.write_text(f"{TOKEN}\n{OTHER}\n")
    return path


@pytest.fixture(scope="module")
def endpoint(ray_session: None, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    def script(messages: Messages, sampling: Sampling) -> str:  # within: it travels to the replicas as it is, they do not see this file
        import time

        if "slow" in str(messages):
            time.sleep(0.05)
        return '"Prediction": "negative"' if "awful" in str(messages) else '"Prediction": "positive"'

    before = {k: os.environ.pop(k, None) for k in ("MULCOT_TOKENS", "MULCOT_TOKENS_FILE")}
    os.environ["MULCOT_TOKENS_FILE"] = str(tokens)
    options = Options(versions=(Share(model="first", share=0.6), Share(model="second", share=0.4)), shadow=Share(model="third", share=1.0))
    root = Store(str(tmp_path_factory.mktemp("root")))
    try:
        with serving(root, "first", RECIPE, RUNTIME, options=options, engine=scripted(script=script)) as e:
            yield e
    finally:
        os.environ.pop("MULCOT_TOKENS_FILE")
        os.environ.update({k: v for k, v in before.items() if v is not None})


@pytest.fixture
def client(endpoint: Endpoint) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=60, trust_env=False) as c:
        yield c


def ask(client: httpx.Client, text: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/sentiment", json={"text": text, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


def until(true: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.2)


def test_two_versions_share_the_posts_and_a_shadow_sees_them(client: httpx.Client) -> None:
    until(lambda: len(client.get("/v1/models").json()["data"]) == 2)  # the second joins when its replica answers
    share = Counter(ask(client, f"post {i}")["model"] for i in range(120))
    assert 50 < share["first"] < 95 and 25 < share["second"] < 70
    assert ask(client, "awful", explain=True)["label"] == "negative"
    second = next(t for t in (f"stream {i}" for i in range(99)) if ask(client, t)["model"] == "second")
    streamed = client.post("/v1/sentiment", json={"text": second, "stream": True}).text
    assert streamed.count("event: ") >= 3 and '"model":"second"' in streamed and "event: done" in streamed
    until(lambda: 'mulcot_shadow_total{model="third",outcome="agrees"' in client.get("/metrics").text)


def test_faults_of_rows_come_back_from_another_version(client: httpx.Client) -> None:
    until(lambda: len(client.get("/v1/models").json()["data"]) == 2)
    answers = [client.post("/v1/sentiment", json={"text": f"{'word ' * 2000}{i}"}) for i in range(8)]
    assert {a.status_code for a in answers} == {422} and {a.json()["error"]["code"] for a in answers} == {"prompt_too_long"}


def test_errors_are_json_all_the_way(client: httpx.Client) -> None:
    for path, status in (("/nowhere", 404), ("/v1/sentiment", 405)):
        answer = client.get(path)
        assert answer.status_code == status and answer.json()["error"]["code"]
    odd = client.post("/v1/sentiment", json={"text": "x"}, headers={"x-request-timeout-seconds": b"\xff", "x-request-disconnect-disabled": "?1"})  # type: ignore[dict-item]
    assert odd.status_code == 200, "Serve's own headers are not the client's"


def test_a_revoked_token_is_refused_within_seconds(client: httpx.Client, tokens: Path) -> None:
    other = {"Authorization": f"Bearer {OTHER}"}
    assert client.get("/v1/model", headers=other).status_code == 200
    tokens.write_text(f"{TOKEN}\n")
    until(lambda: client.get("/v1/model", headers=other).status_code == 401, 5)
    assert client.get("/v1/model").status_code == 200


CLIENTS = 4


def test_a_killed_replica_costs_at_most_what_was_in_flight(endpoint: Endpoint) -> None:
    """What comes meanwhile waits, and a new replica answers it. What was in flight is asked again: mostly nothing is lost, on a busy machine
    one request was (a connection closed between two HAProxys)."""
    outcomes: Counter[str] = Counter()
    stop = threading.Event()

    def ask_on() -> None:
        with httpx.Client(base_url=endpoint.url, headers=endpoint.headers, timeout=90, trust_env=False) as c:
            while not stop.is_set():
                try:
                    answer = c.post("/v1/sentiment", json={"text": "a slow one"})
                    outcomes[str(answer.status_code)] += 1
                except httpx.HTTPError as e:
                    outcomes[type(e).__name__] += 1

    threads = [threading.Thread(target=ask_on) for _ in range(CLIENTS)]
    for t in threads:
        t.start()
    until(lambda: outcomes["200"] > 10)
    named = "ray::ServeReplica:mulcot:sentiment"
    (victim,) = [p for p in psutil.Process().children(recursive=True) if p.cmdline()[:1] and p.cmdline()[0].strip() == named]
    before = outcomes["200"]
    victim.send_signal(signal.SIGKILL)
    until(lambda: outcomes["200"] > before + 20, 90)
    stop.set()
    for t in threads:
        t.join(90)
    assert set(outcomes) <= {"200", "503", "RemoteProtocolError", "ReadError"} and outcomes.total() - outcomes["200"] <= CLIENTS, outcomes
