"""The tour: the whole way from posts to labels, in order, on the real parts (Ray Data, vLLM, FSDP on two workers, Ray Serve), in small.

Read it top to bottom: each test goes on where the one before ended, as a user would on the command line. `mulcot demo` is the same way
at a size that learns something; here one epoch has to do, and it is the contracts between the stages that are looked at.
"""

import base64
import json
import os
import re
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner

from mulcot_ray.artifacts import find, need, read_rows, resolve_model
from mulcot_ray.cli import app
from mulcot_ray.console import console
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Post, Prediction, Split, from_row
from mulcot_ray.storage import Store

pytestmark = [pytest.mark.engine, pytest.mark.ray]
DATA = Path(os.environ.get("MULCOT_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def root(tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("tour")
    (folder / "quick.yaml").write_text("base: tiny\nassistant: {epochs: 1}\nstudent: {epochs: 1}\n")
    import_sample(Store(str(folder)), "sample", train=96, validation=24, test=48, seed=42)
    return folder


@pytest.fixture
def mulcot(root, monkeypatch):
    """Run a command line under the root; returns what it printed. `ok=False`: it must fail with exit code 1."""
    monkeypatch.setattr("mulcot_ray.cli.common.log_to", lambda folder, name: folder / f"{name}.log")  # pytest keeps the logs here

    def run(*words: str, ok: bool = True) -> str:
        recipe = [] if words[0] in ("import",) else ["--recipe", str(root / "quick.yaml")]
        monkeypatch.setattr(console, "file", None)
        result = CliRunner().invoke(app, [*words, "--root", str(root), *recipe], env={"COLUMNS": "200"})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == (0 if ok else 1), result.output
        return re.sub(r"\s+", " ", result.output)

    return run


def test_1_teach(mulcot, root):
    assert "48 posts" not in mulcot("teach", "--posts", "sample", "--name", "taught", "--dry-run")
    mulcot("teach", "--posts", "sample", "--name", "taught")
    m = need(Store(str(root)), "rationales", "taught")
    assert m.rows_in == 96 == m.rows + m.rejects and m.rows >= 80, "the shipped teacher explains nearly all posts"
    assert m.stats["sources"]["predicted"] > m.stats["sources"].get("explained", 0)


def test_2_assistant(mulcot, root):
    mulcot("assistant", "--posts", "sample", "--rationales", "taught", "--name", "assistant")
    assert {"model.safetensors", "contract.json", "README.md", "history.json"} <= set(need(Store(str(root)), "models", "assistant").files)


def test_3_augment(mulcot, root):
    mulcot("augment", "--posts", "sample", "--model", "assistant", "--name", "augmented")
    m = need(Store(str(root)), "rationales", "augmented")
    assert m.rows + m.rejects == 96


def test_4_student(mulcot, root):
    mulcot("student", "--posts", "sample", "--rationales", "taught", "--assistant", "assistant", "--name", "student")
    history = json.loads((root / "models" / "student" / "history.json").read_text())
    assert {"ce_rea", "ce_cls", "kl_rea", "kl_cls"} <= set(history["steps"][-1])
    assert history["steps"][-1]["loss"] < history["steps"][0]["loss"]
    assert "give --rationales and --assistant" in mulcot("student", "--posts", "sample", ok=False)


def test_5_label_and_evaluate(mulcot, root):
    mulcot("label", "--posts", "sample", "--split", "test", "--model", "student", "--mode", "explain", "--name", "by-student")
    store = Store(str(root))
    m = need(store, "predictions", "by-student")
    assert m.rows == 48 and m.rejects == 0
    for p in (from_row(Prediction, r) for r in read_rows(store, m)):
        assert p.negative + p.neutral + p.positive == pytest.approx(1, abs=1e-6)
        assert (p.text_analysis is None) == (p.rationale_fault is not None)
    out = mulcot("evaluate", "--answers", "by-student", "--split", "test")
    assert all(word in out for word in ("accuracy", "macro F1", "weighted F1"))
    report = json.loads((root / "evaluations" / "by-student" / "report.json").read_text())
    assert report["counts"] == {"gold": 48, "answered": 48, "rejected": 0, "missing": 0}


def test_6_everything_twice_does_nothing_and_says_so(mulcot):
    for words in (
        ("teach", "--posts", "sample", "--name", "taught"),
        ("assistant", "--posts", "sample", "--rationales", "taught", "--name", "assistant"),
        ("augment", "--posts", "sample", "--model", "assistant", "--name", "augmented"),
        ("student", "--posts", "sample", "--rationales", "taught", "--assistant", "assistant", "--name", "student"),
        ("label", "--posts", "sample", "--split", "test", "--model", "student", "--mode", "explain", "--name", "by-student"),
        ("evaluate", "--answers", "by-student", "--split", "test"),
    ):
        assert "already done" in mulcot(*words), words


def test_7_another_recipe_under_the_same_name_is_refused(mulcot, root):
    (root / "quick.yaml").write_text("base: tiny\nassistant: {epochs: 1}\nstudent: {epochs: 1}\nseed: 43\n")
    try:
        assert "RecipeChanged" in (out := mulcot("teach", "--posts", "sample", "--name", "taught", ok=False)) and "seed: 42 → 43" in out
    finally:
        (root / "quick.yaml").write_text("base: tiny\nassistant: {epochs: 1}\nstudent: {epochs: 1}\n")


def test_8_transformers_and_vllm_agree_on_the_exported_student(root):
    """The exported folder in plain transformers gives the probabilities that vLLM gave."""
    import torch

    from mulcot_ray import calibration
    from mulcot_ray.calibration import scaled
    from mulcot_ray.posts.images import post_image
    from mulcot_ray.prompts import label_token_ids, render_chat
    from mulcot_ray.records import LABELS, Task
    from mulcot_ray.training.examples import encode_picture
    from mulcot_ray.training.model import load, load_processor

    store, contract = Store(str(root)), load_recipe("tiny").contract
    folder = str(resolve_model(store, "student")[0])
    model, processor = load(folder).eval(), load_processor(folder)
    words = label_token_ids(processor.tokenizer, contract)
    said = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "by-student")))}
    posts = [p for p in (from_row(Post, r) for r in read_rows(store, need(store, "posts", "sample"))) if p.split is Split.TEST][:12]
    for post in posts:
        picture = encode_picture(processor, post_image(post, contract.image.side))
        text = render_chat(processor.tokenizer, contract.messages(Task.CLASSIFICATION, post)) + contract.label_prefix
        ids = torch.tensor([processor.tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 9))["input_ids"]])
        batch = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).long()}
        with torch.no_grad():
            logits = model(**batch, pixel_values=torch.from_numpy(picture.values), image_grid_thw=torch.from_numpy(picture.grid)).logits[0, -1, words]
        assert scaled(tuple(torch.softmax(logits, 0).tolist()), calibration.read(folder)) == pytest.approx(
            [getattr(said[post.post_id], x) for x in LABELS], abs=1e-4
        )


