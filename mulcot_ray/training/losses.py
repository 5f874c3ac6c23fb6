"""Losses over answer tokens, in sums, so that the caller can take the mean over the global batch however it is split.

    L_k = (1 - λ) · CE(student, answer) + λ · T² · KL( softmax(z_a / T) ‖ softmax(z_s / T) )      (METHOD: stage 4)

A position t predicts the token at t + 1, for the soft loss exactly as for the hard one; prompt and padding take no part.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mulcot_ray.training.examples import IGNORE


def answer_positions(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [n, d] of the positions that predict an answer token, and those tokens [n], from [b, t, d] and [b, t]."""
    targets = labels[:, 1:]
    keep = targets != IGNORE
    return hidden[:, :-1][keep], targets[keep]


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum over tokens of the cross-entropy in nats; logits [n, v], targets [n]."""
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def soft_sum(logits: Tensor, soft_logits: Tensor, temperature: float) -> Tensor:
    """T² · Σ KL(softmax(soft/T) ‖ softmax(logits/T)) in nats, over the vocabulary that both have: [n, v_s] and [n, v_a].

    Qwen2.5-VL pads its output layer differently by size (152064 for 7B, 151936 for 3B); the ids up to the shorter are the same
    tokens (`check_vocabularies`), so both are cut to it before the softmax.
    """
    shared = min(logits.shape[-1], soft_logits.shape[-1])
    log_q = F.log_softmax(logits[:, :shared].float() / temperature, dim=-1)
    log_p = F.log_softmax(soft_logits[:, :shared].float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="sum", log_target=True)


class TaskLoss(torch.nn.Module):
    """A model with its loss inside `forward`: what touches sharded parameters (the output layer too) must happen there."""

    def __init__(self, model: torch.nn.Module, temperature: float) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(
        self, batch: dict[str, Tensor], soft_logits: Tensor | None = None, label_ids: list[int] | None = None
    ) -> tuple[Tensor, Tensor] | Tensor:
        """(sum of CE, sum of T²·KL) over the answer tokens; with `label_ids`, instead, the logits [b, 3] of the label words."""
        hidden, targets = answer_positions(*hidden_states(self.model, batch))
        if label_ids is not None:
            words = torch.tensor(label_ids, device=targets.device)
            return core(self.model).lm_head(hidden[torch.isin(targets, words)])[:, words]
        logits = core(self.model).lm_head(hidden)
        hard = cross_entropy_sum(logits, targets)
        soft = soft_sum(logits, soft_logits, self.temperature) if soft_logits is not None else hard.new_zeros(())
        return hard, soft


class AnswerLogits(torch.nn.Module):
    """A frozen model's logits at the answer positions [n, v] (the assistant's side of the soft loss)."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        hidden, _ = answer_positions(*hidden_states(self.model, batch))
        logits: Tensor = core(self.model).lm_head(hidden)
        return logits


def hidden_states(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states [b, t, d] and the labels [b, t]."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    return core(model).model(**inputs, use_cache=False).last_hidden_state, batch["labels"]


def core(model: torch.nn.Module) -> torch.nn.Module:
    """The transformers model inside a peft wrapper, or the model itself."""
    inner: torch.nn.Module = model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]
    return inner
