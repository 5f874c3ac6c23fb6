"""Order and content of the training data, and what is done with it; real FSDP in worker processes of Ray Train."""

import io
import pickle
import struct
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from training_parts import BOTH, RECIPE, assert_same, corpus, run, settings

from mulcot_ray.artifacts import need, resolve_model
from mulcot_ray.errors import ConfigError, RecipeChanged, RowFault, TrainingError
from mulcot_ray.recipe import Lora
from mulcot_ray.records import LABELS, Post, Reason, Sentiment, Split, Task
from mulcot_ray.training import data
from mulcot_ray.training.data import Index, Order, batch, index, permutation, steps

MERGER = Lora(r=4, alpha=8, projector=True)


@pytest.fixture(scope="module")
def store(sample_store):
    return corpus(sample_store)


@pytest.fixture(scope="module")
def posts(store):
    return index(store, need(store, "posts", "sample"), Split.TRAIN, None)


def rows(n, groups=1, size=1):
    """An index of n rows that are in row groups of equal size."""
    of = np.arange(n) * groups // n
    return Index(
        f"{n} {groups} {size}", None, (), (), np.stack([of * 0, of * 0, of * 0 - 1, of * 0 - 1, of], 1).astype(np.int32), np.full(groups, size)
    )


# --- order -----------------------------------------------------------------------------------------------------------


def test_batches_do_not_depend_on_the_workers():
    ix = rows(10)
    assert steps(10, 3, 4) == 7
    for step in range(7):
        whole = batch(ix, step, 4, 7, 0, 1)
        for world in (2, 4):
            assert np.concatenate([batch(ix, step, 4, 7, r, world) for r in range(world)]).tolist() == whole.tolist()


def test_an_epoch_has_every_row_once_and_epochs_differ():
    ix = rows(12)
    seen = np.concatenate([batch(ix, s, 4, 7, 0, 1) for s in range(6)])
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and list(seen[:12]) != list(seen[12:])


def test_what_does_not_fit_into_memory_is_shuffled_window_by_window(monkeypatch):
    monkeypatch.setattr(data, "WINDOW_BYTES", 30)
    ix = rows(400, groups=20, size=10)  # three groups fit
    order = permutation(ix, 7, 0)
    groups = ix.rows[order, 4]
    assert sorted(order) == list(range(400))
    assert [len(set(groups[at : at + 60])) for at in range(0, 360, 60)] == [3] * 6, "no group is read twice"
    assert len(np.flatnonzero(np.diff(groups[:60]))) > 20, "rows are shuffled within the window"
    assert sorted(set(groups[:60])) != [0, 1, 2] and permutation(ix, 7, 1).tolist() != order.tolist()


def test_readers_keep_what_fits(posts, monkeypatch):
    cache = data._Groups(limit=1)
    post, _ = posts.fetch(3)
    for group in (0, 0):
        assert cache.get(posts.store, posts.files[0], group).num_rows == 168
    assert len(cache.tables) == 1, "one group is kept, however large"
    monkeypatch.setattr(data, "GROUPS", cache)
    assert posts.fetch(3)[0] == post and cache.held == next(iter(cache.tables.values())).nbytes


def test_index_joins_posts_and_rationales(store):
    both = index(store, need(store, "posts", "sample"), Split.TRAIN, [need(store, "rationales", "rule"), need(store, "rationales", "rule")])
    assert len(both) == 192  # one row per rationale
    assert pickle.loads(pickle.dumps(both)) == both, "its order is made once in a process, however often it is sent there"
    post, rationale = both.fetch(5)
    assert rationale is not None and post.post_id == rationale.post_id and post.split is Split.TRAIN and post.image_bytes
    labels = index(store, need(store, "posts", "sample"), Split.VALIDATION, None)
    assert len(labels) == 24 and labels.fetch(0)[1] is None
    with pytest.raises(TrainingError, match="no labelled post of split unlabeled"):
        index(store, need(store, "posts", "sample"), Split.UNLABELED, None)


