"""Order and content of the training data; real FSDP in worker processes of Ray Train."""

import numpy as np
import pytest

from mulcot_ray.artifacts import begin, need
from mulcot_ray.errors import ConfigError, RecipeChanged, TrainingError
from mulcot_ray.posts.sample import reference_rationale
from mulcot_ray.recipe import Lora, load_recipe
from mulcot_ray.records import Rationale, Split, Task, from_row, to_table
from mulcot_ray.training.data import batches, index, steps

RECIPE = load_recipe("tiny")


@pytest.fixture(scope="module")
def store(sample_store):
    """The sample posts with the rule's own rationales as rationales/rule."""
    from mulcot_ray.artifacts import Run, read_rows
    from mulcot_ray.records import Post

    run = begin(sample_store, "rationales", "rule", {})
    if isinstance(run, Run):
        posts = [from_row(Post, r) for r in read_rows(sample_store, need(sample_store, "posts", "sample"))]
        made = [reference_rationale(p) for p in posts if p.split is Split.TRAIN]
        with run:
            run.write_table("part-0", to_table(Rationale, made))
            run.commit(len(made))
    return sample_store


def test_batches_do_not_depend_on_the_workers():
    one = list(batches(10, 3, 4, 7, rank=0, world=1, start=0))
    two = [np.concatenate(pair) for pair in zip(*(batches(10, 3, 4, 7, r, 2, 0) for r in (0, 1)), strict=True)]
    assert len(one) == steps(10, 3, 4) == 7
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


def test_an_epoch_has_every_row_once_and_epochs_differ():
    rows = np.concatenate(list(batches(12, 2, 4, 7, 0, 1, 0)))
    assert sorted(rows[:12]) == sorted(rows[12:]) == list(range(12)) and list(rows[:12]) != list(rows[12:])


def test_a_resumed_run_goes_on_with_the_next_batch():
    whole = list(batches(10, 3, 4, 7, 0, 1, 0))
    assert all((a == b).all() for a, b in zip(whole[3:], batches(10, 3, 4, 7, 0, 1, 3), strict=True))


def test_index_joins_posts_and_rationales(store):
    both = index(store, need(store, "posts", "sample"), Split.TRAIN, [need(store, "rationales", "rule"), need(store, "rationales", "rule")])
    assert len(both) == 192  # one row per rationale
    post, rationale = both.fetch(5)
    assert rationale is not None and post.post_id == rationale.post_id and post.split is Split.TRAIN and post.image_bytes
    labels = index(store, need(store, "posts", "sample"), Split.VALIDATION, None)
    assert len(labels) == 24 and labels.fetch(0)[1] is None
    with pytest.raises(TrainingError, match="no labelled post of split unlabeled"):
        index(store, need(store, "posts", "sample"), Split.UNLABELED, None)


