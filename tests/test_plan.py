"""What is planned: counts that are exact, prompts that are those of the stage, and figures whose origin is stated. Nothing is started."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from rich.console import Console

from mulcot_ray.artifacts import begin, need, read_rows, resolve_model
from mulcot_ray.engines.preview import Preview, Question, model_files, tokenizer_of
from mulcot_ray.engines.scope import plan as cut
from mulcot_ray.errors import ArtifactMissing, ConfigError, InputError
from mulcot_ray.parts import commit_part
from mulcot_ray.plan import plan
from mulcot_ray.plan_table import show
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.posts.survey import spread, survey
from mulcot_ray.prices import dollars, load_prices
from mulcot_ray.recipe import Endpoint, load_recipe, load_runtime
from mulcot_ray.records import Post, Prediction, Rationale, Reject, Sentiment, Split, Task, from_row, to_table
from mulcot_ray.storage import Store

TINY, PAPER = load_recipe("tiny"), load_recipe("paper")
LAPTOP, CLUSTER = load_runtime("laptop"), load_runtime("cluster")


def text_of(p) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show(p))
    return console.export_text()


def with_role(runtime, role, **changes):
    return runtime.model_copy(update={role: getattr(runtime, role).model_copy(update=changes)})


def table(store, name, posts, rejects=(), rows=100, group=25):
    """posts/NAME from posts as they are, in parts of `rows` rows, with the importer's statistics."""
    run = begin(store, "posts", name, {"name": name})
    with run:
        for i in range(0, len(posts), rows):
            run.write_table(f"part-{i:05d}", to_table(Post, posts[i : i + rows]), rows_per_group=group)
        if rejects:
            run.write_table("part-00000", to_table(Reject, list(rejects)), rejects=True)
        splits = Counter(str(p.split) for p in posts)
        return run.commit(len(posts) + len(rejects), stats={"splits": dict(splits)})


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


@pytest.fixture
def half_broken(store):
    """200 posts, of which every tenth has no label, every twentieth no picture that opens, and one is far too long."""
    posts = []
    for i, p in enumerate(sample_posts(200, Split.TRAIN, 5)):
        p = replace(p, label=None) if i % 10 == 3 else p
        p = replace(p, image_bytes=b"not a picture") if i % 20 == 7 else p
        p = replace(p, image_bytes=None, image_sha256=None) if i % 20 == 9 else p
        posts.append(replace(p, text="word " * 3000) if i == 100 else p)
    return table(store, "odd", posts, [Reject("x", "import", "bad_line", "no")])


# --- posts -----------------------------------------------------------------------------------------------------------


def test_counts_are_exact(store, half_broken):
    posts = [from_row(Post, r) for r in read_rows(store, half_broken)]
    seen = survey(store, half_broken, Split.TRAIN)
    labels = Counter(str(p.label) if p.label else "no label" for p in posts)
    assert seen.rows == 200 and seen.counts == {"train": {"rows": 200, **labels, "with aspect": 200, "with picture": 190}}
    assert survey(store, half_broken, Split.TEST).rows == 0
    assert plan(store, TINY, LAPTOP, stage="teach", posts="odd", name="x").import_rejects == {"bad_line": 1}


def test_a_sample_is_spread_over_the_table_and_of_the_split_alone(store):
    posts = [Post(f"p{i:04d}", f"p{i}", f"post {i}", split=Split.TEST if i % 3 == 0 else Split.TRAIN) for i in range(1000)]
    source = table(store, "many", posts, rows=400, group=50)
    found = spread(store, source, Split.TRAIN, survey(store, source, Split.TRAIN), 60)
    where = [int(p.post_id[1:]) for p in found]
    assert len(set(where)) == 60 and all(i % 3 for i in where) and where == sorted(where)
    assert where[0] < 50 and where[-1] >= 950 and max(b - a for a, b in zip(where, where[1:], strict=False)) <= 50
    everything = spread(store, source, None, survey(store, source, None), 5000)
    assert [p.post_id for p in everything] == [p.post_id for p in posts]