# --- content ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(store):
    from mulcot_ray.training.examples import Encoder
    from mulcot_ray.training.model import load_processor

    return Encoder(load_processor(str(resolve_model(store, "builtin:student")[0])), RECIPE.contract, 512)


@pytest.fixture(scope="module")
def collate(store, encoder):
    from mulcot_ray.training.collate import Collate
    from mulcot_ray.training.packing import Packer

    return Collate(encoder, Packer(str(resolve_model(store, "builtin:student")[0])), BOTH, 2, True, None)


def test_example_supervises_the_answer_and_its_end(posts, encoder):
    from mulcot_ray.training.examples import IGNORE

    post, _ = posts.fetch(0)
    e = encoder.classification(post)
    told = e.ids[e.labels != IGNORE]
    tok = encoder.processor.tokenizer
    assert tok.decode(told) == f'"Prediction": "{post.label}"<|im_end|>'
    assert int((e.ids == tok.convert_tokens_to_ids("<|image_pad|>")).sum()) == 9  # 84² / 784
    text = tok.decode(e.ids)
    assert text.index("Classify the feeling") < text.index("<|image_pad|>") < text.index("Target:")


def test_a_row_survives_the_way_to_the_worker(store):
    from mulcot_ray.training.feed import Row, pack, read_row, unpack

    both = index(store, need(store, "posts", "sample"), Split.TRAIN, [need(store, "rationales", "rule")])
    good = read_row(Order(both, 1, 8, 42, 84), 5)
    bare = Row(6, Post("p", "s", "text", label=Sentiment.NEUTRAL), None, None)
    bad = Row(7, bare.post, None, None, RowFault(Reason.IMAGE_UNREADABLE, "not a picture"))
    numbers, (first, second, third) = unpack(pack([good, bare, bad], 3), 84)
    assert numbers == [3, 3, 3] and [r.number for r in (first, second, third)] == [5, 6, 7]
    assert first.picture.tobytes() == good.picture.tobytes() and first.rationale == good.rationale and first.post.text == good.post.text
    assert first.post.has_image and len(first.post.image_bytes) < 10, "the prompt has a picture; the compressed one stays behind"
    assert second.post == bare.post and second.picture is None and second.fault is None
    assert third.fault.reason is Reason.IMAGE_UNREADABLE and third.fault.detail == "not a picture"


def test_every_worker_has_as_many_micro_batches_whatever_its_rows_are(store, collate):
    """Collectives have to meet: rows that cannot be used and posts without a picture change what a micro-batch holds, not their number."""
    from mulcot_ray.training.feed import Row, pack, read_row

    both = index(store, need(store, "posts", "sample"), Split.TRAIN, [need(store, "rationales", "rule")])
    made = [read_row(Order(both, 1, 8, 42, 84), i) for i in range(4)]
    fault = RowFault(Reason.IMAGE_UNREADABLE, "x")
    bare = [Row(r.number, Post(r.post.post_id, "s", r.post.text, r.post.aspect, label=r.post.label), r.rationale, None) for r in made]
    usual, worst, plain = (collate(pack(x, 0)) for x in (made, [Row(r.number, r.post, r.rationale, None, fault) for r in made], bare))
    assert [len(s.micro) for s in (usual, worst, plain)] == [2, 2, 2]
    assert (usual.posts, usual.skipped, worst.posts, worst.skipped, plain.skipped) == (4, 0, 0, 4, 0)
    assert all(m.answers == (0, 0) and m.patches == 36 for m in worst.micro), "a blank picture, and nothing to learn"
    assert all(m.patches == 36 and min(m.answers) > 0 for m in plain.micro)
    assert [m.patches for m in usual.micro] == [72, 72]


