"""Packed posts against separate rows: positions, losses and gradients are the same; only the work is less."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mulcot_ray.posts.images import prepare
from mulcot_ray.posts.sample import reference_rationale, sample_posts
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import HERE, Lora, Train, load_recipe
from mulcot_ray.records import Split, Task
from mulcot_ray.training.examples import IGNORE, Example, Picture, collate, encode_picture, supervised
from mulcot_ray.training.losses import answer_positions
from mulcot_ray.training.model import build, core, load, load_processor
from mulcot_ray.training.packing import Packer, answer_rows, answer_start, answer_tokens, features, last_hidden, micro_batches

FOLDER = str(HERE / "models" / "student")
TASKS = (Task.REASONING, Task.CLASSIFICATION)
IMAGE = 6  # <|image_pad|> of the shipped tokenizer
CONTRACTS = {
    "after": load_recipe("tiny").contract,
    "first": load_recipe("tiny").contract.model_copy(update={"image": load_recipe("tiny").contract.image.model_copy(update={"position": "first"})}),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def processor():
    return load_processor(FOLDER)


@pytest.fixture(scope="module")
def packer():
    return Packer(FOLDER)


@pytest.fixture(scope="module")
def model():
    return load(FOLDER).eval()


def example(processor, contract: Contract, number: int = 0, picture: bool = True) -> dict[Task, Example]:
    post = list(sample_posts(number + 1, Split.TRAIN, 3))[number]
    shown = None
    if picture:
        shown = encode_picture(processor, prepare(post.image_bytes, contract.image.side if number % 2 else 56))  # two sizes of picture
    else:
        post = replace(post, image_bytes=None, image_sha256=None)
    answers = {t: contract.answer(t, post.label, reference_rationale(post) if t is Task.REASONING else None) for t in TASKS}
    return {t: supervised(processor, contract, t, post, post.label, answers[t], shown, 1024) for t in TASKS}


def separate(model, posts, tasks):
    """States and targets by task of rows of their own, through the model's plain forward; the reference."""
    found = []
    for t in tasks:
        rows = [answer_positions(_plain(model, p[t]), torch.from_numpy(p[t].labels)[None]) for p in posts if t in p]
        found.append((torch.cat([h for h, _ in rows]), torch.cat([y for _, y in rows])))
    return found


def _plain(model, e: Example):
    batch = collate([e], 0, IMAGE)
    del batch["labels"]
    language = core(model).model.language_model.config
    before, language._attn_implementation = language._attn_implementation, "sdpa"
    hidden = core(model).model(**batch, use_cache=False).last_hidden_state
    language._attn_implementation = before
    return hidden


def loss(model, rows):
    return sum(F.cross_entropy(core(model).lm_head(h).float(), y, reduction="sum") for h, y in rows)


def gradients(model):
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


# --- equal to separate rows ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("order", CONTRACTS)
def test_losses_and_gradients_are_those_of_separate_rows(order, packed, processor, packer, model):
    """Four posts: two sizes of picture, one post without, one with a single task."""
    posts = [example(processor, CONTRACTS[order], i) for i in range(2)]
    posts += [example(processor, CONTRACTS[order], 2, picture=False), {Task.CLASSIFICATION: example(processor, CONTRACTS[order], 3)[TASKS[1]]}]
    ours, theirs = answer_rows(last_hidden(model, batch := packer(posts, TASKS, packed)), batch), separate(model, posts, TASKS)
    for (h, y), (h0, y0) in zip(ours, theirs, strict=True):
        assert y.tolist() == y0.tolist() and len(y) > 0
        assert torch.allclose(h, h0, rtol=1e-5, atol=2e-5)
    a, b = loss(model, ours), loss(model, theirs)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    a.backward()
    mine = gradients(model)
    b.backward()
    reference = gradients(model)
    assert float((mine - reference).norm() / reference.norm()) < 1e-5
    both = sum(len(e.ids) for p in posts for e in p.values())
    forks = sum(packer.fork(list(p.values())) for p in posts)
    assert batch["input_ids"].shape[1] == sum(packer.length(p, packed) for p in posts) == both - packed * forks
    assert forks > (2 * 9 if order == "first" else 0)
    assert len(batch["pixel_values"]) == sum(int(p[TASKS[1]].picture.grid.prod()) for p in posts if p[TASKS[1]].picture), "each picture once"
    assert len(batch["picture"]) == (3 if packed and order == "first" else 5)