def test_9_endpoint_gives_the_label_of_the_bulk_labeler(root):
    from mulcot_ray.serving.run import serving

    store = Store(str(root))
    said = {p.post_id: p for p in (from_row(Prediction, r) for r in read_rows(store, need(store, "predictions", "by-student")))}
    posts = [p for p in (from_row(Post, r) for r in read_rows(store, need(store, "posts", "sample"))) if p.split is Split.TEST][:12]
    with (
        serving(store, "student", load_recipe("tiny"), load_runtime("laptop")) as endpoint,
        httpx.Client(base_url=endpoint.url, timeout=60, trust_env=False) as client,
    ):
        assert client.post("/v1/sentiment", json={"text": "x"}).status_code == 401
        for i, post in enumerate(posts):
            body = {
                "id": post.post_id,
                "text": post.text,
                "aspect": post.aspect,
                "image": base64.b64encode(post.image_bytes).decode(),
                "explain": i == 0,
            }
            answer = client.post("/v1/sentiment", json=body, headers=endpoint.headers).json()
            assert answer["label"] == said[post.post_id].label
            for name, p in answer["probabilities"].items():
                assert p == pytest.approx(getattr(said[post.post_id], name), abs=1e-4)
            if i == 0:
                assert (answer["rationale"] is None) != (answer["rationale_fault"] is None)


@pytest.mark.skipif(not (DATA / "t15" / "dev.tsv").exists(), reason="the Twitter-2015 posts are not here (MULCOT_DATA)")
def test_real_posts(mulcot, root):
    """Twitter-2015's validation split: imported whole, labelled whole by the tiny student (badly: it is tiny), scored."""
    t15 = DATA / "t15"
    out = mulcot("import", str(t15 / "dev.tsv"), "--format", "tombert", "--images", str(t15 / "images"), "--name", "t15-val")
    assert "1122 rows, 0 rejected" in out
    assert "1122 rows, 0 rejected" in mulcot("label", "--posts", "t15-val", "--model", "builtin:student")
    out = mulcot("import", str(t15 / "val_rationales.json"), "--format", "mulcot-json", "--name", "t15-cot")
    assert "1121 rows, 1 rejected (sections_missing 1)" in out
    assert all(word in mulcot("evaluate", "--answers", "t15-cot") for word in ("accuracy", "macro F1", "weighted F1"))
    assert find(Store(str(root)), "evaluations", "t15-cot") is not None