def test_with_features_no_picture_is_decoded_and_no_vision_tower_runs(store, encoder, collate):
    """Rows have the tokens that they have with pictures; one that was rejected when features were made is skipped."""
    import torch

    from mulcot_ray.training.collate import Collate
    from mulcot_ray.training.feed import pack, read_row

    both = index(store, need(store, "posts", "sample"), Split.TRAIN, [need(store, "rationales", "rule")])
    known = {i: torch.full((9 * 96,), float(i)) for i in range(4)}
    featured, three, none = (Collate(encoder, collate.packer, BOTH, 2, True, None, k.get) for k in (known, {**known, 3: None}, {}))
    made, seen = (pack([read_row(Order(both, 1, 8, 42, side), i) for i in range(4)], 0) for side in (None, 84))
    assert made["pixels"].null_count == 4 and made.nbytes < seen.nbytes / 10
    ours, usual, some, blank = featured(made), collate(seen), three(made), none(made)
    for a, b in zip(ours.micro, usual.micro, strict=True):
        assert a.patches == 0 and b.patches == 72 and set(a.batch) ^ set(b.batch) == {"pixel_values", "features"}
        assert all(torch.equal(x, b.batch[k]) for k, x in a.batch.items() if k != "features")
    assert sorted(float(x) for m in ours.micro for x in m.batch["features"][::9, 0]) == [0.0, 1.0, 2.0, 3.0]
    assert [(s.posts, s.skipped, len(s.micro)) for s in (ours, some, blank)] == [(4, 0, 2), (3, 1, 2), (0, 4, 2)]
    assert {float(x) for m in some.micro for x in m.batch["features"][:, 0]} == {0.0, 1.0, 2.0}
    assert all(m.answers == (0, 0) and "image_grid_thw" not in m.batch for m in blank.micro), "a blank text, so that every worker has a forward pass"


def test_prompts_to_answer_are_padded_on_the_left(posts, encoder):
    from mulcot_ray.training.validation import prompts

    examples = [encoder.classification(posts.fetch(i)[0]) for i in range(3)]
    made = prompts(examples, encoder.blank(), 0, encoder.processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    texts = encoder.processor.tokenizer.batch_decode(made["input_ids"])
    assert all(t.endswith("<|im_start|>assistant\n") for t in texts) and made["attention_mask"][:, -1].all()
    assert made["pixel_values"].shape[0] == 3 * 36 and int(made["mm_token_type_ids"].sum()) == 27


def test_figures_are_those_of_scikit_learn(encoder):
    from sklearn.metrics import accuracy_score, f1_score

    from mulcot_ray.training.validation import figures, stated

    rng = np.random.default_rng(1)
    gold, said = rng.integers(0, 3, 50).tolist(), rng.integers(-1, 3, 50).tolist()
    found = figures(list(zip(gold, said, strict=True)))
    assert found["accuracy"] == pytest.approx(accuracy_score(gold, said))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, said, labels=[0, 1, 2], average="macro"))
    assert [stated(RECIPE.contract, t) for t in ('"Prediction": "positive"', '"Prediction": "fine"', "")] == [2, -1, -1]


# --- models ----------------------------------------------------------------------------------------------------------


