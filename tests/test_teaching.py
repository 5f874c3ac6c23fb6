"""The label-aware loop, the answer cache, retries of rejects, duplicates, and rows that kill the engine: on a real local Ray, scripted engine."""

import asyncio
import json
import os
import re
import sys
from dataclasses import replace

import pytest

from mulcot_ray.artifacts import begin, need, read_rows
from mulcot_ray.engines.ask import sampling
from mulcot_ray.engines.base import EngineSpec, Sampling, open_engine
from mulcot_ray.errors import ConfigError, InputError, RowFault
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import LEAKS, EngineRuntime, load_recipe
from mulcot_ray.records import Post, Rationale, Reason, Sentiment, Source, Split, Task, from_row, to_table
from mulcot_ray.storage import Store
from mulcot_ray.teaching.rationales import Attempt, RationaleWork
from mulcot_ray.teaching.teach import teach

RECIPE = load_recipe("tiny")
FULL = '"Text_analysis": "{}"\n"Image_analysis": "i"\n"Conflict_resolution": "c"\n"Final_conclusion": "it is {}"\n"Prediction": "{}"'


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value():
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def answer(label, conclusion=None, text="t"):
    return FULL.format(text, conclusion or label, label)


def spec(script) -> EngineSpec:
    return EngineSpec("fake", "fake", RECIPE.contract, "float32", 1024, 42, "cpu", EngineRuntime(), "scripted", script=script)


def quiet(*_):
    pass


def text_of(messages):
    return messages[-1]["content"][-1]["text"]


# --- one row ---------------------------------------------------------------------------------------------------------


def work(**changes) -> RationaleWork:
    attempts = (Attempt(Task.PREDICT, 0.0, Source.PREDICTED), *(Attempt(Task.EXPLAIN, t, Source.EXPLAINED) for t in (0.5, 0.9)))
    return replace(RationaleWork(RECIPE.contract, attempts, 1.0, 60, False, LEAKS, 7, "fake"), **changes)


def run(answers, w=None, **post):
    """What the loop makes of a fixed sequence of answers, and the requests that it made."""
    seen, left = [], list(answers)

    def script(messages, sampling):
        seen.append((text_of(messages), sampling))
        return left.pop(0)

    p = Post(**{"post_id": "1", "source_id": "1", "text": "hello", "aspect": "it", "label": Sentiment.NEGATIVE, "split": Split.TRAIN, **post})
    try:
        return asyncio.run((w or work())(open_engine(spec(script)), p, None)), seen
    except RowFault as f:
        return f, seen


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("no sections at all", Reason.ANSWER_UNPARSED),
        ('"Prediction": "negative"', Reason.SECTIONS_MISSING),
        (answer("positive"), Reason.LABEL_MISMATCH),
        (answer("negative", "positive"), Reason.CONCLUSION_CONTRADICTS),
        (answer("negative", text="word " * 80), Reason.ANSWER_TRUNCATED),
    ],
)
def test_a_bad_answer_fails_the_attempt(bad, reason):
    kept, seen = run([bad, answer("negative")])
    assert (kept.source, kept.attempts, kept.prediction) == (Source.EXPLAINED, 2, Sentiment.NEGATIVE)
    assert kept.tokens_out > len(answer("negative").split(" ")), "tokens of the failed attempt are paid too"
    failed, seen = run([bad] * 3)
    assert (failed.reason, failed.attempts) == (reason, 3) and failed.raw and len(seen) == 3


def test_a_conclusion_may_say_what_the_sentiment_is_not():
    kept, _ = run([answer("negative", "negative, not positive or neutral")])
    assert kept.source is Source.PREDICTED


@pytest.mark.parametrize("leak", ["The label is negative.", "as labeled, it is bad", "the given label", "I was told so", "the ground truth"])
def test_an_explanation_that_says_it_was_told_fails(leak):
    failed, _ = run([answer("positive"), answer("negative", text=leak), answer("negative", text=leak)])
    assert failed.reason is Reason.LABEL_LEAKED and leak[4:9].lower() in failed.raw.lower()
    kept, _ = run([answer("negative", text=leak)])
    assert kept.source is Source.PREDICTED, "a prediction was told nothing: there is nothing to leak"


def test_gold_is_in_explain_alone_and_temperature_rises():
    _, seen = run([answer("positive")] * 3)
    assert ["Label: negative" in text for text, _ in seen] == [False, True, True]
    assert [s.temperature for _, s in seen] == [0.0, 0.5, 0.9] and seen[0][1].seed is None and seen[1][1].seed != seen[2][1].seed


