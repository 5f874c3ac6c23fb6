"""Losses over answer tokens, in sums, so that the caller can take the mean over the global batch however it is split.

    L_k = (1 - λ) · CE(student, answer) + λ · T² · D( softmax(z_a / T), softmax(z_s / T) )      (METHOD: stage 4)

D is KL(assistant ‖ student) in the method; `Divergence` has others. A position t predicts the token at t + 1, for the soft loss exactly as for
the hard one; prompt and padding take no part.

`answer_losses` starts from hidden states and goes through the tokens in chunks: no model's logits [n, v] ever exist. It makes the gradients
while a chunk's logits are there, instead of making the logits again in `backward`: that saves one product with each output layer, and neither
layer has to be there when `backward` runs (FSDP may have resharded it).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.training.examples import IGNORE

ABSENT = -1e4  # a log-probability that is finite, so that 0 · log 0 is 0 and not nan, and whose exponential is 0 in every dtype
UNSEEN = math.log(torch.finfo(torch.float32).eps)  # the mass that float32 loses of a tail 1 - Σp


class Divergence(StrEnum):
    """From the assistant's distribution p to the student's q, in nats.

    FORWARD_KL  Σ p log(p / q)
    REVERSE_KL  Σ q log(q / p)
    JSD         β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q, 0 < β < 1: the generalised JSD of GKD (arXiv 2306.13649).
                It goes to 0 at both ends: JSD / β → forward KL as β → 0, JSD / (1 - β) → reverse KL as β → 1. Never above the entropy of
                (β, 1 - β), so at most ln 2.
    """

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"


# The kinds of soft labels are plain classes on purpose. FSDP2 casts what it finds in the arguments of a root's `forward`, in dataclasses and tuples
# too, to its parameters' dtype, and log-probabilities in bfloat16 have three digits left. It does not look into other classes.


class Teacher:
    """An assistant online: its hidden states [n, d_a] at the answer positions and its output layer [v_a, d_a]. Constants."""

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self.hidden, self.weight = hidden, weight


class Kept:
    """The assistant's k likeliest ids and one lumped rest, made at the temperature of training, over the shared ids.

    `ids` [n, k] integers, distinct within a row; `logs` [n, k] their log-probabilities; `tail` [n] the log-probability of all others together
    (-inf: none). The k are not renormalised: student and assistant are compared over k + 1 outcomes, which by the log-sum inequality never
    exceeds the divergence over the whole vocabulary, and equals it where k is all of it. What rounding adds to Σp or takes from it is allowed
    for (each term is p log(p/q) - p + q), so fp16 logs cannot make a loss negative. Entries of log -inf are no entries: a row may have
    fewer than k. Ids outside the shared vocabulary are left out and counted in `dropped`. For the reverse KL, which is infinite from
    nothing, a tail of -inf is taken as 2^-23: what float32 loses of 1 - Σp.
    """

    def __init__(self, ids: Tensor, logs: Tensor, tail: Tensor) -> None:
        self.ids, self.logs, self.tail = ids, logs, tail


class Drawn:
    """Sampled soft labels (random sampling KD, arXiv 2503.16870): `ids` [n, m], repeats allowed, and weights [n, m] that sum to 1 in a row.

    Where the expected weight of each id is the assistant's probability (m draws from it, each of weight 1/m), -Σ w log q and its gradient
    are unbiased for the cross term -Σ p log q of the forward KL. So are draws from another distribution with importance weights as they are,
    which sum to 1 on the mean of many rows only; divided by their sum they have a bias that fades as 1/m. The KL is the cross term less the
    assistant's entropy, a constant that draws do not tell: this loss is above T² · KL by T² · H(p) a token and does not reach zero. An entry of
    weight 0 is none.
    """

    def __init__(self, ids: Tensor, weights: Tensor) -> None:
        self.ids, self.weights = ids, weights


Soft = Teacher | Kept | Drawn


class Losses(NamedTuple):
    """Sums over the answer tokens, as tensors of no dimension: float32, or float64 for float64 inputs. Only `total` carries gradients.

    A tuple, so that FSDP2 finds `total` in what a module's `forward` gives back.
    """

    total: Tensor  # mix[0] · ce + mix[1] · soft
    ce: Tensor  # cross-entropy over the student's whole vocabulary, in nats
    soft: Tensor  # T² · divergence, in nats; 0 without soft labels
    dropped: Tensor  # probability at T outside the shared ids, the mean of both models'; of Kept and Drawn, as far as their ids show it


def answer_losses(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    soft: Soft | None = None,
    *,
    temperature: float = 2.0,
    divergence: Divergence = Divergence.FORWARD_KL,
    beta: float = 0.5,
    shared: int | None = None,
    chunk: int = 256,
    mix: tuple[float, float] = (1.0, 1.0),
) -> Losses:
    """Hard and soft loss of `hidden` [n, d], the states that predict the tokens `targets` [n] through the output layer `weight` [v, d].

    Gradients of `total` go to `hidden` and `weight`, where they are asked for; n = 0 gives zeros, with gradients of zero. `shared`: both
    vocabularies mean the same by ids below it (`check_vocabularies`); the default is the shorter output layer: Qwen2.5-VL pads it by size
    (152064 for 7B, 151936 for 3B). The soft loss is over these ids alone.

    At most `chunk` rows of logits of each model exist at a time, in four buffers of [chunk, v] float32 (six for the JSD): 0.6 GiB at 256 rows
    and 151,936 ids. More rows are hardly faster: 512 saved 5 % on two cores, and 128 cost 20 %. Products run in the inputs' dtype; softmax, sums
    and the weight's gradient are in float32 at least. There is `backward` once only (a second one raises RuntimeError), for the gradients
    are scaled where they lie.

    Raises ConfigError for settings and TrainingError for shapes that cannot be.
    """
    _check_settings(temperature, divergence, beta, chunk, soft)
    _check_shapes(hidden, weight, targets, soft)
    widest = min(len(weight), len(soft.weight)) if isinstance(soft, Teacher) else len(weight)
    if shared is None:
        shared = widest
    elif not 1 <= shared <= widest:
        raise TrainingError(f"shared is {shared}; the models have between 1 and {widest} ids in common")
    how = _How(temperature, divergence, beta, shared, chunk, mix)
    return Losses(*_AnswerLosses.apply(hidden, weight, targets, soft, how, torch.is_grad_enabled()))


@dataclass(frozen=True)
class _How:
    temperature: float
    divergence: Divergence
    beta: float
    shared: int
    chunk: int
    mix: tuple[float, float]


class _AnswerLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, soft: Soft | None, how: _How, training: bool) -> tuple[Tensor, ...]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        sums = torch.zeros(3, dtype=exact, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if training and ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=exact) if training and ctx.needs_input_grad[1] else None
        for lo in range(0, len(targets), how.chunk):
            rows = slice(lo, lo + how.chunk)
            parts, slope = _chunk(hidden[rows], weight, targets[rows], _rows(soft, rows), how, d_hidden is not None or d_weight is not None)
            sums += parts
            if slope is None:
                continue
            slope = slope.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(slope, weight, out=d_hidden[rows])
            if d_weight is not None:
                _add_product(d_weight, slope, hidden[rows])
            del slope  # or it would be there beside the next chunk's logits
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = weight.dtype
        ce, divergence, dropped = (s.clone() for s in sums)
        out = (how.mix[0] * ce + how.mix[1] * divergence, ce, divergence, dropped)
        ctx.mark_non_differentiable(*out[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since [v, d] is large: autograd sees it, and refuses a second backward.
        d_hidden, d_weight = ctx.saved_tensors
        return (
            d_hidden.mul_(scale) if d_hidden is not None else None,
            d_weight.mul_(scale).to(ctx.dtype) if d_weight is not None else None,
            None, None, None, None,
        )  # fmt: skip


def _chunk(hidden: Tensor, weight: Tensor, targets: Tensor, soft: Soft | None, how: _How, training: bool) -> tuple[Tensor, Tensor | None]:
    """(sums of CE, T² · divergence and dropped mass [3]; gradient of the mixed sum with respect to the logits [c, v], or None).

    Works in place and lets go early: each buffer is as large as all that this module promises to keep small.
    """
    t, (hard_share, soft_share), picked = how.temperature, how.mix, targets[:, None]
    logs = torch.log_softmax(_logits(hidden, weight), -1)
    ce, slope = -logs.gather(1, picked).sum(), None
    if training:
        slope = logs.exp() if soft is not None else logs.exp_()
        slope.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=slope.dtype)).mul_(hard_share)
    if soft is None:
        return torch.stack([ce, ce.new_zeros(()), ce.new_zeros(())]), slope
    logs.div_(t)  # logits / T, but for a constant of each row
    if isinstance(soft, Teacher):
        log_q = torch.log_softmax(logs[:, : how.shared], -1)
        dropped = _outside(logs, log_q, logs[:, how.shared :])
        del logs
        value, pull, missed = _teacher(soft, log_q, how)
        if slope is not None:
            slope[:, : how.shared].add_(pull, alpha=soft_share * t)  # T² of the loss, 1/T of the softmax
    else:
        few = _few(soft, logs, how)
        value, dropped, missed = few.value, few.dropped, few.missed
        if slope is not None:
            slope[:, : how.shared].addcmul_(logs[:, : how.shared], few.rest * (soft_share * t)).scatter_add_(1, few.ids, few.pull * (soft_share * t))
    return torch.stack([ce, value.sum() * t**2, (dropped + missed).sum() / 2]), slope


def _teacher(soft: Teacher, log_q: Tensor, how: _How) -> tuple[Tensor, Tensor, Tensor]:
    """(divergence [c]; its gradient with respect to the student's logits / T [c, shared]; the assistant's probability outside the shared ids [c]).
    Overwrites log_q."""
    # Two products: a softmax over a part of a wider buffer would copy it first.
    logits = _logits(soft.hidden, soft.weight[: how.shared]).div_(how.temperature)
    beyond = _logits(soft.hidden, soft.weight[how.shared :]).div_(how.temperature)
    log_p = torch.log_softmax(logits, -1)
    missed = _outside(logits, log_p, beyond)
    del logits
    return *_divergence(log_p.to(log_q.dtype), log_q, how), missed


class _Few(NamedTuple):
    """A divergence from few ids of each row, and its gradient: `rest` [c, 1] times what is in the buffer, and `pull` [c, k] more at `ids`."""

    value: Tensor  # [c]
    dropped: Tensor  # [c]: the student's probability outside the shared ids
    missed: Tensor  # [c]: the assistant's
    rest: Tensor
    ids: Tensor
    pull: Tensor


def _few(soft: Kept | Drawn, logits: Tensor, how: _How) -> _Few:
    """From the student's logits / T [c, v], none of them large. They are replaced by their exponentials; those of ids that `Kept` has, by 0."""
    given, ids = (soft.logs if isinstance(soft, Kept) else soft.weights).to(logits.dtype), soft.ids.long()
    inside = (ids >= 0) & (ids < how.shared)
    ids = ids.masked_fill(~inside, 0)  # entries that are not there add 0 to the first id
    told, exact = logits.gather(1, ids), logits.exp_()
    mass, beyond = exact[:, : how.shared].sum(-1, keepdim=True), exact[:, how.shared :].sum(-1)
    mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    dropped = beyond / (beyond + mass[:, 0])
    told = told - mass.log()  # log q
    if isinstance(soft, Drawn):
        missed, weights = given.masked_fill(inside, 0).sum(-1), given.masked_fill(~inside, 0)
        return _Few(-(weights * told).sum(-1), dropped, missed, weights.sum(-1, keepdim=True) / mass, ids, -weights)
    missed = given.exp().masked_fill(inside, 0).sum(-1)
    there = inside & (given > ABSENT)
    exact.scatter_add_(1, ids, -exact.gather(1, ids).masked_fill(~there, 0))  # now of the rest alone, without rounding: ids are distinct
    others = exact[:, : how.shared].sum(-1, keepdim=True)
    rest = others.log() - mass.log()
    floor = UNSEEN if how.divergence is Divergence.REVERSE_KL else ABSENT
    tail = soft.tail.to(logits.dtype)[:, None]
    tail = tail.masked_fill(tail == -torch.inf, floor).masked_fill(rest == -torch.inf, ABSENT)
    log_p = torch.cat([given.masked_fill(~there, ABSENT), tail], -1)
    value, pull = _divergence(log_p, torch.cat([told.masked_fill(~there, ABSENT), rest.clamp(min=ABSENT)], -1), how)
    # The lumped outcome's logit is the log-sum-exp of its ids': each has its share of the pull.
    return _Few(value, dropped, missed, pull[:, -1:] / others.clamp(min=torch.finfo(mass.dtype).tiny), ids, pull[:, :-1])


