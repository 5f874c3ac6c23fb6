"""From a sharded checkpoint to a model folder that transformers and vLLM both load, once they agree about it.

The folder has the merged model as safetensors and, of LoRA, the adapter too; processor, contract, card, temperature; and how it came about:
history.json (curves for reports), history/metrics.parquet (every step), tensorboard/.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mulcot_ray import calibration
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.engines.parity import compare
from mulcot_ray.errors import RowFault
from mulcot_ray.records import Post, Task
from mulcot_ray.training.checkpoints import State, load_weights, read_state
from mulcot_ray.training.examples import Encoder
from mulcot_ray.training.loop import Job
from mulcot_ray.training.metrics import curve, to_parquet
from mulcot_ray.training.model import build, load_processor


def export(best: Any, last: Any, job: Job, metrics: dict[str, Any], prefix: str, card: str, spec: EngineSpec | None, posts: int) -> dict[str, Any]:
    """Write the folder under the store's `prefix`; returns what belongs into the manifest's stats. Runs as a Ray task, in one plain process.

    best, last: Ray Train's checkpoints; the weights come from the one, the history from the other. `spec` None: no parity check; else
    `posts` posts have to get the same labels and probabilities from transformers and vLLM, or EngineError is raised and nothing is written.
    """
    with last.as_directory() as folder:
        state = read_state(Path(folder))
    with tempfile.TemporaryDirectory() as draft:
        out = Path(draft)
        with best.as_directory() as folder:
            _write_model(out, Path(folder), job)
        (out / "contract.json").write_text(job.contract.model_dump_json(indent=1))
        if "temperature" in metrics:
            (out / calibration.FILE).write_text(json.dumps({"temperature": metrics["temperature"]}))
        parity = None if spec is None else compare(replace(spec, model=str(out)), list(islice(_usable(job), posts)))
        _write_history(out, state, metrics)
        (out / "README.md").write_text(card + f"- transformers and vLLM: {parity or 'not compared'}\n")
        for f in sorted(p for p in out.rglob("*") if p.is_file()):
            job.store.write(f"{prefix}/{f.relative_to(out)}", f.read_bytes())
    return {"skipped": state.skipped} | ({"parity": parity} if parity else {})


def _write_model(out: Path, checkpoint: Path, job: Job) -> None:
    model = build(job.base, job.settings, job.contract)
    load_weights(checkpoint, model)
    if job.settings.lora is not None:
        model.save_pretrained(out / "adapter")
        model = model.merge_and_unload()
    # bfloat16 on disk where the base is 16 bit: what vLLM serves, and half the size
    model.to(_stored_dtype(job.base)).save_pretrained(out, max_shard_size="4GB")  # S3 takes 5 GB in one request
    load_processor(job.base).save_pretrained(out)


def _write_history(out: Path, state: State, metrics: dict[str, Any]) -> None:
    history = {"steps": curve(state.rows), "validation": state.validation, "best": metrics, "skipped": state.skipped}
    (out / "history.json").write_text(json.dumps(history))
    (out / "history").mkdir()
    (out / "history" / "metrics.parquet").write_bytes(to_parquet(state.rows))


def _usable(job: Job) -> Iterator[Post]:
    """Validation posts that both sides can read; of the training ones where there is no validation split."""
    index = job.validation or job.order.index
    encoder = Encoder(load_processor(job.base), job.contract, job.max_model_len)
    for i in range(len(index)):
        post, _ = index.fetch(i)
        try:
            encoder.tasks((Task.CLASSIFICATION,), post, None, encoder.picture(post))
        except RowFault:
            continue
        yield post


def _stored_dtype(base: str) -> torch.dtype:
    name = json.loads((Path(base) / "config.json").read_text()).get("dtype") or "float32"
    return torch.float32 if name in ("float32", "float16") else torch.bfloat16
