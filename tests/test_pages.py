"""The pages of evaluations and comparisons, made from tables written by hand: their numbers are the report's, and what others wrote stays data."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from lxml import html as lxml_html

from mulcot_ray.artifacts import Manifest, Run, begin, find, need, read_rows
from mulcot_ray.errors import ArtifactMissing, ConfigError
from mulcot_ray.evaluation.compare import compare
from mulcot_ray.evaluation.evaluate import evaluate
from mulcot_ray.evaluation.faithfulness import paired
from mulcot_ray.evaluation.faithfulness_measures import NAMES, ruled, summarise
from mulcot_ray.evaluation.model_card import model_card
from mulcot_ray.evaluation.pages import compare_files, compare_page, load_faithfulness, model_files, model_page
from mulcot_ray.html import NB, number, percent
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.posts.shown import CLIP, rows_by_id
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Rationale, Reason, Reject, Sentiment, Source, Split, from_row, to_table
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
CONTRACT = RECIPE.contract
CHEAP = ("bleu", "rouge_l")
ATTACK = '</td><script>alert("x")</script><b>bold</b>|`*'
POSTS = [p for split in (Split.TEST, Split.VALIDATION, Split.TRAIN) for p in sample_posts(120 if split is Split.TEST else 60, split, 5)]
TEST = [p for p in POSTS if p.split is Split.TEST]


# --- tables ----------------------------------------------------------------------------------------------------------


def publish(store: Store, kind: Any, name: str, rows: list[Any], rejects: list[Reject] | None = None, stats: Any = None, **identity: Any) -> Manifest:
    run = begin(store, kind, name, {"name": name, **identity})
    assert isinstance(run, Run)
    with run:
        for part in range(0, len(rows), 50):
            run.write_table(f"part-{part:05d}", to_table(type(rows[0]), rows[part : part + 50]), rows_per_group=16)
        if rejects:
            run.write_table("part-00000", to_table(Reject, rejects), rejects=True)
        return run.commit(len(rows) + len(rejects or ()), stats=stats)


def answered(posts: list[Post], accuracy: float, seed: int, model: str = "student", told: float = 0.9) -> list[Prediction]:
    """Too sure of itself; some are wrong, some without a rationale, some with one that ends on another label."""
    rng, made = random.Random(seed), []
    for p in posts:
        assert p.label is not None
        label = p.label if rng.random() < accuracy else rng.choice([x for x in LABELS if x is not p.label])
        sure = rng.uniform(0.8, 0.99)
        share = {s.value: sure if s is label else (1 - sure) / 2 for s in LABELS}
        told_so = rng.random() < told
        sections = {s: getattr(reference_rationale(p, label), s) for s in SECTIONS} if told_so else {}
        made.append(Prediction(p.post_id, label, model, CONTRACT.hash, **share, label_mass=0.97, **sections, tokens_in=100, tokens_out=40,
                               stated=rng.choice([label, label, LABELS[0]]) if told_so else None, rationale_fault=None if told_so else "answer_truncated: cut"))  # fmt: skip
    return made


def trained(store: Store, posts: Manifest, taught: Manifest) -> Manifest:
    identity = {
        "stage": "train", "posts": posts.fingerprint, "rationales": [taught.fingerprint], "base": "b-print", "assistant": None,
        "tasks": ["reasoning", "classification"], "train": RECIPE.student.model_dump(mode="json"), "distill": None, "contract": CONTRACT.hash,
        "seed": 42, "dtype": "float32", "max_model_len": 1024,
    }  # fmt: skip
    steps = [{"step": i, "loss": 3 / i, "ce_cls": 1 / i, "ce_rea": 2 / i} for i in range(1, 90)]
    history = {"steps": steps, "validation": [{"step": 45, "accuracy": 0.7}, {"step": 89, "accuracy": 0.8123}], "best": {"epoch": 2}}
    with begin(store, "models", "student", identity) as run:
        store.create(f"{run.prefix}/history.json", json.dumps(history).encode())
        return run.commit(60, stats={"accuracy": 0.8123, "epoch": 2, "rows": 60})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    s = Store(str(tmp_path_factory.mktemp("root")))
    posts = publish(s, "posts", "p", POSTS, stats={"splits": {"test": 120, "validation": 60, "train": 60}}, stage="import", format="jsonl")
    taught = publish(s, "rationales", "taught", [reference_rationale(p) for p in POSTS[180:]], stage="teach", model="t-print")
    model = trained(s, posts, taught)
    label = {"stage": "label", "posts": posts.fingerprint, "model": model.fingerprint, "contract": CONTRACT.hash, "mode": "explain", "seed": 42}
    rejects = [Reject(TEST[0].post_id, "label", Reason.IMAGE_UNREADABLE, "broken"), Reject(TEST[1].post_id, "label", Reason.ANSWER_UNPARSED, "?")]
    stats = {"model": "student", "mode": "explain"}
    publish(s, "predictions", "student", answered(TEST[3:], 0.8, 1), rejects, stats, **label, split="test")
    publish(s, "predictions", "validation", answered(POSTS[120:180], 0.8, 2), None, stats, **label, split="validation")
    other = {**label, "model": "o-print", "split": "test"}
    publish(
        s, "predictions", "other", answered(TEST[:110], 0.6, 3, "/models/other", 0.5), None, {"model": "/models/other", "mode": "explain"}, **other
    )
    publish(s, "predictions", "teacher", [replace(p, model="big") for p in answered(TEST, 0.9, 4, told=1.0)])
    publish(s, "rationales", "shown", [replace(reference_rationale(p), source=Source.EXPLAINED) for p in TEST])
    return s


def scored(store: Store, name: str, **changes: Any) -> tuple[Run, dict[str, Any]]:
    """A run as it is before the commit, and its report."""
    common: dict[str, Any] = {
        "posts": "p", "answers": "student", "answers_kind": "predictions", "references": "teacher", "split": Split.TEST, "contract": CONTRACT,
        "runtime": RUNTIME, "calibration": "validation", "scores": CHEAP,
    }  # fmt: skip
    manifest, report, _ = evaluate(store, name, **{**common, **changes})
    return Run(store, "evaluations", name, manifest.identity, {}), report


def compared(store: Store, name: str, **changes: Any) -> tuple[Run, dict[str, Any]]:
    common: dict[str, Any] = {"posts": "p", "a": "student", "b": "other", "split": Split.TEST, "contract": CONTRACT, "runtime": RUNTIME}
    manifest, report, _ = compare(store, name, **{**common, **changes})
    return Run(store, "evaluations", name, manifest.identity, {}), report


def faithful() -> dict[str, Any]:
    """A report of evaluation/faithfulness.py, of a model that follows the corpus' rule."""
    cases = paired(TEST[:60])

    def said(post: Post, label: Sentiment) -> Prediction:
        r, p = reference_rationale(post, label), [0.8 if x is label else 0.1 for x in LABELS]
        return Prediction(post.post_id, label, "m", "c", *p, label_mass=0.9, **{s: getattr(r, s) for s in SECTIONS}, stated=label)

    for c in cases.values():
        picture = {k: v for k, v in c.partner.meta.items() if k.startswith("image")}
        told = {k: v for k, v in c.post.meta.items() if k.startswith("image")}
        for what, post in (
            ("picture", replace(c.post, meta={**c.post.meta, **picture})),
            ("text", replace(c.partner, meta={**c.partner.meta, **told})),
        ):
            c.answers[what] = said(post, ruled(c, what))
        c.answers |= {"plain": said(c.post, c.post.label), "own": said(c.post, c.post.label), "other": said(c.post, c.partner.label)}
    return {"posts": "p", "split": "test", "model": "student", "mode": "explain", **summarise(list(cases.values()))}


