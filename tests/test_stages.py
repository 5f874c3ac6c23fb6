"""Teach, augment and label on a real local Ray with the scripted engine."""

import re
import sys

import cloudpickle
import pyarrow.parquet as pq
import pytest

from mulcot_ray.artifacts import begin, find, need, read_rows
from mulcot_ray.cluster import mapped
from mulcot_ray.engines.base import EngineSpec, Sampling
from mulcot_ray.engines.chunks import runtime_replicas
from mulcot_ray.engines.scope import Chunk, plan
from mulcot_ray.errors import EngineError, InputError, RecipeChanged
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import EngineRuntime, load_recipe
from mulcot_ray.records import Post, Prediction, Rationale, Reject, Sentiment, Source, Split, from_row, to_table
from mulcot_ray.teaching.augment import augment
from mulcot_ray.teaching.teach import teach

RECIPE = load_recipe("tiny")
FULL = '"Text_analysis": "t"\n"Image_analysis": "i"\n"Conflict_resolution": "c"\n"Final_conclusion": "f"\n"Prediction": "{}"'


def text_of(messages):
    return messages[-1]["content"][-1]["text"]


def script(messages, sampling: Sampling) -> str:
    """Says positive unless told; what it gets wrong depends on the post's words, so that every path is taken."""
    text = text_of(messages)
    given = re.search(r"Label: (\w+)", text)
    if given is None:
        return FULL.format("positive")
    if "photo of" in text:
        return FULL.format("positive")  # never gives in
    if "thank you" in text and sampling.temperature < 0.7:
        return "no sections at all"
    return FULL.format(given[1])


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value():
    """Workers cannot import this file: its functions are sent whole."""
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])


def engine(script=script, **options) -> EngineSpec:
    length = options.pop("max_model_len", 1024)
    return EngineSpec("fake", "fake", RECIPE.contract, "float32", length, 42, "cpu", EngineRuntime(**options), "scripted", script=script)


def quiet(*_):
    pass


def test_chunks_cover_each_row_once(sample_store):
    posts = need(sample_store, "posts", "sample")
    chunks = plan(posts.sizes, 50)
    assert [(c.lo, c.hi) for c in chunks] == [(0, 50), (50, 100), (100, 150), (150, 168)]
    assert chunks[1] == Chunk("part-00000.parquet", 50, 100) and chunks[1].part == "part-00000-00000050"
    assert (
        runtime_replicas(engine(replicas=(1, 8)), 20) == (1, 3)
        and runtime_replicas(engine(replicas=(1, 8)), 3) == (1, 1)
        and runtime_replicas(engine(replicas=4), 2) == (2, 2)
    )


@pytest.mark.ray
def test_teach(sample_store, runtime, ray_session):
    seen = []
    manifest, fresh = teach(sample_store, "t", posts="sample", recipe=RECIPE, runtime=runtime, progress=lambda *a: seen.append(a), engine=engine())
    assert fresh and manifest.rows_in == 96 == manifest.rows + manifest.rejects and seen[-1][:2] == (96, 96)
    posts = {p.post_id: p for p in (from_row(Post, r) for r in read_rows(sample_store, need(sample_store, "posts", "sample")))}
    kept = [from_row(Rationale, r) for r in read_rows(sample_store, manifest)]
    rejects = [from_row(Reject, r) for r in read_rows(sample_store, manifest, rejects=True)]
    assert {r.post_id for r in kept} | {r.post_id for r in rejects} == {i for i, p in posts.items() if p.split is Split.TRAIN}
    for r in kept:
        gold = posts[r.post_id].label
        assert r.prediction is gold and (r.source is Source.PREDICTED) == (gold is Sentiment.POSITIVE) == (r.attempts == 1)
    assert {(r.stage, r.reason) for r in rejects} == {("teach", "label_mismatch")} and all("4 attempts" in r.detail and r.raw for r in rejects)
    assert manifest.rejects_by_reason == {"label_mismatch": len(rejects)} and len(rejects) > 0
    assert sum(manifest.stats["sources"].values()) == manifest.rows
    again, fresh = teach(sample_store, "t", posts="sample", recipe=RECIPE, runtime=runtime, progress=quiet, engine=engine())
    assert not fresh and again == manifest
    changed = RECIPE.model_copy(update={"teach": RECIPE.teach.model_copy(update={"temperatures": (0.0,)})})
    with pytest.raises(RecipeChanged, match="teach.temperatures"):
        teach(sample_store, "t", posts="sample", recipe=changed, runtime=runtime, progress=quiet, engine=engine())


@pytest.mark.ray
def test_augment_keeps_what_is_right(sample_store, runtime, ray_session):
    manifest, _ = augment(
        sample_store, "a", posts="sample", model="builtin:assistant", recipe=RECIPE, runtime=runtime, progress=quiet, engine=engine()
    )
    assert manifest.rows_in == 96 and manifest.rejects_by_reason == {"label_mismatch": manifest.rejects}
    assert manifest.stats["sources"] == {"augmented": manifest.rows} and manifest.stats["labels"] == {"positive": manifest.rows}


