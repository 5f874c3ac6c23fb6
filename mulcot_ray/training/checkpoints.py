"""Checkpoints: every worker's shards of what trains and of the optimizer, where the run is, and the table of its steps.

The position in the data is the step (data.py), and the random numbers of a step are seeded by it, so neither needs a state of its own. A
checkpoint may be read by another number of workers than wrote it.

A worker writes its part on its own disk and goes on training; Ray Train carries the parts to the store meanwhile and records the checkpoint when
all are there. Of the recorded ones the best and the last are kept.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mulcot_ray.training.metrics import from_parquet, to_parquet
from mulcot_ray.training.model import trainable

SHARDS, STATE, TABLE = "shards", "state.json", "metrics.parquet"


@dataclass
class State:
    """Where a run is. `skipped`: rows that cannot be used, counted in the first epoch; `rows`: its table (metrics.py)."""

    step: int = 0
    epoch: int = 0
    skipped: int = 0
    scheduler: dict[str, Any] = field(default_factory=dict)
    validation: list[dict[str, float]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)


class Drafts:
    """Folders for checkpoints on this machine until they are in the store. What a killed worker left there goes at the next start."""

    def __init__(self, work: str, rank: int) -> None:
        self.place, self.name = Path(tempfile.gettempdir()) / "mulcot-checkpoints", f"{work}-rank-{rank}"
        for left in self.place.glob(f"{self.name}-step-*"):
            shutil.rmtree(left, ignore_errors=True)

    def new(self, step: int) -> Path:
        folder = self.place / f"{self.name}-step-{step}"
        folder.mkdir(parents=True)
        return folder


def save(folder: Path, root: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer, state: State, rank: int) -> None:
    """Write this worker's part. `model`, in `root`, is the one that trains."""
    dcp.save(_content(root, model, optimizer), checkpoint_id=folder / SHARDS)
    if rank == 0:
        (folder / STATE).write_text(json.dumps({k: v for k, v in asdict(state).items() if k != "rows"}))
        (folder / TABLE).write_bytes(to_parquet(state.rows))


def restore(folder: Path, root: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
    content = _content(root, model, optimizer)
    dcp.load(content, checkpoint_id=folder / SHARDS)  # in place
    set_optimizer_state_dict(root, optimizer, content["optimizer"])
    return read_state(folder)


def read_state(folder: Path) -> State:
    return State(**json.loads((folder / STATE).read_text()), rows=from_parquet((folder / TABLE).read_bytes()))


def load_weights(folder: Path, model: nn.Module) -> None:
    """The trained weights into an unsharded model, in one plain process."""
    dcp.load({"model": trainable(model)}, checkpoint_id=folder / SHARDS, no_dist=True)  # tensors of the model itself, filled in place


def _content(root: nn.Module, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": trainable(model), "optimizer": get_optimizer_state_dict(root, optimizer)}