class Page:
    def __init__(self, text: str) -> None:
        self.source, self.tree = text, lxml_html.document_fromstring(text)
        self.text = self.plain(self.tree)

    @staticmethod
    def plain(node: Any) -> str:
        return " ".join(" ".join(node.itertext()).replace(NB, " ").split())

    def tiles(self) -> dict[str, str]:
        return {self.plain(d.find("dt")): self.plain(d.find("dd")) for d in self.tree.xpath("//dl[@class='tiles']/div")}

    def rows(self, table: str) -> dict[str, list[str]]:
        """Heading of a row, without its explanation → its cells of numbers."""
        found = {}
        for tr in self.tree.xpath(f"//table[contains(concat(' ', @class, ' '), ' {table} ')]/tbody/tr[td]"):
            name = "".join(tr.xpath("th[1]//text()[not(ancestor::small) and not(ancestor::*[@aria-hidden])]")).strip()
            found[name or self.plain(tr[0])] = [self.plain(td) for td in tr.xpath("td[not(contains(@class, 'scaled'))]")]
        return found

    def examples(self) -> list[Any]:
        return self.tree.xpath("//article[starts-with(@aria-labelledby, 'example')]")

    def heads(self) -> list[str]:
        return self.tree.xpath("//h2/@id")

    def warnings(self) -> str:
        return " ".join(self.plain(p) for p in self.tree.xpath("//p[@class='warn']"))


def shares(*values: float) -> list[str]:
    return [percent(v).replace(NB, " ") for v in values]


def ends(low: float, high: float) -> str:
    return f"{100 * low:.1f} – {100 * high:.1f}"


