"""From a worker's rows of one step to micro-batches of tensors: what runs in Ray Data's thread beside the training one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from ray.data.collate_fn import ArrowBatchCollateFn
from torch import Tensor

from mulcot_ray.errors import RowFault
from mulcot_ray.records import Task
from mulcot_ray.training.examples import Encoder, Example, Picture, encode_picture
from mulcot_ray.training.feed import Row, unpack
from mulcot_ray.training.losses import Drawn, Kept
from mulcot_ray.training.packing import Packer, answer_tokens, micro_batches

Examples = Mapping[Task, Example]
Soft = Callable[[list[tuple[int, Examples]], Task], Kept | Drawn]  # numbers and examples of rows -> soft labels of their answers, in order
Features = Callable[[int], Tensor | None]  # number of a row -> those of its picture, flat; None: the row cannot be used


@dataclass(frozen=True)
class MicroBatch:
    """`batch` as Packer makes it; soft labels for each task, or None; answer tokens for each task; patches for the vision tower."""

    batch: dict[str, Tensor]
    soft: list[Kept | Drawn] | None
    answers: tuple[int, ...]
    patches: int

    @property
    def tokens(self) -> int:
        return self.batch["input_ids"].numel()

    def to(self, device: torch.device) -> MicroBatch:
        soft = None if self.soft is None else [type(s)(**{k: v.to(device, non_blocking=True) for k, v in vars(s).items()}) for s in self.soft]
        return replace(self, batch={k: v.to(device, non_blocking=True) for k, v in self.batch.items()}, soft=soft)


@dataclass(frozen=True)
class Slice:
    """A worker's part of a step. `skipped`: rows of it that cannot be used."""

    step: int
    micro: list[MicroBatch]
    posts: int
    skipped: int


class Collate(ArrowBatchCollateFn):
    """Tokens, patches, labels, soft labels and positions of a worker's rows of one step, cut into micro-batches.

    With `features`, pictures' features in place of their patches: rows come without pictures, and the vision tower is not to run.
    """

    def __init__(
        self, encoder: Encoder, packer: Packer, tasks: Sequence[Task], micro_batch: int, packed: bool, soft: Soft | None,
        features: Features | None = None,
    ) -> None:  # fmt: skip
        self.encoder, self.packer, self.tasks = encoder, packer, tuple(tasks)
        self.micro_batch, self.packed, self.soft, self.features = micro_batch, packed, soft, features
        self.blank = {self.tasks[0]: encoder.blank(picture=features is None)}
        self.white = encoder.white()
        self.lock = threading.Lock()  # a tokenizer is not to be used by two threads at once

    def __call__(self, batch: pa.Table) -> Slice:
        with self.lock:
            steps, rows = unpack(batch, self.encoder.contract.image.side)
            assert len(set(steps)) == 1, "a batch is one step's rows"
            made = [(r.number, self._examples(r)) for r in rows]
            lengths = [self.packer.length(e, self.packed) if e else 0 for _, e in made]
            # Cut by all rows, usable or not: every worker runs as many micro-batches as the others, or they wait for it for ever.
            micro = [self._micro([(n, e) for i in some for n, e in made[i : i + 1] if e]) for some in micro_batches(lengths, self.micro_batch)]
            skipped = sum(not e for _, e in made)
            return Slice(steps[0], micro, len(made) - skipped, skipped)

    def _examples(self, row: Row) -> Examples:
        """Empty where the row cannot be used: it is too long, or its picture is unreadable."""
        if row.fault is not None:
            return {}
        picture = None if row.picture is None else encode_picture(self.encoder.processor, row.picture)
        if self.features is not None and row.post.has_image:
            if (found := self.features(row.number)) is None:
                return {}
            picture = Picture(None, self.white.grid, found.view(self.white.tokens(self.encoder.processor.image_processor.merge_size), -1))
        try:
            return self.encoder.tasks(self.tasks, row.post, row.rationale, picture)
        except RowFault:
            return {}

    def _micro(self, rows: list[tuple[int, Examples]]) -> MicroBatch:
        examples = [e for _, e in rows]
        answers = tuple(sum(answer_tokens(e[t]) for e in examples) for t in self.tasks)
        soft = None if self.soft is None else [self.soft(rows, t) for t in self.tasks]
        return make(self.packer, examples, self.tasks, self.packed, self.blank, soft, answers)


def make(
    packer: Packer, examples: list[Examples], tasks: Sequence[Task], packed: bool, blank: Examples, soft: Any, answers: tuple[int, ...]
) -> MicroBatch:
    """A micro-batch, with a blank post where no post has a picture, or where there is no post at all.

    Every worker must run the vision tower when one does, forward and backward, or the others wait for its shards for ever. A blank post without
    a picture says that none does.
    """
    if not examples or (_pictured([blank]) and not _pictured(examples)):
        examples = [*examples, blank]
    batch = packer(examples, tasks, packed)
    return MicroBatch(batch, soft, answers, len(batch.get("pixel_values", ())))


def _pictured(posts: Sequence[Examples]) -> bool:
    return any(e.picture is not None for post in posts for e in post.values())
