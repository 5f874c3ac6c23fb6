"""What is known of a run step by step: its table, its TensorBoard file, and how well it uses the machine."""

from __future__ import annotations

import io
import struct
import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from torch import nn

from mulcot_ray.training.model import core

EVENTS = "events.out.tfevents.0.mulcot-ray"  # TensorBoard reads what has "tfevents" in its name
CURVE_POINTS = 2000  # rows of history.json, which reports draw; the table has all


# --- model FLOPs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """FLOPs for one token of text, one patch of a picture and one answer token, of a step's forward and backward passes.

    2·N for a forward pass through N weights, 2·N more where a gradient goes through them to what trains below, 2·N more where they train
    themselves: 6·N for a model trained whole, 4·N for the frozen layers under LoRA, 2·N for a frozen vision tower or assistant. Not counted:
    embeddings (looked up), attention scores (2 % at 500 tokens and the width of 3B), and what checkpointing computes twice.
    """

    token: float = 0.0
    patch: float = 0.0
    answer: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.token + other.token, self.patch + other.patch, self.answer + other.answer)

    def of(self, tokens: float, patches: float, answers: float) -> float:
        return self.token * tokens + self.patch * patches + self.answer * answers


def cost(model: nn.Module, *, frozen: bool) -> Cost:
    """Of a model before it is sharded; `frozen`: it takes part in the forward pass alone."""
    whole = core(model)
    visual, text, head = whole.model.visual, whole.model.language_model, whole.lm_head
    merger = visual.merger.modules_to_save["default"] if hasattr(visual.merger, "modules_to_save") else visual.merger
    deep = any(p.requires_grad for p in visual.blocks.parameters())  # only then does a gradient go down into the vision tower

    def flops(module: nn.Module, reached: bool) -> float:
        return sum(p.numel() * (2 if frozen else 2 + 2 * reached + 2 * p.requires_grad) for p in module.parameters())

    output = whole.config.text_config.vocab_size * whole.config.text_config.hidden_size
    return Cost(
        token=flops(text.layers, True),
        patch=flops(visual.blocks, deep) + flops(merger, deep) / whole.config.vision_config.spatial_merge_size**2,  # one token of several patches
        answer=output * (2 if frozen else 6 if any(p.requires_grad for p in head.parameters()) else 4),
    )


# --- the table -------------------------------------------------------------------------------------------------------


def to_parquet(rows: list[dict[str, Any]]) -> bytes:
    """One row a step, the validation figures in the row of the step after which they were found."""
    names = list(dict.fromkeys(k for r in rows for k in r))
    table = pa.table({n: pa.array([r.get(n) for r in rows], pa.int32() if n in ("step", "epoch", "workers") else pa.float64()) for n in names})
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def from_parquet(data: bytes) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if v is not None} for r in pq.read_table(io.BytesIO(data)).to_pylist()]


def curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most CURVE_POINTS of the rows, evenly spaced, the last among them."""
    every = -(-len(rows) // CURVE_POINTS)
    return rows[::-1][:: max(1, every)][::-1]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


class EventFile:
    """A TensorBoard file of scalars, some 300 bytes a step. A resumed run makes it anew from its table, so that no step is in it twice."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        from tensorboardX.proto.event_pb2 import Event  # type: ignore[import-untyped]

        self.data = bytearray()
        self._record(Event(wall_time=rows[0]["time"] if rows else time.time(), file_version="brain.Event:2"))
        for row in rows:
            self.add(row)

    def add(self, row: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary  # type: ignore[import-untyped]

        values = [Summary.Value(tag=_tag(k), simple_value=v) for k, v in row.items() if k not in ("step", "epoch", "time")]
        self._record(Event(wall_time=row["time"], step=int(row["step"]), summary=Summary(value=values)))

    def _record(self, event: Any) -> None:
        """TFRecord: length, its checksum, the event, its checksum."""
        from tensorboardX.record_writer import masked_crc32c  # type: ignore[import-untyped]

        event = event.SerializeToString()
        length = struct.pack("<Q", len(event))
        self.data += length + struct.pack("<I", masked_crc32c(length)) + event + struct.pack("<I", masked_crc32c(event))


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    group = "validation" if name in VALIDATION else "speed" if name in SPEED else "train"
    return f"{group}/{name}"


VALIDATION = ("accuracy", "macro_f1", "temperature", "scored_accuracy", "unparsed")
SPEED = ("tokens_s", "posts_s", "seconds", "waited", "workers", "mfu")
