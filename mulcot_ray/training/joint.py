"""The module that is sharded and trained: the student, a frozen assistant beside it, and everything that needs their output layers.

FSDP2 gathers a root's own parameters in its `forward` alone. So both models are in one root, and the losses, the label words' logits and the
writing of answers happen in its `forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mulcot_ray.recipe import Distill
from mulcot_ray.training.losses import Divergence, Drawn, Kept, Losses, Teacher, answer_losses
from mulcot_ray.training.model import core, output_weight
from mulcot_ray.training.packing import answer_rows, last_hidden

Batch = Mapping[str, Tensor]


class TaskLosses(NamedTuple):
    """`total` carries the gradients; `parts` [tasks, 3] are sums over answer tokens of CE, soft loss and dropped mass."""

    total: Tensor
    parts: Tensor


class Joint(nn.Module):
    """`shared`: ids that both vocabularies have; None without soft labels, when the loss is the cross-entropy alone."""

    def __init__(self, student: nn.Module, assistant: nn.Module | None, distill: Distill, shared: int | None, chunk: int) -> None:
        super().__init__()
        self.student, self.assistant = student, assistant
        if assistant is not None:
            assistant.requires_grad_(False)
        self.distill, self.shared, self.chunk = distill, shared, chunk
        self.train()

    def train(self, mode: bool = True) -> Joint:
        """The assistant never trains: the authors' keeps its dropout on, and the soft labels their noise."""
        super().train(mode)
        if self.assistant is not None:
            self.assistant.eval()
        return self

    def forward(
        self, batch: Batch, scales: Sequence[float] = (), cached: Sequence[Kept | Drawn] | None = None, words: Sequence[int] | None = None,
        write: Mapping[str, Any] | None = None,
    ) -> TaskLosses | Tensor:  # fmt: skip
        """The losses of a batch of `Packer`, a factor for each task in `scales`; `cached` are soft labels for each task's answer tokens.

        With `words`, instead, the logits [b, len(words)] where one of these token ids stands in the answers. With `write`, instead, what
        `generate` of the transformers model returns for the batch, its inputs, and these options.
        """
        if write is not None:
            written: Tensor = core(self.student).generate(**batch, **write)
            return written
        if words is not None:
            hidden, targets = answer_rows(last_hidden(self.student, batch), batch)[0]
            weight, ids = output_weight(self.student), torch.tensor(words, device=hidden.device)
            return hidden[torch.isin(targets, ids)] @ weight[ids].T
        soft: Sequence[Teacher | Kept | Drawn | None] = cached or [None] * len(scales)
        if self.assistant is not None:  # before the student's activations are there
            with torch.no_grad():
                theirs = answer_rows(last_hidden(self.assistant, batch), batch)
                soft = [Teacher(hidden, output_weight(self.assistant)) for hidden, _ in theirs]
        rows = answer_rows(last_hidden(self.student, batch), batch)
        weight = output_weight(self.student)
        found = [self._loss(h, weight, t, s, scale) for (h, t), s, scale in zip(rows, soft, scales, strict=True)]
        return TaskLosses(torch.stack([x.total for x in found]).sum(), torch.stack([torch.stack([x.ce, x.soft, x.dropped]) for x in found]))

    def _loss(self, hidden: Tensor, weight: Tensor, targets: Tensor, soft: Teacher | Kept | Drawn | None, scale: float) -> Losses:
        d = self.distill
        lam = 0.0 if soft is None else d.lam
        return answer_losses(
            hidden, weight, targets, soft, temperature=d.temperature, divergence=Divergence(d.divergence), beta=d.beta, shared=self.shared,
            chunk=self.chunk, mix=(scale * (1 - lam), scale * lam),
        )  # fmt: skip
