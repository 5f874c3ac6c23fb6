"""Losses and their gradients against a dense float64 reference, written from the formulas and differentiated by autograd."""

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.training.examples import IGNORE, Example, collate
from mulcot_ray.training.losses import Divergence, Drawn, Kept, Teacher, answer_losses, answer_positions

D, D_TEACHER = 6, 5
WAYS = [(Divergence.FORWARD_KL, 0.5), (Divergence.REVERSE_KL, 0.5), *((Divergence.JSD, b) for b in (0.1, 0.5, 0.9))]
KINDS = ["teacher", "kept", "drawn"]


@pytest.fixture(autouse=True)
def one_thread():
    """These tensors are too small to share, and waiting for a second core that is busy is slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def between(p, q, divergence, beta):
    """Divergence of each row, from probabilities above 0."""
    if divergence is Divergence.FORWARD_KL:
        return (p * (p / q).log()).sum(-1)
    if divergence is Divergence.REVERSE_KL:
        return (q * (q / p).log()).sum(-1)
    m = beta * p + (1 - beta) * q
    return beta * (p * (p / m).log()).sum(-1) + (1 - beta) * (q * (q / m).log()).sum(-1)


def reference(hidden, weight, targets, soft, *, temperature, divergence=Divergence.FORWARD_KL, beta=0.5, shared=None, mix=(1.0, 1.0)):
    """(total, ce, soft, dropped) with whole logits, in float64."""
    z = hidden @ weight.T
    ce = -(z.exp() / z.exp().sum(-1, keepdim=True)).log()[torch.arange(len(targets)), targets].sum()
    s = shared or (min(len(weight), len(soft.weight)) if isinstance(soft, Teacher) else len(weight))
    whole = (z / temperature).exp() / (z / temperature).exp().sum(-1, keepdim=True)
    q, mine = whole[:, :s] / whole[:, :s].sum(-1, keepdim=True), whole[:, s:].sum()
    if isinstance(soft, Teacher):
        a = (soft.hidden.double() @ soft.weight.double().T / temperature).exp()
        value, theirs = between(a[:, :s] / a[:, :s].sum(-1, keepdim=True), q, divergence, beta), (a[:, s:].sum(-1) / a.sum(-1)).sum()
    elif isinstance(soft, Kept):
        of_q = q.gather(1, soft.ids.long())
        p = torch.cat([soft.logs.double().exp(), soft.tail.double().exp()[:, None]], -1)
        value, theirs = between(p, torch.cat([of_q, q.scatter(1, soft.ids.long(), 0).sum(-1, keepdim=True)], -1), divergence, beta), torch.zeros(())
    else:
        value, theirs = -(soft.weights.double() * q.gather(1, soft.ids.long()).log()).sum(-1), torch.zeros(())
    value = temperature**2 * value.sum()
    return mix[0] * ce + mix[1] * value, ce, value, ((mine + theirs) / 2).detach()


def make(kind, n=7, v=11, v_a=11, seed=0, dtype=torch.float64, k=4, temperature=2.0, shared=None):
    """hidden, weight (both to be trained), targets and soft labels of one kind."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(a, D, generator=g, dtype=torch.float64) for a in (n, v))
    teacher = Teacher(torch.randn(n, D_TEACHER, generator=g, dtype=torch.float64), torch.randn(v_a, D_TEACHER, generator=g, dtype=torch.float64))
    targets = torch.randint(0, v, (n,), generator=g)
    soft = None
    if kind is not None:
        s = shared or min(v, v_a)
        log_p = torch.log_softmax((teacher.hidden @ teacher.weight.T)[:, :s] / temperature, -1)
        soft = teacher
        if kind == "kept":
            soft = kept(log_p, k)
        elif kind == "drawn":
            ids = torch.randint(0, s, (n, k), generator=g, dtype=torch.int32)
            soft = Drawn(ids, torch.softmax(torch.randn(n, k, generator=g, dtype=torch.float64), -1))
    cast = {key: t if t.dtype == torch.int32 else t.to(dtype) for key, t in vars(soft).items()} if soft else {}
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, type(soft)(**cast) if soft else None


def kept(log_p, k, dtype=torch.float64):
    logs, ids = log_p.topk(k)
    rest = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
    return Kept(ids.int(), logs.to(dtype), rest.to(dtype))


def grads(total, hidden, weight):
    hidden.grad = weight.grad = None
    total.backward()
    return hidden.grad.clone(), weight.grad.clone()