@pytest.mark.ray
@pytest.mark.parametrize("mode", ["score", "explain", "generate"])
def test_label(sample_store, runtime, ray_session, mode):
    manifest, _ = label(
        sample_store, f"l-{mode}", posts="sample", model="builtin:student", recipe=RECIPE, runtime=runtime, mode=mode, progress=quiet, engine=engine()
    )
    rows = [from_row(Prediction, r) for r in read_rows(sample_store, manifest)]
    assert len(rows) == len({r.post_id for r in rows}) == 168 and manifest.rejects == 0
    first = rows[0]
    assert (first.positive is None) == (mode == "generate") and (first.text_analysis is None) == (mode == "score")
    if mode != "generate":
        assert first.negative + first.neutral + first.positive == pytest.approx(1)


@pytest.mark.ray
def test_bad_rows_become_named_rejects(tmp_path, runtime, ray_session):
    """A bad picture, a missing one, an empty text and a prompt that is too long: each a Reject, and the others go on."""
    from mulcot_ray.storage import Store

    store = Store(str(tmp_path))
    (good,) = sample_posts(1, Split.TEST, 1)
    rows = [
        good,
        Post("truncated", "s", "x", "a", image_bytes=good.image_bytes[: len(good.image_bytes) // 2]),
        Post("gone", "s", "x", "a", image_ref=str(tmp_path / "gone.png")),
        Post("url", "s", "x", "a", image_ref="http://127.0.0.1/x.png"),
        Post("empty", "s", " ", "a"),
        Post("long", "s", "word " * 500, "a"),
        Post("no image", "s", "x", "a"),
    ]
    with begin(store, "posts", "p", {}) as run:
        run.write_table("part-0", to_table(Post, rows))
        run.commit(len(rows), stats={"splits": {"unlabeled": len(rows)}})
    manifest, _ = label(
        store, "l", posts="p", model="builtin:student", recipe=RECIPE, runtime=runtime, progress=quiet, engine=engine(max_model_len=200)
    )
    found = {r["post_id"]: r["reason"] for r in read_rows(store, manifest, rejects=True)}
    assert found == {"truncated": "image_unreadable", "gone": "image_missing", "url": "bad_value", "empty": "empty_text", "long": "prompt_too_long"}
    assert {r["post_id"] for r in read_rows(store, manifest)} == {good.post_id, "no image"}


@pytest.mark.ray
def test_resume_does_only_what_is_missing(sample_store, runtime, ray_session):
    """Parts of an interrupted run stay as they are; the rest is done; leftovers of a half-done chunk do no harm."""
    whole, _ = label(sample_store, "whole", posts="sample", model="builtin:student", recipe=RECIPE, runtime=runtime, progress=quiet, engine=engine())
    run = begin(sample_store, "predictions", "half", whole.identity | {}, {"rows_per_chunk": 16})
    for name in list(whole.files)[:4]:
        sample_store.create(f"predictions/half/{name}", sample_store.read(f"predictions/whole/{name}"))
    sample_store.write("predictions/half/rejects/part-00000-00000096.parquet", b"left by a killed attempt")
    mark = pq.read_metadata(sample_store.path("predictions/half/part-00000-00000000.parquet"))
    seen = []
    other = runtime.model_copy(update={"rows_per_chunk": 7})  # the plan of the first attempt stands
    manifest, fresh = label(
        sample_store,
        "half",
        posts="sample",
        model="builtin:student",
        recipe=RECIPE,
        runtime=other,
        progress=lambda *a: seen.append(a),
        engine=engine(),
    )
    assert fresh and seen[0] == (64, 168, 0) and seen[-1][0] == 168
    assert list(manifest.files) == list(whole.files) and run.plan == {"rows_per_chunk": 16}
    assert [r["label"] for r in read_rows(sample_store, manifest)] == [r["label"] for r in read_rows(sample_store, whole)]
    assert pq.read_metadata(sample_store.path("predictions/half/part-00000-00000000.parquet")) == mark


def broken(messages, sampling):
    raise EngineError("the engine has died")


@pytest.mark.ray
def test_a_dead_engine_is_an_error_and_publishes_nothing(sample_store, runtime, ray_session):
    dead = engine(broken)
    with pytest.raises(EngineError, match="has died"):
        label(sample_store, "dead", posts="sample", model="builtin:student", recipe=RECIPE, runtime=runtime, progress=quiet, engine=dead)
    assert find(sample_store, "predictions", "dead") is None
    manifest, _ = label(
        sample_store, "dead", posts="sample", model="builtin:student", recipe=RECIPE, runtime=runtime, progress=quiet, engine=engine()
    )
    assert manifest.rows == 168


def test_an_empty_split_says_what_there_is(sample_store, runtime):
    with pytest.raises(InputError, match="no rows in split.*'train': 96"):
        teach(sample_store, "none", posts="sample", recipe=RECIPE, runtime=runtime, split=Split.UNLABELED, progress=quiet, engine=engine())


def stumble(batch):
    try:
        return {}[int(batch["x"][0])]
    except KeyError as e:
        raise ZeroDivisionError(f"no row {e}") from e


def test_what_a_worker_stumbled_over_is_named(ray_session):
    """Ray's own account of it begins with a traceback, which would fill the message."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(EngineError, match=r"^the workers failed: ZeroDivisionError: no row 7\. Logs: "):
        list(mapped([{"x": 7}], stumble))