def test_what_trains_is_counted(store):
    """FLOPs: 6·N of a model trained whole, 2·N of a frozen one, between them under LoRA; of a vision tower only what has a gradient."""
    from mulcot_ray.training.metrics import cost
    from mulcot_ray.training.model import build, core, load

    folder = str(resolve_model(store, "builtin:student")[0])
    model = load(folder)
    text = sum(p.numel() for p in model.model.language_model.layers.parameters())
    whole, frozen = cost(model, frozen=False), cost(model, frozen=True)
    assert (whole.token, frozen.token) == (6 * text, 2 * text) and whole.answer == 3 * frozen.answer == 6 * 1259 * 96
    assert whole.of(10, 4, 2) == 10 * whole.token + 4 * whole.patch + 2 * whole.answer
    adapted = build(folder, settings().model_copy(update={"lora": Lora(r=4, alpha=8)}), RECIPE.contract)
    adapters = sum(p.numel() for p in core(adapted).parameters() if p.requires_grad)
    assert cost(adapted, frozen=False).token == 4 * text + 6 * adapters
    assert cost(adapted, frozen=False).patch == frozen.patch
    merger = build(folder, settings().model_copy(update={"lora": Lora(r=4, alpha=8, projector=True)}), RECIPE.contract)
    trained = {n for n, p in merger.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained and all("visual.merger" in n for n in trained) and frozen.patch < cost(merger, frozen=False).patch < whole.patch


def test_frozen_weights_take_half_and_what_trains_does_not(store):
    import torch

    from mulcot_ray.training.model import build

    model = build(str(resolve_model(store, "builtin:student")[0]), settings(), RECIPE.contract, torch.bfloat16)
    assert {(p.requires_grad, p.dtype) for p in model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}


def test_models_must_be_of_one_kind(store, tmp_path):
    import json

    from mulcot_ray.training.model import check_alike, check_vocabularies

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {w: i for i, w in enumerate(self.words)}

    assert check_vocabularies(Words("a", "b"), Words("a", "b", "c")) == 2
    with pytest.raises(TrainingError, match="differ in 1 ids.*'b'.*'x'"):
        check_vocabularies(Words("a", "b"), Words("a", "x"))
    folder = resolve_model(store, "builtin:student")[0]
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"image_token_id": 3}))
    check_alike(str(folder), str(folder))
    with pytest.raises(TrainingError, match="cannot share a batch: image_token_id is .* for the student and 3 for the assistant"):
        check_alike(str(folder), str(tmp_path))