def off(a, b):
    """Largest difference relative to the largest value."""
    return float((a.double() - b.double()).abs().max() / b.abs().max().clamp(min=1e-12)) if b.numel() else 0.0


def compare(hidden, weight, targets, soft, tolerance, chunk, **how):
    """Values and gradients against the reference; a factor on the total, as of a mean over a global batch, goes to the gradients."""
    ours = answer_losses(hidden, weight, targets, soft, chunk=chunk, **how)
    mine = grads(ours.total * 0.37, hidden, weight)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    total, ce, value, dropped = reference(h, w, targets, soft, **how)
    right = grads(total * 0.37, h, w)
    for name, a, b in [("total", ours.total, total), ("ce", ours.ce, ce), ("soft", ours.soft, value)]:
        assert a.item() == pytest.approx(b.item(), rel=tolerance, abs=tolerance), name
    assert float(ours.dropped) == pytest.approx(float(dropped), rel=tolerance, abs=tolerance)
    for a, b in zip(mine, right, strict=True):
        assert a.shape == b.shape and off(a, b) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize(("divergence", "beta"), WAYS)
@pytest.mark.parametrize("kind", ["teacher", "kept"])
def test_values_and_gradients(kind, divergence, beta, chunk, dtype):
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    compare(*make(kind, dtype=dtype), tolerance, chunk, temperature=2.0, divergence=divergence, beta=beta, mix=(0.7, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_values_and_gradients_of_drawn_labels(chunk, dtype):
    compare(*make("drawn", k=9, dtype=dtype), 1e-5 if dtype == torch.float32 else 1e-11, chunk, temperature=2.0, mix=(0.7, 0.3))


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_cross_entropy_alone(chunk):
    hidden, weight, targets, _ = make(None, dtype=torch.float32)
    ours = answer_losses(hidden, weight, targets, chunk=chunk)
    right = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert ours.total.item() == ours.ce.item() == pytest.approx(right.item(), rel=1e-5)
    assert float(ours.soft) == float(ours.dropped) == 0
    for a, b in zip(grads(ours.total, hidden, weight), grads(right, hidden, weight), strict=True):
        assert off(a, b) < 1e-5


@given(
    kind=st.sampled_from(KINDS), n=st.integers(1, 6), v=st.integers(5, 30), v_a=st.integers(5, 30), cut=st.integers(0, 3), k=st.integers(1, 5),
    chunk=st.integers(1, 8), temperature=st.floats(0.5, 5), way=st.sampled_from(WAYS), lam=st.floats(0, 1), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_sizes(kind, n, v, v_a, cut, k, chunk, temperature, way, lam, seed):
    """Vocabularies of different size both ways, a shared part shorter than both, one token, k up to the vocabulary's size."""
    shared = min(v, v_a) - cut
    divergence, beta = (Divergence.FORWARD_KL, 0.5) if kind == "drawn" else way
    if kind == "kept":  # the reference has no 0 · log 0
        k = min(k, shared - 1)
    made = make(kind, n, v, v_a, seed, k=k, temperature=temperature, shared=shared)
    compare(*made, 1e-8, chunk, temperature=temperature, divergence=divergence, beta=beta, shared=shared, mix=(1 - lam, lam))


def test_targets_outside_the_shared_ids_have_their_cross_entropy():
    hidden, weight, _, soft = make("teacher", v=14, v_a=9)
    compare(hidden, weight, torch.tensor([13, 0, 9, 8, 12, 5, 13]), soft, 1e-10, 3, temperature=2.0, mix=(0.7, 0.3))


def test_gradients_are_those_of_the_values():
    """Central differences of `total` itself, apart from any reference."""
    for kind in KINDS:
        hidden, weight, targets, soft = make(kind, n=3, v_a=13)
        if kind == "kept":  # Σp is not quite 1
            soft = Kept(soft.ids, soft.logs.half(), soft.tail)
        elif kind == "drawn":  # nor are importance weights as they are
            soft = Drawn(soft.ids, soft.weights * 1.3)
        for divergence, beta in WAYS if kind != "drawn" else WAYS[:1]:
            how = {"divergence": divergence, "beta": beta, "mix": (0.7, 0.3), "chunk": 2}
            slopes = grads(answer_losses(hidden, weight, targets, soft, **how).total, hidden, weight)
            for x, slope in zip((hidden, weight), slopes, strict=True):
                flat = x.data.view(-1)  # of the tensor itself
                for i in range(0, len(flat), 5):
                    was, ends = float(flat[i]), []
                    for step in (1e-6, -1e-6):
                        flat[i] = was + step
                        ends.append(answer_losses(hidden, weight, targets, soft, **how).total.item())
                    flat[i] = was
                    assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(float(slope.view(-1)[i]), abs=1e-6)


def test_gradient_of_the_soft_loss_does_not_fade_with_temperature():
    """d(T²·KL)/dz = T·(q - p): the factor T² keeps soft and hard gradients of the same order."""
    z = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True)
    a = torch.tensor([[0.0, 2.0, 0.0]])
    answer_losses(z, torch.eye(3), torch.tensor([0]), Teacher(a, torch.eye(3)), mix=(0.0, 1.0)).total.backward()
    assert torch.allclose(z.grad, 2.0 * (torch.softmax(z / 2, -1) - torch.softmax(a / 2, -1)), atol=1e-6)


@pytest.mark.parametrize(("divergence", "beta"), WAYS)
def test_no_divergence_from_oneself(divergence, beta):
    hidden, weight, targets, _ = make(None, n=5, v=500, dtype=torch.float32)
    ours = answer_losses(hidden, weight, targets, Teacher(hidden.detach(), weight.detach()), divergence=divergence, beta=beta, mix=(0.0, 1.0))
    assert float(ours.soft) == pytest.approx(0, abs=2e-5)
    assert all(g.abs().max() < 1e-5 for g in grads(ours.total, hidden, weight))


def test_jsd_has_the_limits_that_it_says():
    made = make("teacher")
    forward, reverse = (float(answer_losses(*made, divergence=d).soft) for d in (Divergence.FORWARD_KL, Divergence.REVERSE_KL))
    low, high = (float(answer_losses(*made, divergence=Divergence.JSD, beta=b).soft) for b in (1e-6, 1 - 1e-6))
    assert low / 1e-6 == pytest.approx(forward, rel=1e-4) and high / 1e-6 == pytest.approx(reverse, rel=1e-4)
    far = Teacher(torch.tensor([[90.0, 0.0]]), torch.eye(2))
    apart = answer_losses(torch.tensor([[0.0, 90.0]]), torch.eye(2), torch.tensor([0]), far, temperature=1.0, divergence=Divergence.JSD)
    assert float(apart.soft) == pytest.approx(math.log(2), rel=1e-6)


# --- kept and drawn labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("divergence", "beta"), WAYS)
@pytest.mark.parametrize("tail", [-torch.inf, -16.0])  # what is left over after rounding belongs to no id
def test_all_ids_kept_is_the_whole_divergence(divergence, beta, tail):
    hidden, weight, targets, teacher = make("teacher")
    labels = kept(torch.log_softmax(teacher.hidden @ teacher.weight.T / 2, -1), 11)
    labels = Kept(labels.ids, labels.logs, torch.full_like(labels.tail, tail))
    how = {"divergence": divergence, "beta": beta, "mix": (0.7, 0.3)}
    whole, lumped = (answer_losses(hidden, weight, targets, soft, **how) for soft in (teacher, labels))
    assert float(lumped.soft) == pytest.approx(float(whole.soft), rel=1e-12)
    for a, b in zip(grads(lumped.total, hidden, weight), grads(whole.total, hidden, weight), strict=True):
        assert off(a, b) < 1e-12


@given(seed=st.integers(0, 10_000), spread=st.floats(0.1, 6), way=st.sampled_from(WAYS))
@settings(max_examples=60, deadline=None)
def test_kept_labels_are_a_lower_bound_that_grows_with_k(seed, spread, way):
    hidden, weight, targets, teacher = make("teacher", n=1, v=20, v_a=20, seed=seed)
    teacher = Teacher(teacher.hidden * spread, teacher.weight)
    log_p = torch.log_softmax(teacher.hidden @ teacher.weight.T / 2, -1)
    how = {"divergence": way[0], "beta": way[1]}
    values = [float(answer_losses(hidden, weight, targets, kept(log_p, k), **how).soft) for k in (1, 3, 8, 19)]
    values.append(float(answer_losses(hidden, weight, targets, teacher, **how).soft))
    assert values[0] >= 0 and all(a <= b + 1e-12 for a, b in zip(values, values[1:], strict=False))


@pytest.mark.parametrize(("divergence", "beta"), WAYS)
def test_rounded_logs_make_no_loss_negative(divergence, beta):
    """A student that equals the assistant, labels in fp16: Σ p log(p/q) itself is below 0 in some rows."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 50, generator=g)
    log_p = torch.log_softmax(z / 2, -1)
    labels = kept(log_p, 8, torch.float16)
    p, q = labels.logs.float(), log_p.gather(1, labels.ids.long())
    p, q = torch.cat([p, labels.tail.float()[:, None]], -1), torch.cat([q, (-q.exp().sum(-1, keepdim=True)).log1p()], -1)
    assert (p.exp() * (p - q)).sum(-1).min() < -1e-4
    for i in range(0, 200, 10):
        rows = Kept(labels.ids[i : i + 1], labels.logs[i : i + 1], labels.tail[i : i + 1])
        loss = answer_losses(z[i : i + 1], torch.eye(50), torch.tensor([0]), rows, divergence=divergence, beta=beta)
        assert -1e-6 < float(loss.soft) < 1e-4


@pytest.mark.parametrize(("divergence", "beta"), WAYS)
def test_odd_rows_of_kept_labels(divergence, beta):
    """A row with no entry, one with fewer than k, one without a tail, one whose tail all but hides the ids: losses and gradients are finite."""
    hidden, weight, targets, _ = make(None, n=4, v=6, dtype=torch.float32)
    none = -torch.inf
    ids = torch.tensor([[0, 0, 0], [2, -1, 0], [5, 1, 3], [4, 0, 1]], dtype=torch.int32)
    logs = torch.tensor([[none, none, none], [math.log(0.6), none, none], [math.log(0.5), math.log(0.3), math.log(0.2)], [-40.0, -41.0, -300.0]])
    tail = torch.tensor([0.0, math.log(0.4), none, 0.0])
    ours = answer_losses(hidden, weight, targets, Kept(ids, logs, tail), divergence=divergence, beta=beta, chunk=3)
    assert math.isfinite(ours.soft) and ours.soft > 0 and ours.dropped == 0
    assert all(g.isfinite().all() for g in grads(ours.total, hidden, weight))
    # One row each: nothing is known of the first, and the second is a matter of id 2 against the others.
    alone = [answer_losses(hidden[i : i + 1], weight, targets[:1], Kept(ids[i : i + 1], logs[i : i + 1], tail[i : i + 1]),
                           divergence=divergence, beta=beta).soft for i in range(4)]  # fmt: skip
    assert float(alone[0]) == pytest.approx(0, abs=1e-6) and float(sum(alone)) == pytest.approx(float(ours.soft), rel=1e-5)
    assert float(alone[2]) < 4 * 17  # a tail of nothing is not infinitely far
    q = torch.softmax((hidden[1] @ weight.T).detach().double() / 2, -1)[2]
    two = between(torch.tensor([0.6, 0.4]), torch.stack([q, 1 - q]), divergence, beta)
    assert float(alone[1]) == pytest.approx(4 * float(two), rel=1e-5)


def test_more_kept_ids_than_shared_ones():
    """Ids beyond the shared ones are left out, and their probability is told."""
    hidden, weight, targets, teacher = make("teacher", v=9, v_a=12)
    labels = kept(torch.log_softmax(teacher.hidden @ teacher.weight.T / 2, -1), 12)
    ours = answer_losses(hidden, weight, targets, labels, mix=(0.7, 0.3))
    whole = answer_losses(hidden, weight, targets, teacher, mix=(0.7, 0.3))
    assert float(ours.dropped) == pytest.approx(float(whole.dropped), rel=1e-9) and float(whole.dropped) > 0
    assert all(g.isfinite().all() for g in grads(ours.total, hidden, weight))
    weights = torch.full((7, 12), 1 / 12, dtype=torch.float64)
    drawn = answer_losses(hidden, weight, targets, Drawn(torch.arange(12).repeat(7, 1), weights))
    assert float(drawn.dropped) == pytest.approx(7 * 3 / 12 / 2, rel=1e-9)


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_drawn_labels_are_unbiased(power):
    """Draws from p^power with importance weights: over many, the loss and its gradient are those of the cross term -Σ p log q."""
    n, m, groups = 20_000, 4, 100
    hidden, weight, targets, teacher = make("teacher", n=1, v=30, v_a=30)
    p = torch.softmax(teacher.hidden @ teacher.weight.T / 2, -1)[0]
    proposal = p**power / (p**power).sum()
    ids = torch.multinomial(proposal, n * m, replacement=True, generator=torch.Generator().manual_seed(1)).view(n, m)
    labels = Drawn(ids.int(), (p / proposal)[ids] / m)
    many = hidden.detach().repeat(n, 1).requires_grad_()

    log_q = torch.log_softmax(hidden @ weight.T / 2, -1)
    (4 * -(p * log_q).sum()).backward()
    answer_losses(many, weight, targets.repeat(n), labels, chunk=5000, mix=(0.0, 1.0)).total.backward()
    error = (many.grad.mean(0) - hidden.grad[0]) / (many.grad.std(0) / n**0.5)
    assert error.abs().max() < 4
    each = n // groups
    values = torch.stack([
        answer_losses(many[i : i + each], weight, targets.repeat(each), Drawn(labels.ids[i : i + each], labels.weights[i : i + each])).soft / each
        for i in range(0, n, each)
    ])  # fmt: skip
    assert abs(values.mean().item() + 4 * (p * log_q).sum().item()) < 4 * float(values.std()) / groups**0.5


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_no_answer_tokens(kind):
    """A batch without answers still takes part in `backward`: under FSDP the other workers wait for it."""
    hidden, weight, targets, soft = make(kind, n=0)
    ours = answer_losses(hidden, weight, targets, soft)
    assert all(x.item() == 0 for x in ours)
    h, w = grads(ours.total, hidden, weight)
    assert h.shape == (0, D) and w.shape == (11, D) and (w == 0).all()


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_only_asked_gradients_are_made(kind):
    hidden, weight, targets, soft = make(kind)
    full = grads(answer_losses(hidden, weight, targets, soft).total, hidden, weight)
    for i, frozen in enumerate((weight, hidden)):  # a frozen output layer, as under LoRA; or nothing but it trains
        frozen.requires_grad_(False)
        hidden.grad = weight.grad = None
        answer_losses(hidden, weight, targets, soft).total.backward()
        assert frozen.grad is None and torch.equal((hidden, weight)[i].grad, full[i])
        frozen.requires_grad_(True)
    with torch.no_grad():
        assert not answer_losses(hidden, weight, targets, soft).total.requires_grad
    parts = answer_losses(hidden, weight, targets, soft)
    assert parts.total.requires_grad and not any(x.requires_grad for x in parts[1:])


def test_output_layer_tied_to_the_embeddings():
    _, weight, targets, soft = make("teacher")
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    answer_losses(weight[ids], weight, targets, soft, temperature=2.0).total.backward()
    tied, weight.grad = weight.grad, None
    reference(weight[ids], weight, targets, soft, temperature=2.0)[0].backward()
    assert off(tied, weight.grad) < 1e-11


def test_there_is_one_backward():
    hidden, weight, targets, soft = make("teacher")
    total = answer_losses(hidden, weight, targets, soft).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        total.backward()


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_bfloat16_is_close_to_float64(kind):
    """Within what rounding each logit to 8 bits does."""
    hidden, weight, targets, soft = make(kind, n=40, v=300, v_a=310, dtype=torch.bfloat16)
    if kind == "kept":  # half-precision tables, but not bfloat16
        soft = make(kind, n=40, v=300, v_a=310, dtype=torch.float16)[3]
    if kind == "drawn":
        soft = Drawn(soft.ids, soft.weights.float() / soft.weights.float().sum(-1, keepdim=True))
    ours = answer_losses(hidden, weight, targets, soft, chunk=16, shared=300, mix=(0.7, 0.3))
    mine = grads(ours.total, hidden, weight)
    assert {x.dtype for x in ours} == {torch.float32} and {x.dtype for x in mine} == {torch.bfloat16}
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    blank = Drawn(torch.zeros(40, 1, dtype=torch.int32), torch.zeros(40, 1)) if soft is None else soft
    right = reference(h, w, targets, blank, temperature=2.0, mix=(0.7, 0.3), shared=300)
    for a, b in zip(ours, right, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=5e-3, abs=1e-6)
    for a, b in zip(mine, grads(right[0], h, w), strict=True):
        assert off(a, b) < 1e-2


def test_the_gradient_of_a_bfloat16_layer_is_summed_in_float32():
    """600 equal tokens, one a chunk: in bfloat16, whose numbers above 256 are 2 apart, the sum would stop growing."""
    hidden = torch.ones(600, 2, dtype=torch.bfloat16)
    weight = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    answer_losses(hidden, weight, torch.zeros(600, dtype=torch.int64), chunk=1).total.backward()
    assert weight.grad[:, 0].tolist() == [-450, 150, 150, 150]


class Largest(TorchDispatchMode):
    """The most elements that the storage of any tensor has, of all that operations make; a view of what was there is not made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in there:
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize(("divergence", "beta"), WAYS)
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_logits_never_exist(kind, divergence, beta, dtype):
    if kind == "drawn":
        divergence = Divergence.FORWARD_KL
    hidden, weight, targets, soft = make(kind, n=64, v=1000, v_a=1100, dtype=dtype)
    with Largest() as seen:
        hidden @ weight.T
    assert seen.elements == 64 * 1000
    with Largest() as seen:
        answer_losses(hidden, weight, targets, soft, divergence=divergence, beta=beta, chunk=8).total.backward()
    assert 8 * 1000 <= seen.elements <= 8 * 1100
    with Largest() as seen:  # nor a gradient [v, d] that nobody asked for
        answer_losses(hidden, weight.detach(), targets, soft, divergence=divergence, beta=beta, chunk=2).total.backward()
    assert 2 * 1000 <= seen.elements <= 2 * 1100 < 1000 * D


# --- under FSDP2 -----------------------------------------------------------------------------------------------------


class Root(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = torch.nn.Linear(D, D), torch.nn.Linear(D, 11, bias=False)

    def forward(self, x, targets, soft):
        self.seen = None if soft is None else soft.logs.dtype
        return answer_losses(self.body(x), self.head.weight, targets, soft, chunk=3)


@pytest.mark.parametrize("half", [False, True])
def test_inside_the_forward_of_a_sharded_module(tmp_path, half):
    """One process is enough to see sharded parameters (DTensors outside of `forward`), casts and hooks."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    x, _, targets, soft = make("kept", dtype=torch.float32)
    x, soft = x.detach(), Kept(soft.ids, soft.logs.half(), soft.tail)
    plain, sharded = Root(), Root()
    right = plain(x, targets, soft)
    right.total.backward()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
        fully_shard(sharded, reshard_after_forward=True, mp_policy=policy)
        ours = sharded(x, targets, soft)
        ours.total.backward()
        assert sharded.seen == torch.float16  # not cast on the way in
        assert ours.total.item() == pytest.approx(right.total.item(), rel=1e-2 if half else 1e-6)
        for a, b in zip(sharded.parameters(), plain.parameters(), strict=True):
            assert off(a.grad.full_tensor(), b.grad) < (2e-2 if half else 1e-6)
    finally:
        dist.destroy_process_group()


# --- what cannot be --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "says"), [
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"temperature": math.nan}, "temperature is nan"),
    ({"chunk": 0}, "chunk is 0"),
    ({"divergence": Divergence.JSD, "beta": 0.0}, "beta is 0.0.*forward_kl"),
    ({"divergence": Divergence.JSD, "beta": 1.0}, "beta is 1.0"),
])  # fmt: skip
def test_wrong_settings(how, says):
    with pytest.raises(ConfigError, match=says):
        answer_losses(*make("teacher"), **how)


def test_wrong_pairs():
    with pytest.raises(ConfigError, match="forward_kl alone, not reverse_kl"):
        answer_losses(*make("drawn"), divergence=Divergence.REVERSE_KL)
    for shared in (0, 12):
        with pytest.raises(TrainingError, match=f"shared is {shared}; .* between 1 and 11"):
            answer_losses(*make("teacher", v_a=13), shared=shared)
    hidden, weight, targets, _ = make(None)
    with pytest.raises(TrainingError, match=r"hidden states are \(6, 6\); 7 targets"):
        answer_losses(hidden[:6], weight, targets)
    for kind in KINDS:
        with pytest.raises(TrainingError, match="soft labels of 7 tokens cannot have the shapes"):
            answer_losses(hidden, weight, targets, make(kind, n=5)[3])


# --- positions -------------------------------------------------------------------------------------------------------


def test_positions_are_the_answers_and_shifted():
    hidden = torch.arange(2 * 5).reshape(2, 5, 1).float()
    labels = torch.tensor([[IGNORE, IGNORE, 7, 8, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE, 0]])  # 0 is a token like any other
    h, y = answer_positions(hidden, labels)
    assert h.flatten().tolist() == [1, 2, 8] and y.tolist() == [7, 8, 0]


def test_collate_masks_by_length_even_where_pad_is_a_real_token():
    import numpy as np

    a = Example(np.array([5, 0, 6, 0]), np.array([IGNORE, IGNORE, 6, 0]), None)
    b = Example(np.array([5, 9]), np.array([IGNORE, 9]), None)
    batch = collate([a, b], pad_id=0, image_token_id=99)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 6, 0], [IGNORE, 9, IGNORE, IGNORE]]
    assert "pixel_values" not in batch
