"""What the tests of training share: a corpus with rationales, and runs on it of which the curve is looked at."""

import json

import pytest

from mulcot_ray.artifacts import Run, begin, need, read_rows
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.posts.sample import reference_rationale
from mulcot_ray.recipe import Lora, load_recipe
from mulcot_ray.records import Post, Rationale, Split, Task, from_row, to_table

RECIPE = load_recipe("tiny")
BOTH = (Task.REASONING, Task.CLASSIFICATION)
CURVE = ("step", "loss", "lr", "ce_rea", "ce_cls", "kl_rea", "kl_cls", "dropped", "grad_norm", "posts")
# Sums are taken in another order by other numbers of workers; float32 has seven digits. Measured: 1e-6 after four steps.
TOLERANCE = 2e-5


def corpus(store, train=96, validation=24, test=48):
    """posts/sample, and rationales/rule, the rule's own."""
    import_sample(store, "sample", train=train, validation=validation, test=test, seed=42)
    run = begin(store, "rationales", "rule", {})
    if isinstance(run, Run):
        posts = [from_row(Post, r) for r in read_rows(store, need(store, "posts", "sample"))]
        made = [reference_rationale(p) for p in posts if p.split is Split.TRAIN]
        with run:
            run.write_table("part-0", to_table(Rationale, made))
            run.commit(len(made))
    return store


def settings(**changes):
    """LoRA without dropout, batches of 24: what divides by one, two and three workers. Four steps an epoch of 96 rows."""
    return RECIPE.student.model_copy(update={"epochs": 1, "global_batch": 24, "lora": Lora(r=4, alpha=8, label_words=True), **changes})


def run(store, name, runtime, *, workers=1, micro=8, train=None, distill=None, tasks=BOTH, assistant="builtin:assistant", seen=None, **changes):
    """Train models/NAME. Returns (curve, history, manifest)."""
    from mulcot_ray.training import stages

    recipe = RECIPE.model_copy(update={"distill": RECIPE.distill.model_copy(update=distill or {})})
    runtime = runtime.model_copy(update={"train_workers": workers, "micro_batch": micro, "parity_posts": 0, **changes})
    seen = [] if seen is None else seen
    rationales = ["rule"] if Task.REASONING in tasks else None
    base = "builtin:student"
    manifest, fresh = stages.train(
        store, name, "sample", rationales, base, assistant, train or settings(), tasks, recipe, runtime, lambda *a: seen.append(a)
    )
    assert fresh
    history = json.loads(store.read(f"models/{name}/history.json"))
    return curve(history), history, manifest


def curve(history):
    return [{k: s[k] for k in CURVE if k in s} for s in history["steps"]]


def assert_same(one, two, tolerance=TOLERANCE):
    """The same losses, gradient norms and counts, step by step."""
    assert [s["step"] for s in one] == [s["step"] for s in two] == list(range(1, len(one) + 1))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=1e-9)
