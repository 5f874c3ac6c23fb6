"""The page and the metrics of a night: their numbers are the manifest's, they add up, and what others wrote stays data."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finished_nights import VERSION, canary, confidence_of, manifest
from lxml import etree
from lxml import html as lxml_html
from prometheus_client.parser import text_string_to_metric_families

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import ConservationError
from mulcot_ray.html import NB, duration, number, percent
from mulcot_ray.labeling.gates import Gates, Verdict, judge
from mulcot_ray.labeling.report import metrics, night_page
from mulcot_ray.records import LABELS, Reason, Reject

ATTACK = '</td><script>alert("x")</script><b>bold</b>|`*{{ 7 * 7 }}'
LONG = "unbroken" * 60
REASONS = {"bad_line": 60, "image_missing": 30, "duplicate_id": 9, "answer_unparsed": 1}
SECTIONS = ["gates", "rows", "labels", "answered", "confidence", "rejects", "cost", "next", "made"]


def reject(post_id: str, reason: Reason, detail: str, raw: str | None = None) -> dict[str, Any]:
    return Reject(post_id, "intake", reason, detail, raw).row()


EXAMPLES = {
    "bad_line": [reject(f"posts-0.jsonl:{i}", Reason.BAD_LINE, "not JSON: line 1 column 4") for i in range(3)],
    "answer_unparsed": [reject("p-77", Reason.ANSWER_UNPARSED, "no prediction in it", "I would rather not say.")],
}


def week() -> list[Manifest]:
    return [manifest(f"2026-11-{d}", canary=canary(0.9)) for d in range(15, 22)]


def eventful(**changes: Any) -> Manifest:
    """More negative labels, some of everything else, a cascade, a deadline."""
    s: dict[str, Any] = {
        "labels": {"negative": 380, "neutral": 300, "positive": 320}, "fates": {"scored": 700, "carried": 250, "copied": 50, "repeated": 20, "deferred": 80, "rejected": 100},
        "answered_by": {"student": 930, "assistant": 60, "teacher": 10}, "images": {"with": 1150, "without": 50}, "image_faults": 30, "explained": 125,
        "engine": {"student": {"rows_in": 700, "asked": 690, "reused": 10}, "assistant": {"rows_in": 70, "asked": 70, "reused": 0}},
        "pace": {"said": ["1200 rows at this pace would end after the deadline: no rationales from here on", "the deadline is reached: 80 rows deferred"],
                 "deadline": 1795413600.0, "budget": 12.5},
        "canary": canary(0.88), **changes,
    }  # fmt: skip
    return manifest(rejects=100, repeated=20, deferred=80, reasons=REASONS, **s)


class Page:
    def __init__(self, text: str) -> None:
        self.source, self.tree = text, lxml_html.document_fromstring(text)
        self.text = self.plain(self.tree)

    @staticmethod
    def plain(node: Any) -> str:
        return " ".join(" ".join(node.itertext()).replace(NB, " ").split())

    def rows(self, table: str) -> dict[str, list[str]]:
        """Heading of a row, without its explanation → its cells."""
        found = {}
        for tr in self.tree.xpath(f"//table[contains(concat(' ', @class, ' '), ' {table} ')]/tbody/tr[td]"):
            name = "".join(tr.xpath("th[1]//text()[not(ancestor::small) and not(ancestor::*[@aria-hidden])]")).strip()
            found[name] = [self.plain(td) for td in tr.xpath("td[not(@class='bar')]")]
        return found

    def facts(self, kind: str) -> dict[str, str]:
        return {self.plain(dt): self.plain(dt.getnext()) for dt in self.tree.xpath(f"//dl[contains(concat(' ', @class, ' '), ' {kind} ')]//dt")}


def shown(m: Manifest, earlier: list[Manifest] | None = None, gates: Gates | None = None, examples: Any = None, **options: Any) -> Page:
    earlier = week() if earlier is None else earlier
    return Page(night_page(m, judge(m, earlier, gates or Gates()), earlier, EXAMPLES if examples is None else examples, **options))


def share(n: float, of: float = 1) -> str:
    return percent(n / of).replace(NB, " ")


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> Page:
    return shown(eventful(), root="s3://bucket/runs")


def test_every_row_is_accounted_for(page: Page) -> None:
    table, total = page.rows("rows"), 1200
    expected = {"Scored": 700, "Carried": 250, "Copied": 50, "All labels": 1000, "Repeated": 20, "Deferred": 80, "Rejected": 100, "Rows in": total}
    usual = {"Scored": 850, "Carried": 100, "Copied": 50, "Repeated": 0, "Deferred": 0, "Rejected": 10}
    assert table == {
        k: [number(n).replace(NB, " "), share(n, total) + (f" usually {share(usual[k], 1010)}" if k in usual else "")] for k, n in expected.items()
    }
    assert list(table) == list(expected)
    assert page.facts("tiles") == {
        "Rows in": "1 200", "Labelled": share(1000, total), "Asked tonight": "700", "Rejected": share(100, total), "Put off": share(80, total), "USD for 1,000 posts asked": "0.0123"}  # fmt: skip
    assert (
        "Of 1 200 rows of the dump 1 000 have a label of student-3f9a1c2b , 100 are rejects, each with its reason, 20 repeat another row, 80 are put off"
        in page.text
    )
    assert f"1 150 rows came with a picture, 50 without; 30 had one that could not be used, and are rejects. Without a usable picture: {share(80, total)} of these rows, usually {share(20, 1010)}" in page.text  # fmt: skip


@pytest.mark.parametrize(
    ("what", "changes"),
    [("rows in", {"rows_in": 1201}), ("rows labelled", {"rows": 999}), ("rejects", {"rejects": 99}), ("rejects by reason", {"rejects_by_reason": {"bad_line": 99}})],
)  # fmt: skip
def test_what_does_not_add_up_is_no_report(what: str, changes: dict[str, Any]) -> None:
    m = eventful()
    with pytest.raises(ConservationError, match=rf"\d+ {what} are stated, \d+ counted"):
        night_page(m.model_copy(update=changes), [], [], {})
    with pytest.raises(ConservationError, match="1000 labels are stated, 999 counted"):
        night_page(eventful(labels={"negative": 999}), [], [], {})


def test_gates_stand_with_their_reasons(page: Page) -> None:
    verdicts = judge(eventful(), week(), Gates())
    cells, rows = page.rows("gates"), page.tree.xpath("//table[@class='gates']/tbody/tr")
    assert len(cells) == len(verdicts) == len(rows) == 8
    for v, tr in zip(verdicts, rows, strict=True):
        state = {True: "passed", False: "breached", None: "not judged"}[v.ok]
        name = f"{v.gate.replace('_', ' ').capitalize()}, {state}"
        assert cells[name] == [share(v.measured).replace("-", "−"), share(v.limit)] and page.plain(tr.xpath("th/small")[0]) == v.why.replace(NB, " ")
    held = page.tree.xpath("//div[@role='status']")[0]
    bad = [v for v in verdicts if v.ok is False]
    assert [v.gate for v in bad] == ["label_drift", "reject_rate", "reject_rate_rise"] and "Held back. Gates are breached" in page.plain(held)
    assert [page.plain(li) for li in held.xpath(".//li")] == [f"{v.gate.replace('_', ' ').capitalize()}. {v.why.replace(NB, ' ')}" for v in bad]
    fit = shown(manifest())
    assert (
        "Fit to be published. 6 of 8 gates could judge, and none is breached." in fit.text
        and "held" not in fit.tree.xpath("//div[@role='status']/@class")[0]
    )
    assert "Not judged." in Page(night_page(manifest(), [], [], {})).text
    one = Page(night_page(manifest(), [Verdict(gate="g", ok=False, measured=-0.021, limit=0.1, why="W.")], [], {}))
    assert "A gate is breached" in one.text and one.rows("gates")["G, breached"] == ["−2.1 %", "10.0 %"]


def test_labels_stand_beside_the_usual_ones(page: Page) -> None:
    assert page.rows("labels") == {
        "positive": ["320", "32.0 % usually 43.0 %", "−11.0"], "neutral": ["300", "30.0 % usually 33.0 %", "−3.0"],
        "negative": ["380", "38.0 % usually 24.0 %", "+14.0"], "All": ["1 000", "100.0 %", ""],
    }  # fmt: skip
    assert "median over the last 7 published nights before this one, 2026-11-15 to 2026-11-21" in page.text
    assert page.rows("answered") == {"Student": ["930", "93.0 %"], "Assistant": ["60", "6.0 %"], "Teacher": ["10", "1.0 %"]}
    assert "125 labels ( 12.5 % ) come with a rationale. A larger model answered" in page.text.replace("(12.5 %)", "( 12.5 % )")
    assert "“Usually” is the one published night before this one, 2026-11-21." in shown(eventful(), nights=1).text
    two = shown(eventful(), nights=2)
    assert "median over the last 2 published nights before this one, 2026-11-20 to 2026-11-21" in two.text


def test_the_first_night_has_nothing_to_compare_with() -> None:
    page = shown(manifest(), [])
    assert "No night before this one is published" in page.text and "usually" not in page.text and page.tree.xpath("//polyline") == []
    assert page.rows("labels")["positive"] == ["430", "43.0 %"] and page.rows("rows")["Scored"] == ["850", share(850, 1010)]
    assert [h for h in page.tree.xpath("//h2/@id")] == SECTIONS


def test_confidence_is_drawn_as_it_is(page: Page) -> None:
    (svg,) = page.tree.xpath("//svg")
    _, _, width, height = map(float, svg.get("viewbox").split())
    bars = [{k: float(r.get(k)) for k in ("x", "y", "width", "height")} for r in svg.xpath(".//rect")]
    histogram = manifest().stats["confidence"]["histogram"]
    assert len(bars) == 14 and all(b["x"] >= 0 and b["x"] + b["width"] <= width and b["y"] + b["height"] <= height for b in bars)
    tallest = max(b["height"] for b in bars)
    for b, n in zip(bars, histogram[6:], strict=True):
        assert b["height"] / tallest == pytest.approx(n / max(histogram), abs=0.002)
    assert len(svg.xpath(".//polyline")[0].get("points").split()) == 28 and "75.0 %" in svg.get("aria-label").replace(NB, " ")
    table = page.rows("bins")
    assert len(table) == 14 and table["0.95 – 1.00"] == ["750", "75.0 %", "75.0 %"] and table["0.60 – 0.65"] == ["0", "0.0 %", "0.0 %"]
    mean = manifest().stats["confidence"]["mean"]
    assert (
        f"The mean of the largest probability is {share(mean)}, usually {share(mean)}. 75.0 % of the labels are surer than 90 %, 5.0 % less sure than 60 %."
        in page.text
    )
    low = shown(manifest(confidence=confidence_of({2: 1000})))
    assert len(low.tree.xpath("//svg//rect")) == 18 and "from 0.10 to 1" in low.tree.xpath("//svg/@aria-label")[0]
    none = shown(manifest(confidence=confidence_of({})))
    assert "No label of this night has probabilities." in none.text and none.tree.xpath("//svg") == []


def test_rejects_stand_with_examples(page: Page) -> None:
    table = page.rows("rejects")
    assert list(table) == ["Bad line", "Image missing", "Duplicate id", "Answer unparsed", "All"]
    assert table["Bad line"] == ["60", share(60, 1200)] and table["All"] == ["100", share(100, 1200)]
    heads = [page.plain(h) for h in page.tree.xpath("//section[@aria-labelledby='rejects']//h3")]
    assert heads == ["Bad line: 3 of 60", "Answer unparsed: 1 of 1"]
    items = [page.plain(li) for li in page.tree.xpath("//ul[@class='examples']/li")]
    assert items[0] == "posts-0.jsonl:0 not JSON: line 1 column 4" and items[3] == "p-77 no prediction in it I would rather not say."
    assert "There are none." in shown(manifest(rejects=0)).text
    assert {str(r) for r in Reason if r in ("bad_line", "image_missing")} == {"bad_line", "image_missing"}
    every = {str(r): 1 for r in Reason}
    assert len(shown(manifest(rejects=len(every), reasons=every)).rows("rejects")) == len(every) + 1


def test_speed_price_and_what_the_deadline_did(page: Page) -> None:
    cost = page.facts("cost")
    assert (
        cost["Scoring"] == "812 posts a second"
        and cost["Tokens"] == "300 000 read, 1 000 written"
        and cost["Price"] == "1.23 USD; 0.0123 USD for 1,000 posts asked"
    )
    assert (
        cost["Engine of the student"] == "rows in 700, asked 690, reused 10"
        and cost["Deadline"] == "2026-11-23 06:00 UTC"
        and cost["Budget"] == "12.50 USD"
    )
    assert (
        list(cost)[-1] == "What it led to"
        and cost["What it led to"].endswith("the deadline is reached: 80 rows deferred")
        and "no rationales from here on" in cost["What it led to"]
    )
    assert page.rows("steps") == {k: [duration(v).replace(NB, " ")] for k, v in (("Intake", 2.5), ("Match", 3.0), ("Score", 61.2), ("Assemble", 1.4))}
    quiet = shown(manifest(rate=None, usd=None, usd_per_1k=None, engine={}, rows=1000))
    assert set(quiet.facts("cost")) == {"Tokens", "Time"} and "Neither deadline nor budget changed anything." in quiet.text
    assert shown(manifest(usd=0.0, usd_per_1k=0.00004)).facts("cost")["Price"] == "0.00 USD; 0.000040 USD for 1,000 posts asked"


def test_the_canary_by_class(page: Page) -> None:
    assert page.rows("canary") == {s.value: ["100", "88", "88.0 %"] for s in LABELS}
    assert "400 posts whose true label is known were asked along with the night: 88.0 % are right, macro F1 87.0 %." in page.text
    assert "canary" not in shown(manifest()).tree.xpath("//h2/@id")


def test_commands_are_exact(page: Page) -> None:
    commands = [c for c in page.tree.xpath("//section[@aria-labelledby='next']//pre")[0].text_content().splitlines() if not c.startswith("#")]
    assert commands == [f"mulcot {c} --root s3://bucket/runs" for c in ("published", "publish 2026-11-22", "publish 2026-11-22 --force", "rollback 2026-11-22", "published --sql", "published --athena")]  # fmt: skip
    assert f"read_parquet('s3://bucket/runs/labels/dt=2026-11-22/version={VERSION}.1/*.parquet')" in page.text
    assert "mulcot publish 2026-11-22 --root '/a folder/x'" in shown(manifest(), root="/a folder/x").text
    facts = page.facts("made")
    assert facts["Dump"] == "s3://dump/dt=2026-11-22, read in 4 units" and facts["Version"] == f"{VERSION}, revision 1"
    assert f'"{VERSION}"' in page.tree.xpath("//section[@aria-labelledby='made']//pre")[0].text_content()


def hostile() -> Page:
    every = {str(r): 3 for r in (Reason.BAD_LINE, Reason.ANSWER_UNPARSED)}
    examples = {r: [reject(f"{ATTACK}{LONG}", Reason(r), f"{ATTACK} {LONG}", f"{ATTACK} {LONG} " + "z" * 3000) for _ in range(3)] for r in every}
    m = manifest(
        rejects=6,
        reasons=every,
        input=f"{ATTACK}{LONG}",
        model=f"{ATTACK}{LONG}",
        pace={"said": [f"{ATTACK}{LONG}"], "deadline": None},
        canary=canary(0.9),
    )
    verdicts = [Verdict(gate="label_drift", ok=False, measured=0.5, limit=0.1, why=f"{ATTACK} {LONG}")]
    m = m.model_copy(update={"identity": {"input": f"{ATTACK}{LONG}"}})
    return Page(night_page(m, verdicts, week(), examples, root=f"{ATTACK}{LONG}"))


def test_what_others_wrote_stays_data() -> None:
    page = hostile()
    assert (
        "<script" not in page.source
        and "<b>bold" not in page.source
        and not page.tree.xpath("//script | //b")
        and "49" not in page.facts("made")["Model"]
    )
    (first, *_) = page.tree.xpath("//ul[@class='examples']/li")
    assert first.xpath("p")[0].text_content().startswith(ATTACK) and first.xpath("pre")[0].text_content().startswith(ATTACK)
    assert "more characters)" in first.xpath("pre")[0].text_content() and len(first.text_content()) < 2000


def test_the_page_is_valid_and_closed(page: Page) -> None:
    for p in (page, hostile(), shown(manifest(), [])):
        parser = etree.HTMLParser(recover=False)
        etree.fromstring(
            re.sub(r"(?s)<svg.*?</svg>|</?(main|section|nav|header|footer|figure|figcaption|details|summary)\b[^>]*>", "", p.source), parser
        )
        assert p.source.startswith("<!doctype html>") and [str(e) for e in parser.error_log] == []
        etree.fromstring(re.search(r"(?s)<main.*</main>", p.source)[0])  # every element is closed
        assert not re.search(r"(?<!s3:)(?<!s3:/)\bhttps?:|@import|url\((?!#)", p.source)
        links, ids = p.tree.xpath("//@href | //@src"), p.tree.xpath("//@id")
        assert all(link.startswith("#") for link in links) and len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
        assert set(p.tree.xpath("//@aria-labelledby")) <= set(ids) and "default-src 'none'" in p.source
        assert not p.tree.xpath("//script | //iframe | //link | //form | //object | //img")


# --- metrics ---------------------------------------------------------------------------------------------------------


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name without mulcot_night_, value of the further label) → value."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.type == "gauge" and family.documentation and family.name.startswith("mulcot_night_")
        for s in family.samples:
            labels = dict(s.labels)
            assert labels.pop("version") == VERSION and s.timestamp is None and len(labels) <= 1
            found[s.name.removeprefix("mulcot_night_"), *labels.values()] = s.value
    return found


def test_metrics_are_the_manifests() -> None:
    m = eventful()
    verdicts = judge(m, week(), Gates())
    found = samples(metrics(m, verdicts))
    assert found["rows_in",] == 1200 == sum(v for k, v in found.items() if k[0] == "rows")
    assert {k[1]: v for k, v in found.items() if k[0] == "labels"} == m.stats["labels"]
    assert {k[1]: v for k, v in found.items() if k[0] == "answered_by"} == m.stats["answered_by"]
    assert {k[1]: v for k, v in found.items() if k[0] == "rejects"} == REASONS and found["images", "fault"] == 30 and found["explained",] == 125
    assert (found["canary_accuracy",], found["canary_macro_f1",], found["posts_per_second",]) == (0.88, 0.87, 812.4)
    assert (found["usd",], found["usd_per_1k",], found["seconds", "score"], found["tokens", "in"]) == (1.234, 0.0123, 61.2, 300_000)
    assert {k[1]: v for k, v in found.items() if k[0] == "gate_ok"} == {v.gate: float(v.ok) for v in verdicts} and found["fit",] == 0
    assert {k[1]: v for k, v in found.items() if k[0] == "gate_measured"} == {v.gate: v.measured for v in verdicts}
    assert {k[1]: v for k, v in found.items() if k[0] == "gate_limit"} == {v.gate: v.limit for v in verdicts}


def test_what_is_not_known_has_no_sample() -> None:
    m = manifest(rate=None, usd=None, usd_per_1k=None, confidence=confidence_of({}))
    found = samples(metrics(m, judge(m, [], Gates())))
    assert not {"posts_per_second", "usd", "usd_per_1k", "confidence", "canary_accuracy", "canary_macro_f1"} & {k[0] for k in found}
    assert {k[1] for k in found if k[0] == "gate_ok"} == {"reject_rate", "deferred_rate"} and found["fit",] == 1
    text = metrics(manifest(), [])
    assert text.endswith("\n") and text == metrics(manifest(), []) and f'mulcot_night_labels{{label="positive",version="{VERSION}"}} 430.0' in text
    assert "python_info" not in text and "_created" not in text


# --- in a browser ----------------------------------------------------------------------------------------------------


def test_the_page_fits_phone_and_desktop_in_both_themes_and_asks_for_nothing(browse: Callable[..., Any], page: Page, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.html" for name in ("night", "first", "hostile")}
    for (_, file), p in zip(files.items(), (page, shown(manifest(), []), hostile()), strict=True):
        file.write_text(p.source, encoding="utf-8")
    papers = set()
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            tab, asked, errors = browse(width, scheme), [], []
            tab.on("request", lambda r, asked=asked: asked.append(r.url))
            tab.on("console", lambda m, errors=errors: errors.append(m.text))
            for name, file in files.items():
                asked.clear()
                tab.goto(file.as_uri())
                tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                wide = tab.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is {wide} pixels wide at {width}"
                assert asked == [file.as_uri()]
                outside = tab.evaluate(
                    "[...document.querySelectorAll('h1, h2, p, td, th, dd, li, svg, pre')].filter(e => e.getBoundingClientRect().right > innerWidth)"
                    ".map(e => e.outerHTML.slice(0, 200))"
                )
                assert outside == [], (name, width)
                shot = tmp_path / f"{name}-{width}-{scheme}.png"
                tab.screenshot(path=shot)
                assert shot.stat().st_size > 10_000
            papers.add((scheme, tab.evaluate("getComputedStyle(document.body).backgroundColor")))
            assert errors == []
            tab.close()
    assert len(papers) == 2 and len({colour for _, colour in papers}) == 2