def test_the_table_and_the_tensorboard_file_hold_every_step():
    from tensorboardX.proto.event_pb2 import Event

    from mulcot_ray.training.metrics import EventFile, curve, from_parquet, to_parquet

    made = [{"step": i, "epoch": 0, "time": 100.0 + i, "loss": 1 / i} | ({"accuracy": 0.5} if i == 2 else {}) for i in (1, 2)]
    assert from_parquet(to_parquet(made)) == made and from_parquet(to_parquet([])) == []
    many = [{"step": i} for i in range(1, 5002)]
    assert 1500 < len(curve(many)) <= 2000 and curve(many)[-1] == many[-1] and curve(made) == made
    file = EventFile(made)
    file.add({"step": 3, "time": 104.0, "mfu": 0.25})
    raw, events = bytes(file.data), []
    while raw:
        (size,) = struct.unpack("Q", raw[:8])
        events.append(Event.FromString(raw[12 : 12 + size]))
        raw = raw[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    found = [(e.step, v.tag, v.simple_value) for e in events[1:] for v in e.summary.value]
    assert found == [(1, "train/loss", 1.0), (2, "train/loss", 0.5), (2, "validation/accuracy", 0.5), (3, "speed/mfu", 0.25)]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "options"),
    [
        ("global_batch 15.*train_workers 2 of the runtime$", {"workers": 2, "train": settings(global_batch=15)}),
        ("global_batch 16.*train_workers 3 of the runtime, which may have 2 to 4", {"workers": (2, 4), "train": settings(global_batch=16)}),
        ("divergence jsd with keep: sampled", {"distill": {"soft_labels": "cached", "keep": "sampled", "divergence": "jsd"}}),
        ("features with soft_labels: online", {"distill": {"features": True}}),
        ("features with lora.projector", {"distill": {"soft_labels": "cached", "features": True}, "train": settings(lora=MERGER)}),
        ("96 rows × 1 epochs do not fill one batch of 200", {"train": settings(global_batch=200)}),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(store, runtime, says, options):
    with pytest.raises(ConfigError, match=says):
        run(store, "odd", runtime, **options)
    assert not store.files("training")


def test_workers_must_leave_room_for_the_data(store, runtime, ray_session):
    with pytest.raises(ConfigError, match="train_workers 4 × train_cpus 1 of the 4 CPUs .* leave none for reading"):
        run(store, "crowded", runtime, workers=4)


def test_a_loss_that_is_no_number_ends_the_run_at_once(store, posts):
    """With what can be done about it, and not after as many attempts as a lost worker gets."""
    from mulcot_ray.training.checkpoints import State
    from mulcot_ray.training.collate import Slice
    from mulcot_ray.training.fit import _StopAtOurs
    from mulcot_ray.training.loop import Trainer

    class Diverged(Trainer):
        def __init__(self):
            order = Order(posts, 1, 24, 42, 84)
            self.job = SimpleNamespace(settings=settings(lr=5.0), order=order, checkpoint_steps=None, peak_flops=None, board=None, live="models/m/x")
            self.rank, self.world, self.state, self.events = 0, 1, State(), None

        def step(self, piece):
            return {"loss": float("nan"), "tokens": 1.0, "posts": 1.0, "flops": 1.0}

    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower lr .now 5.0") as caught:
        next(Diverged().run([Slice(0, [], 1, 0)]))
    with pytest.raises(TrainingError, match="goes on with step 3, the checkpoint with 0"):
        next(Diverged().run([Slice(3, [], 1, 0)]))
    failed = RuntimeError(f"as Ray puts it\nmulcot_ray.errors.TrainingError: {caught.value}\n")
    with pytest.raises(TrainingError, match="the loss is nan"):
        _StopAtOurs().after_exception(None, {0: RuntimeError("connection closed by peer"), 1: failed})
    _StopAtOurs().after_exception(None, {0: RuntimeError("connection closed by peer")})  # is tried again


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def online(store, runtime, ray_session):
    """Both tasks, soft labels online, LoRA, one worker: (what was told, curve, history, manifest)."""
    seen = []
    return seen, *run(store, "one", runtime, workers=1, micro=4, seen=seen)


@pytest.mark.ray
def test_workers_micro_batches_and_packing_change_nothing(store, runtime, online):
    """The same curve by one, two and three workers, cut in every way."""
    _, one, history, _ = online
    two, rows, _ = run(store, "two", runtime, workers=2, micro=2, packed=False, checkpointing=True, reshard=True, loss_chunk=5)
    three, packed, _ = run(store, "three", runtime, workers=3, micro=1)
    assert_same(one, two)
    assert_same(one, three)
    tokens = [[s["tokens"] for s in h["steps"]] for h in (history, rows, packed)]
    assert tokens[0] == tokens[2] and all(a < b for a, b in zip(tokens[0], tokens[1], strict=True))
    assert len(one) == 4 and one[-1]["posts"] == 24 and one[0]["dropped"] == 0 and one[-1]["loss"] < one[0]["loss"]
    for s in one:
        assert s["kl_rea"] > 0 and s["loss"] == pytest.approx(0.7 * (s["ce_rea"] + s["ce_cls"]) + 0.3 * (s["kl_rea"] + s["kl_cls"]), rel=1e-5)


@pytest.mark.ray
def test_what_a_person_sees_of_a_run(store, runtime, online):
    from mulcot_ray.training.stages import train

    seen, _, history, manifest = online
    assert [s[:2] for s in seen] == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)] and {"tokens_s", "loss", "waited"} <= set(seen[0][2])
    table = pq.read_table(io.BytesIO(store.read("models/one/history/metrics.parquet"))).to_pylist()
    assert [r["loss"] for r in table] == [s["loss"] for s in history["steps"]] and table[-1]["accuracy"] == manifest.stats["accuracy"]
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "contract.json", "README.md", "adapter/adapter_model.safetensors"}
    assert wanted <= set(manifest.files) and any("tfevents" in f for f in manifest.files)
    assert not store.files("training") and not list(Path(tempfile.gettempdir()).glob("mulcot-checkpoints/one-*"))
    same = {"store": store, "name": "one", "posts": "sample", "rationales": ["rule"], "base": "builtin:student", "assistant": "builtin:assistant"}
    rest = {"tasks": BOTH, "recipe": RECIPE, "runtime": runtime, "progress": print}
    assert train(**same, settings=settings(), **rest)[1] is False, "the same identity by another number of workers: done already"
    with pytest.raises(RecipeChanged, match="train.lr"):
        train(**same, settings=settings(lr=1.0), **rest)


