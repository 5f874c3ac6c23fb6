"""From a sharded checkpoint to a model folder that transformers and vLLM both load: merged safetensors, processor, contract, card."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from mulcot_ray import calibration
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Train
from mulcot_ray.storage import Store
from mulcot_ray.training.model import build, load_processor, trainable


def export(
    checkpoint: str,
    base: str,
    settings: Train,
    contract: Contract,
    store: Store,
    prefix: str,
    card: str,
    history: dict[str, Any],
    temperature: float | None = None,
) -> dict[str, int]:
    """Write the folder under the store; returns file sizes in bytes. Runs as a Ray task, in one plain process."""
    model = build(base, settings, contract)
    content = {"model": trainable(model)}  # tensors of the model itself: loading fills them in place
    dcp.load(content, checkpoint_id=Path(checkpoint) / "shards", no_dist=True)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        if settings.lora is not None:
            model.save_pretrained(out / "adapter")
            model = model.merge_and_unload()
        # bfloat16 on disk where the base is 16 bit: what vLLM serves, and half the size
        stored = _stored_dtype(base)
        model.to(stored).save_pretrained(out)
        load_processor(base).save_pretrained(out)
        (out / "contract.json").write_text(contract.model_dump_json(indent=1))
        (out / "history.json").write_text(json.dumps(history))
        (out / "README.md").write_text(card)
        if temperature is not None:
            (out / calibration.FILE).write_text(json.dumps({"temperature": temperature}))
        sizes = {}
        for f in sorted(p for p in out.rglob("*") if p.is_file()):
            name = str(f.relative_to(out))
            store.write(f"{prefix}/{name}", f.read_bytes())
            sizes[name] = f.stat().st_size
        return sizes


def _stored_dtype(base: str) -> torch.dtype:
    name = json.loads((Path(base) / "config.json").read_text()).get("dtype") or "float32"
    return torch.float32 if name in ("float32", "float16") else torch.bfloat16
