"""The page at `/`, in a real Chromium against a server on this machine.

Most tests meet FakeApi, which speaks the API's protocol from a script and can be held between two events. The last one meets the real
`make_api` with the scripted engine. No page may ask any other address than its server's, or log an error: the fixture looks after each.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.testclient import TestClient
from PIL import Image

from mulcot_ray.engines.base import Messages, Sampling, spec
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.posts.sample import RESOLUTIONS, sample_posts
from mulcot_ray.prompts import KEYS
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import LABELS, Split
from mulcot_ray.serving.api import make_api
from mulcot_ray.serving.page import EXAMPLES, PATHS, SEED, examples, mount
from mulcot_ray.serving.tokens import token_digest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = sync_api.expect
PATIENCE = 15_000  # milliseconds

TOKEN = "a-token-for-the-tests"
SECTIONS = {
    "text_analysis": "It voices gratitude about Cape Merrow: positive.",
    "image_analysis": "It shows a frowning face: <img src=x onerror=\"document.title='hit'\">.",
    "conflict_resolution": "The praise clashes with the image: it is irony.",
    "final_conclusion": "The poster is negative about Cape Merrow.",
    "prediction": "negative",
}
HEAD = {
    "id": "p1", "label": "negative", "probabilities": {"negative": 0.8312, "neutral": 0.0488, "positive": 0.12}, "label_mass": 0.9987,
    "model": "builtin:student", "model_version": "fedcba9876543210", "contract": "0123456789abcdef",
}  # fmt: skip
WHOLE = HEAD | {
    "rationale": {**{KEYS[s]: t for s, t in SECTIONS.items() if s in KEYS}, "Prediction": "negative"}, "rationale_fault": None,
    "usage": {"tokens_in": 264, "tokens_out": 71}, "seconds": 0.31, "timings": {"queue": 0.04, "prepare": 3.2, "score": 14.4, "rationale": 281.0},
}  # fmt: skip


def fault(status: int, code: str, message: str, field: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": {"code": code, "message": message, "field": field}}, status, headers)


class FakeApi:
    """The API's protocol without a model. What it does is said by the post's text; each event of "stepwise" waits for `go`."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.left = threading.Event()  # set when a client went before its answer was whole
        self.steps = threading.Semaphore(0)
        self.api = FastAPI()
        mount(self.api)
        self.api.add_api_route("/v1/sentiment", self.sentiment, methods=["POST"])

    def go(self, events: int = 1) -> None:
        self.steps.release(events)

    async def sentiment(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return fault(401, "unauthorized", "the token is not known")
        body = await request.json()
        self.bodies.append(body)
        match body["text"].split():
            case ["refuse", field]:
                return fault(422, "invalid_request", f"{field}: not to my taste", field)
            case ["busy"]:
                return fault(503, "over_capacity", "all places are taken", headers={"Retry-After": "7"})
            case ["proxy"]:
                return PlainTextResponse("<h1>Bad gateway</h1>", 502)
        if not body["stream"] or body["text"] == "whole":
            return JSONResponse(WHOLE if body["explain"] else WHOLE | {"rationale": None})
        return StreamingResponse(self.events(body["text"]), media_type="text/event-stream")

    async def events(self, text: str) -> AsyncIterator[str]:
        whole = False
        try:
            yield ": a comment, to be passed over\n\n"
            for name, data in self.script(text):
                while text == "stepwise" and not self.steps.acquire(blocking=False):
                    await asyncio.sleep(0.005)
                yield f"event: {name}\r\ndata: {json.dumps(data)}\r\n\r\n"
            whole = True
        finally:
            if not whole:
                self.left.set()

    def script(self, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
        yield "label", HEAD
        if text == "broken":
            return
        for section, words in SECTIONS.items():
            half = len(words) // 2
            yield "rationale", {"section": section, "delta": words[:half]}
            if text == "dies":
                yield "error", {"code": "engine_error", "message": "the engine is not available", "field": None}
                return
            yield "rationale", {"section": section, "delta": words[half:]}
        if text == "cut":
            yield "done", WHOLE | {"rationale": None, "rationale_fault": "answer_truncated"}
        elif text == "unsure":
            yield "done", WHOLE | {"rationale": WHOLE["rationale"] | {"Prediction": "neutral"}}
        else:
            yield "done", WHOLE


@contextmanager
def served(api: FastAPI) -> Iterator[str]:
    """The address of a server that runs in a thread."""
    server = uvicorn.Server(uvicorn.Config(api, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def fake() -> FakeApi:
    return FakeApi()


@pytest.fixture(scope="module")
def url(fake: FakeApi) -> Iterator[str]:
    with served(fake.api) as address:
        yield address


@pytest.fixture(scope="module")
def browser(chromium: Any) -> Any:
    expect.set_options(timeout=PATIENCE)
    return chromium


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """visit(address, **context options) → the page, loaded. Afterwards: no request elsewhere, no error but refused posts."""
    origins, errors, contexts = set(), [], []

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            errors.append(message.text)

    def open_page(address: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda r: origins.add(r.url.split(",")[0] if r.url.startswith("data:") else r.url.removeprefix(address)))
        page.on("console", note)
        page.on("pageerror", lambda e: errors.append(str(e)))
        page.goto(address)
        expect(page.locator("#examples button")).to_have_count(EXAMPLES)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert all(o in ("/", "/examples", "/v1/sentiment") or o.startswith("data:image/") for o in origins), origins


def submit(page: Any, text: str, token: str = TOKEN) -> None:
    page.get_by_label("Access token").fill(token)
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Submit").click()


def picture(size: tuple[int, int] = (60, 40), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, form)
    return out.getvalue()


def sent(body: dict[str, Any]) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(body["image"].split(",")[1])))


# --- what is served --------------------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_may_run_nothing_but_itself(fake: FakeApi) -> None:
    client = TestClient(fake.api)
    answer = client.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert len(re.findall(r"'sha256-[\w+/]{43}='", policy)) == 2
    assert answer.headers["referrer-policy"] == "no-referrer" and answer.headers["x-content-type-options"] == "nosniff"
    assert not re.search(r"\son\w+=|\sstyle=|innerHTML|insertAdjacentHTML|document\.write|eval\(", answer.text)
    assert re.findall(r"https?://[^'\"]+", answer.text) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert not set(PATHS) & set(client.app.openapi()["paths"])


def test_the_examples_are_sample_posts_of_all_relations(fake: FakeApi) -> None:
    found = TestClient(fake.api).get("/examples").json()
    assert found == examples() and len(found) == EXAMPLES
    corpus = {p.post_id: p for p in sample_posts(200, Split.TEST, SEED)}
    for e in found:
        post = corpus[e["id"]]
        assert e == {"id": post.post_id, "text": post.text, "aspect": post.aspect, "image": e["image"]}
        assert base64.b64decode(e["image"].removeprefix("data:image/png;base64,")) == post.image_bytes
    posts = [corpus[e["id"]] for e in found]
    assert len({(p.meta["relation"], p.label) for p in posts}) == EXAMPLES
    assert {p.meta["relation"] for p in posts} == set(RESOLUTIONS) and {p.label for p in posts} == set(LABELS)


# --- a post and its answer -------------------------------------------------------------------------------------------


def test_a_post_with_a_picture_streams_label_bars_and_reasons(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    page.get_by_label("Aspect").fill("Cape Merrow")
    page.get_by_label("Picture").set_input_files({"name": "mine.png", "mimeType": "image/png", "buffer": picture()})
    expect(page.get_by_alt_text("The picture that will be sent")).to_be_visible()
    expect(page.locator("#image-note")).to_have_text(re.compile(r"mine\.png\s*60 × 40 pixels"))
    submit(page, "stepwise")
    expect(page.get_by_role("status")).to_have_text("Reading the post …")
    expect(page.locator("#verdict")).to_be_hidden()
    fake.go()
    expect(page.locator("#verdict")).to_have_text("▼ negative toward Cape Merrow")
    bars = page.get_by_role("list", name="Probabilities").get_by_role("listitem")
    expect(bars).to_have_text(["▼ negative 83.1\u202f%", "● neutral 4.9\u202f%", "▲ positive 12.0\u202f%"])
    assert [b.evaluate("e => parseFloat(e.style.width)") for b in bars.locator("i").all()] == pytest.approx([83.12, 4.88, 12])
    reasons = page.get_by_role("list", name="Reasons")
    expect(reasons).to_have_attribute("aria-live", "polite")
    titles = ["Text analysis", "Image analysis", "Conflict resolution", "Final conclusion", "Prediction"]
    expect(reasons.get_by_role("heading")).to_have_text(titles)
    items = reasons.get_by_role("listitem")
    shown = [""] * 5
    for i, words in enumerate(SECTIONS.values()):
        for part in (words[: len(words) // 2], words):
            fake.go()
            shown[i] = part
            expect(items.locator("p")).to_have_text(shown)
        expect(items.nth(i)).to_have_attribute("aria-busy", "true")  # announced when it is whole
        if i:
            expect(items.nth(i - 1)).to_have_attribute("aria-busy", "false")
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    fake.go()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Done in [\d.]+\u202fs: negative, 83\.1\u202f%\.$"))
    expect(items.last).to_have_text("Prediction▼ negative")
    expect(items.last).to_have_attribute("aria-busy", "false")
    timings = page.locator("#timings").inner_text()
    for value in ("0.31\u202fs", "3.2\u202fms", "281\u202fms", "264", "71", "99.9\u202f%", "builtin:student", "fedcba9876543210", "0123456789abcdef"):
        assert value in timings
    expect(page.get_by_role("button", name="Cancel")).to_be_hidden()
    # What the model wrote is text, whatever it looks like.
    assert page.title().startswith("Try a post") and page.locator("#result img").count() == 0
    page.get_by_text("The answer as JSON").click()
    assert json.loads(page.locator("#raw code").inner_text()) == WHOLE
    body = fake.bodies[-1]
    assert body == {"text": "stepwise", "aspect": "Cape Merrow", "explain": True, "stream": True, "image": body["image"]}
    assert base64.b64decode(body["image"].removeprefix("data:image/png;base64,")) == picture()  # small: sent as it is


def test_an_example_is_one_click_away(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    example = examples()[3]
    button = page.get_by_role("list", name="Examples").get_by_role("button").nth(3)
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(page.get_by_label("Text", exact=True)).to_have_value(example["text"])
    expect(page.get_by_label("Aspect")).to_have_value(example["aspect"])
    expect(page.get_by_alt_text("The picture that will be sent")).to_have_attribute("src", example["image"])
    page.get_by_label("Access token").fill(TOKEN)
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#verdict")).to_contain_text("negative")
    assert fake.bodies[-1] == {"text": example["text"], "aspect": example["aspect"], "image": example["image"], "explain": True, "stream": True}
    page.get_by_label("Text", exact=True).press("x")  # no longer the example
    expect(button).to_have_attribute("aria-pressed", "false")


def test_an_answer_in_one_piece_is_shown_too(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    submit(page, "whole")
    expect(page.locator("#verdict")).to_have_text("▼ negative the post as a whole")
    expect(page.locator("#reasons p").first).to_have_text(SECTIONS["text_analysis"])
    page.get_by_label("Write the reasons too").uncheck()
    submit(page, "just the label")
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.locator("#verdict")).to_be_visible()
    expect(page.locator("#reasons")).to_be_hidden()
    assert fake.bodies[-1] == {"text": "just the label", "explain": False, "stream": False}


def test_reasons_that_lack_or_differ_say_so(visit: Callable[..., Any], url: str) -> None:
    page = visit(url)
    submit(page, "cut")
    expect(page.locator("#note")).to_have_text("No complete reasons: answer_truncated.")
    expect(page.locator("#reasons p").first).to_have_text(SECTIONS["text_analysis"])
    submit(page, "unsure")
    expect(page.locator("#note")).to_contain_text("The reasons end on neutral.")
    expect(page.locator("#reasons li").last).to_have_text("Prediction● neutral")


def test_cancel_frees_the_server_and_keeps_what_came(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    fake.left.clear()
    submit(page, "stepwise")
    fake.go(2)
    expect(page.locator("#reasons .writing")).to_have_count(1)
    asked = len(fake.bodies)
    page.get_by_label("Text", exact=True).press("Control+Enter")  # one at a time
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("status")).to_have_text(re.compile(r"^Cancelled after [\d.]+\u202fs\.$"))
    assert fake.left.wait(5) and len(fake.bodies) == asked
    expect(page.locator("#verdict")).to_be_visible()
    expect(page.get_by_role("button", name="Submit")).to_be_focused()
    page.get_by_role("button", name="Submit").click()  # and again, from the start
    fake.go(12)
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.locator("#reasons p").nth(1)).to_have_text(SECTIONS["image_analysis"])


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_token_that_is_wanted_or_wrong(visit: Callable[..., Any], url: str) -> None:
    page = visit(url)
    token = page.get_by_label("Access token")
    submit(page, "a post", token="")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"The server asks for a token \(401\)"))
    expect(token).to_be_focused()
    submit(page, "a post", token="not-one-of-the-tokens")
    expect(token).to_have_accessible_description(re.compile(r"The server does not know this token \(401\)"))
    expect(token).to_have_attribute("aria-invalid", "true")
    submit(page, "a post", token="Schlüssel mit Leerzeichen")  # no header can hold it
    expect(page.locator("#token-fault")).to_contain_text("printable ASCII")
    submit(page, "a post")
    expect(page.get_by_role("status")).to_contain_text("Done")
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(token).not_to_have_attribute("aria-invalid", "true")
    page.reload()
    expect(token).to_have_value(TOKEN)
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [[TOKEN], 0, ""]
    assert page.context.new_page().goto(url) and page.context.pages[1].get_by_label("Access token").input_value() == ""  # this tab's alone


@pytest.mark.parametrize("field", ["text", "aspect", "image"])
def test_a_refusal_stands_at_its_field(visit: Callable[..., Any], url: str, field: str) -> None:
    page = visit(url)
    submit(page, f"refuse {field}")
    control = page.locator(f"#{field}")
    expect(control).to_have_accessible_description(re.compile(rf"{field}: not to my taste \(422\)"))
    expect(control).to_have_attribute("aria-invalid", "true")
    expect(control).to_be_focused()


def test_faults_without_a_field(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    alert = page.get_by_role("alert")
    submit(page, "refuse temperature")
    expect(alert).to_contain_text("temperature: not to my taste (422)")
    submit(page, "proxy")
    expect(alert).to_contain_text("Bad Gateway (502)")
    submit(page, "broken")
    expect(alert).to_contain_text("The connection ended before the answer was whole.")
    submit(page, "dies")
    expect(alert).to_contain_text("the engine is not available (engine_error)")
    expect(page.locator("#verdict")).to_be_visible()  # what came is kept
    submit(page, "busy")
    expect(alert).to_contain_text("all places are taken (503). Try again in 7\u202fs.")
    asked = len(fake.bodies)
    page.get_by_role("button", name="Try again").click()
    expect(alert).to_contain_text("503")
    assert len(fake.bodies) == asked + 1
    page.get_by_label("Text", exact=True).fill(" ")
    page.get_by_role("button", name="Submit").click()
    expect(page.locator("#text-fault")).to_contain_text("Write something first")
    assert len(fake.bodies) == asked + 1
    page.context.set_offline(True)
    submit(page, "a post")
    expect(alert).to_contain_text("The server cannot be reached.")


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_chosen_dropped_pasted_scaled_and_removed(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    note, chooser = page.locator("#image-note"), page.get_by_label("Picture")
    chooser.set_input_files({"name": "wide.jpg", "mimeType": "image/jpeg", "buffer": picture((3200, 1000), "JPEG")})
    expect(note).to_contain_text("Scaled down here from 3200 × 1000 to 1600 × 500 pixels")
    submit(page, "a post")
    expect(page.get_by_role("status")).to_contain_text("Done")
    assert sent(fake.bodies[-1]).size == (1600, 500) and sent(fake.bodies[-1]).format == "JPEG"

    files = "new DataTransfer(); t.items.add(new File([Uint8Array.from(atob(b), c => c.charCodeAt(0))], n, {type: 'image/png'}))"
    give = f"(target, [kind, n, b]) => {{ const t = {files}; target.dispatchEvent(kind === 'paste' ? new ClipboardEvent(kind, {{clipboardData: t, bubbles: true, cancelable: true}}) : new DragEvent(kind, {{dataTransfer: t, bubbles: true, cancelable: true}})) }}"
    page.locator("footer").evaluate(give, ["drop", "dropped.png", base64.b64encode(picture((50, 50))).decode()])
    expect(note).to_contain_text("50 × 50 pixels")
    page.get_by_label("Text", exact=True).evaluate(give, ["paste", "pasted.png", base64.b64encode(picture((70, 30))).decode()])
    expect(note).to_contain_text("70 × 30 pixels")

    chooser.set_input_files({"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#image-fault")).to_have_text("notes.txt is no picture that this browser can read.")
    expect(note).to_contain_text("70 × 30 pixels")  # the one before is still there
    page.get_by_role("button", name="Remove the picture").click()
    expect(chooser).to_be_focused()
    expect(page.get_by_alt_text("The picture that will be sent")).to_be_hidden()
    submit(page, "without")
    expect(page.get_by_role("status")).to_contain_text("Done")
    assert "image" not in fake.bodies[-1]


# --- for everybody ---------------------------------------------------------------------------------------------------


def test_keyboard_alone(visit: Callable[..., Any], url: str, fake: FakeApi) -> None:
    page = visit(url)
    reached = []

    def tab() -> str:
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            "[document.activeElement.id || document.activeElement.tagName, getComputedStyle(document.activeElement).outlineStyle]"
        )
        reached.append(name)
        if name == "image":  # it is unseen: the zone that stands for it shows the focus
            outline = page.locator(".zone").evaluate("e => getComputedStyle(e).outlineStyle")
        assert outline != "none", f"{name} has focus and does not show it"
        return str(name)

    assert tab() == "A"  # skip link
    tab()
    page.keyboard.type(TOKEN)
    tab()
    page.keyboard.press("Space")  # the first example
    for _ in range(EXAMPLES):
        tab()
    page.keyboard.press("Control+A")
    page.keyboard.type("stepwise")
    page.keyboard.press("Control+Enter")
    fake.go(12)
    expect(page.get_by_role("status")).to_contain_text("Done")
    assert fake.bodies[-1] == {
        "text": "stepwise",
        "aspect": examples()[0]["aspect"],
        "image": examples()[0]["image"],
        "explain": True,
        "stream": True,
    }
    while tab() != "PRE" and len(reached) < 40:
        if reached[-1] == "SUMMARY":
            page.keyboard.press("Enter")
    assert reached[EXAMPLES + 2 :] == ["text", "aspect", "image", "remove", "explain", "submit", "SUMMARY", "PRE"]
    page.get_by_role("link", name="Skip to the form").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Text", exact=True)).to_be_focused()


CONTRAST = """() => {
  const rgb = c => { const p = document.createElement('canvas').getContext('2d'); p.fillStyle = c; p.fillRect(0, 0, 1, 1); return [...p.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    if (!e.checkVisibility() || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    let back = e;
    while (back && rgb(getComputedStyle(back).backgroundColor)[3] < 255) back = back.parentElement;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(rgb(getComputedStyle(back ?? document.body).backgroundColor))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([e.tagName, e.textContent.trim().slice(0, 30), ratio]);
  }
  return poor;
}"""
UNNAMED = "() => [...document.querySelectorAll('input, textarea, button, a, summary')].filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"
CROWDED = """() => [...document.querySelectorAll('main *, header *')].filter(e => e.checkVisibility() && !e.closest('#examples, .skip') &&
  (e.getBoundingClientRect().right > innerWidth || e.getBoundingClientRect().left < 0)).map(e => e.id || e.tagName)"""


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark"), (360, "light")])
def test_it_fits_and_can_be_read(visit: Callable[..., Any], url: str, fake: FakeApi, tmp_path: Path, width: int, scheme: str) -> None:
    page = visit(url, viewport={"width": width, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    page.get_by_role("list", name="Examples").get_by_role("button").first.click()
    submit(page, "stepwise")
    fake.go(4)
    expect(page.locator("#reasons .writing")).to_have_count(1)
    assert page.evaluate("document.getAnimations().length") == 0  # as the reader asked
    page.screenshot(path=tmp_path / f"{width}-{scheme}-streaming.png", full_page=True)
    fake.go(8)
    expect(page.get_by_role("status")).to_contain_text("Done")
    assert page.evaluate(CONTRAST) == []
    page.screenshot(path=tmp_path / f"{width}-{scheme}-done.png", full_page=True)
    submit(page, "refuse aspect")
    expect(page.get_by_role("alert")).to_be_visible()
    assert page.evaluate(CONTRAST) == [] and page.evaluate(UNNAMED) == [] and page.evaluate(CROWDED) == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    page.screenshot(path=tmp_path / f"{width}-{scheme}-refused.png", full_page=True)
    assert page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == (
        "rgb(251, 250, 248)" if scheme == "light" else "rgb(21, 25, 28)"
    )
    assert len(list(tmp_path.glob("*.png"))) == 3


# --- the real thing --------------------------------------------------------------------------------------------------


def script(messages: Messages, sampling: Sampling) -> str:
    """All five sections; the text analysis is longer than one piece of the stream."""
    words = {"Text_analysis": "It voices <b>gratitude</b> about the fair, and plainly so: positive."}
    return "".join(f'"{key}": "{words.get(key, f"About {key}.")}"\n' for key in KEYS.values()) + '"Prediction": "positive"'


def test_the_real_api_behind_the_page(visit: Callable[..., Any]) -> None:
    recipe = load_recipe("tiny")
    engine = ScriptedEngine(replace(spec(recipe, load_runtime("laptop"), "student", "none"), backend="scripted", script=script))
    work = LabelWork(recipe.contract, "score", recipe.explain_tokens, recipe.seed, "scripted")
    with served(make_api(engine, work, "the-fingerprint", [token_digest(TOKEN)])) as url:
        page = visit(url)
        page.get_by_role("list", name="Examples").get_by_role("button").nth(1).click()
        page.get_by_label("Access token").fill("another-token-than-wanted")
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("alert")).to_contain_text("The server does not know this token (401)")
        page.get_by_label("Access token").fill(TOKEN)
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("status")).to_contain_text("Done")
        expect(page.locator("#verdict")).to_have_text(f"▲ positive toward {examples()[1]['aspect']}")
        expect(page.locator("#reasons p")).to_have_text([
            "It voices <b>gratitude</b> about the fair, and plainly so: positive.", "About Image_analysis.", "About Conflict_resolution.",
            "About Final_conclusion.", "▲ positive",
        ])  # fmt: skip
        assert "the-fingerprint" in page.locator("#timings").inner_text()
        page.get_by_label("Picture").set_input_files({"name": "line.png", "mimeType": "image/png", "buffer": picture((400, 4))})
        expect(page.locator("#image-note")).to_contain_text("400 × 4 pixels")
        page.get_by_role("button", name="Submit").click()
        expect(page.locator("#image")).to_have_accessible_description(re.compile(r"400×4 pixels.*\(422\)"))
        page.get_by_label("Write the reasons too").uncheck()
        page.get_by_role("button", name="Remove the picture").click()
        page.get_by_role("button", name="Submit").click()
        expect(page.get_by_role("status")).to_contain_text("Done")
        expect(page.locator("#reasons")).to_be_hidden()
    with served(make_api(engine, work, "the-fingerprint", None)) as url:  # without tokens, on loopback
        page = visit(url)
        submit(page, "Thanks to the fair", token="")
        expect(page.locator("#verdict")).to_have_text("▲ positive the post as a whole")