@pytest.mark.ray
def test_cached_soft_labels_train_like_the_assistant(store, runtime, online):
    """From a table of the whole vocabulary, rounded to fp16, without the assistant."""
    cached, _, manifest = run(store, "cached", runtime, workers=2, micro=5, distill={"soft_labels": "cached", "top_k": 1259})
    assert_same(online[1], cached, tolerance=2e-3)
    assert (
        manifest.identity["distill"]["soft_labels"] == "cached"
        and "soft labels from: softlabels/soft-" in store.read("models/cached/README.md").decode()
    )
    assert len(store.names("softlabels")) == 1
    kept = {"soft_labels": "cached", "top_k": 1259, "features": True}
    featured, _, manifest = run(store, "featured", runtime, workers=2, micro=5, distill=kept)
    assert_same(cached, featured, tolerance=1e-6)
    assert manifest.identity["distill"]["features"] is True and len(store.names("softlabels")) == 2


@pytest.mark.ray
@pytest.mark.engine
def test_the_export_is_the_trained_model(store, runtime, ray_session):
    """Reverse KL, the vision projector beside LoRA, the best epoch by what the model writes; vLLM and plain transformers agree about the export."""
    import torch

    from mulcot_ray.prompts import label_token_ids
    from mulcot_ray.training.collate import make
    from mulcot_ray.training.model import load
    from mulcot_ray.training.packing import Packer, answer_rows, last_hidden
    from mulcot_ray.training.validation import CLASSIFY

    train = settings(epochs=2, lora=Lora(r=4, alpha=8, label_words=True, projector=True, dropout=0.1), select_by="generated", schedule="plateau")
    _, history, manifest = run(store, "exported", runtime, workers=2, train=train, distill={"divergence": "reverse_kl"}, parity_posts=4)
    assert (
        "probabilities of 4 posts differ by" in manifest.stats["parity"]
        and manifest.stats["parity"] in store.read("models/exported/README.md").decode()
    )
    assert len(history["validation"]) == 2 and all({"unparsed", "scored_accuracy", "accuracy"} <= set(v) for v in history["validation"])
    best = max(history["validation"], key=lambda v: (v["accuracy"], v["macro_f1"]))
    assert manifest.stats["accuracy"] == best["accuracy"]
    folder, base = str(resolve_model(store, "exported")[0]), str(resolve_model(store, "builtin:student")[0])
    model, before = load(folder).eval(), load(base)
    assert not torch.equal(model.model.visual.merger.mlp[0].weight, before.model.visual.merger.mlp[0].weight)
    assert torch.equal(model.model.visual.blocks[0].mlp.up_proj.weight, before.model.visual.blocks[0].mlp.up_proj.weight)
    from mulcot_ray.training.examples import Encoder
    from mulcot_ray.training.model import load_processor

    encoder, packer = Encoder(load_processor(folder), RECIPE.contract, 512), Packer(folder)
    words, right = label_token_ids(encoder.processor.tokenizer, RECIPE.contract), 0
    validation = index(store, need(store, "posts", "sample"), Split.VALIDATION, None)
    for i in range(len(validation)):
        post, _ = validation.fetch(i)
        micro = make(packer, [{Task.CLASSIFICATION: encoder.classification(post)}], CLASSIFY, False, {}, None, ())
        with torch.no_grad():
            hidden, targets = answer_rows(last_hidden(model, micro.batch), micro.batch)[0]
        logits = (hidden[torch.isin(targets, torch.tensor(words))] @ model.lm_head.weight.T)[0, words]
        right += LABELS[int(logits.argmax())] is post.label
    chosen = next(v for v in history["validation"] if v["epoch"] == manifest.stats["epoch"])
    assert right / len(validation) == pytest.approx(chosen["scored_accuracy"])