def _divergence(log_p: Tensor, log_q: Tensor, how: _How) -> tuple[Tensor, Tensor]:
    """(divergence of each row [c], its gradient with respect to the logits of q [c, m]) over m outcomes. Overwrites both inputs.

    With g the gradient with respect to log q, that of the logits is g - q Σg. Terms are those of the divergence between measures
    (p log(p/q) - p + q), each no less than 0; where Σp = 1 they sum to the usual one, and where rounding spoils that, they are still right.
    """
    if how.divergence is Divergence.FORWARD_KL:  # g = -p
        p = log_p.exp()
        mass = p.sum(-1)
        value = log_p.sub_(log_q).mul_(p).sum(-1) + 1 - mass
        return value, log_q.exp_().mul_(mass[:, None]).sub_(p)
    q = log_q.exp()
    if how.divergence is Divergence.REVERSE_KL:  # g = q log(q / p)
        mass = log_p.exp().sum(-1)
        g = log_q.sub_(log_p).mul_(q)
        total = g.sum(-1)
        return total + mass - 1, g.sub_(q.mul_(total[:, None]))
    ours, theirs = math.log(1 - how.beta), math.log(how.beta)  # g = (1 - β) q log(q / m)
    log_m = torch.logaddexp(log_p.add_(theirs), log_q.add_(ours))
    p = log_p.exp()  # β p
    value = log_p.sub_(log_m).sub_(theirs).mul_(p).sum(-1)
    g = log_q.sub_(log_m).sub_(ours).mul_(q).mul_(1 - how.beta)
    total = g.sum(-1)
    return value + total, g.sub_(q.mul_(total[:, None]))


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))


