"""The demo report renders from made-up data, shows the numbers, and is closed: nothing is fetched, nothing runs."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mulcot_ray.evaluation.report import demo_report
from mulcot_ray.html import NB, duration
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.prompts import KEYS
from mulcot_ray.records import LABELS, SECTIONS, Post, Rationale, Split

VOID = {"meta", "img", "br", "link", "input", "hr"}
ATTACK = '<script>alert("x")</script> & <b>bold</b>'


def sections(r: Rationale) -> dict[str, str]:
    return {KEYS[s]: getattr(r, s) for s in SECTIONS}


def example(post: Post, wrong: bool) -> dict[str, Any]:
    assert post.label is not None
    label = LABELS[(LABELS.index(post.label) + 1) % 3] if wrong else post.label
    return {
        "image": post.image_bytes, "text": post.text, "aspect": post.aspect, "gold": post.label, "label": label,
        "probabilities": {s: 0.72 if s is label else 0.14 for s in LABELS}, "sections": sections(reference_rationale(post, label)),
        "teacher": sections(reference_rationale(post)), "relation": post.meta["relation"],
    }  # fmt: skip


def made_up() -> dict[str, Any]:
    def curve(kd: bool, top: float) -> dict[str, list[dict[str, float]]]:
        steps = []
        for i in range(300):
            low = 0.3 + 2.2 * 0.985**i + 0.12 * ((i * 7919) % 13) / 13
            parts = {"ce_cls": low / 3, "ce_rea": low / 2} | ({"kl_cls": low / 5, "kl_rea": low / 4} if kd else {})
            steps.append({"step": i + 1, "loss": sum(parts.values()), **parts})
        return {"steps": steps, "validation": [{"step": 100 * e, "epoch": e, "accuracy": top - 0.3 / e**2} for e in (1, 2, 3)]}

    posts = list(sample_posts(6, Split.TEST, 3))
    return {
        "summary": {
            "accuracy": {"teacher": 0.903, "assistant": 0.861, "student_before": 0.337, "student": 0.8425, "labels_only": 0.7812},
            "seconds": {"import": 4.2, "teach": 61.5, "assistant": 148.0, "augment": 55.3, "student": 171.9, "evaluate": 21.4, "total": 462.3},
            "counts": {
                "posts": 1600, "test_posts": 400, "rationales_by_source": {"predicted": 901, "explained": 214, "augmented": 1033},
                "rejects": {"teach": {"label_mismatch": 41, "sections_missing": 12}, "augment": {}}, "endpoint": {"posts": 20, "median_ms": 182.4},
            },
            "versions": {"ray": "2.60.0", "torch": "2.13.0", "transformers": "5.19.0"}, "recipe": "tiny", "contract": "deadbeef01234567",
        },
        "curves": {"assistant": curve(False, 0.88), "student": curve(True, 0.86), "labels_only": curve(False, 0.79)},
        "confusions": {
            "student": [[131, 9, 8, 0], [12, 98, 11, 2], [10, 9, 108, 2]],
            "labels_only": [[120, 14, 14, 0], [20, 85, 18, 0], [12, 17, 100, 0]],
        },
        "examples": [example(p, i % 3 == 1) for i, p in enumerate(posts)],
        "single": {"text_only": 0.6432, "image_only": 0.6175, "majority": 0.4},
    }  # fmt: skip


class Strict(HTMLParser):
    """Every tag that opens closes, in order; collects ids, addresses and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        self.text += data


def render(tmp_path: Path, data: dict[str, Any]) -> tuple[str, Strict]:
    target = tmp_path / "new" / "report.html"
    target.parent.mkdir(parents=True)
    target.write_text(demo_report(**data), encoding="utf-8")
    html = target.read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(html)
    assert not parser.open
    return html, parser


def test_shows_the_numbers(tmp_path: Path) -> None:
    _, page = render(tmp_path, made_up())
    shares = ["84.2 %", "33.7 %", "90.3 %", "64.3 %", "80.4 – 87.5"]
    for number in [*shares, "1 033", "131", "182.4", "rejects, teach", "label mismatch", "7 min 42 s", "deadbeef01234567", "2.60.0"]:
        assert number.lower() in page.text.replace(NB, " ").lower(), number
    assert page.text.count("✓ right") == 4 and page.text.count("✗ wrong") == 2


def test_is_closed(tmp_path: Path) -> None:
    html, page = render(tmp_path, made_up())
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html))
    assert all(link.startswith(("#", "data:image/")) for link in page.links)
    assert not page.tags & {"script", "iframe", "object", "form", "link"}
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)


def test_plots_follow_the_theme(tmp_path: Path) -> None:
    html, _ = render(tmp_path, made_up())
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 5 and all('role="img"' in p and "aria-label" in p for p in plots)
    assert all("var(--" in p and not re.search(r"#0[0-9]0[0-9]0[0-9]\b", p) for p in plots)
    assert "Student before" in plots[0] and "84.2" in plots[0]


def test_posts_are_escaped(tmp_path: Path) -> None:
    data = made_up()
    data["examples"][0] |= {"text": ATTACK, "aspect": ATTACK, "relation": ATTACK, "sections": {"Text_analysis": ATTACK}, "teacher": {ATTACK: ATTACK}}
    data["summary"]["seconds"][ATTACK] = 1.0
    data["curves"][ATTACK] = data["curves"]["student"]
    html, page = render(tmp_path, data)
    assert "<script" not in html and "<b>" not in html
    assert ATTACK in page.text


def test_little_data_is_enough(tmp_path: Path) -> None:
    post = {"image": None, "text": "t", "aspect": None, "gold": "neutral", "label": "positive", "probabilities": None}
    data = {
        "summary": {"accuracy": {"student": 0.5, "assistant": None}, "seconds": {}, "counts": {}, "versions": {}, "recipe": "tiny", "contract": "c"},
        "curves": {"student": {"steps": [{"step": 1, "loss": 2.0}]}, "assistant": {"steps": [], "validation": []}}, "confusions": {},
        "examples": [{**post, "sections": None, "teacher": None, "relation": ""}], "single": {},
    }  # fmt: skip
    html, page = render(tmp_path, data)
    assert "50.0" in page.text and "no picture" in page.text and "No rationale was written." in page.text
    assert "Assistant" not in page.text


def test_same_data_same_file(tmp_path: Path) -> None:
    assert render(tmp_path / "a", made_up())[0] == render(tmp_path / "b", made_up())[0]


def test_durations() -> None:
    assert [duration(s).replace(NB, " ") for s in (3.14, 42.4, 99.6, 125, 7322)] == ["3.1 s", "42 s", "100 s", "2 min 05 s", "2 h 02 min"]
