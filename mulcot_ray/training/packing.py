"""Posts of a micro-batch as one row without padding: each post is [shared prefix | branch of task 0 | branch of task 1].

A branch sees the prefix and itself, has the positions that it would have in a row of its own, and its picture is encoded once for all tasks.
So losses and gradients are those of separate rows. There is no mask: attention (`forked`) goes post by post, over the prefix and the first
branch as one causal row, then over each further branch with the prefix before it. What the tasks' prompts do not begin with in common (with
`position: after_instruction`, the picture's tokens too) stands in each branch.

The ways that were measured: forward, loss and backward for both tasks of real Twitter-2015 posts (879 and 281 tokens, 100 of them the picture;
four posts at a time), CPU time relative to the first line, which takes 153 ms a post with LoRA and 184 ms whole. "larger" is a model of 6 layers,
width 256 and a vision tower of 4 blocks, with LoRA, at 720 ms.

                                                    picture after instruction    picture first
                                                    LoRA   whole   larger        LoRA   whole   larger
    a padded batch for each task                    1.00   1.00    1.00          1.00   1.00    1.00
    both tasks as one padded batch                  1.68   1.87    1.82          1.71   1.59
    the same, picture encoded once                  1.57   1.36    1.80          1.63   1.37
    packed, by a mask [t, t], padded                1.16   0.96    1.16          0.95   0.87
    a padded batch a task, picture once, no mask    0.75   0.69    0.82          0.74   0.70    0.82
    rows without padding (`packed` False)           0.66   0.65    0.85          0.66   0.65    0.81
    packed without padding or mask (kept)           0.69   0.63    0.83          0.61   0.61    0.74

A mask costs more than a shared prefix saves: over prefix and branches of a and b tokens it has (a + b)² entries where half of a² + b² would do,
and it rules out the causal kernels. A picture that stands after the task's instruction is in no shared prefix; sharing then gains nothing and
costs nothing. Where the vision tower is frozen whole, a batch may hold pictures' features in place of their patches (`distill.features`; the
table of soft labels keeps them), and the tower does not run. With LoRA and a vocabulary of 8,192 a step from cached soft labels then takes 61 in
place of 74 ms a post (`benchmarks/student_step.py`), 18 % less; of a step of Qwen2.5-VL-3B the tower is 6 to 8 % by count of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mulcot_ray.records import Task
from mulcot_ray.training.examples import IGNORE, Example, Picture, pixels
from mulcot_ray.training.model import core, skeleton

FORKED = "mulcot_forked"  # the name of `forked` among transformers' attention functions
Posts = Sequence[Mapping[Task, Example]]


class Packer:
    """Makes batches for models of one folder; pickles as the folder's name.

    Positions come from the model class's own `get_rope_index`, on a model without weights.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.image_token, self._rope = _family(folder)

    def __reduce__(self) -> tuple[type[Packer], tuple[str]]:
        return Packer, (self.folder,)

    def __call__(self, posts: Posts, tasks: Sequence[Task], packed: bool = True) -> dict[str, Tensor]:
        """The batch of these posts, in their order; t is the number of tokens in all. A post may lack a picture, or tasks.

        input_ids, labels   int64 [1, t]; labels are IGNORE where nothing is to be predicted, and at the first token of each branch
        branch              int64 [1, t]: the place in `tasks` of the task that the label at t belongs to; -1 where there is none
        position_ids        int64 [3, 1, t]: time, row, column
        cuts                int64 [posts, tasks + 2]: where a post's prefix begins, its first branch begins, and each branch ends
        pixel_values, image_grid_thw   of each post's picture, once; absent where no post has one
        features            [picture tokens, hidden] of the same pictures, in place of pixel_values where that is what is known of them
        picture             int64 [m]: which of these pictures stands at each place of a picture in the row

        With `packed` False no prefix is shared: each task has all of its tokens in its branch. The picture is encoded once all the same.
        """
        ids, labels, branch, positions, cuts, pictures, picture = [], [], [], [], [], list[Picture](), list[int]()
        at = 0
        for post in posts:
            fork = self.fork([post[t] for t in tasks if t in post]) if packed else 0
            seen = next((e.picture for e in post.values() if e.picture is not None), None)
            cut, first = [at, at + fork], True
            for number, task in enumerate(tasks):
                if task in post:
                    e = post[task]
                    assert e.picture is None or (seen is not None and (e.picture.grid == seen.grid).all()), "a post has one picture"
                    lo = 0 if first else fork
                    y = e.labels[lo:].copy()
                    y[0] = IGNORE  # nothing is predicted across a branch's border
                    ids.append(e.ids[lo:])
                    labels.append(y)
                    branch.append(np.where(y == IGNORE, -1, number))
                    positions.append(self._positions(e)[:, lo:])
                    if seen is not None and (e.ids[lo:] == self.image_token).any():
                        picture.append(len(pictures))
                    at += len(e.ids) - lo
                    first = False
                cut.append(at + fork if first else at)
            cuts.append(cut)
            if seen is not None:
                pictures.append(seen)
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(ids))[None],
            "labels": torch.from_numpy(np.concatenate(labels))[None],
            "branch": torch.from_numpy(np.concatenate(branch))[None],
            "position_ids": torch.cat(positions, 1)[:, None],
            "cuts": torch.tensor(cuts),
            "picture": torch.tensor(picture, dtype=torch.long),
        }
        if pictures:
            kept = [p.features for p in pictures if p.features is not None]
            assert len(kept) in (0, len(pictures)), "a batch's pictures are all known by patches, or all by features"
            batch |= {"features": torch.cat(kept)} if kept else {"pixel_values": pixels(pictures)}
            batch["image_grid_thw"] = torch.from_numpy(np.concatenate([p.grid for p in pictures]))
        return batch

    def fork(self, examples: Sequence[Example]) -> int:
        """How many first tokens these examples share, all of them of their prompts.

        Each keeps at least one token of its prompt for itself: that token predicts the first of its answer. No picture is cut in two.
        """
        if len(examples) < 2:
            return 0
        ids = [e.ids for e in examples]
        n = min(max(0, answer_start(e) - 1) for e in examples)
        same = np.logical_and.reduce([ids[0][:n] == x[:n] for x in ids[1:]])
        n = n if same.all() else int(same.argmin())
        while n and ids[0][n - 1] == ids[0][n] == self.image_token:
            n -= 1
        return n

    def length(self, post: Mapping[Task, Example], packed: bool = True) -> int:
        """Tokens of a post's row."""
        fork = self.fork(list(post.values())) if packed else 0
        return sum(len(e.ids) for e in post.values()) - fork * (len(post) - 1) if post else 0

    def _positions(self, e: Example) -> Tensor:
        ids = torch.from_numpy(e.ids)[None]
        grid = None if e.picture is None else torch.from_numpy(e.picture.grid)
        found: Tensor = self._rope(ids, mm_token_type_ids=(ids == self.image_token).long(), image_grid_thw=grid)[0][:, 0]
        return found


