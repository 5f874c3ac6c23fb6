"""Soft labels as a table: what is kept, how much it loses, that it is found again, and that it is not used for tokens that it is not of."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from mulcot_ray.artifacts import Manifest, Run, begin, need, read_rows, resolve_model
from mulcot_ray.errors import ConfigError, RecipeChanged, TrainingError
from mulcot_ray.parts import read_commits
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.recipe import HERE, Lora, load_recipe, load_runtime
from mulcot_ray.records import Post, Rationale, Split, Task, to_table
from mulcot_ray.storage import Store
from mulcot_ray.training import soften as stage
from mulcot_ray.training.data import index
from mulcot_ray.training.examples import Encoder, Example
from mulcot_ray.training.losses import Drawn, Kept, Teacher, answer_losses
from mulcot_ray.training.model import check_features, load, load_processor
from mulcot_ray.training.packing import Packer, answer_rows, answer_tokens, last_hidden
from mulcot_ray.training.soft_labels import FEATURES_PER_GROUP, ROWS_PER_GROUP, SoftLabel, SoftLabels, draw, keep, part_name, tokens_digest
from mulcot_ray.training.soften import TASKS, soften

RECIPE = load_recipe("tiny")
RUNTIME = load_runtime("laptop").model_copy(update={"rows_per_chunk": 8, "micro_batch": 3})
ROWS = 20  # the last is too long
ASSISTANT, STUDENT = (str(HERE / "models" / m) for m in ("assistant", "student"))


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """Posts with a rationale each: one without a picture, and one whose text does not fit into a row."""
    store = Store(str(tmp_path_factory.mktemp("soft")))
    posts = [replace(p, split=Split.TRAIN) for p in sample_posts(ROWS, Split.TRAIN, 7)]
    told = [reference_rationale(p) for p in posts]
    posts[3] = replace(posts[3], image_bytes=None, image_sha256=None)
    posts[-1] = replace(posts[-1], text=posts[-1].text * 100)
    for kind, record, rows in (("posts", Post, posts), ("rationales", Rationale, told)):
        run = begin(store, kind, "p", {"of": kind})
        assert isinstance(run, Run)
        with run:
            run.write_table("part-0", to_table(record, rows))
            run.commit(len(rows), stats={"splits": {"train": ROWS}})
    return store


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(store, ray_session) -> Manifest:
    manifest, fresh = make(store, "top")
    assert fresh
    return manifest


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_processor(STUDENT), RECIPE.contract, RECIPE.max_model_len)


@pytest.fixture(scope="module")
def models():
    return {f: load(f).eval().requires_grad_(False) for f in (ASSISTANT, STUDENT)}


def make(store: Store, name: str, runtime=RUNTIME, seen: list | None = None, **distill):
    recipe = RECIPE.model_copy(update={"distill": RECIPE.distill.model_copy(update={"top_k": 16, **distill})})
    return soften(
        store, name, posts="p", rationales=["p"], assistant="builtin:assistant", recipe=recipe, runtime=runtime,
        progress=lambda *a: seen.append(a) if seen is not None else None,
    )  # fmt: skip


def examples(store: Store, encoder: Encoder, rows: list[int]) -> list[tuple[int, dict[Task, Example]]]:
    table = index(store, need(store, "posts", "p"), Split.TRAIN, [need(store, "rationales", "p")])
    found = []
    for row in rows:
        post, rationale = table.fetch(row)
        found.append((row, encoder.tasks(TASKS, post, rationale, encoder.picture(post))))
    return found


def settings(**distill):
    return RECIPE.distill.model_copy(update={"top_k": 16, **distill})


# --- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_table_has_a_row_for_each_task_of_each_training_row(store, made, encoder, models):
    """Distributions are those of the assistant's plain logits at the temperature of training, whatever else was in its batch."""
    rows = list(read_rows(store, made))
    assert [(r["row"], r["task"]) for r in rows] == [(i, t.value) for i in range(ROWS - 1) for t in TASKS]
    assert made.rows_in == 2 * ROWS and made.rejects_by_reason == {"prompt_too_long": 2}
    assert len(made.parts()) == 3 and made.stats["rows_per_part"] == 8
    (_, post), packer, model = examples(store, encoder, [5])[0], Packer(STUDENT), models[ASSISTANT]
    for task in TASKS:
        got = SoftLabel(**{**rows[10 + TASKS.index(task)], "task": task})
        batch = packer([{task: post[task]}], [task])
        logits = model.lm_head(answer_rows(last_hidden(model, batch), batch)[0][0])[:, : made.stats["shared"]]
        logs = torch.log_softmax(logits / RECIPE.distill.temperature, -1)
        soft = got.soft()
        assert isinstance(soft, Kept) and got.tokens == answer_tokens(post[task]) == len(logs)
        assert torch.allclose(soft.logs.float(), logs.topk(16).values, atol=0.01) and torch.allclose(
            soft.logs.float(), logs.gather(1, soft.ids.long()), atol=0.01
        )
        assert torch.allclose(soft.tail.exp() + soft.logs.float().exp().sum(-1), torch.ones(len(logs)), atol=2e-3)
        assert got.tokens_digest == tokens_digest(post[task]) and got.post_id.startswith("sample-train")
    stats = made.stats
    assert stats["tokens"] == sum(r["tokens"] for r in rows)
    assert stats["bytes_per_token"] == pytest.approx(sum(made.files[p]["bytes"] for p in made.parts()) / stats["tokens"], abs=0.1)
    assert 0.5 < stats["mass_kept"] < 1


