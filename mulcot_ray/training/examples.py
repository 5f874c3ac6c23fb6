"""From a post and the answer it should get to token ids and labels, and from several of those to one padded batch of rows.

Labels are set by length, never by looking for pad ids: everything up to the answer is ignored, the answer and the end-of-turn
token after it are supervised. Image tokens are never cut; a row that does not fit is a fault, not a shorter row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mulcot_ray.errors import RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.prompts import Contract, render_chat
from mulcot_ray.records import Post, Rationale, Reason, Sentiment, Task

IGNORE = -100
IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture as patches: values float32 [patches, 3·2·14·14], grid int64 [1, 3] (time, rows, columns of patches).

    With `features` [tokens, hidden], what a vision tower made of it, there are no values.
    """

    values: np.ndarray | None
    grid: np.ndarray
    features: torch.Tensor | None = None

    def tokens(self, merge: int) -> int:
        return int(self.grid.prod()) // merge**2


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of prompt and answer, int64 [length]; labels are IGNORE on the prompt."""

    ids: np.ndarray
    labels: np.ndarray
    picture: Picture | None


def encode_picture(processor: Any, image: Image.Image) -> Picture:
    out = processor.image_processor(images=[image], return_tensors="np")
    return Picture(np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"], np.int64))


def prompt_ids(processor: Any, messages: list[dict[str, Any]], picture: Picture | None) -> list[int]:
    """Token ids of a prompt, up to where the answer begins."""
    prompt = render_chat(processor.tokenizer, messages)
    if picture is not None:
        prompt = prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * picture.tokens(processor.image_processor.merge_size))
    ids: list[int] = processor.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids


def encode(processor: Any, messages: list[dict[str, Any]], answer: str, picture: Picture | None, max_len: int) -> Example:
    """One supervised example. Raises RowFault PROMPT_TOO_LONG when prompt and answer exceed `max_len` tokens."""
    tok = processor.tokenizer
    head = prompt_ids(processor, messages, picture)
    tail = [*tok(answer, add_special_tokens=False)["input_ids"], tok.eos_token_id]
    if len(head) + len(tail) > max_len:
        raise RowFault(Reason.PROMPT_TOO_LONG, f"{len(head)} + {len(tail)} tokens, at most {max_len}")
    return Example(np.array(head + tail), np.array([IGNORE] * len(head) + tail), picture)


def collate(examples: list[Example], pad_id: int, image_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded batch: input_ids, attention_mask, labels, mm_token_type_ids int64 [batch, length]; pixels where there are any.

    `mm_token_type_ids` marks image tokens: without it transformers 5 silently falls back to one-dimensional positions.
    """
    length = max(len(e.ids) for e in examples)
    ids = torch.full((len(examples), length), pad_id)
    labels = torch.full_like(ids, IGNORE)
    mask = torch.zeros_like(ids)
    for i, e in enumerate(examples):
        n = len(e.ids)
        ids[i, :n], labels[i, :n], mask[i, :n] = torch.from_numpy(e.ids), torch.from_numpy(e.labels), 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels, "mm_token_type_ids": (ids == image_token_id).long()}
    pictures = [e.picture for e in examples if e.picture is not None]
    if pictures:
        batch["pixel_values"] = pixels(pictures)
        batch["image_grid_thw"] = torch.from_numpy(np.concatenate([p.grid for p in pictures]))
    return batch


def pixels(pictures: Sequence[Picture]) -> torch.Tensor:
    """The patches of several pictures, one after the other."""
    values = [p.values for p in pictures if p.values is not None]
    assert len(values) == len(pictures), "pictures as patches"
    return torch.from_numpy(np.concatenate(values))


def supervised(
    processor: Any, contract: Contract, task: Task, post: Post, label: Sentiment, answer: str, picture: Picture | None, max_len: int
) -> Example:
    """The example of one task for one post (the explain prompt is given the label, the others are not)."""
    messages = contract.messages(task, post, label if task is Task.EXPLAIN else None)
    return encode(processor, messages, answer, picture, max_len)


@dataclass(frozen=True)
class Encoder:
    """What turns posts into examples. `processor` is the model's; `max_len` in tokens, prompt and answer together."""

    processor: Any
    contract: Contract
    max_len: int

    def picture(self, post: Post) -> Picture | None:
        """Raises RowFault."""
        image = post_image(post, self.contract.image.side)
        return None if image is None else encode_picture(self.processor, image)

    def tasks(self, tasks: Sequence[Task], post: Post, rationale: Rationale | None, picture: Picture | None) -> dict[Task, Example]:
        """The example of each task, around one and the same picture. Raises RowFault."""
        gold = gold_label(post)
        answers = {t: self.contract.answer(t, gold, rationale if t is Task.REASONING else None) for t in tasks}
        return {t: supervised(self.processor, self.contract, t, post, gold, a, picture, self.max_len) for t, a in answers.items()}

    def classification(self, post: Post) -> Example:
        """The classification example of a post that cannot be left out: where text and picture do not fit, it goes without them."""
        try:
            return self.tasks((Task.CLASSIFICATION,), post, None, self.picture(post))[Task.CLASSIFICATION]
        except RowFault:
            bare = Post(post.post_id, post.source_id, "-", post.aspect, label=post.label)
            return self.tasks((Task.CLASSIFICATION,), bare, None, None)[Task.CLASSIFICATION]

    def blank(self, picture: bool = True) -> Example:
        """A white picture (or none) and nothing to learn: takes part in every collective, and in no loss."""
        post = Post("-", "-", "-", image_bytes=b"-" if picture else None, label=Sentiment.NEUTRAL)
        e = self.tasks((Task.CLASSIFICATION,), post, None, self.white() if picture else None)[Task.CLASSIFICATION]
        return Example(e.ids, np.full_like(e.labels, IGNORE), e.picture)

    def white(self) -> Picture:
        """A white picture. Every picture has its grid, as all have the contract's side."""
        side = self.contract.image.side
        return encode_picture(self.processor, Image.new("RGB", (side, side), "white"))


def gold_label(post: Post) -> Sentiment:
    assert post.label is not None, "the index holds labelled posts only"
    return post.label
