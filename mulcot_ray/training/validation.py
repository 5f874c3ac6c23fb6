"""How well the model under training classifies the validation split: by the probabilities of the label words, or by what it writes.

Every worker takes a part of the split, and takes part in every forward pass of the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mulcot_ray import calibration
from mulcot_ray.errors import RowFault
from mulcot_ray.prompts import Contract, label_token_ids
from mulcot_ray.records import LABELS, Task
from mulcot_ray.training.collate import make
from mulcot_ray.training.data import Index
from mulcot_ray.training.examples import IGNORE, Encoder, Example, gold_label, pixels
from mulcot_ray.training.joint import Joint
from mulcot_ray.training.packing import Packer

CLASSIFY = (Task.CLASSIFICATION,)
SPARE_TOKENS = 8  # beyond the longest right answer; what does not end there is no answer


@dataclass(frozen=True)
class Validation:
    """The split, and how this worker sees it."""

    index: Index
    encoder: Encoder
    packer: Packer
    rank: int
    world: int
    at_once: int
    device: torch.device

    def scored(self, model: Joint) -> dict[str, float]:
        """Accuracy, macro F1, and the temperature that would make the probabilities fit the split (calibration.py)."""
        words = label_token_ids(self.encoder.processor.tokenizer, self.encoder.contract)
        said: list[tuple[int, list[float]]] = []
        for examples, gold in self._mine():
            micro = make(self.packer, [{Task.CLASSIFICATION: e} for e in examples], CLASSIFY, False, self._blank, None, ()).to(self.device)
            logits = model(micro.batch, words=words)
            assert isinstance(logits, Tensor)
            said += zip(gold, torch.softmax(logits.float(), -1).tolist(), strict=False)  # those that stand in for nobody come last
        said = self._everyone(said)
        found = figures([(g, p.index(max(p))) for g, p in said])
        return found | {"temperature": calibration.fit([p for _, p in said], [g for g, _ in said])}

    def generated(self, model: Joint) -> dict[str, float]:
        """Accuracy and macro F1 of the labels that the model writes, greedily; an answer without a label is wrong, and counted."""
        tok, contract = self.encoder.processor.tokenizer, self.encoder.contract
        longest = max(len(tok(contract.answer(Task.CLASSIFICATION, s), add_special_tokens=False)["input_ids"]) for s in LABELS)
        options = {
            "max_new_tokens": longest + SPARE_TOKENS, "do_sample": False, "synced_gpus": self.world > 1, "eos_token_id": tok.eos_token_id,
            "pad_token_id": tok.pad_token_id,
        }  # fmt: skip
        said: list[tuple[int, int]] = []
        for examples, gold in self._mine():
            batch = prompts(examples, self._blank[Task.CLASSIFICATION], tok.pad_token_id, self.packer.image_token)
            written = model({k: v.to(self.device) for k, v in batch.items()}, write=options)
            assert isinstance(written, Tensor)
            texts = tok.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            said += zip(gold, (stated(contract, t) for t in texts), strict=False)
        said = self._everyone(said)
        return figures(said) | {"unparsed": sum(answer < 0 for _, answer in said) / len(said)}

    @cached_property
    def _blank(self) -> dict[Task, Example]:
        return {Task.CLASSIFICATION: self.encoder.blank()}

    def _mine(self) -> Iterator[tuple[list[Example], list[int]]]:
        """Examples, as many in each turn on every worker, and the gold labels of those that are this worker's to answer for."""
        each = -(-len(self.index) // (self.world * self.at_once)) * self.at_once
        for lo in range(self.rank * each, (self.rank + 1) * each, self.at_once):
            posts = [self.index.fetch(i % len(self.index))[0] for i in range(lo, lo + self.at_once)]
            gold = [LABELS.index(gold_label(p)) for p in posts]
            yield [self.encoder.classification(p) for p in posts], gold[: max(0, len(self.index) - lo)]

    def _everyone(self, mine: list[Any]) -> list[Any]:
        parts: list[list[Any]] = [[] for _ in range(self.world)]
        dist.all_gather_object(parts, mine)
        return [x for part in parts for x in part]


def figures(said: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Accuracy and macro F1 from pairs of gold and answer, as numbers of LABELS; -1 is no answer."""
    hit = [sum(g == a == k for g, a in said) for k in range(len(LABELS))]
    both = [sum((g == k) + (a == k) for g, a in said) for k in range(len(LABELS))]
    return {"accuracy": sum(hit) / len(said), "macro_f1": sum(2 * h / max(n, 1) for h, n in zip(hit, both, strict=True)) / len(LABELS)}


def stated(contract: Contract, text: str) -> int:
    """The number of the label that an answer states; -1 where it states none."""
    try:
        return LABELS.index(contract.parse(text, sections=False).label)
    except RowFault:
        return -1


def prompts(examples: Sequence[Example], blank: Example, pad_id: int, image_token: int) -> dict[str, Tensor]:
    """The prompts of examples as a left-padded batch, as `generate` wants it; a blank one behind them where none has a picture."""
    if not any(e.picture is not None for e in examples):
        examples = [*examples, blank]
    heads = [torch.from_numpy(e.ids[e.labels == IGNORE]) for e in examples]
    ids = torch.full((len(heads), max(map(len, heads))), pad_id)
    mask = torch.zeros_like(ids)
    for i, head in enumerate(heads):
        ids[i, -len(head) :], mask[i, -len(head) :] = head, 1
    pictures = [e.picture for e in examples if e.picture is not None]
    return {
        "input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == image_token).long(),
        "pixel_values": pixels(pictures),
        "image_grid_thw": torch.cat([torch.from_numpy(p.grid) for p in pictures]),
    }  # fmt: skip