@pytest.mark.ray
def test_the_measured_kl_is_the_loss_of_the_whole_and_of_the_kept(store, made, encoder, models):
    """All of so few rows are measured: the figures are the sums that training would see. What is kept never says more than the whole."""
    rows = examples(store, encoder, list(range(ROWS - 1)))
    reader, packer = SoftLabels(store, made, settings()), Packer(STUDENT)
    batch = packer([p for _, p in rows], TASKS)
    ours, theirs = (answer_rows(last_hidden(models[m], batch), batch) for m in (STUDENT, ASSISTANT))
    found = Counter[str]()
    for task, (hidden, targets), (states, _) in zip(TASKS, ours, theirs, strict=True):
        for name, soft in (("kl_full", Teacher(states, models[ASSISTANT].lm_head.weight)), ("kl_kept", reader(rows, task))):
            losses = answer_losses(hidden, models[STUDENT].lm_head.weight, targets, soft, temperature=2.0, shared=reader.shared)
            found[name] += float(losses.soft) / 4
        found["tokens"] += len(targets)
    for name in ("kl_full", "kl_kept"):
        assert made.stats[name] == pytest.approx(found[name] / found["tokens"], rel=1e-3)
    assert 0 < made.stats["kl_kept"] < made.stats["kl_full"] and made.stats["measured_tokens"] == found["tokens"]


@pytest.mark.ray
def test_again_is_nothing_and_other_settings_are_refused(store, made):
    again, fresh = make(store, "top", RUNTIME.model_copy(update={"rows_per_chunk": 5}))
    assert not fresh and again == made
    with pytest.raises(RecipeChanged, match="distill.top_k: 16 → 8"):
        make(store, "top", top_k=8)
    with pytest.raises(ConfigError, match="top_k 70000: at most 65535"):
        make(store, "many", keep="sampled", top_k=70_000)


