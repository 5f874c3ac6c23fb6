"""The page at `/`, where a person tries a post, and its examples at `/examples`. It asks the API as any client does.

One HTML file: style and script are in it, and the Content-Security-Policy lets those two run by their digests and nothing else. No
other host, no inline handler, no string becomes HTML (`require-trusted-types-for`). Neither path holds a secret: both may be open.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse

from mulcot_ray.html import data_uri, environment
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.prompts import KEYS, PREDICTION
from mulcot_ray.records import LABELS, Post, Sentiment, Split

EXAMPLES, DRAWN, SEED = 8, 96, 42
PATHS = ("/", "/examples")  # to be reached without a token
HEADERS = {"Cache-Control": "no-cache", "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}


def mount(api: FastAPI) -> None:
    """Add PATHS to the application. They are no part of its OpenAPI document: they are for people."""
    html = page()
    headers = HEADERS | {"Content-Security-Policy": policy(html)}

    @api.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @api.get("/examples", include_in_schema=False)
    def some() -> JSONResponse:  # not async: the first call draws pictures for some milliseconds
        return JSONResponse(examples(), headers=HEADERS)


def page() -> str:
    """page.html with the house's style, the labels and the sections filled in."""
    titles = {s: key.replace("_", " ") for s, key in KEYS.items()} | {PREDICTION.lower(): PREDICTION}
    keys = KEYS | {PREDICTION.lower(): PREDICTION}  # the stream's names → those of the whole answer
    return environment(Path(__file__).parent).get_template("page.html").render(labels=[str(x) for x in LABELS], titles=titles, keys=keys)


def policy(html: str) -> str:
    """The Content-Security-Policy of a page: its own style and script by their digests, pictures within it, requests to its own origin."""
    allowed = {}
    for tag in ("style", "script"):
        texts = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)
    return (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


@cache
def examples() -> list[dict[str, str | None]]:
    """EXAMPLES sample posts of the test split, no two alike in label and in how text and picture relate; id, text, aspect, image (data: URI)."""
    chosen: dict[tuple[str, Sentiment | None], Post] = {}
    for post in sample_posts(DRAWN, Split.TEST, SEED):
        chosen.setdefault((post.meta["relation"], post.label), post)
    return [
        {"id": p.post_id, "text": p.text, "aspect": p.aspect, "image": data_uri(p.image_bytes or b"")}
        for p in list(chosen.values())[:EXAMPLES]
    ]  # fmt: skip