def test_seeds_depend_on_content_and_attempt_alone():
    (post,) = sample_posts(1, Split.TRAIN, 1)
    same = replace(post, post_id="other", label=None, split=Split.TEST)
    assert sampling(9, 1, post, 2, temperature=0.5) == sampling(9, 1, same, 2, temperature=0.5)
    others = [sampling(9, 1, p, a, temperature=0.5).seed for p, a in ((post, 3), (replace(post, text="x"), 2), (replace(post, image_sha256="x"), 2))]
    assert len({*others, sampling(9, 1, post, 2, temperature=0.5).seed}) == 4
    retried, seen = run([answer("positive")] * 3, work(first=3))
    assert {s.seed for _, s in seen}.isdisjoint({s.seed for _, s in run([answer("positive")] * 3)[1]} - {None})


def test_guided_output_is_the_contracts_form():
    _, seen = run([answer("negative")], work(guided=True))
    guide = seen[0][1].guide
    assert re.fullmatch(guide, answer("negative")) and not re.fullmatch(guide, answer("bad")) and not re.fullmatch(guide, '"Prediction": "negative"')
    assert run([answer("negative")])[1][0][1].guide is None


# --- whole tables ----------------------------------------------------------------------------------------------------


def contrary(messages, sampling: Sampling) -> str:
    """Positive, unless told otherwise; with "the" in the post it gives in at one seed of four."""
    text = text_of(messages)
    given = re.search(r"Label: (\w+)", text)
    return answer("positive" if given is None or ("the" in text and sampling.seed % 4) else given[1])


@pytest.fixture
def store(tmp_path, sample_store):
    """A store of one's own over the sample posts, so that its answer cache is empty."""
    import shutil

    shutil.copytree(sample_store.path("posts"), tmp_path / "posts")
    return Store(str(tmp_path))


def ids(store, manifest, rejects=False):
    return [r["post_id"] for r in read_rows(store, manifest, rejects=rejects)]


@pytest.mark.ray
def test_answers_are_paid_for_once(store, runtime, ray_session):
    common = dict(posts="sample", recipe=RECIPE, runtime=runtime, progress=quiet)
    first, _ = teach(store, "first", engine=spec(contrary), **common)
    asked = first.stats["answers"]["asked"]
    assert asked >= 96 and first.stats["answers"]["reused"] == 0 and first.stats["tokens"]["out"] > 0
    second, fresh = teach(store, "second", engine=spec(refuses), **common)
    paid = {"asked": 0, "reused": asked, "spared_tokens_in": first.stats["tokens"]["in"], "spared_tokens_out": first.stats["tokens"]["out"]}
    assert fresh and second.stats["answers"] == paid and second.stats["tokens"] == {"in": 0, "out": 0}
    assert list(read_rows(store, first)) == list(read_rows(store, second))
    other = RECIPE.model_copy(update={"teach": RECIPE.teach.model_copy(update={"max_tokens": 150})})
    third, _ = teach(store, "third", engine=spec(contrary), **(common | {"recipe": other}))
    assert third.stats["answers"] == first.stats["answers"], "another question"


def refuses(messages, sampling):
    raise AssertionError("asked again")


@pytest.mark.ray
def test_rejects_alone_are_retried(store, runtime, ray_session):
    common = dict(posts="sample", recipe=RECIPE, runtime=runtime, progress=quiet)
    first, _ = teach(store, "first", engine=spec(contrary), **common)
    assert 0 < first.rejects < 40
    again, _ = teach(
        store, "again", retry_rejects="first", engine=spec(contrary), **(common | {"runtime": runtime.model_copy(update={"rows_per_chunk": 7})})
    )
    assert again.rows_in == 96 == again.rows + again.rejects and again.rejects < first.rejects and again.identity["round"] == 1
    assert set(ids(store, first)) < set(ids(store, again)) and len(set(ids(store, again))) == again.rows
    assert again.stats["answers"]["asked"] <= 3 * first.rejects and again.stats["answers"]["reused"] <= first.rejects
    kept = {r["post_id"]: r for r in read_rows(store, again)}
    assert all(kept[r["post_id"]] == r for r in read_rows(store, first)), "what was kept is taken over as it is"
    assert sum(again.stats["sources"].values()) == again.rows
    gives_in, _ = teach(store, "gives-in", retry_rejects="again", engine=spec(obeys), **common) if again.rejects else (again, True)
    assert gives_in.rejects == 0
    with pytest.raises(InputError, match="no rejects"):
        teach(store, "nothing", retry_rejects="gives-in", engine=spec(obeys), **common)
    with pytest.raises(ConfigError, match="another contract"):
        changed = RECIPE.model_copy(update={"contract": RECIPE.contract.model_copy(update={"system": "x"})})
        teach(store, "other", retry_rejects="first", engine=spec(obeys), **(common | {"recipe": changed}))


def obeys(messages, sampling):
    given = re.search(r"Label: (\w+)", text_of(messages))
    return answer(given[1] if given else "positive")


@pytest.mark.parametrize("split", [Split.VALIDATION, Split.TEST])
def test_gold_of_judged_splits_is_never_shown(sample_store, runtime, split):
    with pytest.raises(ConfigError, match="shown gold labels"):
        teach(sample_store, "no", posts="sample", recipe=RECIPE, runtime=runtime, split=split, progress=quiet, engine=spec(obeys))