@pytest.mark.ray
def test_a_run_goes_on_with_the_parts_that_are_missing(store, made):
    """Of a finished table one part, its manifest and a stray file of rejects are as a kill leaves them: the same table comes out."""
    for name in store.files("softlabels/top"):
        if name not in ("manifest.json", "lease.json", f"{part_name(8)}.parquet"):
            store.write(f"softlabels/cut/{name}", store.read(f"softlabels/top/{name}"))
    store.write("softlabels/cut/rejects/part-00000000.stray.parquet", store.read(next(f"softlabels/top/{n}" for n in made.parts(rejects=True))))
    seen: list = []
    cut, fresh = make(store, "cut", RUNTIME.model_copy(update={"rows_per_chunk": 5}), seen)
    assert fresh and seen[0] == (24, 2 * ROWS, 2) and seen[-1] == (2 * ROWS, 2 * ROWS, 2) and len(seen) == 2
    assert list(read_rows(store, cut)) == list(read_rows(store, made))
    assert {k: v for k, v in cut.stats.items()} == made.stats and cut.rejects_by_reason == made.rejects_by_reason
    keys = [f"softlabels/{n}/{part_name(8)}.parquet" for n in ("cut", "top")]
    assert read_commits(store, keys[:1])[0].tally == read_commits(store, keys[1:])[0].tally


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_reader_gives_any_rows_in_the_order_of_the_answers(store, made, encoder):
    reader = pickle.loads(pickle.dumps(SoftLabels(store, made, settings())))
    rows = examples(store, encoder, [17, 2, 9, 2])
    for task in TASKS:
        found = reader(rows, task)
        one = [reader.fetch(r, task).soft() for r, _ in rows]
        assert isinstance(found, Kept) and found.ids.dtype == torch.int32 and found.logs.dtype == torch.float16
        assert torch.equal(found.ids, torch.cat([s.ids for s in one])) and torch.equal(found.tail, torch.cat([s.tail for s in one]))
        assert len(found.ids) == sum(answer_tokens(p[task]) for _, p in rows)
    assert len(reader._places) == 3 and len(pickle.dumps(reader)) == len(pickle.dumps(SoftLabels(store, made, settings())))
    assert 2 * RUNTIME.rows_per_chunk > ROWS_PER_GROUP - 1, "rows of more than one group were read"
    blank = {TASKS[1]: Example(np.array([5, 6]), np.array([-100, -100]), None)}
    none = reader([(0, blank)], TASKS[1])
    assert isinstance(none, Kept) and len(none.ids) == len(none.logs) == len(none.tail) == 0


@pytest.mark.ray
def test_drift_is_an_error_and_not_a_loss(store, made, encoder):
    reader = SoftLabels(store, made, settings())
    row, post = examples(store, encoder, [4])[0]
    e = post[TASKS[0]]
    other = Example(e.ids.copy(), e.labels, e.picture)
    other.ids[7] += 1  # a token of the prompt: the answer's distributions hang on it too
    with pytest.raises(TrainingError, match="reasoning of row 4.*made from other tokens"):
        reader([(row, {TASKS[0]: other})], TASKS[0])
    with pytest.raises(TrainingError, match="made from other tokens"):
        reader([(row + 1, post)], TASKS[0])
    with pytest.raises(TrainingError, match="none for reasoning of row 19: it was rejected"):
        reader.fetch(ROWS - 1, TASKS[0])
    with pytest.raises(TrainingError, match="no row 24"):
        reader.fetch(24, TASKS[0])
    with pytest.raises(TrainingError, match=r"were made with .*'temperature': 2.0.* the recipe has .*'temperature': 1.0"):
        SoftLabels(store, made, settings(temperature=1.0))


def test_a_digest_tells_tokens_and_where_the_answer_begins():
    labels = [np.array([-100, -100, 7]), np.array([-100, 6, 7]), np.array([-100, -100, 8])]
    ids = np.array([5, 6, 7])
    assert len({tokens_digest(Example(i, y, None)) for i, y in ((ids, labels[0]), (ids, labels[1]), (np.array([5, 6, 8]), labels[2]))}) == 3


# --- picture features --------------------------------------------------------------------------------------------------


