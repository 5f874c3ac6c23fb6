"""Faithfulness: pairs and exchanges, readers of one modality told apart, the scripted engine on Ray, and the shipped teacher."""

from __future__ import annotations

import asyncio
import io
import json
import random
import sys
from collections import Counter
from dataclasses import replace
from statistics import stdev
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from mulcot_ray.artifacts import begin, find, need, parquet_bytes
from mulcot_ray.engines.base import Completion, EngineSpec, Messages, Sampling, Scores, spec
from mulcot_ray.engines.scripted import ScriptedEngine
from mulcot_ray.errors import ConfigError, InputError, RecipeChanged, RowFault
from mulcot_ray.evaluation import faithfulness as module
from mulcot_ray.evaluation.faithfulness import _sample, _swaps, faithfulness, paired, written
from mulcot_ray.evaluation.faithfulness_measures import mean, share, show
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.sample import rule, sample_posts
from mulcot_ray.recipe import Endpoint, EngineRuntime, load_recipe, load_runtime
from mulcot_ray.records import LABELS, SECTIONS, Post, Prediction, Reason, Reject, Sentiment, Split, from_row, to_table
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")
CONTRACT = RECIPE.contract
COLOURS = {Sentiment.NEGATIVE: (200, 0, 0), Sentiment.NEUTRAL: (120, 120, 120), Sentiment.POSITIVE: (0, 200, 0)}
FULL = '"Text_analysis": "{}"\n"Image_analysis": "{}"\n"Conflict_resolution": "c"\n"Final_conclusion": "It is {}."\n"Prediction": "{}"'


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def post(i: int, label: Sentiment | None, *, shade: int = 0, **changes: Any) -> Post:
    """A post whose text and picture both say `label` (neutral where there is none)."""
    out = io.BytesIO()
    feeling = label or Sentiment.NEUTRAL
    Image.new("RGB", (84, 84), tuple(c + shade for c in COLOURS[feeling])).save(out, "PNG")
    full = Post(f"p{i}", f"s{i}", f"{feeling} words number {i}", image_bytes=out.getvalue(), label=label, split=Split.TEST)
    return replace(full, image_sha256=f"sha{i}", **changes) if "image_sha256" not in changes else replace(full, **changes)


def table(store: Store, name: str, posts: list[Post]) -> None:
    with begin(store, "posts", name, {"posts": [p.post_id for p in posts]}) as run:
        run.write_table("part-00000", to_table(Post, posts), rows_per_group=7)
        run.commit(len(posts), stats={"splits": dict(Counter(str(p.split) for p in posts))})


def scripted(script: Any = None, **changes: Any) -> EngineSpec:
    return replace(spec(RECIPE, RUNTIME, "student", "none"), backend="scripted", script=script or by_length, fingerprint="scripted", **changes)


def by_length(messages: Messages, sampling: Sampling) -> str:
    """Reads the text alone: its length decides."""
    text = messages[-1]["content"][-1]["text"]
    label = LABELS[len(text) % 3]
    return FULL.format(f"{text.split()[1]} is {label}", "a picture", label, label)


# --- pairs and exchanges ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_partners_have_another_label_and_each_serves_once(seed):
    rng = random.Random(seed)
    labels = [label for label in LABELS for _ in range(rng.randint(4, 8))]
    rng.shuffle(labels)
    posts = [post(i, label) for i, label in enumerate(labels)]
    cases = paired(posts)
    assert set(cases) == {p.post_id for p in posts} and all(c.partner.label is not c.post.label for c in cases.values())
    if max(Counter(labels).values()) <= len(labels) / 2:
        assert len({c.partner.post_id for c in cases.values()}) == len(posts)
    assert paired(posts) == cases


def test_a_large_class_shares_its_partners():
    posts = [post(i, Sentiment.POSITIVE if i % 4 else Sentiment.NEGATIVE) for i in range(12)]
    served = Counter(c.partner.post_id for c in paired(posts).values() if c.post.label is Sentiment.POSITIVE)
    assert sorted(served) == ["p0", "p4", "p8"] and served.total() == 9 and max(served.values()) <= 4