def kills(messages, sampling):
    """Takes the whole process with it when it meets one of two posts."""
    if "poison" in text_of(messages):
        os._exit(1)
    return answer("positive")


@pytest.mark.ray
def test_a_row_that_kills_its_engine_is_a_reject_and_the_others_go_on(tmp_path, runtime, ray_session):
    from mulcot_ray.labeling.label import label

    store = Store(str(tmp_path))
    posts = [Post(f"p{i}", f"p{i}", "poison" if i in (5, 20) else f"text {i}", "a") for i in range(48)]
    with begin(store, "posts", "p", {}) as run:
        run.write_table("part-0", to_table(Post, posts))
        run.commit(48, stats={"splits": {"unlabeled": 48}})
    manifest, _ = label(
        store, "l", posts="p", model="builtin:student", recipe=RECIPE, runtime=runtime, mode="generate", progress=quiet, engine=spec(kills)
    )
    rejects = list(read_rows(store, manifest, rejects=True))
    assert [(r["post_id"], r["reason"]) for r in rejects] == [("p5", "engine_error"), ("p20", "engine_error")]
    assert sorted(ids(store, manifest)) == sorted(p.post_id for p in posts if p.post_id not in ("p5", "p20"))
    assert not any(f.startswith("attempts") for f in store.files("predictions/l"))


def dies_once(marker, messages, sampling):
    """Dies, as an engine, at its first question; a file remembers."""
    from mulcot_ray.errors import EngineError

    if not os.path.exists(marker):
        open(marker, "w").close()
        raise EngineError("the engine has died")
    return answer("positive")


@pytest.mark.ray
def test_an_engine_that_dies_once_is_opened_again(store, runtime, ray_session, tmp_path):
    import functools

    from mulcot_ray.labeling.label import label

    marker = str(tmp_path / "died")
    script = functools.partial(dies_once, marker)
    manifest, _ = label(
        store, "l", posts="sample", model="builtin:student", recipe=RECIPE, runtime=runtime, mode="generate", progress=quiet, engine=spec(script)
    )
    assert manifest.rows == 168 and os.path.exists(marker)


@pytest.mark.ray
def test_duplicates_get_their_representatives_rationale(tmp_path, runtime, ray_session):
    """Exact copies: with the same gold label the rationale is shared, with another each is asked."""
    from mulcot_ray.posts.duplicates import duplicates

    store = Store(str(tmp_path))
    originals = [p for p in sample_posts(24, Split.TRAIN, 3)]
    copies = [replace(p, post_id=f"copy-{p.post_id}") for p in originals[:6]]
    conflicting = [replace(p, post_id=f"conflict-{p.post_id}", label=next(x for x in Sentiment if x is not p.label)) for p in originals[6:8]]
    posts = originals + copies + conflicting
    with begin(store, "posts", "p", {}) as run:
        run.write_table("part-00000", to_table(Post, posts))
        run.commit(len(posts), stats={"splits": {"train": len(posts)}})
    found, _ = duplicates(store, "p", posts="p", runtime=runtime, progress=quiet)
    assert found.rows >= 8 and found.stats["conflicts"] >= 2
    common = dict(posts="p", recipe=RECIPE, runtime=runtime, progress=quiet, engine=spec(obeys))
    manifest, _ = teach(store, "t", duplicates="p", **common)
    rows = {r.post_id: r for r in (from_row(Rationale, r) for r in read_rows(store, manifest))}
    assert manifest.rows_in == 32 == manifest.rows and len(rows) == 32 and manifest.stats["copied"] == found.rows - found.stats["conflicts"]
    for p in copies:
        copied, original = rows[p.post_id], rows[p.post_id.removeprefix("copy-")]
        assert copied.duplicate_of == original.post_id and copied.text_analysis == original.text_analysis and copied.tokens_in == 0
    for p in conflicting:
        assert rows[p.post_id].duplicate_of is None and rows[p.post_id].prediction is p.label
    assert sum(manifest.stats["sources"].values()) == 32
    everyone, _ = teach(store, "all", **common)
    assert {(r["post_id"], r["prediction"]) for r in read_rows(store, everyone)} == {(r.post_id, r.prediction) for r in rows.values()}


@pytest.mark.ray
def test_the_card_stands_beside_the_table(store, runtime, ray_session):
    manifest, _ = teach(store, "t", posts="sample", recipe=RECIPE, runtime=runtime, progress=quiet, engine=spec(contrary))
    page = store.read("rationales/t/card.html").decode()
    assert "card.html" in manifest.files and str(manifest.rejects) in page and RECIPE.contract.hash in page
    assert need(store, "rationales", "t") == manifest and json.loads(json.dumps(manifest.stats)) == manifest.stats