def test_checkpointing_and_lora_change_nothing(processor, packer):
    """Recomputed activations of a model with adapters (peft's wrapper): same loss, same gradients."""
    settings = Train(method="lora", lora=Lora(r=4, alpha=8), lr=1e-3, global_batch=1, epochs=1, schedule="cosine")
    model = build(FOLDER, settings, CONTRACTS["first"]).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    posts = [example(processor, CONTRACTS["first"], i) for i in range(2)]
    loss(model, separate(model, posts, TASKS)).backward()
    reference = gradients(model)
    core(model).gradient_checkpointing_enable()
    loss(model, answer_rows(last_hidden(model, batch := packer(posts, TASKS)), batch)).backward()
    assert float((gradients(model) - reference).norm() / reference.norm()) < 1e-5


@pytest.mark.parametrize("order", CONTRACTS)
def test_features_of_pictures_stand_in_for_the_vision_tower(order, processor, packer, monkeypatch):
    """The same losses and gradients, of adapters alone, without a picture in the batch. Two sizes of picture, and a post without one."""
    settings = Train(method="lora", lora=Lora(r=4, alpha=8), lr=1e-3, global_batch=1, epochs=1, schedule="cosine")
    model = build(FOLDER, settings, CONTRACTS[order]).train()
    posts = [example(processor, CONTRACTS[order], i, picture=i != 1) for i in range(4)]
    made = features(model, batch := packer(posts, TASKS))
    loss(model, answer_rows(last_hidden(model, batch), batch)).backward()
    reference = gradients(model)
    seen = [Picture(None, p[TASKS[0]].picture.grid, x.clone()) for p, x in zip([posts[0], *posts[2:]], made, strict=True)]
    kept = [{t: replace(e, picture=picture) for t, e in p.items()} for p, picture in zip(posts, [seen[0], None, *seen[1:]], strict=True)]
    monkeypatch.setattr(type(core(model).model.visual), "forward", None)
    batch = packer(kept, TASKS)
    assert "pixel_values" not in batch and batch["features"].shape == (4 + 4 + 9, 96)
    loss(model, answer_rows(last_hidden(model, batch), batch)).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert torch.equal(gradients(model), reference)
    with pytest.raises(AssertionError, match="all known by patches, or all by features"):
        packer([posts[0], kept[2]], TASKS)


def test_the_plain_forward_is_as_before_after_a_packed_one(processor, packer, model):
    e = example(processor, CONTRACTS["after"], 1)
    before = _plain(model, e[TASKS[0]])
    last_hidden(model, packer([e], TASKS))
    batch = collate([e[TASKS[0]], e[TASKS[1]]], 0, IMAGE)
    del batch["labels"]
    assert core(model).model.language_model.config._attn_implementation != "sdpa"
    after = core(model).model(**batch, use_cache=False).last_hidden_state
    assert torch.allclose(after[:1, : before.shape[1]], before, rtol=1e-5, atol=2e-5)
    short = after[1:, : len(e[TASKS[1]].ids)]
    assert torch.allclose(short, _plain(model, e[TASKS[1]]), rtol=1e-5, atol=2e-5), "the mask of a padded row is kept to"


def test_a_changed_branch_does_not_reach_the_other(processor, packer, model):
    post = example(processor, CONTRACTS["first"], 0)
    other = Example(post[TASKS[0]].ids.copy(), post[TASKS[0]].labels, post[TASKS[0]].picture)
    other.ids[answer_start(other) :] = 20
    with torch.no_grad():
        kept = [answer_rows(last_hidden(model, b := packer([p], TASKS)), b)[1][0] for p in (post, {**post, TASKS[0]: other})]
    assert torch.equal(*kept)


# --- borders -------------------------------------------------------------------------------------------------------------


def bare(prompt: list[int], answer: list[int], picture: Picture | None = None) -> Example:
    return Example(np.array(prompt + answer), np.array([IGNORE] * len(prompt) + answer), picture)