def test_partners_share_no_source_text_or_picture_and_stay_within_their_kind():
    n, p = Sentiment.NEGATIVE, Sentiment.POSITIVE
    whole = [post(0, n, text="same"), post(1, p, text="same"), post(2, p, source_id="s0"), post(3, p, image_sha256="sha0"), post(4, p)]
    aspects = [post(i, (n, p)[i % 2], aspect="x") for i in range(10, 14)]
    bare = [post(i, (n, p)[i % 2], image_bytes=None, image_sha256=None) for i in range(20, 22)]
    cases = paired(whole + aspects + bare)
    assert cases["p0"].partner.post_id == "p4"
    for c in cases.values():
        assert (c.post.aspect is None, c.post.has_image) == (c.partner.aspect is None, c.partner.has_image)
    assert [cases[f"p{i}"].partner.post_id for i in (20, 21)] == ["p21", "p20"]


def test_without_gold_any_other_post_will_do():
    cases = paired([post(i, None) for i in range(5)])
    assert len({c.partner.post_id for c in cases.values()}) == 5 and all(c.partner != c.post for c in cases.values())


def test_nothing_to_pair_is_an_error():
    with pytest.raises(InputError, match="none of the 3 posts"):
        paired([post(i, Sentiment.POSITIVE) for i in range(3)])