def last_hidden(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Last hidden states [1, t, d] of a batch of `Packer`. The model's text part is set to `forked` attention, the same as `sdpa` elsewhere.

    To be called inside the root module's `forward` where the model is sharded.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    inner: Any = core(model).model
    _register()
    if inner.language_model.config._attn_implementation != FORKED:
        inner.language_model.config._attn_implementation = FORKED
    seen = None
    if "image_grid_thw" in batch:
        each = features(model, batch)
        seen = {"image": BaseModelOutputWithPooling(pooler_output=[each[i] for i in batch["picture"].tolist()])}
    hidden: Tensor = inner(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], mm_encoder_outputs=seen, use_cache=False, cuts=batch["cuts"].cpu()
    ).last_hidden_state
    return hidden


def features(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Of each picture of a batch [tokens, hidden]: those that it brings, or what the model's vision tower makes of it."""
    inner: Any = core(model).model
    if "features" not in batch:
        made: Sequence[Tensor] = inner.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True).pooler_output
        return made
    return batch["features"].split((batch["image_grid_thw"].prod(-1) // inner.visual.spatial_merge_size**2).tolist())


def answer_rows(hidden: Tensor, batch: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """For each task the states [n, d] that predict a token of its answers, and those tokens [n]; posts in order, and tokens within them."""
    targets, branch, before = batch["labels"][0, 1:], batch["branch"][0, 1:], hidden[0, :-1]
    picked = [branch == task for task in range(batch["cuts"].shape[1] - 2)]
    return [(before[p], targets[p]) for p in picked]


def answer_start(e: Example) -> int:
    """The place of the first token of the answer; the length of the example where there is none."""
    told = e.labels != IGNORE
    return int(told.argmax()) if told.any() else len(told)


def answer_tokens(e: Example) -> int:
    """How many tokens of the answer are predicted: all but one that begins the row."""
    return int((e.labels[1:] != IGNORE).sum())


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut a worker's slice of a global batch into micro-batches: at most `size` posts each, and as even in tokens as dealing makes them.

    Their number depends on the number of posts alone, so every worker has as many (each is a round of FSDP's collectives); the largest, which
    decides the memory, is near the mean. Losses are sums, so how a slice is cut does not matter to them.
    """
    count = -(-len(lengths) // size)
    found: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        to = min((b for b in range(count) if len(found[b]) < size), key=lambda b: (load[b], b))
        found[to].append(i)
        load[to] += lengths[i]
    return [sorted(b) for b in found]


# --- attention -------------------------------------------------------------------------------------------------------


@torch.compiler.disable
def forked(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, cuts: Tensor | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, post by post where `cuts` (see `Packer`) says which tokens are a post's. query, key, value [1, heads, t, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if cuts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    out = []
    for start, fork, first, *ends in cuts.tolist():
        if first > start:
            rows = slice(start, first)
            out.append(sdpa_attention_forward(module, query[:, :, rows], key[:, :, rows], value[:, :, rows], None, is_causal=True, **kwargs)[0])
        for lo, hi in zip((first, *ends), ends, strict=False):
            if hi == lo:
                continue
            q, k, v = (x[:, :, lo:hi] for x in (query, key, value))
            mask = None
            if fork > start:
                k, v = torch.cat([key[:, :, start:fork], k], 2), torch.cat([value[:, :, start:fork], v], 2)
                mask = torch.ones(hi - lo, k.shape[2], dtype=torch.bool, device=q.device).tril(fork - start)[None, None]
            out.append(sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)[0])
    return torch.cat(out, 1), None


@lru_cache(maxsize=1)
def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(FORKED, forked)
    AttentionMaskInterface.register(FORKED, sdpa_mask)


@lru_cache(maxsize=4)
def _family(folder: str) -> tuple[int, Callable[..., tuple[Tensor, Tensor]]]:
    """The id of the picture's token, and `get_rope_index`."""
    model = skeleton(folder)
    return int(model.config.image_token_id), model.model.get_rope_index
