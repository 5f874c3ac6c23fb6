"""Stages 2 and 4: train the assistant, train the student. Ray Train runs `loop.worker` on the workers; the result is a model folder."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mulcot_ray.artifacts import Manifest, Run, begin, need, resolve_model
from mulcot_ray.cluster import log_folder, own_error, session
from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.prompts import digest
from mulcot_ray.recipe import Recipe, Runtime, Train
from mulcot_ray.records import Split, Task
from mulcot_ray.storage import Store

Progress = Callable[[int, int, dict[str, float]], None]  # step, steps in all, the losses or validation figures
BOTH = (Task.REASONING, Task.CLASSIFICATION)


def assistant(
    store: Store, name: str, *, posts: str, rationales: list[str], recipe: Recipe, runtime: Runtime, progress: Progress
) -> tuple[Manifest, bool]:
    """models/NAME: the assistant, on labels and the teacher's rationales (L_cls + L_rea)."""
    return train(store, name, posts, rationales, recipe.models.assistant, None, recipe.assistant, BOTH, recipe, runtime, progress)


def student(
    store: Store, name: str, *, posts: str, rationales: list[str], assistant: str, recipe: Recipe, runtime: Runtime, progress: Progress
) -> tuple[Manifest, bool]:
    """models/NAME: the student, on labels, all rationales and the assistant's soft labels."""
    return train(store, name, posts, rationales, recipe.models.student, assistant, recipe.student, BOTH, recipe, runtime, progress)


def labels_only(store: Store, name: str, *, posts: str, recipe: Recipe, runtime: Runtime, progress: Progress) -> tuple[Manifest, bool]:
    """models/NAME: the student's base trained on the labels alone, the baseline that distillation has to beat."""
    return train(store, name, posts, None, recipe.models.student, None, recipe.student, (Task.CLASSIFICATION,), recipe, runtime, progress)