def test_the_sample_does_not_depend_on_the_rest_of_the_table(tmp_path):
    store = Store(str(tmp_path))
    posts = [post(i, LABELS[i % 3], source_id=f"s{i // 2}") for i in range(40)]
    other = [post(i, LABELS[i % 3], split=Split.TRAIN) for i in range(40, 60)]
    table(store, "a", posts)
    table(store, "b", [*other[:3], *posts[::-1], *other[3:]])
    drawn = {n: [p.post_id for p in _sample(store, need(store, "posts", n), Split.TEST, 12, seed=1)] for n in "ab"}
    assert drawn["a"] == drawn["b"] and len({int(i[1:]) // 2 for i in drawn["a"]}) == 12, "one post of a source"
    everything = _sample(store, need(store, "posts", "a"), Split.TEST, None, seed=1)
    assert len(everything) == 20 and [p.post_id for p in everything][:12] == drawn["a"]
    assert [p.post_id for p in _sample(store, need(store, "posts", "a"), Split.TEST, 12, seed=2)] != drawn["a"]


def test_an_exchange_takes_the_aspect_with_the_text_and_the_gold_from_the_rule():
    cases = paired(list(sample_posts(30, Split.TEST, 3)))
    for c in cases.values():
        plain, picture, text = _swaps([c], CONTRACT)
        assert (plain.text, plain.aspect, plain.image_bytes, plain.label) == (c.post.text, c.post.aspect, c.post.image_bytes, c.post.label)
        assert (picture.text, picture.aspect, picture.image_bytes) == (c.post.text, c.post.aspect, c.partner.image_bytes)
        assert (text.text, text.aspect, text.image_bytes) == (c.partner.text, c.partner.aspect, c.post.image_bytes)
        assert picture.label is rule(Sentiment(c.post.meta["text_sentiment"]), Sentiment(c.partner.meta["image_sentiment"]))[0]
        assert text.label is rule(Sentiment(c.partner.meta["text_sentiment"]), Sentiment(c.post.meta["image_sentiment"]))[0]
        assert text.aspect in text.text and plain.meta["partner"] == c.partner.post_id
    bare = next(iter(paired([post(i, LABELS[i], image_bytes=None, image_sha256=None) for i in range(3)]).values()))
    assert [p.post_id.split("/")[0] for p in _swaps([bare], CONTRACT)] == ["plain", "text"]


def test_the_written_part_is_what_the_contract_would_write():
    sections = dict(zip(SECTIONS, ('it says "so"', "two\nlines", "c", "It is negative."), strict=True))
    text = written(CONTRACT, Prediction("p", Sentiment.NEGATIVE, "m", "c", **sections))
    assert text.endswith('"Final_conclusion": "It is negative."\n')
    answer = CONTRACT.parse(text + CONTRACT.label_prefix + 'positive"')
    assert (
        answer.label is Sentiment.POSITIVE and answer.sections["text_analysis"] == "it says 'so'" and answer.sections["image_analysis"] == "two lines"
    )
    assert written(CONTRACT, Prediction("p", Sentiment.NEGATIVE, "m", "c")) is None


# --- readers of known habits -----------------------------------------------------------------------------------------


class Reader(ScriptedEngine):
    """Reads the first word of the text, the colour of the picture, or both (the worse of the two); `listens` to what is written before a label."""

    def __init__(self, reads: str, listens: bool) -> None:
        super().__init__(scripted())
        self.reads, self.listens, self.told = reads, listens, list[tuple[str, str]]()

    def look(self, messages: Messages, image: Image.Image | None) -> tuple[Sentiment, str]:
        word = messages[-1]["content"][-1]["text"].removeprefix("Post: ").split()[0]
        seen = min(COLOURS, key=lambda x: sum(abs(a - b) for a, b in zip(COLOURS[x], image.getpixel((9, 9)), strict=True)))
        label = {"text": Sentiment(word), "picture": seen, "both": min(Sentiment(word), seen, key=LABELS.index)}[self.reads]
        text = f"It says {word}." if self.reads != "picture" else "Some text."
        return label, FULL.format(text, f"It shows {seen}." if self.reads != "text" else "Some picture.", label, label)

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        return Completion(self.look(messages, image)[1], "stop", 10, 10)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        label = self.look(messages, image)[0]
        if written:
            self.told.append((messages[-1]["content"][0]["text"], written))
        if written and self.listens:
            label = CONTRACT.parse(f'{written}"Prediction": "{written.split("It is ")[1].split(".")[0]}"').label
        p = [0.9 if x is label else 0.05 for x in LABELS]
        return Scores((p[0], p[1], p[2]), 1.0, 10)


def in_this_process(engine: Any) -> Any:
    """Stands for run_chunks: the same work, posts and tables, with an engine that can be looked into."""

    def run_chunks(target: Any, source: Any, chosen: Any, spec: Any, work: Any, runtime: Any, progress: Any) -> None:
        kept, rejects, store = [], [], target.store
        tables = [pq.read_table(store.path(f"{source.prefix}/{f}")) for f in source.files]
        for p in (from_row(Post, r) for t in tables for r in t.to_pylist()):
            try:
                kept.append(asyncio.run(work(engine, p, post_image(p, CONTRACT.image.side))))
            except RowFault as f:
                rejects.append(Reject(p.post_id, target.stage, f.reason, f.detail))
        store.create(f"{target.prefix}/part-00000.parquet", parquet_bytes(to_table(work.kind, kept)))
        store.create(f"{target.prefix}/rejects/part-00000.parquet", parquet_bytes(to_table(Reject, rejects)))

    return run_chunks


def measured(tmp_path, monkeypatch, engine: Any, posts: list[Post] | None = None, **options: Any) -> dict[str, Any]:
    store = Store(str(tmp_path))
    table(store, "p", posts or [post(i, LABELS[i % 3], shade=i % 5) for i in range(30)])
    monkeypatch.setattr(module, "run_chunks", in_this_process(engine))
    common: dict[str, Any] = dict(posts="p", model="m", recipe=RECIPE, runtime=RUNTIME, split=Split.TEST, limit=None, progress=lambda *_: None)
    manifest, report, fresh = faithfulness(store, "f", **common, engine=scripted(), **options)
    assert fresh and json.loads(store.read("evaluations/f/report.json")) == report and manifest.rows_in == report["counts"]["paired"]
    return report


@pytest.mark.parametrize("reads", ["text", "picture", "both"])
def test_readers_of_one_modality_are_told_apart(tmp_path, monkeypatch, reads):
    report = measured(tmp_path, monkeypatch, Reader(reads, listens=True))
    m = report["measures"]
    picture, text = m["swap_picture"], m["swap_text"]
    assert m["accuracy"] == {"value": 1.0, "low": pytest.approx(0.886, abs=1e-3), "high": 1.0, "n": 30} and m["label_mass"]["value"] == 1
    if reads == "both":  # the worse of two wins, so half of the exchanges (those for a worse one) flip
        assert 0.3 < picture["flips"]["value"] == text["flips"]["value"] < 0.7
        assert picture["towards_partner"]["low"] > 0.1 and all(c["holds"] for c in report["checks"])
    else:
        read, unread = (text, picture) if reads == "text" else (picture, text)
        assert (read["flips"]["value"], unread["flips"]["value"]) == (1, 0)
        assert (read["towards_partner"]["value"], unread["towards_partner"]["value"]) == (pytest.approx(0.85), 0)
        assert [c["holds"] for c in report["checks"]] == [reads == "picture", reads == "text"] * 2 + [True]
    about = {"text": "text_analysis", "picture": "image_analysis"}
    for what, section in about.items():
        other = about["picture" if what == "text" else "text"]
        assert m[f"swap_{what}"][f"{section}_same"]["value"] == (0 if reads in (what, "both") else 1)
        assert m[f"swap_{what}"][f"{other}_same"]["value"] == 1 == m[f"swap_{what}"][f"{other}_overlap"]["value"]
        assert (m[f"swap_{what}"][f"{section}_overlap"]["value"] == pytest.approx(2 / 4)) == (reads in (what, "both"))
    assert picture["as_ruled"]["n"] == 0 and report["by_relation"] == {}


@pytest.mark.parametrize("listens", [True, False])
def test_a_label_that_does_not_follow_from_the_rationale_is_noticed(tmp_path, monkeypatch, listens):
    engine = Reader("both", listens)
    report = measured(tmp_path, monkeypatch, engine)
    m = report["measures"]
    assert m["own_rationale_keeps"]["value"] == 1 and m["stated_is_label"]["value"] == 1 and m["other_rationale_keeps"]["n"] == 30
    assert (m["other_rationale_keeps"]["value"], m["other_rationale_drags"]["value"]) == ((0, 1) if listens else (1, 0))
    assert report["checks"][-1]["holds"] is listens
    assert {head for head, _ in engine.told} == {CONTRACT.msc["reasoning"].instruction} and len(engine.told) == 60
    assert all(text.startswith('"Text_analysis": "It says') and text.endswith('."\n') for _, text in engine.told)


def test_a_teacher_is_asked_for_the_whole_answer(tmp_path, monkeypatch):
    engine = Reader("both", listens=True)
    report = measured(tmp_path, monkeypatch, engine, mode="generate")
    assert {head for head, _ in engine.told} == {CONTRACT.msc["predict"].instruction} and len(engine.told) == 90 + 60
    assert report["mode"] == "generate" and report["measures"]["swap_text"]["towards_partner"]["n"] == 30
    assert report["measures"]["accuracy"]["value"] == 1


def test_without_gold_the_direction_is_towards_the_partners_answer(tmp_path, monkeypatch):
    posts = [replace(post(i, LABELS[i % 3]), label=None) for i in range(30)]
    report = measured(tmp_path, monkeypatch, Reader("text", listens=True), posts)
    m = report["measures"]
    assert report["counts"]["gold"] == 0 and m["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}
    assert 0 < m["swap_text"]["towards_partner"]["n"] <= 30 and m["swap_text"]["towards_partner"]["value"] == pytest.approx(0.85)


class Silent(Reader):
    """Writes nothing of use, and can't be asked about words number 3."""

    async def generate(self, messages: Messages, image: Image.Image | None, sampling: Sampling) -> Completion:
        return Completion("no sections", "stop", 10, 2)

    async def score(self, messages: Messages, image: Image.Image | None, written: str = "") -> Scores:
        if messages[-1]["content"][-1]["text"].endswith("number 3"):
            raise RowFault(Reason.PROMPT_TOO_LONG, "too long")
        return await super().score(messages, image, written)


def test_posts_without_answers_or_rationales_are_counted(tmp_path, monkeypatch):
    report = measured(tmp_path, monkeypatch, Silent("text", listens=True))
    assert report["rejects_by_reason"] == {"prompt_too_long": 3}, "p3 as it is, with another picture, and its text behind another picture"
    assert report["counts"] == {"paired": 30, "answered": 29, "aspects": 0, "pictures": 30, "gold": 30, "rationales": 0}
    m = report["measures"]
    assert m["swap_picture"]["flips"]["n"] == 29 and m["swap_text"]["flips"]["n"] == 28 and m["own_rationale_keeps"]["n"] == 0
    assert [c["holds"] for c in report["checks"]] == [False, True, None, None, None]
    assert not Store(str(tmp_path)).files("predictions/f.told") and need(Store(str(tmp_path)), "posts", "f.told").rows == 0


def test_intervals():
    assert share([]) == mean([]) == {"value": None, "low": None, "high": None, "n": 0}
    s = share([True] * 8 + [False] * 2)  # scipy.stats.binomtest(8, 10).proportion_ci(method="wilson")
    assert (s["value"], s["n"]) == (0.8, 10) and s["low"] == pytest.approx(0.490162, abs=1e-6) and s["high"] == pytest.approx(0.943318, abs=1e-6)
    values = [random.Random(i).gauss(1, 2) for i in range(400)]
    m, reach = mean(values), 1.96 * stdev(values) / 20
    assert m["value"] - m["low"] == pytest.approx(reach, rel=0.1) and m["high"] - m["value"] == pytest.approx(reach, rel=0.1)


def test_an_openai_endpoint_is_refused(tmp_path):
    store = Store(str(tmp_path))
    table(store, "p", [post(i, LABELS[i % 3]) for i in range(6)])
    there = RUNTIME.model_copy(update={"teacher": EngineRuntime(endpoint=Endpoint(url="http://127.0.0.1:1/v1"))})
    with pytest.raises(ConfigError, match="dialect 'openai'"):
        faithfulness(
            store, "f", posts="p", model="endpoint:big", recipe=RECIPE, runtime=there, split=Split.TEST, limit=4, progress=print, role="teacher"
        )
    assert store.files("evaluations") == {}


# --- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_on_ray_with_the_scripted_engine(sample_store, runtime, ray_session):
    common: dict[str, Any] = dict(posts="sample", model="m", recipe=RECIPE, runtime=runtime, progress=lambda *_: None, engine=scripted())
    with pytest.raises(InputError, match="none of the 0 posts"):
        faithfulness(sample_store, "by-length", split=Split.UNLABELED, limit=24, **common)
    manifest, report, fresh = faithfulness(sample_store, "by-length", split=Split.TEST, limit=24, **common)
    assert fresh and report["counts"]["answered"] == 24 == report["counts"]["aspects"] and manifest.stats["picture_flips"] == 0
    assert need(sample_store, "predictions", "by-length.swaps").rows == 72 and need(sample_store, "predictions", "by-length.told").rows == 48
    m = report["measures"]
    assert m["swap_picture"]["text_analysis_same"]["value"] == 1 and m["swap_text"]["flips"]["value"] > 0.3
    assert m["own_rationale_keeps"]["value"] == 1 and set(report["by_relation"]) <= {"agree", "complaint", "image decides", "irony", "text decides"}
    assert sum(r["posts"] for r in report["by_relation"].values()) == 24
    again, same, fresh = faithfulness(sample_store, "by-length", split=Split.TEST, limit=24, **common)
    assert not fresh and again == manifest and same == report
    with pytest.raises(RecipeChanged, match="limit: 24 → 30"):
        faithfulness(sample_store, "by-length", split=Split.TEST, limit=30, **common)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(show(report))
    shown = console.export_text()
    assert "label flips" in shown and "✗ the partner's picture makes its label more probable" in shown and "irony" in shown


@pytest.mark.ray
def test_an_interrupted_run_goes_on(sample_store, runtime, ray_session, monkeypatch):
    """Killed before the report: the tables that were finished stay, and the result is that of an undisturbed run."""
    common: dict[str, Any] = dict(
        posts="sample", model="m", recipe=RECIPE, runtime=runtime, split=Split.TEST, limit=12, progress=lambda *_: None, engine=scripted()
    )
    _, whole, _ = faithfulness(sample_store, "undisturbed", **common)
    with monkeypatch.context() as m:
        m.setattr(module, "summarise", lambda cases: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            faithfulness(sample_store, "killed", **common)
    assert find(sample_store, "evaluations", "killed") is None
    mark = sample_store.read("predictions/killed.swaps/manifest.json")
    monkeypatch.setattr(module, "run_chunks", lambda *_: 1 / 0)  # nothing is left to ask
    _, report, fresh = faithfulness(sample_store, "killed", **common)
    assert fresh and report == whole and sample_store.read("predictions/killed.swaps/manifest.json") == mark


@pytest.mark.ray
@pytest.mark.engine
def test_the_shipped_teacher_looks_at_both(tmp_path, runtime, ray_session):
    """About 60 posts that the teacher never saw: each exchange changes what it must, and leaves what it must."""
    from mulcot_ray.posts.importing import import_sample

    store = Store(str(tmp_path))
    import_sample(store, "sample", train=1, validation=0, test=70, seed=42)
    _, report, _ = faithfulness(
        store, "teacher", posts="sample", model="builtin:teacher", recipe=RECIPE, runtime=runtime, split=Split.TEST, limit=60,
        progress=lambda *_: None, role="teacher", mode="generate",
    )  # fmt: skip
    m = report["measures"]
    assert m["accuracy"]["n"] >= 58 and m["accuracy"]["value"] > 0.85 and all(c["holds"] for c in report["checks"])
    for what in ("picture", "text"):
        assert m[f"swap_{what}"]["towards_partner"]["low"] > 0.1 and m[f"swap_{what}"]["as_ruled"]["value"] > 0.8
    deciding = report["by_relation"]
    assert deciding["image decides"]["swap_picture"]["flips"]["value"] > deciding["text decides"]["swap_picture"]["flips"]["value"]
    assert deciding["text decides"]["swap_text"]["flips"]["value"] > deciding["image decides"]["swap_text"]["flips"]["value"]
    assert m["own_rationale_keeps"]["value"] > 0.95 and m["other_rationale_drags"]["value"] > 0.8