def test_features_of_pictures_stand_beside_the_soft_labels(store, encoder, models, monkeypatch):
    """In the row of the first task alone, bit by bit what the student's vision tower makes of the picture. (Without Ray.)"""
    monkeypatch.setattr(stage, "_run_all", in_process)
    kept, student = {"soft_labels": "cached", "features": True}, resolve_model(store, "builtin:student")[1]
    made, _ = make(store, "seen", **kept)
    plain, _ = make(store, "unseen", soft_labels="cached")
    assert made.identity == plain.identity | {"distill": plain.identity["distill"] | {"features": True}, "student": student}
    rows, without = list(read_rows(store, made)), list(read_rows(store, plain))
    assert [{**r, "features": None} for r in rows] == without, "soft labels are the same"
    tokens = 9  # 84² / 784
    assert [r["row"] for r in rows if r["features"]] == [i for i in range(ROWS - 1) if i != 3]
    assert {(r["task"], len(r["features"])) for r in rows if r["features"]} == {(TASKS[0].value, tokens * 96 * 4)}
    # As stored: so small a picture is also twice in its page's statistics, which leave out what has more than 4 kB.
    assert 0.8 * tokens * 96 * 4 < made.stats["feature_bytes_per_post"] < 2.3 * tokens * 96 * 4
    assert 1 < made.stats["bytes_per_token"] / plain.stats["bytes_per_token"] < 2.5, "of the soft labels, in smaller groups, whose footers count here"
    with store.parquet(f"softlabels/seen/{made.parts()[0]}") as f:
        assert f.metadata.row_group(0).num_rows == FEATURES_PER_GROUP
    reader = pickle.loads(pickle.dumps(SoftLabels(store, made, settings(**kept), student)))
    for row, post in examples(store, encoder, [0, 17]):
        picture = post[TASKS[0]].picture
        own = (
            models[STUDENT].model.get_image_features(torch.from_numpy(picture.values), torch.from_numpy(picture.grid), return_dict=True).pooler_output
        )
        assert torch.allclose(reader.features(row).view(tokens, 96), own[0], rtol=1e-6, atol=1e-6)
        assert torch.equal(reader.fetch(row, TASKS[1]).soft().ids, SoftLabels(store, plain, settings()).fetch(row, TASKS[1]).soft().ids)
    assert reader.features(ROWS - 1) is None, "it was rejected"
    with pytest.raises(TrainingError, match="no picture features of row 3 .* has a picture now"):
        reader.features(3)
    with pytest.raises(TrainingError, match=f"features of the student {student}, and 0123 is to be trained"):
        SoftLabels(store, made, settings(**kept), "0123")
    with pytest.raises(TrainingError, match=r"unseen' were made with .*, and the recipe has .*'features': True"):
        SoftLabels(store, plain, settings(**kept), student)
    with pytest.raises(RecipeChanged, match="distill.features: null → true"):
        make(store, "unseen", **kept)


def test_features_in_half_precision_are_its_bits(store, tmp_path, encoder):
    table = index(store, need(store, "posts", "p"), Split.TRAIN, [need(store, "rationales", "p")])
    kept = settings(soft_labels="cached", features=True)
    work = stage._Work(
        Store(str(tmp_path)), "softlabels/x", table, ASSISTANT, STUDENT, 1259, RECIPE.contract, RECIPE.max_model_len, kept, "bfloat16", 1, "cpu", 2,
        64, 1,
    )  # fmt: skip
    worker = stage._Softener(work)
    worker({"lo": np.array([0]), "hi": np.array([2])})
    with work.store.parquet(f"softlabels/x/{part_name(0)}.parquet") as f:
        rows = f.read().to_pylist()
    batch = Packer(STUDENT)([p for _, p in examples(store, encoder, [0, 1])], TASKS)
    with torch.no_grad():
        own = worker.student.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True).pooler_output
    assert own[0].dtype == torch.bfloat16 and [r["features"] is None for r in rows] == [False, True] * 2
    for r, x in zip(rows[::2], own, strict=True):
        assert torch.equal(torch.frombuffer(bytearray(r["features"]), dtype=torch.bfloat16).view(9, 96), x)


