"""Many posts in one request: order, bad lines, back-pressure, limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving_parts import AUTH, Failing, Stepping, app, b64, picture, served, wait_for

from mulcot_ray.serving import batch, leaving
from mulcot_ray.serving.batch import numbered
from mulcot_ray.serving.guards import Refused
from mulcot_ray.serving.leaving import Left

TYPE = {"Content-Type": "application/x-ndjson"}
URL = "/v1/sentiment/batch"


def lines(*posts: Any) -> bytes:
    return b"".join((p if isinstance(p, bytes) else json.dumps(p).encode()) + b"\n" for p in posts)


def answers(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(x) for x in answer.text.splitlines()]


def test_order_is_kept_and_a_bad_line_is_an_error_in_its_place() -> None:
    body = lines(
        {"id": "a", "text": "Lovely"}, {"id": "b", "text": "awful", "explain": True}, b"", b"{no json", {"id": "c"}, {"id": "d", "text": " "},
        {"id": "e", "text": "x", "image": b64(b"no picture")}, {"id": "f", "text": "x", "stream": True}, {"id": "g", "text": "x", "url": "http://h"},
        b"\xff\xfe", b"[]", b"7", {"text": "x", "image": b64(picture())},
    )  # fmt: skip
    with TestClient(app(), headers=AUTH | TYPE) as c:
        found = answers(c.post(URL, content=body))
    assert [(x.get("id"), x.get("line"), x.get("label") or x["error"]["code"], x.get("error", {}).get("field")) for x in found[:-1]] == [
        ("a", None, "positive", None), ("b", None, "negative", None), (None, 4, "invalid_json", None), ("c", 5, "invalid_request", "text"),
        ("d", 6, "empty_text", "text"), ("e", 7, "image_unreadable", "image"), ("f", 8, "invalid_request", "stream"),
        ("g", 9, "invalid_request", "url"), (None, 10, "invalid_json", None), (None, 11, "invalid_request", None), (None, 12, "invalid_request", None),
    ]  # fmt: skip
    assert found[-1]["label"] == "positive" and found[1]["rationale"]["Prediction"] == "negative"


def test_a_line_is_answered_as_a_request_is() -> None:
    post = {"id": "p", "text": "awful", "aspect": "weather", "image": b64(picture()), "explain": True}
    with TestClient(app(), headers=AUTH) as c:
        (line,) = answers(c.post(URL, content=lines(post), headers=TYPE))
        one = c.post("/v1/sentiment", json=post).json()
    for a in (line, one):
        del a["timings"], a["seconds"]
    assert line == one


def test_the_last_line_needs_no_end() -> None:
    with TestClient(app(), headers=AUTH | TYPE) as c:
        assert [x["id"] for x in answers(c.post(URL, content=lines({"id": "a", "text": "x"}) + b'{"id": "b", "text": "x"}'))] == ["a", "b"]
        assert answers(c.post(URL, content=b"")) == [] == answers(c.post(URL, content=b"\r\n\n"))


def test_other_bodies_are_refused() -> None:
    with TestClient(app(), headers=AUTH) as c:
        assert c.post(URL, json={"text": "x"}).status_code == 415
        assert TestClient(app()).post(URL, content=b"", headers=TYPE).status_code == 401


def test_a_few_lines_are_in_work_and_no_more_is_read() -> None:
    """A sender that pours 40 MB in while the engine stands still is made to wait: 4 lines in work, 4 and 2 more taken in."""
    engine = Stepping()
    body = lines(*({"id": str(i), "text": "x" * 19_000} for i in range(2000)))
    head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nAuthorization: {AUTH['Authorization']}\r\nContent-Type: {TYPE['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(app(engine, running=4)) as url, socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as s:
        s.settimeout(0.5)
        sent = 0
        s.sendall(head.encode())
        with pytest.raises(TimeoutError):
            while sent < len(body):
                sent += s.send(body[sent : sent + 65536])
        assert sent < len(body) / 2 and engine.most == 4
        engine.go(10)
        wait_for(lambda: engine.most <= 4 and engine.steps._value == 0)
    wait_for(lambda: engine.under_way == 0)
    assert engine.broken_off >= 1, "it has left: what was in work is broken off"


def test_a_client_that_never_reads_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are answered as far as buffers go; then, after a while, its place among the batches is free again."""
    monkeypatch.setattr(leaving, "SEND_S", 0.3)
    body = lines(*({"id": "i" * 100 + str(i), "text": "x"} for i in range(20_000)))
    head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nAuthorization: {AUTH['Authorization']}\r\nContent-Type: {TYPE['Content-Type']}\r\nContent-Length: {len(body)}\r\n\r\n"
    with served(app()) as url, socket.socket() as s, httpx.Client(headers=AUTH, trust_env=False) as c:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.settimeout(2)
        s.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        with contextlib.suppress(TimeoutError):
            s.sendall(head.encode() + body)
        wait_for(lambda: 'mulcot_requests_open{replica="-"} 1.0' in c.get(f"{url}/metrics").text)
        assert (
            "mulcot_labels_total" in (text := c.get(f"{url}/metrics").text) and 'label="positive",model="scripted",replica="-"} 20000.0' not in text
        )


