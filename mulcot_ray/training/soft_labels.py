"""A table of soft labels: what is kept of the assistant's distribution over each answer token of the training rows, and how it is read.

The distributions are over the ids that both tokenizers have, at the temperature of training. Two ways to keep them:

top_k     the k likeliest ids (int32) and their log-probabilities (float16), and the log-probability of all others together (float32).
          Not renormalised: the loss is a lower bound of the one by the whole distributions.
sampled   k draws: the ids that came (int32) and how often (uint16). An unbiased estimate of the whole (arXiv 2503.16870).

Of the shipped assistant at T = 2, on 96 sample posts (the KL to the untrained student is 0.443 nats a token by the whole distributions):

                   k = 8    16      64     256   |  16 draws    64     256
    bytes a token     42    68     201     675   |        20    47      84
    KL             0.322  0.344  0.380   0.407   |     0.449  0.450  0.444

A row of the table is one task of one training row; `soften` writes it. With `distill.features` the row of the first task also holds what the
student's vision tower makes of the post's picture: [tokens of the picture, hidden] in the dtype of the recipe, bit by bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import TrainingError
from mulcot_ray.recipe import Distill
from mulcot_ray.records import Task
from mulcot_ray.storage import Store
from mulcot_ray.training.data import GROUPS
from mulcot_ray.training.examples import Example
from mulcot_ray.training.losses import Drawn, Kept
from mulcot_ray.training.packing import answer_start, answer_tokens

ROWS_PER_GROUP = 16  # read to get one of them: 0.8 MB where k is 64 and a rationale has 250 tokens
FEATURES_PER_GROUP = 4  # the same with features, two of them: 1 MB where a picture has 100 tokens of 2,048 numbers in bfloat16


@dataclass(frozen=True, slots=True)
class SoftLabel:
    """Soft labels of the answer of one task of training row `row` (its place in `data.index`). Arrays as little-endian bytes, token by token.

    top_k: `ids` int32 and `logs` float16 [tokens, k], `tail` float32 [tokens]. sampled: `width` uint16 [tokens] says how many different
    ids were drawn; they are `ids` int32, and `counts` uint16 [sum of width] how often each was. `tokens_digest` is that of the example.
    `features` (the first task's row alone, where the post has a picture and the recipe wants them): see the module.
    """

    post_id: str
    row: int
    task: Task
    tokens: int
    tokens_digest: str
    ids: bytes
    logs: bytes | None = None
    tail: bytes | None = None
    counts: bytes | None = None
    width: bytes | None = None
    features: bytes | None = None

    schema: ClassVar[pa.Schema] = pa.schema(
        [("post_id", pa.string()), ("row", pa.int32()), ("task", pa.string()), ("tokens", pa.int32()), ("tokens_digest", pa.string()),
         ("ids", pa.binary()), ("logs", pa.binary()), ("tail", pa.binary()), ("counts", pa.binary()), ("width", pa.binary()),
         ("features", pa.binary())]
    )  # fmt: skip

    def soft(self) -> Kept | Drawn:
        """As tensors. Draws are padded with ids of weight 0."""
        ids = np.frombuffer(self.ids, np.int32)
        if self.logs is not None and self.tail is not None:
            shape = (self.tokens, len(ids) // max(1, self.tokens))
            logs, tail = np.frombuffer(self.logs, np.float16), np.frombuffer(self.tail, np.float32)
            return Kept(torch.tensor(ids.reshape(shape)), torch.tensor(logs.reshape(shape)), torch.tensor(tail))
        assert self.counts is not None and self.width is not None
        counts, width = np.frombuffer(self.counts, np.uint16), np.frombuffer(self.width, np.uint16)
        there = np.arange(max(width, default=0)) < width[:, None]
        wide, weights = np.zeros(there.shape, np.int32), np.zeros(there.shape, np.float32)
        wide[there], weights[there] = ids, counts
        return Drawn(torch.tensor(wide), torch.tensor(weights / weights.sum(1, keepdims=True)))


class SoftLabels:
    """Random access to a table; pickles. Row groups that were read last are kept among the posts' (`data.GROUPS`), within their bytes.

    `shared`: the number of ids that the distributions are over, as the loss must be told. Raises TrainingError for a table that was made with
    other settings than the recipe's, with features of another model than `student` (a fingerprint), where a row has no soft labels, and where its
    tokens are not those that they were made from.
    """

    def __init__(self, store: Store, manifest: Manifest, distill: Distill, student: str | None = None) -> None:
        if (made := manifest.identity["distill"]) != (wanted := kept_by(distill)):
            raise TrainingError(f"softlabels {manifest.name!r} were made with {made}, and the recipe has {wanted}")
        if distill.features and (made := manifest.identity["student"]) != student:
            raise TrainingError(f"softlabels {manifest.name!r} hold picture features of the student {made}, and {student} is to be trained")
        self.store, self.name, self.sampled = store, manifest.name, distill.keep == "sampled"
        self.shared, self.rows_per_part = int(manifest.stats["shared"]), int(manifest.stats["rows_per_part"])
        self.rows_per_group, self.dtype = rows_per_group(distill), str(manifest.identity["dtype"])
        self.first = str(manifest.identity["tasks"][0])  # the task whose rows hold features
        self.parts = frozenset(manifest.parts())
        self._places: dict[str, dict[tuple[int, str], int]] = {}  # part -> where its rows are

    def __call__(self, rows: Sequence[tuple[int, Mapping[Task, Example]]], task: Task) -> Kept | Drawn:
        """Those of several training rows (number and examples), one after the other, in the order that `answer_rows` has their tokens."""
        found: list[Any] = []
        for row, post in rows:
            if task in post and answer_tokens(post[task]):
                label = self.fetch(row, task)
                if label.tokens_digest != (now := tokens_digest(post[task])):
                    raise TrainingError(
                        f"softlabels {self.name!r}: {task} of row {row} (post {label.post_id!r}) was made from other tokens ({label.tokens_digest}, "
                        f"now {now}). The tokenizer, the contract or the rationales have changed since: make them again, under another name"
                    )
                found.append(label.soft())
        if not self.sampled:
            kept = found or [Kept(torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1, dtype=torch.float16), torch.empty(0))]
            return Kept(*(torch.cat([getattr(s, k) for s in kept]) for k in ("ids", "logs", "tail")))
        drawn = found or [Drawn(torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1))]
        widest = max(s.ids.shape[1] for s in drawn)
        return Drawn(*(torch.cat([_widened(getattr(s, k), widest) for s in drawn]) for k in ("ids", "weights")))

    def features(self, row: int) -> Tensor | None:
        """Of one training row's picture, flat [tokens of the picture · hidden]; None: the row was rejected when they were made."""
        key, places = self._part(row)
        if (at := places.get((row, self.first))) is None:
            return None
        label = self._label(key, at)
        if label.features is None:
            raise TrainingError(f"softlabels {self.name!r} have no picture features of row {row} (post {label.post_id!r}), which has a picture now")
        return torch.frombuffer(bytearray(label.features), dtype=getattr(torch, self.dtype))

    def fetch(self, row: int, task: Task) -> SoftLabel:
        """Those of one training row's task."""
        key, places = self._part(row)
        at = places.get((row, task.value))
        if at is None:
            raise TrainingError(f"softlabels {self.name!r} have none for {task} of row {row}: it was rejected when they were made")
        return self._label(key, at)

    def _part(self, row: int) -> tuple[str, dict[tuple[int, str], int]]:
        """The key of the part that would have a training row, and where its rows are."""
        part = f"{part_name(row - row % self.rows_per_part)}.parquet"
        if part not in self.parts:
            raise TrainingError(f"softlabels {self.name!r} have no row {row}: they were made of fewer rows")
        key = f"softlabels/{self.name}/{part}"
        if part not in self._places:
            with self.store.parquet(key) as f:
                rows, tasks = (f.read(columns=[c])[c].to_pylist() for c in ("row", "task"))
            self._places[part] = {place: i for i, place in enumerate(zip(rows, tasks, strict=True))}
        return key, self._places[part]

    def _label(self, key: str, at: int) -> SoftLabel:
        found = GROUPS.get(self.store, key, at // self.rows_per_group).slice(at % self.rows_per_group, 1).to_pylist()[0]
        return SoftLabel(**{**found, "task": Task(found["task"])})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_places": {}}


def keep(logs: Tensor, k: int) -> dict[str, Tensor]:
    """The k likeliest of log-probabilities [n, v], and the logarithm of what all others have together (-inf: there are none)."""
    top, ids = logs.topk(min(k, logs.shape[1]))
    rest = logs.scatter(1, ids, -torch.inf).logsumexp(-1)
    return {"ids": ids.int(), "logs": top.half(), "tail": rest.float()}


def draw(logs: Tensor, draws: int, generator: torch.Generator) -> dict[str, Tensor]:
    """So many draws from each row of log-probabilities [n, v]: the ids that came, row after row, how often each, and how many ids a row has."""
    ids = torch.multinomial(logs.exp(), draws, replacement=True, generator=generator).sort(-1).values
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    at = new.flatten().nonzero()[:, 0]
    counts = torch.diff(at, append=at.new_tensor([ids.numel()]))
    return {"ids": ids[new].int(), "counts": counts.to(torch.uint16), "width": new.sum(-1).to(torch.uint16)}


def tokens_digest(e: Example) -> str:
    """16 hex digits of an example's token ids and of where its answer begins."""
    return hashlib.sha256(np.append(e.ids, answer_start(e)).astype("<i8").tobytes()).hexdigest()[:16]


def kept_by(distill: Distill) -> dict[str, Any]:
    """The settings that decide a table. Without features it is the same as before there were any."""
    made = {"temperature": distill.temperature, "keep": distill.keep, "top_k": distill.top_k}
    return made | {"features": True} if distill.features else made


def rows_per_group(distill: Distill) -> int:
    """Of the table's Parquet files."""
    return FEATURES_PER_GROUP if distill.features else ROWS_PER_GROUP


def part_name(first_row: int) -> str:
    return f"part-{first_row:08d}"


def _widened(x: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))