def test_example_supervises_the_answer_and_its_end(store):
    from mulcot_ray.artifacts import resolve_model
    from mulcot_ray.posts.images import post_image
    from mulcot_ray.records import Sentiment
    from mulcot_ray.training.examples import IGNORE, encode_picture, supervised
    from mulcot_ray.training.model import load_processor

    processor = load_processor(str(resolve_model(store, "builtin:student")[0]))
    post, _ = index(store, need(store, "posts", "sample"), Split.TRAIN, None).fetch(0)
    picture = encode_picture(processor, post_image(post, 84))
    answer = RECIPE.contract.answer(Task.CLASSIFICATION, Sentiment.POSITIVE)
    e = supervised(processor, RECIPE.contract, Task.CLASSIFICATION, post, Sentiment.POSITIVE, answer, picture, 512)
    told = e.ids[e.labels != IGNORE]
    assert processor.tokenizer.decode(told) == '"Prediction": "positive"<|im_end|>'
    assert int((e.ids == processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")).sum()) == 9  # 84² / 784
    text = processor.tokenizer.decode(e.ids)
    assert text.index("Classify the feeling") < text.index("<|image_pad|>") < text.index("Target:")


def _curve(store, name, posts="sample", **options):
    import json

    from mulcot_ray.training.stages import train

    settings, tasks, workers, assistant = options["settings"], options["tasks"], options["workers"], options.get("assistant")
    runtime = options["runtime"].model_copy(update={"train_workers": workers, "micro_batch": options.get("micro", 8)})
    seen = []
    manifest, fresh = train(store, name, posts, ["rule"], "builtin:student", assistant, settings, tasks, RECIPE, runtime, lambda *a: seen.append(a))
    return json.loads(store.read(f"models/{name}/history.json")), manifest, fresh, seen


@pytest.mark.ray
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_processes_equal_one(store, runtime, ray_session, method):
    """FSDP over two workers gives the losses of one worker, step by step, with soft labels and both tasks."""
    lora = Lora(r=4, alpha=8, label_words=True) if method == "lora" else None
    settings = RECIPE.student.model_copy(update={"epochs": 1, "global_batch": 32, "method": method, "lora": lora})
    common = dict(settings=settings, tasks=(Task.REASONING, Task.CLASSIFICATION), runtime=runtime, assistant="builtin:assistant")
    one, *_ = _curve(store, f"{method}-1", workers=1, **common)
    two, manifest, fresh, seen = _curve(store, f"{method}-2", workers=2, micro=4, **common)
    assert fresh and len(one["steps"]) == len(two["steps"]) == 3
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a == pytest.approx(b, rel=2e-4), "losses, learning rate and gradient norm"
    assert a["kl_rea"] > 0 and a["loss"] == pytest.approx(0.7 * (a["ce_rea"] + a["ce_cls"]) + 0.3 * (a["kl_rea"] + a["kl_cls"]), rel=1e-4)
    assert one["validation"][0]["accuracy"] == pytest.approx(two["validation"][0]["accuracy"])
    assert (seen[-1][0], seen[-1][1]) == (3, 3)
    assert {"config.json", "model.safetensors", "tokenizer.json", "contract.json", "README.md"} <= set(manifest.files)
    assert ("adapter/adapter_model.safetensors" in manifest.files) == (method == "lora")
    assert not store.files("training")
    assert _curve(store, f"{method}-2", workers=1, **common)[2] is False  # same identity on another number of workers: done already
    with pytest.raises(RecipeChanged, match="train.lr"):
        _curve(store, f"{method}-2", workers=2, **(common | {"settings": settings.model_copy(update={"lr": 1.0})}))


@pytest.mark.ray
def test_the_exported_model_is_the_trained_one(store, runtime, ray_session):
    """Loaded by plain transformers, the export gives the validation accuracy that training reported."""
    import torch

    from mulcot_ray.artifacts import resolve_model
    from mulcot_ray.posts.images import post_image
    from mulcot_ray.prompts import label_token_ids
    from mulcot_ray.records import LABELS
    from mulcot_ray.training.examples import collate, encode_picture, supervised
    from mulcot_ray.training.model import load, load_processor

    settings = RECIPE.student.model_copy(update={"epochs": 2, "global_batch": 16})
    _, manifest, *_ = _curve(store, "export", settings=settings, tasks=(Task.CLASSIFICATION,), workers=2, runtime=runtime)
    folder = str(resolve_model(store, "export")[0])
    model, processor = load(folder).eval(), load_processor(folder)
    words, right = label_token_ids(processor.tokenizer, RECIPE.contract), 0
    validation = index(store, need(store, "posts", "sample"), Split.VALIDATION, None)
    for i in range(len(validation)):
        post, _ = validation.fetch(i)
        answer = RECIPE.contract.answer(Task.CLASSIFICATION, post.label)
        e = supervised(
            processor, RECIPE.contract, Task.CLASSIFICATION, post, post.label, answer, encode_picture(processor, post_image(post, 84)), 512
        )
        batch = collate([e], 0, model.config.image_token_id)
        at = next(t for t in range(len(e.labels)) if e.labels[t] in words)
        del batch["labels"]
        with torch.no_grad():
            right += LABELS[int(model(**batch).logits[0, at - 1, words].argmax())] is post.label
    assert right / len(validation) == pytest.approx(manifest.stats["accuracy"])


@pytest.mark.ray
def test_a_killed_worker_costs_at_most_an_epoch_and_changes_nothing(store, runtime, ray_session, tmp_path):
    """SIGKILL one worker in the second epoch: Ray Train restarts both from the checkpoint, and the curve is the undisturbed one."""
    settings = RECIPE.student.model_copy(update={"epochs": 2, "global_batch": 32, "schedule": "plateau"})
    common = dict(settings=settings, tasks=(Task.CLASSIFICATION,), workers=2)
    whole, *_ = _curve(store, "undisturbed", runtime=runtime, **common)
    killed, *_ = _curve_with_kill(store, "killed", runtime, common, step=4)
    assert [s["step"] for s in killed["steps"]] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(whole["steps"], killed["steps"], strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def _curve_with_kill(store, name, runtime, common, step):
    """As _curve; a thread kills a training worker once `step` is reached."""
    import os
    import signal
    import threading

    import psutil

    done = threading.Event()

    def kill():
        while not done.wait(0.05):
            workers = [p for p in psutil.process_iter(["cmdline", "name"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
            if workers and hits and hits[-1] >= step:
                os.kill(workers[0].pid, signal.SIGKILL)
                return

    hits: list[int] = []
    thread = threading.Thread(target=kill)
    thread.start()
    from mulcot_ray.training import stages

    original = stages._watch

    def watch(board, progress, stop):
        original(board, lambda *a: (hits.append(a[0]), progress(*a)), stop)

    stages._watch = watch
    try:
        return _curve(store, name, runtime=runtime, **common)
    finally:
        stages._watch = original
        done.set()
        thread.join()


def test_a_batch_that_does_not_divide_is_refused_before_anything_starts(store, runtime):
    with pytest.raises(ConfigError, match="global_batch 15.*train_workers 2"):
        _curve(
            store, "odd", settings=RECIPE.student.model_copy(update={"global_batch": 15}), tasks=(Task.CLASSIFICATION,), workers=2, runtime=runtime
        )


def test_vocabularies_must_agree():
    from mulcot_ray.training.model import check_vocabularies

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {w: i for i, w in enumerate(self.words)}

    check_vocabularies(Words("a", "b"), Words("a", "b", "c"))
    with pytest.raises(TrainingError, match="differ in 1 ids.*'b'.*'x'"):
        check_vocabularies(Words("a", "b"), Words("a", "x"))