def test_answers_that_start_at_the_fork_and_begin_alike(packer, model):
    """One prompt, two answers with the same first tokens: each answer's first token is predicted in its own branch."""
    post = {TASKS[0]: bare([20, 21, 22], [30, 31, 32, 33]), TASKS[1]: bare([20, 21, 22], [30, 31, 40])}
    assert packer.fork(list(post.values())) == 2, "the last token of the prompt stands in both branches"
    batch = packer([post], TASKS)
    assert batch["input_ids"].tolist() == [[20, 21, 22, 30, 31, 32, 33, 22, 30, 31, 40]]
    assert batch["branch"].tolist() == [[-1, -1, -1, 0, 0, 0, 0, -1, 1, 1, 1]]
    assert batch["cuts"].tolist() == [[0, 2, 7, 11]]
    assert batch["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 5]
    with torch.no_grad():
        for (h, y), (h0, y0) in zip(answer_rows(last_hidden(model, batch), batch), separate(model, [post], TASKS), strict=True):
            assert y.tolist() == y0.tolist() and torch.allclose(h, h0, rtol=1e-5, atol=2e-5)


def test_an_answer_without_a_prompt_loses_its_first_token_only(packer, model):
    """Nothing can predict the first token of a row: neither in its own nor in a packed one, whatever stands before it there."""
    post = {TASKS[0]: bare([20, 21], [30, 31]), TASKS[1]: bare([], [20, 41, 42])}
    batch = packer([post, post], TASKS)
    assert packer.fork(list(post.values())) == 0
    assert [y.tolist() for _, y in answer_rows(last_hidden(model, batch), batch)] == [[30, 31, 30, 31], [41, 42, 41, 42]]
    assert [answer_tokens(e) for e in post.values()] == [2, 2]


def test_no_answer_no_rows_and_the_graph_holds(packer, model):
    """A post that has nothing to predict (it only takes part) gives no rows, and backward works."""
    batch = packer([{TASKS[1]: Example(np.array([20, 21]), np.array([IGNORE, IGNORE]), None)}], TASKS)
    rows = answer_rows(last_hidden(model, batch), batch)
    assert [len(y) for _, y in rows] == [0, 0]
    loss(model, rows).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_three_tasks_and_a_first_one_missing(packer, model):
    tasks = (Task.PREDICT, *TASKS)
    posts = [{t: bare([20, 21, 22, 23 + i], [30 + i] * (i + 1)) for i, t in enumerate(tasks)}]
    posts.append({t: posts[0][t] for t in TASKS})
    batch = packer(posts, tasks)
    assert batch["cuts"].tolist() == [[0, 3, 5, 8, 12], [12, 15, 15, 18, 22]]
    with torch.no_grad():
        for (h, y), (h0, y0) in zip(answer_rows(last_hidden(model, batch), batch), separate(model, posts, tasks), strict=True):
            assert y.tolist() == y0.tolist() and torch.allclose(h, h0, rtol=1e-5, atol=2e-5)


def test_a_fork_does_not_cut_a_picture(packer):
    picture = Picture(np.zeros((16, 1176), np.float32), np.array([[1, 4, 4]]))
    ids = [20, 3, IMAGE, IMAGE, IMAGE, IMAGE]
    assert packer.fork([bare(ids, [30], picture), bare(ids, [31], picture)]) == 2, "its last token would be a branch's own"
    assert packer.fork([bare([*ids, 4, 50], [30], picture), bare([*ids, 4, 51], [31], picture)]) == 7
    batch = packer([{TASKS[0]: bare(ids, [30], picture), TASKS[1]: bare(ids, [31], picture)}], TASKS)
    assert batch["picture"].tolist() == [0, 0] and len(batch["pixel_values"]) == 16


@settings(max_examples=25, deadline=None)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 5)), before=st.integers(1, 6), answers=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_positions_are_those_of_separate_rows(shape, before, answers):
    packer = Packer(FOLDER)
    rows, columns = shape
    picture = Picture(np.zeros((4 * rows * columns, 1176), np.float32), np.array([[1, 2 * rows, 2 * columns]]))
    prompt = [*range(20, 20 + before), 3, *[IMAGE] * (rows * columns), 4, 50]
    post = {t: bare([*prompt, 60 + i], [70 + i] * n, picture) for i, (t, n) in enumerate(zip(TASKS, answers, strict=True))}
    found = packer([post], TASKS)["position_ids"][:, 0]
    fork = packer.fork(list(post.values()))
    assert fork == len(prompt)
    first, second = (packer([{t: post[t]}], TASKS)["position_ids"][:, 0] for t in TASKS)
    assert torch.equal(found, torch.cat([first, second[:, fork:]], 1))
    assert first[:, -1].tolist() == [before + 1 + max(rows, columns) + 2 + answers[0]] * 3, "a picture takes as many positions as its longer side"


def test_a_packer_pickles_as_its_folder(packer):
    again = pickle.loads(pickle.dumps(packer))
    assert len(pickle.dumps(packer)) < 500 and again.image_token == packer.image_token == IMAGE


# --- micro-batches -------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 2000), max_size=40), size=st.integers(1, 9))
def test_micro_batches_are_as_many_as_the_posts_ask_for_and_even(lengths, size):
    found = micro_batches(lengths, size)
    assert sorted(i for b in found for i in b) == list(range(len(lengths)))
    assert len(found) == -(-len(lengths) // size) and all(len(b) <= size for b in found)
    loads = [sum(lengths[i] for i in b) for b in found]
    if len(found) > 1 and all(len(b) == size for b in found):
        assert max(loads) - min(loads) <= size * max(lengths)


def test_long_posts_do_not_meet():
    assert micro_batches([900, 10, 850, 20], 2) == [[0, 1], [2, 3]]