def test_answers_come_while_lines_are_still_sent() -> None:
    """Both directions by hand: httpx reads an answer only after it has sent all."""

    async def run(port: int) -> list[str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST {URL} HTTP/1.1\r\nHost: h\r\nAuthorization: {AUTH['Authorization']}\r\nContent-Type: {TYPE['Content-Type']}\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        seen = []
        for name in ("a", "b", "c"):
            part = lines({"id": name, "text": "x"})
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            while not (line := await asyncio.wait_for(reader.readline(), 10)).startswith(b"{"):
                pass
            seen.append(json.loads(line)["id"])
        writer.close()
        return seen

    with served(app()) as url:
        assert asyncio.run(run(int(url.rpartition(":")[2]))) == ["a", "b", "c"]


def test_each_line_has_its_deadline() -> None:
    with TestClient(app(Failing(seconds=5), timeout_s=0.05, running=1), headers=AUTH | TYPE) as c:
        found = answers(c.post(URL, content=lines(*({"id": str(i), "text": "x"} for i in range(3)))))
    assert [(x["id"], x["error"]["code"]) for x in found] == [("0", "timeout"), ("1", "timeout"), ("2", "timeout")]


def test_batches_at_once_are_bounded() -> None:
    engine = Stepping()

    async def run(url: str) -> tuple[int, dict[str, Any], list[int]]:
        async with httpx.AsyncClient(headers=AUTH | TYPE, timeout=20, trust_env=False) as c:
            waiting = [asyncio.create_task(c.post(url + URL, content=lines({"text": "x"}))) for _ in range(4)]
            while engine.under_way < 4:
                await asyncio.sleep(0.01)
            refused = await c.post(url + URL, content=lines({"text": "x"}))
            engine.go(4)
            return refused.status_code, refused.json(), [(await w).status_code for w in waiting] + [(await one_more(c, url)).status_code]

    async def one_more(c: httpx.AsyncClient, url: str) -> httpx.Response:
        engine.go()
        return await c.post(url + URL, content=lines({"text": "x"}))

    with served(app(engine)) as url:
        status, body, done = asyncio.run(run(url))
    assert status == 503 and body["error"]["code"] == "over_capacity" and done == [200] * 5


def test_a_batch_waits_where_a_request_is_refused() -> None:
    """Lines wait for places however many requests do: a batch has few in flight."""
    engine = Stepping()

    async def run(url: str) -> tuple[int, list[dict[str, Any]]]:
        async with httpx.AsyncClient(headers=AUTH, timeout=20, trust_env=False) as c:
            busy = [asyncio.create_task(c.post(f"{url}/v1/sentiment", json={"text": "x"})) for _ in range(2)]
            while engine.under_way < 1:
                await asyncio.sleep(0.01)
            many = asyncio.create_task(c.post(url + URL, content=lines(*({"id": str(i), "text": "x"} for i in range(9))), headers=TYPE))
            await asyncio.sleep(0.2)
            refused = (await c.post(f"{url}/v1/sentiment", json={"text": "x"})).status_code
            engine.go(11)
            await asyncio.gather(*busy)
            return refused, answers(await many)

    with served(app(engine, running=1)) as url:
        refused, found = asyncio.run(run(url))
    assert refused == 503 and [x["id"] for x in found] == [str(i) for i in range(9)] and all("label" in x for x in found)


# --- lines of a body -------------------------------------------------------------------------------------------------


def taken(parts: list[bytes | Exception]) -> list[tuple[int, bytes | str]]:
    async def run() -> list[tuple[int, bytes | str]]:
        rest = iter(parts)

        async def receive() -> Any:
            part = next(rest, None)
            if part is None:
                return {"type": "http.disconnect"}
            if isinstance(part, Exception):
                raise part
            return {"type": "http.request", "body": part, "more_body": part != b"END"} if part != b"END" else {"type": "http.request", "body": b""}

        return [(n, line if isinstance(line, bytes) else line.code) async for n, line in numbered(receive)]

    return asyncio.run(run())


def test_lines_are_cut_where_they_end_and_not_where_a_piece_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_BODY", 8)
    monkeypatch.setattr(batch, "MAX_LINES", 5)
    assert taken([b"ab", b"c\nd", b"\n\n", b"e", b"END"]) == [(1, b"abc"), (2, b"d"), (4, b"e")]
    assert taken([b"a\n", b"x" * 5, b"x" * 5, b"x" * 500, b"xx\nb\n", b"END"]) == [(1, b"a"), (2, "line_too_long"), (3, b"b")]
    assert taken([b"x" * 9 + b"\nb\n", b"END"]) == [(1, "line_too_long"), (2, b"b")]
    assert taken([b"1\n2\n3\n4\n5\n6\n7\n", b"END"])[-1] == (6, "too_many_lines")
    assert taken([b"a\n", Refused(413, "body_too_large", "-")]) == [(1, b"a"), (2, "body_too_large")]
    with pytest.raises(Left):
        taken([b"a\nb"])


def test_bytes_in_work_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_HELD", 3000)
    engine = Stepping()

    async def run(url: str) -> None:
        async with httpx.AsyncClient(headers=AUTH | TYPE, timeout=20, trust_env=False) as c:
            body = lines(*({"id": str(i), "text": "x" * 1000} for i in range(10)))
            asked = asyncio.create_task(c.post(url + URL, content=body))
            while engine.under_way < 2:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            engine.go(10)
            assert len(answers(await asked)) == 10

    with served(app(engine, running=8)) as url:
        asyncio.run(run(url))
    assert engine.most == 2


def test_a_pause_that_is_too_long_ends_a_batch() -> None:
    def slowly() -> Any:
        yield lines({"id": "a", "text": "x"})
        time.sleep(0.8)
        yield lines({"id": "b", "text": "x"})

    with served(app(body_s=0.3)) as url, httpx.Client(headers=AUTH | TYPE, timeout=20, trust_env=False) as c:
        found = answers(c.post(url + URL, content=slowly()))
    assert found[0]["id"] == "a" and found[1]["error"]["code"] == "body_too_slow" and len(found) == 2