def _outside(logits: Tensor, logs: Tensor, beyond: Tensor) -> Tensor:
    """Probability [c] of the logits `beyond` [c, r], in a softmax over them and those whose log-softmax is `logs`; both begin at id 0."""
    if beyond.shape[-1] == 0:
        return logs.new_zeros(len(logs))
    return torch.sigmoid(beyond.logsumexp(-1) - (logits[:, 0] - logs[:, 0]))


def _rows(soft: Soft | None, rows: slice) -> Soft | None:
    if isinstance(soft, Teacher):
        return Teacher(soft.hidden[rows], soft.weight)
    return soft if soft is None else type(soft)(*(t[rows] for t in vars(soft).values()))


def _add_product(total: Tensor, slope: Tensor, hidden: Tensor) -> None:
    """total [v, d] += slopeᵀ [v, c] @ hidden [c, d]; where the total is of a wider dtype, in pieces, so that no second [v, d] is made."""
    if total.dtype == hidden.dtype:
        total.addmm_(slope.T, hidden)
        return
    for lo in range(0, len(total), 16384):
        total[lo : lo + 16384] += slope[:, lo : lo + 16384].T @ hidden


def _check_settings(temperature: float, divergence: Divergence, beta: float, chunk: int, soft: Soft | None) -> None:
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; it must be above 0")
    if chunk < 1:
        raise ConfigError(f"chunk is {chunk}; it must be at least 1 row")
    if divergence is Divergence.JSD and not 0 < beta < 1:
        raise ConfigError(f"beta is {beta}; it must be between 0 and 1, where the JSD is 0: use forward_kl or reverse_kl for its limits")
    if isinstance(soft, Drawn) and divergence is not Divergence.FORWARD_KL:
        raise ConfigError(f"drawn soft labels estimate forward_kl alone, not {divergence}: keep the top k instead")


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, soft: Soft | None) -> None:
    n = len(targets)
    if hidden.shape != (n, weight.shape[1]):
        raise TrainingError(f"hidden states are {tuple(hidden.shape)}; {n} targets and a layer {tuple(weight.shape)} need {(n, weight.shape[1])}")
    if soft is None:
        return
    if isinstance(soft, Teacher):
        right = soft.hidden.shape == (n, soft.weight.shape[1])
    elif isinstance(soft, Kept):
        right = soft.ids.shape == soft.logs.shape and soft.ids.dim() == 2 and len(soft.ids) == n and soft.tail.shape == (n,)
    else:
        right = soft.ids.shape == soft.weights.shape and soft.ids.dim() == 2 and len(soft.ids) == n
    if not right:
        shapes = ", ".join(f"{k} {tuple(t.shape)}" for k, t in vars(soft).items())
        raise TrainingError(f"soft labels of {n} tokens cannot have the shapes {shapes}")


def answer_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [n, d] of the positions that predict an answer token, and those tokens [n], from [b, t, d] and [b, t]."""
    targets = labels[:, 1:]
    keep = targets != IGNORE
    return hidden[:, :-1][keep], targets[keep]