def test_large_pictures_bound_what_a_sample_reads(store, monkeypatch):
    """With a budget of 2 KB a group, its first rows are taken and not rows spread over it."""
    posts = [Post(f"p{i:04d}", f"p{i}", "text", image_bytes=bytes([i % 256]) * 1000, image_sha256="-", split=Split.TRAIN) for i in range(400)]
    source = table(store, "heavy", posts, rows=400, group=100)
    seen = survey(store, source, None)
    monkeypatch.setattr("mulcot_ray.posts.survey.BUDGET", 8000)
    assert [p.post_id for p in spread(store, source, None, seen, 8)] == [f"p{g * 100 + i:04d}" for g in range(4) for i in (0, 1)]
    monkeypatch.setattr("mulcot_ray.posts.survey.BUDGET", 1 << 20)
    assert [p.post_id for p in spread(store, source, None, seen, 8)] == [f"p{g * 100 + i:04d}" for g in range(4) for i in (0, 99)]


def test_rows_that_would_be_rejected_are_counted_and_extrapolated(store, half_broken):
    p = plan(store, TINY, LAPTOP, stage="teach", posts="odd", name="x", split=Split.TRAIN)
    assert p.sampled == 200
    assert {k: (n["sampled"], n["expected"]) for k, n in p.faults.items()} == {
        "no_label": (20, 20), "image_unreadable": (10, 10), "prompt_too_long": (1, 1)
    }  # fmt: skip
    assert "sample-train" in p.faults["image_unreadable"]["example"] and "UnidentifiedImageError" in p.faults["image_unreadable"]["example"]
    some = plan(store, TINY, LAPTOP, stage="teach", posts="odd", name="x", split=Split.TRAIN, sample=40)
    assert some.sampled == 40 and some.faults["no_label"]["expected"] == 5 * some.faults["no_label"]["sampled"]
    assert p.tokens_in < plan(store, TINY, LAPTOP, stage="label", posts="odd", name="x", model="builtin:teacher", mode="generate").tokens_in * 2
    strict = TINY.model_copy(
        update={"contract": TINY.contract.model_copy(update={"image": TINY.contract.image.model_copy(update={"missing": "reject"})})}
    )
    labelled = plan(store, strict, LAPTOP, stage="label", posts="odd", name="x", model="builtin:student")
    assert labelled.faults["image_missing"]["sampled"] == 10 and "no_label" not in labelled.faults


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_tokens_are_those_that_training_and_the_engine_count(sample_store):
    from mulcot_ray.posts.images import post_image
    from mulcot_ray.training.examples import encode, encode_picture
    from mulcot_ray.training.model import load_processor

    posts = list(sample_posts(12, Split.TEST, 1)) + [replace(p, image_bytes=None, image_sha256=None) for p in sample_posts(3, Split.TRAIN, 2)]
    with model_files(sample_store, "builtin:student") as files:
        look = Preview(TINY, [Question(Task.REASONING, 1)], False, tokenizer_of(files), TINY.contract.image.side**2 // 784)
        found = look.at(posts)
    processor = load_processor(str(resolve_model(sample_store, "builtin:student")[0]))
    for post, row in zip(posts, found, strict=True):
        image = post_image(post, TINY.contract.image.side)
        whole = encode(processor, TINY.contract.messages(Task.REASONING, post), "", None if image is None else encode_picture(processor, image), 1024)
        assert row[Task.REASONING][1] == len(whole.ids) - 1  # the end-of-turn token


def test_a_shown_prompt_is_the_stages_with_the_pictures_place(sample_store):
    p = plan(sample_store, TINY, LAPTOP, stage="teach", posts="sample", name="x", split=Split.TRAIN, shown=2)
    assert len(p.shown) == 2 and "Analyse the text and the image" in p.shown[0] and "<picture: 9 tokens>" in p.shown[0]
    predict, explain = p.prompts
    assert (predict.question.task, explain.question.task) == (Task.PREDICT, Task.EXPLAIN)
    assert 0 < predict.shared < predict.p50 <= predict.p90 <= predict.p99 <= predict.max < explain.max
    scored = plan(sample_store, TINY, LAPTOP, stage="label", posts="sample", name="x", model="builtin:student")
    assert scored.shown[0].endswith('"Prediction": "') and scored.tokens_out == 0 and [x.question.limit for x in scored.prompts] == [0]
    assert [
        x.question.task for x in plan(sample_store, TINY, LAPTOP, stage="augment", posts="sample", name="x", model="builtin:assistant").prompts
    ] == [Task.REASONING]


def test_answers_that_may_be_cut_are_named(sample_store):
    tight = TINY.model_copy(update={"max_model_len": 200})
    p = plan(sample_store, tight, LAPTOP, stage="teach", posts="sample", name="x")
    assert p.prompts[0].tight == 168 and any("168 of 168 prompts leave less room" in n for n in p.notes)


def test_what_cannot_be_planned_says_why(sample_store):
    with pytest.raises(ArtifactMissing, match="no posts 'nope'"):
        plan(sample_store, TINY, LAPTOP, stage="teach", posts="nope", name="x")
    with pytest.raises(ArtifactMissing, match="no models 'nope'"):
        plan(sample_store, TINY, LAPTOP, stage="label", posts="sample", name="x", model="nope")
    with pytest.raises(ConfigError, match="a plan of augment needs a model"):
        plan(sample_store, TINY, LAPTOP, stage="augment", posts="sample", name="x")
    with pytest.raises(ConfigError, match="split test: the teacher is shown gold labels"):
        plan(sample_store, TINY, LAPTOP, stage="teach", posts="sample", name="x", split=Split.TEST)
    with pytest.raises(InputError, match="no rows in split .*unlabeled"):
        plan(sample_store, TINY, LAPTOP, stage="label", posts="sample", name="x", model="builtin:student", split=Split.UNLABELED)


# --- what is there already -------------------------------------------------------------------------------------------


def half_done(
    store, name, stage="label", chunks=None, rows_per_chunk=10, finish=False, mode="score", stats=None, milliseconds=500, model="builtin:student"
):
    """Chunks of a result as the workers commit them, over posts/sample."""
    source = need(store, "posts", "sample")
    fingerprint = resolve_model(store, model)[1]
    kind, record = ("predictions", Prediction) if stage == "label" else ("rationales", Rationale)
    identity = {"stage": stage, "posts": source.fingerprint, "model": fingerprint, "contract": TINY.contract.hash, "mode": mode}
    run = begin(store, kind, name, identity, {"rows_per_chunk": rows_per_chunk})
    with run:
        for c in cut(source.sizes, rows_per_chunk)[:chunks]:
            n = c.hi - c.lo
            if stage == "label":
                kept = [Prediction(f"{c.part}-{i}", Sentiment.NEUTRAL, "m", "c") for i in range(n)]
            else:
                kept = [Rationale(f"{c.part}-{i}", "predicted", "m", "c", "t", "i", "r", "f", Sentiment.NEUTRAL) for i in range(n)]
            tally = Counter(rows_in=n, rejects=0, milliseconds=milliseconds * n)
            commit_part(store, run.prefix, c.part, to_table(record, kept), [], tally)
        return run.commit(source.rows, stats=stats) if finish else None


@pytest.fixture
def own(tmp_path):
    from mulcot_ray.posts.importing import import_sample

    store = Store(str(tmp_path))
    import_sample(store, "sample", train=96, validation=24, test=48, seed=42)
    return store


def test_chunks_that_are_done_are_taken_off(own):
    half_done(own, "part", chunks=7)
    p = plan(own, TINY, LAPTOP, stage="label", posts="sample", name="part", model="builtin:student")
    assert (p.done.chunks, p.done.of, p.done.rows, p.done.finished) == (7, 17, 70, False)
    assert "168 in 17 chunks; 70 rows in 7 chunks are done" in text_of(p)
    fresh = plan(own, TINY, LAPTOP, stage="label", posts="sample", name="other", model="builtin:student")
    assert p.tokens_in == pytest.approx(fresh.tokens_in * 98 / 168, rel=0.01) and p.seconds[0] < fresh.seconds[0]
    other = plan(own, TINY, LAPTOP, stage="label", posts="sample", name="part", model="builtin:teacher")
    assert other.done.rows == 0 and any("belongs to a result with another model" in n for n in other.notes)


def test_a_finished_result_leaves_nothing_to_do(own):
    half_done(own, "done", finish=True, stats={"tokens": {"in": 1, "out": 0}, "answers": {"asked": 0, "reused": 0}})
    p = plan(own, TINY, LAPTOP, stage="label", posts="sample", name="done", model="builtin:student")
    assert p.done.finished and p.tokens_in == 0 and p.usd == (0.0, 0.0) and p.seconds == (0.0, 0.0)


def test_speed_tokens_and_attempts_of_an_earlier_result_are_taken(own):
    """168 rows in 17 chunks of 3 s a row, three chunks at once: a second a row. 252 answers of 40 tokens: 1.5 a row."""
    stats = {"tokens": {"in": 9000, "out": 10080}, "answers": {"asked": 252, "reused": 0}}
    half_done(own, "old", "teach", finish=True, mode=None, stats=stats, milliseconds=3000, model="builtin:teacher")
    p = plan(own, TINY, LAPTOP, stage="teach", posts="sample", name="new", split=Split.TRAIN)
    assert [(q.question.times, q.question.answer) for q in p.prompts] == [(1.0, 40.0), (0.5, 40.0)]
    assert p.seconds == (pytest.approx(96), pytest.approx(96)) and p.basis.startswith("measured: 1e+03 ms a row and replica in rationales/old")
    assert not any("assumed" in n for n in p.notes)
    assert p.usd[0] == pytest.approx(96 / 3600 * load_prices().accelerator("cpu").usd_per_hour)
    gpu = with_role(CLUSTER, "teacher", accelerator="H100", tensor_parallel=1)
    elsewhere = plan(own, TINY, gpu, stage="teach", posts="sample", name="new", split=Split.TRAIN)
    assert "an estimate" in elsewhere.basis, "a speed measured on a CPU says nothing of a GPU"
    reused = {**stats, "answers": {"asked": 2, "reused": 250}}
    half_done(own, "cached", "augment", finish=True, mode=None, stats=reused, model="builtin:assistant")
    p = plan(own, TINY, LAPTOP, stage="augment", posts="sample", name="new", model="builtin:assistant")
    assert "an estimate" in p.basis and any("assumed: answers of half their 160 tokens" in n for n in p.notes)


# --- time and money --------------------------------------------------------------------------------------------------


def test_real_sizes_without_weights(sample_store):
    runtime = with_role(CLUSTER, "teacher", accelerator="H100")
    p = plan(sample_store, PAPER, runtime, stage="teach", posts="sample", name="x", split=Split.TRAIN)
    assert p.tokens_estimated and any("./Qwen2.5-VL-72B-Instruct is not here" in n for n in p.notes)
    assert "<|im_start|>system\nYou are a careful analyst" in p.shown[0] and "<picture: 100 tokens>" in p.shown[0]
    assert 300 < p.prompts[0].p50 < 600 and "73.4 billion parameters on 8 × H100" in p.basis and "within a factor of about 2" in p.basis
    assert p.usd[0] == pytest.approx(p.seconds[1] / 3600 * 8 * 6.88)
    assert p.seconds[0] == p.seconds[1], "one chunk keeps one replica busy"
    dear = load_prices().model_copy(update={"accelerators": {"H100": load_prices().accelerator("H100").model_copy(update={"usd_per_hour": 68.8})}})
    assert plan(sample_store, PAPER, runtime, stage="teach", posts="sample", name="x", split=Split.TRAIN, prices=dear).usd[0] == pytest.approx(
        10 * p.usd[0]
    )
    unnamed = plan(sample_store, PAPER, with_role(CLUSTER, "teacher", accelerator="cpu"), stage="teach", posts="sample", name="x")
    assert unnamed.seconds is None and unnamed.usd is None and "names no `accelerator`" in unnamed.basis and "not known" in text_of(unnamed)
    unknown = plan(
        sample_store, PAPER, with_role(CLUSTER, "student", accelerator="L4"), stage="label", posts="sample", name="x", model="./of-our-own"
    )
    assert unknown.seconds is None and "not one whose size is known" in unknown.basis


def test_replicas_make_a_range(sample_store):
    runtime = with_role(LAPTOP, "student", replicas=(1, 4)).model_copy(update={"rows_per_chunk": 5})
    p = plan(sample_store, TINY, runtime, stage="label", posts="sample", name="x", model="builtin:student")
    assert p.seconds[1] == pytest.approx(4 * p.seconds[0]) and p.usd[0] == p.usd[1] and "1 to 4 replicas" in p.basis


def test_an_endpoint_is_paid_by_the_token(sample_store):
    recipe = TINY.model_copy(update={"models": TINY.models.model_copy(update={"teacher": "endpoint:gpt-4.1-mini"})})
    runtime = with_role(LAPTOP, "teacher", endpoint=Endpoint(url="http://localhost:1/v1", requests_per_minute=60))
    p = plan(sample_store, recipe, runtime, stage="teach", posts="sample", name="x", split=Split.TRAIN)
    assert p.usd[0] == pytest.approx(p.tokens_in * 0.40e-6 + p.tokens_out * 1.60e-6, rel=1e-3) and p.tokens_out == round(96 * 1.3 * 80)
    assert p.seconds[0] == pytest.approx(96 * 1.3) and "<picture: 132 tokens>" in p.shown[0] and p.tokens_estimated
    free = with_role(LAPTOP, "teacher", endpoint=Endpoint(url="http://localhost:1/v1"))
    own = recipe.model_copy(update={"models": TINY.models.model_copy(update={"teacher": "endpoint:ours"})})
    q = plan(sample_store, own, free, stage="teach", posts="sample", name="x", split=Split.TRAIN)
    assert q.seconds is None and q.usd is None and "no price of 'ours'" in q.basis and "<picture: 9 tokens>" in q.shown[0]


def test_a_plan_is_shown_and_written_as_json(sample_store):
    p = plan(sample_store, TINY, LAPTOP, stage="teach", posts="sample", name="x", split=Split.TRAIN)
    text = text_of(p)
    for word in (
        "teach x: builtin:teacher on posts/sample, train",
        "96 in 3 chunks",
        "explain",
        dollars(p.usd[0]),
        "an estimate",
        "assumed",
        "<picture: 9 tokens>",
    ):
        assert word in text, word
    data = json.loads(p.as_json())
    assert data["counts"]["train"]["rows"] == 96 and data["prompts"][0]["question"]["task"] == "predict" and data["done"]["of"] == 3


def test_a_plan_starts_and_writes_nothing(sample_store):
    code = (
        "import sys; from mulcot_ray.plan import plan; from mulcot_ray.storage import Store; from mulcot_ray.recipe import load_recipe, load_runtime;"
        f"s = Store({sample_store.base!r}); before = s.files('');"
        "plan(s, load_recipe('tiny'), load_runtime('laptop'), stage='teach', posts='sample', name='x');"
        "print([m for m in ('ray', 'vllm') if m in sys.modules], s.files('') == before)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[] True"


# --- the price table -------------------------------------------------------------------------------------------------


def test_own_prices_go_over_the_table(tmp_path):
    file = tmp_path / "prices.yaml"
    file.write_text("accelerators: {H100: {usd_per_hour: 2.5}, B300: {usd_per_hour: 9, memory_gib: 268, tflops_bf16: 2500, bandwidth_gbs: 8000}}\n")
    own, ours = load_prices(str(file)), load_prices()
    assert own.accelerator("H100").usd_per_hour == 2.5 and own.accelerator("H100").memory_gib == ours.accelerator("H100").memory_gib
    assert own.accelerator("B300").memory_gib == 268 and own.endpoints == ours.endpoints
    assert {"cpu", "L4", "A10G", "L40S", "A100-40GB", "A100-80GB", "H100", "H200"} == set(ours.accelerators)
    with pytest.raises(ConfigError, match="accelerator 'B300' is not in the price table"):
        ours.accelerator("B300")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accelerators: {H100: {usd: 2}}", "accelerators.H100.usd: Extra inputs are not permitted"),
        ("accelerators: {B300: {usd_per_hour: 9}}", "accelerators.B300.memory_gib: Field required"),
        ("accelerators: {H100: {usd_per_hour: -1}}", "accelerators.H100.usd_per_hour"),
        ("machines: {}", "machines: Extra inputs"),
        ("accelerators: [H100]", "accelerators wants names"),
        ("accelerators: {H100: 3}", "accelerators wants names"),
        ("- 3", "holds no figures"),
        ("a: [", "cannot be read"),
    ],
)  # fmt: skip
def test_faults_of_a_price_file_are_named(tmp_path, text, message):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_prices(str(tmp_path / "p.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_prices(str(tmp_path / "absent.yaml"))