def train(
    store: Store, name: str, posts: str, rationales: list[str] | None, base: str, assistant: str | None, settings: Train, tasks: tuple[Task, ...],
    recipe: Recipe, runtime: Runtime, progress: Progress,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Train, take the best epoch by validation accuracy (then F1), export, commit. Returns False where it was there already."""
    if settings.global_batch % runtime.train_workers:
        raise ConfigError(
            f"global_batch {settings.global_batch} of the recipe does not divide by train_workers {runtime.train_workers} of the runtime"
        )
    source = need(store, "posts", posts)
    tables = None if rationales is None else [need(store, "rationales", r) for r in rationales]
    folder, base_print = resolve_model(store, base)
    soft = resolve_model(store, assistant) if assistant is not None else None
    identity = {
        "stage": "train", "posts": source.fingerprint, "rationales": None if tables is None else sorted(t.fingerprint for t in tables),
        "base": base_print, "assistant": soft[1] if soft else None, "tasks": list(tasks), "train": settings.model_dump(mode="json"),
        "distill": recipe.distill.model_dump(mode="json") if soft else None, "contract": recipe.contract.hash, "seed": recipe.seed,
        "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    run = begin(store, "models", name, identity)
    if isinstance(run, Manifest):
        return run, False

    from mulcot_ray.training.data import index
    from mulcot_ray.training.loop import Job

    has_validation = bool(source.stats["splits"].get(Split.VALIDATION))
    job = Job(
        str(folder), str(soft[0]) if soft else None, settings, recipe.distill, recipe.contract, tasks, index(store, source, Split.TRAIN, tables),
        index(store, source, Split.VALIDATION, None) if has_validation else None, recipe.seed, recipe.dtype, recipe.max_model_len, runtime.device,
        runtime.micro_batch, runtime.checkpointing, runtime.reshard,
    )  # fmt: skip
    with run, session(runtime):
        return _fit(run, job, runtime, progress), True


def _fit(run: Run, job: Any, runtime: Runtime, progress: Progress) -> Manifest:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from mulcot_ray.training.export import export
    from mulcot_ray.training.loop import worker

    store = run.store
    board = ray.remote(num_cpus=0)(_Board).remote()
    work = f"{run.name}-{digest(run.identity)[:8]}"  # a resumed run finds it, another recipe under a freed name does not
    trainer = TorchTrainer(
        worker,
        train_loop_config=replace(job, board=board),
        scaling_config=ScalingConfig(
            num_workers=runtime.train_workers, use_gpu=runtime.device == "cuda", resources_per_worker={"CPU": runtime.train_cpus}
        ),
        torch_config=TorchConfig(backend="nccl" if runtime.device == "cuda" else "gloo"),
        run_config=RunConfig(
            name=work,
            storage_path=store.path("training"),
            storage_filesystem=store.fs,
            failure_config=FailureConfig(max_failures=2),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"),
        ),
    )
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, progress, stop), daemon=True)
    watcher.start()
    try:
        result = trainer.fit()
    except Exception as e:
        raise own_error(e) or TrainingError(f"training failed: {type(e).__name__}. Logs: {log_folder()}") from e
    finally:
        stop.set()
        watcher.join()
    assert result.best_checkpoints, "every epoch reports a checkpoint"
    best, metrics = max(result.best_checkpoints, key=lambda c: c[1]["score"])
    with result.checkpoint.as_directory() as folder:
        state = json.loads((Path(folder) / "state.json").read_text())
    history = {"steps": state["steps"], "validation": state["validation"], "best": metrics, "skipped": state["skipped"]}
    task = ray.remote(num_cpus=1)(_export)
    with best.as_directory() as folder:
        card, t = _card(run, job, metrics), metrics.get("temperature")
        ray.get(task.remote(export, folder, job.base, job.settings, job.contract, store, run.prefix, card, history, t))
    stats = {k: metrics[k] for k in ("accuracy", "macro_f1", "temperature", "epoch", "step") if k in metrics} | {
        "rows": len(job.train),
        "skipped": state["skipped"],
    }
    manifest = run.commit(len(job.train), stats=stats)
    _remove(store, f"training/{work}")
    return manifest


def _export(function: Any, *args: Any) -> Any:
    return function(*args)


class _Board:
    """The last progress line, for the driver to read (an actor)."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, int, dict[str, float]]] = []

    def put(self, step: int, total: int, values: dict[str, float]) -> None:
        self.lines.append((step, total, values))

    def take(self) -> list[tuple[int, int, dict[str, float]]]:
        lines, self.lines = self.lines, []
        return lines


def _watch(board: Any, progress: Progress, stop: threading.Event) -> None:
    import ray

    while True:
        ended = stop.wait(0.5)
        try:
            for line in ray.get(board.take.remote(), timeout=5):
                progress(*line)
        except Exception:  # progress is never a reason to fail
            if ended:
                return
        if ended:
            return


def _remove(store: Store, key: str) -> None:
    """Working files of a finished run."""
    if store.is_s3:
        for name in store.files(key):
            store.delete(f"{key}/{name}")
    else:
        shutil.rmtree(store.path(key), ignore_errors=True)


def _card(run: Run, job: Any, metrics: dict[str, Any]) -> str:
    lines = [f"# {run.name}", "", "A Qwen2.5-VL model trained by mulcot-ray. It answers the prompts of `contract.json`, which stands beside it.", ""]
    facts = {
        "base": Path(job.base).name,
        "soft labels from": Path(job.assistant).name if job.assistant else "none",
        "tasks": ", ".join(job.tasks),
        "training rows": len(job.train),
        "validation": ", ".join(f"{k} {metrics[k]:.3f}" for k in ("accuracy", "macro_f1") if k in metrics) or "none",
        "best epoch": metrics["epoch"],
        "contract": f"{job.contract.name} ({job.contract.hash})",
        "identity": json.dumps(run.identity, sort_keys=True),
    }
    return "\n".join([*lines, *(f"- {k}: {v}" for k, v in facts.items())]) + "\n"
