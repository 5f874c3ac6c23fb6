"""What stands before the replicas in Serve's proxy: lost replicas, Serve's own errors, headers that are Serve's."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.types import Message, Receive, Scope, Send

from mulcot_ray.serving import front
from mulcot_ray.serving.front import Front, middlewares

SCOPE: Scope = {
    "type": "http",
    "method": "POST",
    "path": "/v1/sentiment",
    "headers": [(b"x-request-id", b"7"), (b"x-request-timeout-seconds", b"\xff")],
}


class Server:
    """Serve's proxy from a script: each attempt reads the body and answers with the next of `answers` (None: says nothing)."""

    def __init__(self, *answers: list[Message] | None | Exception) -> None:
        self.answers, self.bodies, self.scopes = list(answers), list[bytes](), list[Scope]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        for message in answer or []:
            await send(message)


def answer(status: int, body: bytes = b"{}", **headers: str) -> list[Message]:
    found = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    return [{"type": "http.response.start", "status": status, "headers": found}, {"type": "http.response.body", "body": body}]


def ask(server: Server, *parts: bytes, leaves: bool = False) -> tuple[int | None, dict[bytes, bytes], bytes]:
    sent: list[Message] = []
    messages = [{"type": "http.request", "body": p, "more_body": i < len(parts) - 1} for i, p in enumerate(parts)]

    async def receive() -> Message:
        return messages.pop(0) if messages and not leaves else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(Front(server)(dict(SCOPE), receive, send))
    if not sent:
        return None, {}, b""
    return sent[0]["status"], dict(sent[0]["headers"]), b"".join(m.get("body", b"") for m in sent[1:])


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "FIRST_WAIT_S", 0.0)


def test_an_answer_passes_as_it_is() -> None:
    server = Server(answer(200, b'{"a": 1}', content_type="application/json"))
    assert ask(server, b"ab", b"c") == (200, {b"content-type": b"application/json"}, b'{"a": 1}') and server.bodies == [b"abc"]


def test_a_lost_replica_is_made_up_for() -> None:
    dead_engine = answer(503, content_type="application/json", x_error_code="engine_error")
    server = Server(None, dead_engine, RuntimeError("lost"), answer(200, b"yes", content_type="application/json"))
    status, _, body = ask(server, b"ab", b"c")
    assert (status, body) == (200, b"yes") and server.bodies == [b"abc"] * 4
    assert [s["headers"] for s in server.scopes] == [[(b"x-request-id", b"7")]] * 4


def test_when_none_comes_back_it_says_so() -> None:
    server = Server(*[None] * front.TRIES)
    status, headers, body = ask(server, b"abc")
    assert status == 503 and headers[b"retry-after"] and json.loads(body)["error"]["code"] == "replica_lost" and len(server.bodies) == front.TRIES


def test_a_long_body_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "KEPT", 2)
    server = Server(None, answer(200))
    assert ask(server, b"ab", b"c")[0] == 503 and server.bodies == [b"abc"]


def test_who_has_left_is_not_asked_for() -> None:
    server = Server(answer(200))
    assert ask(server, b"abc", leaves=True)[0] is None and len(server.scopes) == 1


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    server = Server([answer(200)[0]], answer(200))
    assert ask(server, b"abc") == (200, {}, b"") and len(server.bodies) == 1


@pytest.mark.parametrize(("status", "shown", "code"), [(503, 503, "over_capacity"), (408, 504, "timeout"), (404, 404, "not_found")])
def test_serves_own_errors_are_json(status: int, shown: int, code: str) -> None:
    said = b"Request dropped due to backpressure (num_queued_requests=64, max_queued_requests=64)."
    found = ask(Server(answer(status, said, content_type="text/plain", retry_after="3")), b"abc")
    assert found[0] == shown and found[1][b"content-type"] == b"application/json" and json.loads(found[2])["error"]["code"] == code
    assert b"backpressure" not in found[2] and found[1][b"retry-after"] == b"3"


def test_ours_are_left_alone() -> None:
    ours = answer(503, b'{"error": {}}', content_type="application/json", x_error_code="over_capacity")
    assert ask(Server(ours), b"abc")[2] == b'{"error": {}}'
    metrics = answer(200, b"mulcot_places 1", content_type="text/plain; version=0.0.4")
    assert ask(Server(metrics), b"")[2] == b"mulcot_places 1"


def test_serve_finds_it() -> None:
    from ray.serve._private.http_util import _apply_middlewares, validate_http_proxy_callback_return

    module, _, name = front.PATH.partition(":")
    assert module == front.__name__ and getattr(front, name) is middlewares
    assert isinstance(_apply_middlewares(Server(), validate_http_proxy_callback_return(middlewares())), Front)