@pytest.mark.parametrize(
    ("says", "distill", "changes"),
    [
        ("soft_labels: online: features stand in the table", {"soft_labels": "online"}, {}),
        ("method: full: the vision tower trains", {}, {"method": "full", "lora": None}),
        ("lora.projector: the merger trains", {}, {"lora": Lora(r=4, alpha=8, projector=True)}),
        (r"lora.targets '.*proj': it matches model.visual.patch_embed.proj of the vision tower", {}, {"lora": Lora(r=4, alpha=8, targets=".*proj")}),
        (r"it matches model.visual.merger.mlp.0 of", {}, {"lora": Lora(r=4, alpha=8, targets=r".*merger\.mlp\.0")}),
    ],
)
def test_features_that_would_change_are_refused(store, says, distill, changes):
    recipe = RECIPE.model_copy(
        update={"distill": settings(**{"soft_labels": "cached", "features": True, **distill}), "student": RECIPE.student.model_copy(update=changes)}
    )
    with pytest.raises(ConfigError, match=says):
        soften(store, "odd", posts="p", rationales=["p"], assistant="builtin:assistant", recipe=recipe, runtime=RUNTIME, progress=print)
    check_features(settings(**distill), recipe.student, STUDENT)  # without features anything goes
    assert not store.files("softlabels/odd")


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_sampled_labels_are_drawn_by_seed_row_and_task(store, encoder, monkeypatch):
    """Another cut gives the same draws: who makes a row does not decide them. The estimate is near the whole KL. (Without Ray.)"""
    monkeypatch.setattr(stage, "_run_all", in_process)
    one, _ = make(store, "drawn", keep="sampled", top_k=50)
    two, _ = make(store, "drawn2", RUNTIME.model_copy(update={"rows_per_chunk": 6, "micro_batch": 1}), keep="sampled", top_k=50)
    a, b = list(read_rows(store, one)), list(read_rows(store, two))
    assert len(a) == len(b) == one.rows and all(r["logs"] is None and r["tail"] is None for r in a)
    same = [x["ids"] == y["ids"] and x["counts"] == y["counts"] for x, y in zip(a, b, strict=True)]
    assert sum(same) >= len(a) - 2, "but for rounding, which may move a draw"
    reader = SoftLabels(store, one, settings(keep="sampled", top_k=50))
    found = reader(examples(store, encoder, [0, 11]), TASKS[0])
    assert isinstance(found, Drawn) and torch.allclose(found.weights.sum(-1), torch.ones(len(found.ids)), atol=1e-6)
    assert torch.allclose(found.weights * 50, (found.weights * 50).round(), atol=1e-4), "counts of 50 draws"
    assert 1 < one.stats["ids_per_token"] < 50
    assert one.stats["kl_kept"] == pytest.approx(one.stats["kl_full"], rel=0.2)
    assert isinstance(reader([], TASKS[0]), Drawn)


def in_process(run, work, each, runtime, progress):
    worker, tally = stage._Softener(work), Counter()
    for lo in range(0, len(work.rows), each):
        (counts,) = worker({"lo": [lo], "hi": [min(lo + each, len(work.rows))]})["tally"]
        tally.update(json.loads(counts))
    return tally


def test_keep_is_exact_and_the_tail_is_the_rest():
    logs = torch.log_softmax(torch.randn(7, 30, generator=torch.Generator().manual_seed(0)) * 3, -1)
    part, whole = keep(logs, 5), keep(logs, 99)
    p = logs.exp().sort(-1, descending=True).values
    assert torch.allclose(part["tail"].exp(), p[:, 5:].sum(-1), atol=1e-6)
    assert whole["ids"].shape == (7, 30) and bool((whole["tail"] == -torch.inf).all())
    assert torch.allclose(part["logs"].float().exp().sum(-1), p[:, :5].sum(-1), atol=1e-3)


def test_draws_are_counted_and_unbiased():
    p = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.25, 0.25, 0.25, 0.25]])
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(2, 4)
    for _ in range(200):
        found = draw(p.log(), 40, generator)
        label = SoftLabel(
            "-", 0, TASKS[0], 2, "-", *(found[k].numpy().tobytes() if k in found else None for k in ("ids", "logs", "tail", "counts", "width"))
        )
        soft = label.soft()
        assert isinstance(soft, Drawn) and found["counts"].long().sum() == 80
        total.scatter_add_(1, soft.ids.long(), soft.weights)
    assert torch.allclose(total / 200, p, atol=4 * (0.25 / 8000) ** 0.5)
    assert total[0, 3] == 0


def test_a_worker_that_is_second_to_commit_reports_what_stands(store, tmp_path, encoder):
    """Two attempts at one range: the part of the first stands, and the second returns its counts."""
    table = index(store, need(store, "posts", "p"), Split.TRAIN, [need(store, "rationales", "p")])
    work = stage._Work(
        Store(str(tmp_path)), "softlabels/x", table, ASSISTANT, STUDENT, 1259, RECIPE.contract, RECIPE.max_model_len, settings(), "float32", 1, "cpu",
        2, 64, 1,
    )  # fmt: skip
    worker = stage._Softener(work)
    first = worker({"lo": np.array([17]), "hi": np.array([ROWS])})
    worker.work = replace(work, distill=settings(top_k=3))
    assert worker({"lo": np.array([17]), "hi": np.array([ROWS])}) == first
    assert first["rejects"][0].startswith("part-00000017.") and len(list((tmp_path / "softlabels/x/rejects").iterdir())) == 1