@pytest.fixture(scope="module")
def whole(store: Store) -> tuple[Page, dict[str, Any], Run]:
    run, report = scored(store, "whole")
    return Page(model_page(run, report, faithfulness=faithful())), report, run


# --- the page of a model ---------------------------------------------------------------------------------------------


def test_the_headline_is_the_reports(whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, _ = whole
    labels, tiles = report["labels"], page.tiles()
    for name, key in (("Accuracy", "accuracy"), ("Macro F1", "macro_f1"), ("Weighted F1", "weighted_f1")):
        assert tiles[name] == f"{shares(labels[key])[0]} {ends(*labels['intervals'][key])}"
    assert tiles["Calibration error"].startswith(shares(report["calibration"]["after"]["ece"])[0])
    assert tiles["Format valid"] == f"{shares(report['form']['format_valid'])[0]} of {report['form']['tried']} tried"
    assert report["counts"] == {"gold": 120, "answered": 117, "rejected": 2, "missing": 1}
    assert "Posts without a usable answer count as wrong: 2 rejected, 1 missing." in page.text
    most = max(sum(row) for row in labels["confusion"])
    assert f"would be right in {shares(most / 120)[0]}" in page.text
    assert page.plain(page.tree.xpath("//h1")[0]) == "Evaluation of student" and page.warnings() == ""
    heads = ["mistakes", "slices", "calibration", "rationales", "faithfulness", "training", "cost", "examples", "lineage", "again"]
    assert page.heads() == heads


def test_tables_are_the_reports(whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, _ = whole
    for (name, cells), counts in zip(page.rows("matrix").items(), report["labels"]["confusion"], strict=True):
        assert name in LABELS and [int(c.split()[0]) for c in cells] == counts
        assert [c.split()[1] for c in cells] == [f"{100 * n / sum(counts):.0f}" for n in counts]
    for name, x in report["labels"]["per_class"].items():
        assert page.rows("classes")[name] == [*shares(x["precision"], x["recall"], x["f1"]), str(x["support"])]
    assert page.rows("rejects") == {"Image unreadable": ["1"], "Answer unparsed": ["1"]}
    slices = {value: s for values in report["slices"].values() if len(values) > 1 for value, s in values.items()}
    assert set(page.rows("slices")) == set(slices) and len(slices) > 5
    for value, cells in page.rows("slices").items():
        s = slices[value]
        assert cells == [f"{shares(s['accuracy'])[0]} {ends(*s['interval'])}", *shares(s["macro_f1"])]
    assert "split (test)" in page.text and "target (with aspect)" in page.text
    scores = page.rows("scores")
    assert scores["BLEU"][0].startswith(f"{report['rationales']['bleu']:.2f}") and scores["ROUGE-L"][0].startswith(
        f"{report['rationales']['rouge_l']:.3f}"
    )
    assert scores["Distinct-2"][0].startswith(f"{report['rationales']['distinct_2']:.4f}") and "METEOR" not in scores
    form = page.rows("form")
    assert form["Consistent"][0].startswith(shares(report["form"]["sections_consistent"])[0])
    assert form["States the label predicted"] == shares(report["predictions"]["consistency"])
    assert form["Answer truncated"] == [str(report["form"]["faults"]["answer_truncated"])] and form["Rejected for their form"] == ["1"]
    cost = page.plain(page.tree.xpath("//dl[contains(@class, 'cost')]")[0])
    assert f"Tokens in {number(report['cost']['tokens_in']).replace(NB, ' ')} 100 for each" in cost and "then a rationale written" in cost


def test_calibration_is_the_reports(whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, _ = whole
    c = report["calibration"]
    rows = page.rows("calibration")
    assert c["after"] and all(
        rows[name] == [f"{c[x][key]:.4f}" for x in ("before", "after")]
        for name, key in (("ECE", "ece"), ("ECE by chance", "ece_by_chance"), ("NLL", "nll"))
    )
    assert f"The temperature {c['temperature']:.3f} softens" in page.text and "fitted on 60 validation posts" in page.text
    points = {f"{p['threshold']:.3f}": p for p in c["after"]["coverage"]}
    shown = [tr for tr in page.tree.xpath("//table[@class='thresholds']/tbody/tr")]
    assert len(shown) >= 4
    for tr in shown:
        threshold, *cells = [page.plain(td) for td in tr]
        p = points[threshold]
        assert cells == [str(p["kept"]), *shares(p["coverage"], p["accuracy"])]
    plots = {svg.get("aria-label").split(".")[0].split(",")[0]: svg for svg in page.tree.xpath("//svg")}
    assert len(plots) == 3 and "Reliability" in plots
    assert percent(c["before"]["confidence"]) in plots["Reliability"].get("aria-label")


def test_intervals_are_drawn_where_they_are(whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, _ = whole
    slices = {value: s for values in report["slices"].values() for value, s in values.items()}
    overall, least = report["labels"]["accuracy"], float(page.tree.xpath("//th[@class='scaled']/span/span")[0].text.rstrip(" %")) / 100
    assert least <= min(s["interval"][0] for s in slices.values())
    for tr in page.tree.xpath("//table[contains(@class, 'slices')]/tbody/tr"):
        s = slices[tr.xpath("th")[0].text]
        (scale,) = tr.xpath(".//span[starts-with(@class, 'scale ')]")
        left = {e.tag: float(re.search(r"left: ([\d.]+)%", e.get("style"))[1]) for e in scale}
        width = float(re.search(r"width: ([\d.]+)%", scale.find("i").get("style"))[1])
        back = {k: least + v / 100 * (1 - least) for k, v in left.items()}
        assert (back["b"], back["i"], back["u"]) == pytest.approx((s["accuracy"], s["interval"][0], overall), abs=1e-4)
        assert width / 100 * (1 - least) == pytest.approx(s["interval"][1] - s["interval"][0], abs=1e-4)
        off = "below" if s["interval"][1] < overall else "above" if s["interval"][0] > overall else ""
        assert scale.get("class").split()[1:] == [off][: bool(off)] and ("the rest" in page.plain(tr)) == bool(off)


def test_examples_stand_beside_the_teachers(store: Store, whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, _ = whole
    said = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "student")))}
    taught = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "teacher")))}
    posts, kinds = {p.post_id: p for p in TEST}, []
    for e in page.examples():
        i = page.plain(e.xpath(".//code")[0])
        text, post, answer = page.plain(e), posts[i], said[i]
        kinds.append(page.plain(e.xpath(".//h3")[0]).split(" ·")[0])
        assert " ".join(post.text.split()) in text and post.aspect in text and post.meta["relation"] in text and len(e.xpath(".//img")) == 1
        assert [page.plain(x) for x in e.xpath(".//dl//span[starts-with(@class, 'label')]")] == [
            f"{'▼●▲'[LABELS.index(x)]} {x}" for x in (answer.label, post.label)
        ]
        assert ("✓ right" in text) == (answer.label is post.label)
        assert [page.plain(x) for x in e.xpath(".//li/span[3]")] == shares(answer.positive, answer.neutral, answer.negative)
        heads = [page.plain(x) for x in e.xpath(".//thead/tr/th")]
        assert heads == (["student", "teacher"] if answer.text_analysis else ["teacher"])
        for who, row in (("student", answer), ("teacher", taught[i])):
            if who in heads:
                cells = [page.plain(x) for x in e.xpath(f".//td[@data-by='{who}']")]
                assert cells == [*(" ".join(getattr(row, s).split()) for s in SECTIONS), str(row.stated)]
        assert ("Its rationale cannot be used: answer_truncated: cut" in text) == (answer.text_analysis is None)
    assert [kinds.count(k) for k in ("Wrong, and sure of it", "Unsure", "Right, and sure of it")] == [4, 4, 4]
    assert {e["post_id"] for e in report["examples"]["wrong"][:3]} <= {page.plain(e.xpath(".//code")[0]) for e in page.examples()}


def test_another_teacher_and_fewer_examples(store: Store) -> None:
    run, report = scored(store, "whole")
    page = Page(model_page(run, report, teacher="shown", examples=5))
    assert (
        len(page.examples()) == 5
        and "shown, who was given the label" in page.text
        and page.heads() == [h for h in page.heads() if h != "faithfulness"]
    )
    assert Page(model_page(run, report, examples=0)).examples() == []
    with pytest.raises(ArtifactMissing, match="nobody"):
        model_page(run, report, teacher="nobody")


def test_lineage_and_commands(store: Store, whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, _, _ = whole
    (dl,) = page.tree.xpath("//section[@aria-labelledby='lineage']/dl")
    facts = {page.plain(a): page.plain(b) for a, b in zip(dl.xpath("dt"), dl.xpath("dd"), strict=True)}
    assert facts["Posts"].startswith("posts/p: 240 rows; 120 test, 60 validation, 60 train")
    assert facts["Answers"].startswith("predictions/student: 117 rows, 2 rejects; label words scored, then a rationale written; split test")
    assert facts["Model"].startswith("models/student, trained on 60 rows; best of 7 epochs: 2, validation accuracy 81.2 %")
    assert "LoRA of rank 32" in facts["Training"] and "on split train of posts/p" in facts["Training"] and facts["Base"] == "fingerprint b-print"
    assert (
        facts["Rationales"].startswith("rationales/taught: 60 of 60 posts, by fingerprint t-print")
        and facts["Prompts"] == f"contract tiny, {CONTRACT.hash}"
    )
    assert need(store, "models", "student").fingerprint in facts["Model"] and '"max_model_len": 1024' in page.text
    commands = page.tree.xpath("//section[@aria-labelledby='again']/pre")[0].text_content().splitlines()
    assert commands == [
        "export MULCOT_RECIPE=tiny",
        "mulcot import FILES --format jsonl --name p",
        "mulcot assistant --posts p --rationales taught --name student",
        "mulcot label --posts p --split test --model student --mode explain --name student",
        "mulcot faithfulness --posts p --split test --model student --mode explain",
        "mulcot evaluate --answers student --posts p --split test --references teacher --calibrate-on validation --scores bleu,rouge_l --name whole",
    ]


def test_faithfulness_is_its_reports(whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, f = whole[0], faithful()
    checks = [page.plain(li) for li in page.tree.xpath("//ul[@class='checks']/li")]
    assert (
        len(checks) == 5
        and all(("✓" in line) == bool(c["holds"]) for line, c in zip(checks, f["checks"], strict=True))
        and any("✓" in c for c in checks)
    )
    m = f["measures"]
    flips = page.rows("exchanged")["Label flips"]
    assert flips == [
        f"{shares(m[x]['flips']['value'])[0]} {ends(m[x]['flips']['low'], m[x]['flips']['high'])}" for x in ("swap_picture", "swap_text")
    ]
    toward = page.rows("exchanged")["Change of P(partner’s label)"]
    assert [t.split()[0] for t in toward] == [f"{m[x]['towards_partner']['value']:+.3f}".replace("-", "−") for x in ("swap_picture", "swap_text")]
    drags = page.rows("as-it-is")[NAMES["other_rationale_drags"].replace("'", "’").capitalize()]
    assert drags[0].startswith(shares(m["other_rationale_drags"]["value"])[0])
    assert set(page.rows("relations")) == set(f["by_relation"])


def test_answers_with_nothing_but_labels(store: Store) -> None:
    """No probabilities, no rationales, no references, no model under the root."""
    publish(store, "predictions", "mute", [Prediction(p.post_id, p.label, "m", CONTRACT.hash) for p in TEST])
    run, report = scored(store, "mute", answers="mute", references=None, calibration=None)
    page = Page(model_page(run, report))
    assert report["calibration"] is None and report["rationales"] is None and report["form"]["format_valid"] is None
    assert page.heads() == ["mistakes", "slices", "rationales", "cost", "examples", "lineage", "again"]
    assert page.tiles()["Accuracy"].startswith("100.0 %") and "Calibration error" not in page.tiles() and "No answer has a rationale." in page.text
    assert "Every post has an answer." in page.text and page.plain(page.tree.xpath("//h1/span")[0]) == "mute"
    assert {page.plain(e.xpath(".//h3")[0]).split(" ·")[0] for e in page.examples()} == {"Right"} and "No rationale was written." in page.text
    card = model_card(run, report)
    assert "These answers have no probabilities." in card and "No answer has one." in card


def test_a_model_that_lost_its_history(store: Store, tmp_path: Path) -> None:
    other = Store(str(tmp_path / "copy"))
    shutil.copytree(store.base, other.base)
    Path(other.path("models/student/history.json")).unlink()
    run, report = scored(other, "whole")
    page = Page(model_page(run, report))
    assert "training" not in page.heads() and len(page.tree.xpath("//svg")) == 2


def test_rationales_as_answers_are_no_measure(store: Store) -> None:
    run, report = scored(store, "told", answers="shown", answers_kind="rationales", references=None, calibration=None)
    page = Page(model_page(run, report))
    assert "This is no measure of a model." in page.warnings() and page.rows("sources") == {"Explained": ["120"]}
    assert "no evidence of accuracy" in model_card(run, report)


def test_references_that_saw_the_label(store: Store) -> None:
    run, report = scored(store, "seen", references="shown")
    page = Page(model_page(run, report))
    assert report["references_label_conditioned"] and "The references saw the answer." in page.warnings()
    assert "Some references were written with the gold label in view." in model_card(run, report)


def test_posts_that_the_model_was_trained_on(store: Store) -> None:
    publish(store, "predictions", "by-heart", answered([p for p in POSTS if p.split is Split.TRAIN], 1.0, 1),
            stats={"model": "student"}, model=need(store, "models", "student").fingerprint)  # fmt: skip
    for split, words in ((Split.TRAIN, "They are the posts that it was trained on"), (None, "Among them are the posts")):
        run, report = scored(store, f"by-heart-{split}", answers="by-heart", split=split, calibration=None, references=None)
        assert words in Page(model_page(run, report)).warnings() and words in model_card(run, report)
    run, report = scored(store, "chosen", answers="validation", split=Split.VALIDATION, calibration=None, references=None)
    assert "The best epoch was chosen by these posts" in Page(model_page(run, report)).warnings()


def test_the_same_report_gives_the_same_page(store: Store, whole: tuple[Page, dict[str, Any], Run]) -> None:
    page, report, run = whole
    assert model_page(run, report, faithfulness=faithful()) == page.source


def test_files_are_part_of_the_result(store: Store, whole: tuple[Page, dict[str, Any], Run]) -> None:
    """Also of a report that was not read back from JSON yet, in which labels and splits are enumerations."""
    _, report, first = whole
    examples = {k: [{**e, "gold": Sentiment(e["gold"]), "label": Sentiment(e["label"])} for e in some] for k, some in report["examples"].items()}
    with begin(store, "evaluations", "again", first.identity) as run:
        files = model_files(run, {**report, "split": Split.TEST, "examples": examples}, faithfulness=faithful())
        for name, text in files.items():
            store.create(f"{run.prefix}/{name}", text.encode())
        run.commit(120)
    done = find(store, "evaluations", "again")
    assert done and set(done.files) == {"report.html", "model_card.md"}
    assert files["report.html"].replace("--name again", "--name whole") == whole[0].source and "split: test" in files["model_card.md"]


def test_a_report_of_faithfulness_is_asked_for_by_name(store: Store) -> None:
    with begin(store, "evaluations", "faithful", {"stage": "faithfulness"}) as run:
        store.create(f"{run.prefix}/report.json", json.dumps(faithful()).encode())
        run.commit(60)
    assert load_faithfulness(store, "faithful")["checks"] == faithful()["checks"]
    scored(store, "whole")
    with pytest.raises(ConfigError, match="evaluations/whole is of stage 'evaluate'"):
        load_faithfulness(store, "whole")


# --- the model card --------------------------------------------------------------------------------------------------


def test_the_card_has_the_reports_metrics(whole: tuple[Page, dict[str, Any], Run]) -> None:
    _, report, run = whole
    text = model_card(run, report)
    front, body = text.removeprefix("---\n").split("---\n", 1)
    (model,) = yaml.safe_load(front)["model-index"]
    metrics = {m["name"]: m["value"] for m in model["results"][0]["metrics"]}
    assert (
        model["name"] == "student" and metrics["Accuracy"] == report["labels"]["accuracy"] and metrics["BLEU (0–100)"] == report["rationales"]["bleu"]
    )
    assert metrics["Expected calibration error"] == report["calibration"]["after"]["ece"]
    assert model["results"][0]["dataset"] == {"name": "p", "type": "p", "split": "test"}
    assert re.findall(r"^## (.*)$", body, re.M) == [
        "Intended use", "Not for", "Where it comes from", "Evaluation", "Calibration", "Rationales", "How to reproduce"
    ]  # fmt: skip
    assert f"| Macro F1 | {percent(report['labels']['macro_f1'])} | {ends(*report['labels']['intervals']['macro_f1'])} |" in body
    assert "2 of them were rejected and 1 are missing: they count as wrong." in body
    assert f"at temperature {report['calibration']['temperature']:.3f}" in body and "    mulcot evaluate --answers student" in body


# --- the page of a comparison ----------------------------------------------------------------------------------------


def test_a_comparison_is_its_report(store: Store) -> None:
    run, report = compared(store, "pair")
    page, g = Page(compare_page(run, report)), report["gold"]
    assert compare_files(run, report) == {"report.html": page.source}
    d, (low, high) = g["difference"]["accuracy"], g["intervals"]["accuracy"]
    assert page.tiles()["student"] == f"{shares(g['a']['accuracy'])[0]} {ends(*g['a']['intervals']['accuracy'])}"
    assert page.tiles()["other"].startswith(shares(g["b"]["accuracy"])[0]) and d > 0.1 and low > 0 and "student is better." in page.text
    assert page.rows("differences")["Accuracy"] == [f"{100 * d:+.1f}", f"{100 * low:+.1f} to {100 * high:+.1f}"]
    assert page.rows("matrix") == {
        s: [f"{n} {100 * n / (sum(row) or 1):.0f} %" for n in row] for s, row in zip(LABELS, report["agreement"]["matrix"], strict=True)
    }
    assert page.rows("byclass") == {s: [str(x[k]) for k in ("only_a_right", "only_b_right", "none_right")] for s, x in g["disagreements"].items()}
    assert f"they agree in {shares(report['agreement']['share'])[0]}" in page.text
    said = f"{g['only_a_right']} that only student has right and {g['only_b_right']} that only other has"
    assert said in page.text and g["mcnemar_p"] < 0.05 and "hard to call luck" in page.text
    boxes = [page.plain(x) for x in page.tree.xpath("//dl[@class='ends']/div/dd")]
    assert boxes == [str(g[k]) for k in ("both_right", "only_a_right", "only_b_right", "none_right")]
    assert page.plain(page.tree.xpath("//section[@aria-labelledby='again']/pre")[0]).endswith(
        "mulcot compare student other --posts p --split test --name pair"
    )
    assert "export MULCOT_RECIPE=tiny" in page.text and "Model B" in page.text


def test_disagreements_are_shown_with_both_answers(store: Store) -> None:
    run, report = compared(store, "pair")
    page = Page(compare_page(run, report))
    assert len(page.examples()) == len(report["examples"]) == 24
    rows = {n: {r["post_id"]: r for r in read_rows(store, need(store, "predictions", n))} for n in ("student", "other")}
    for e, example in zip(page.examples(), report["examples"], strict=True):
        i = example["post_id"]
        assert page.plain(e.xpath(".//code")[0]) == i and len(e.xpath(".//img")) == 1
        labels = [page.plain(x).split()[1] for x in e.xpath(".//dl//span[starts-with(@class, 'label')]")]
        assert labels == [example["a"], example["b"], example["gold"]]
        verdict = page.plain(e.xpath(".//span[starts-with(@class, 'verdict')]")[0])
        assert verdict == {"a": "✓ student is right", "b": "✓ other is right", "none": "✗ neither is right"}[example["right"]]
        assert [page.plain(x) for x in e.xpath(".//thead/tr/th")] == [n for n in rows if rows[n][i]["text_analysis"]]
    assert 0 < sum(bool(e.xpath(".//details[@open]")) for e in page.examples()) <= 6


def test_a_comparison_without_gold(store: Store) -> None:
    night = [replace(p, label=None) for p in TEST]
    publish(store, "posts", "night", night, stage="import", format="jsonl")
    run, report = compared(store, "night", posts="night", split=None)
    page = Page(compare_page(run, report))
    assert report["gold"] is None and page.heads() == ["agreement", "examples", "lineage", "again"] and page.tiles() == {}
    assert "says how they differ, not who is right" in page.text and "not known who is right" in page.text and "is better" not in page.text


def test_a_comparison_that_decides_nothing(store: Store) -> None:
    """The same labels from two models, and two who have no post in common."""
    publish(store, "predictions", "twin", [replace(p, model="twin") for p in answered(TEST[3:], 0.8, 1)])
    page = Page(compare_page(*compared(store, "twins", b="twin")))
    assert "No post tells the two apart" in page.text and "do not show which of them is better" in page.text and page.examples() == []
    for name, part in (("first", TEST[:40]), ("second", TEST[40:])):
        publish(store, "predictions", name, answered(part, 0.9, 1))
    run, report = compared(store, "apart", a="first", b="second")
    assert report["agreement"]["share"] is None and "There is no post that both answered." in Page(compare_page(run, report)).text


# --- what others wrote -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """Posts and answers that attack, in words too long for any line and texts too long for any page; returns the longest word too."""
    s, long = Store(str(tmp_path_factory.mktemp("hostile"))), "unbroken" * 60
    posts = [
        replace(p, post_id=f"{i}{ATTACK}", text=f"{ATTACK} {long} " + "z" * 3000 * (i % 2), aspect=f"{ATTACK}{long}", meta={**p.meta, "relation": f"{ATTACK}{long}{i % 3}"})
        for i, p in enumerate(TEST[:40])
    ]  # fmt: skip
    publish(s, "posts", "p", posts, stage="import", format=ATTACK)
    for name, seed in (("a", 1), ("b", 2)):
        told = dict.fromkeys(SECTIONS, f"{ATTACK} {long}")
        rows = [replace(p, **told, model=ATTACK, rationale_fault=ATTACK, stated=LABELS[0]) for p in answered(posts, 0.6, seed, told=0)]
        publish(
            s, "predictions", name, rows, None, {"model": f"{ATTACK}{long}", "mode": ATTACK}, stage="label", model=ATTACK, mode=ATTACK, split=None
        )
    return s, long


def pages(hostile: tuple[Store, str], whole: tuple[Page, dict[str, Any], Run], store: Store) -> dict[str, str]:
    s, _ = hostile
    common: dict[str, Any] = {"references": "b", "answers": "a", "calibration": None}
    return {
        "model": whole[0].source,
        "pair": compare_page(*compared(store, "pair")),
        "hostile": model_page(*scored(s, "e", **common)),
        "hostile-pair": compare_page(*compared(s, "c", a="a", b="b")),
    }


def test_what_others_wrote_stays_data(hostile: tuple[Store, str], whole: tuple[Page, dict[str, Any], Run], store: Store) -> None:
    found = pages(hostile, whole, store)
    for name in ("hostile", "hostile-pair"):
        page = Page(found[name])
        assert "<script" not in page.source and "<b>bold" not in page.source and not page.tree.xpath("//script | //b[text()]")
        assert page.tree.xpath("//blockquote")[0].text_content().startswith(ATTACK) and ATTACK in page.plain(page.tree.xpath("//td[@data-by]")[0])
        clipped = [q for q in page.tree.xpath("//blockquote") if "more characters)" in q.text_content()]
        assert clipped and all(len(q.text_content()) < CLIP + 40 for q in clipped)
    run, report = scored(hostile[0], "e", references="b", answers="a", calibration=None)
    card = model_card(run, report)
    assert "<script" not in re.sub(r"^    .*$", "", card.split("---\n", 2)[2], flags=re.M).replace("\\<script", "")
    assert yaml.safe_load(card.removeprefix("---\n").split("\n---\n")[0])["model-index"][0]["name"].endswith(hostile[1])


def test_pages_are_closed(hostile: tuple[Store, str], whole: tuple[Page, dict[str, Any], Run], store: Store) -> None:
    for text in pages(hostile, whole, store).values():
        page = Page(text)
        assert not re.search(r"https?:|@import|url\((?!#)", re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", text))
        links, ids = page.tree.xpath("//@href | //@src"), page.tree.xpath("//@id")
        assert all(link.startswith(("#", "data:image/")) for link in links) and len(ids) == len(set(ids))
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
        assert {i for value in page.tree.xpath("//@aria-labelledby") for i in value.split()} <= set(ids)
        assert not page.tree.xpath("//script | //iframe | //link | //form | //object") and "default-src 'none'" in text
        assert not re.search(r"#0[0-9]0[0-9]0[0-9]\b", "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL)))


# --- rows by their ids -----------------------------------------------------------------------------------------------


def test_rows_are_found_by_id_and_no_others(store: Store) -> None:
    wanted = [POSTS[7].post_id, POSTS[130].post_id, POSTS[239].post_id]
    found = rows_by_id(store, need(store, "posts", "p"), [*wanted, "nobody"])
    assert set(found) == set(wanted) and all(from_row(Post, found[p.post_id]).text == p.text for p in POSTS if p.post_id in wanted)
    assert rows_by_id(store, need(store, "posts", "p"), []) == {}
    rationales = rows_by_id(store, need(store, "rationales", "taught"), [POSTS[200].post_id])
    assert from_row(Rationale, rationales[POSTS[200].post_id]).prediction is POSTS[200].label


def test_rows_of_a_bucket(s3_bucket: str) -> None:
    s = Store(f"s3://{s3_bucket}/pages")
    publish(s, "posts", "p", TEST[:60])
    assert set(rows_by_id(s, need(s, "posts", "p"), [TEST[55].post_id])) == {TEST[55].post_id}


# --- in a browser ----------------------------------------------------------------------------------------------------


def test_pages_fit_phone_and_desktop_in_both_themes_and_ask_for_nothing(
    browse: Callable[..., Any], hostile: tuple[Store, str], whole: tuple[Page, dict[str, Any], Run], store: Store, tmp_path: Path
) -> None:
    files = {name: tmp_path / f"{name}.html" for name in ("model", "pair", "hostile", "hostile-pair")}
    for name, text in pages(hostile, whole, store).items():
        files[name].write_text(text, encoding="utf-8")
    papers = set()
    for width in (390, 1280):
        for scheme in ("light", "dark"):
            page, asked, errors = browse(width, scheme), [], []
            page.on("request", lambda r, asked=asked: asked.append(r.url))
            page.on("console", lambda m, errors=errors: errors.append(m.text))
            for name, file in files.items():
                asked.clear()
                page.goto(file.as_uri())
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is {wide} pixels wide at {width}"
                assert all(url == file.as_uri() or url.startswith("data:image/jpeg;") for url in asked), asked
                outside = page.evaluate(
                    "[...document.querySelectorAll('main h2, main p, main td, main th, main dd, main svg')].filter(e => !e.closest('.scroll, .why thead') && "
                    "e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML.slice(0, 200))"
                )
                assert outside == [], (name, width)
                assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
                shot = tmp_path / f"{name}-{width}-{scheme}.png"
                page.screenshot(path=shot)
                assert shot.stat().st_size > 10_000
            papers.add((scheme, page.evaluate("getComputedStyle(document.body).backgroundColor")))
            assert errors == []
            page.close()
    assert len(papers) == 2 and len({colour for _, colour in papers}) == 2
