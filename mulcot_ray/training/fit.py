"""One training run on Ray Train: workers that come and go, checkpoints that stay, a model folder at the end."""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from mulcot_ray.artifacts import Manifest, Run
from mulcot_ray.cluster import log_folder, own_error
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.recipe import Runtime
from mulcot_ray.storage import Store
from mulcot_ray.training.export import export
from mulcot_ray.training.feed import CPUS, Feed
from mulcot_ray.training.loop import Job, worker
from mulcot_ray.training.stages import Progress

FAILURES = 8  # of workers, over a run; nodes that are taken away (spot) are not counted
RESIZE_SECONDS = 60.0  # how often a run with a range of workers asks whether there is room for more


def fit(run: Run, job: Job, runtime: Runtime, spec: EngineSpec, progress: Progress) -> Manifest:
    """Train, take the best epoch, export, commit. `spec`: how an engine of the model's role runs, for the parity check."""
    import ray

    store, (lo, hi), gpu = run.store, runtime.workers, runtime.device == "cuda"
    _check_room(runtime)
    board = ray.remote(num_cpus=0)(_Board).remote()
    feed = Feed(job.order, store, f"training/{job.work}", hi)
    trainer = (_HereTrainer if _here(runtime) else TorchTrainer)(
        worker,
        train_loop_config=replace(job, board=board),  # type: ignore[arg-type]
        datasets={"train": feed.steps},
        dataset_config=feed,
        scaling_config=ScalingConfig(
            num_workers=lo if lo == hi else (lo, hi), elastic_resize_monitor_interval_s=RESIZE_SECONDS, use_gpu=gpu,
            resources_per_worker={"CPU": runtime.train_cpus} | ({"GPU": 1} if gpu else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name=job.work,
            storage_path=store.path("training"),
            storage_filesystem=store.fs,
            failure_config=FailureConfig(max_failures=FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute="score", checkpoint_score_order="max"),  # and the last
            callbacks=[_StopAtOurs()],
        ),
    )  # fmt: skip
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(board, progress, stop), daemon=True)
    watcher.start()
    try:
        result = trainer.fit()
    except Exception as e:
        raise own_error(getattr(e, "controller_failure", e)) or TrainingError(f"training failed: {type(e).__name__}. Logs: {log_folder()}") from e
    finally:
        stop.set()
        watcher.join()
    scored = [c for c in result.best_checkpoints or () if "score" in c[1]]
    assert scored, "every epoch reports a checkpoint with its score"
    best, metrics = max(scored, key=lambda c: c[1]["score"])
    needs = {"num_cpus": max(1.0, spec.runtime.cpus), "num_gpus": spec.runtime.devices if gpu and runtime.parity_posts else 0}
    task = ray.remote(max_retries=0, **needs)(_call)
    card = _card(run, job, metrics)
    checked = spec if runtime.parity_posts else None
    try:
        exported = ray.get(task.remote(export, best, result.checkpoint, job, metrics, run.prefix, card, checked, runtime.parity_posts))
    except ray.exceptions.RayTaskError as e:
        cause = getattr(e, "cause", None) or e  # without Ray's traceback
        raise own_error(cause) or cause from e
    stats = {k: metrics[k] for k in ("accuracy", "macro_f1", "temperature", "epoch", "step") if k in metrics}
    manifest = run.commit(len(job.order.index), stats=stats | {"rows": len(job.order.index)} | exported)
    _remove(store, f"training/{job.work}")
    return manifest


class _HereTrainer(TorchTrainer):
    """For a Ray that this command started and will stop: what it holds then goes with it, and nobody but us waits for its news.

    Ray's cleaner of placement groups asks the dashboard, which is not there, so every run would end with 12 s of waiting for it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # between looks at the workers, 2 s by default
        super().__init__(*args, **kwargs)

    def _create_default_callbacks(self) -> list[Any]:
        return [c for c in super()._create_default_callbacks() if not isinstance(c, PlacementGroupCleanerCallback)]


def _here(runtime: Runtime) -> bool:
    return not (os.environ.get("RAY_ADDRESS") or runtime.address)


class _StopAtOurs(UserCallback):
    """Ends the run at an error of our own: what a worker says so will not be better on the next attempt."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for e in worker_exceptions.values():
            if (own := own_error(e)) is not None:
                raise own


def _check_room(runtime: Runtime) -> None:
    """On this machine alone: a cluster may grow."""
    import ray

    cpus = ray.cluster_resources().get("CPU", 0)
    wanted = runtime.workers[1] * runtime.train_cpus
    if _here(runtime) and wanted + CPUS > cpus:
        raise ConfigError(
            f"train_workers {runtime.workers[1]} × train_cpus {runtime.train_cpus:g} of the {cpus:g} CPUs that Ray has here leave none for reading "
            f"the data, which needs {CPUS:g}: have fewer workers, or raise local_cpus"
        )


def _call(function: Any, *args: Any) -> Any:
    return function(*args)


class _Board:
    """The last progress lines, for the driver to read (an actor)."""

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


def _card(run: Run, job: Job, metrics: dict[str, Any]) -> str:
    lines = [f"# {run.name}", "", "A Qwen2.5-VL model trained by mulcot-ray. It answers the prompts of `contract.json`, which stands beside it.", ""]
    soft = (
        "none"
        if job.assistant is None and job.soft is None
        else Path(job.assistant).name
        if job.assistant
        else f"softlabels/{job.soft and job.soft.name}"
    )
    facts = {
        "base": Path(job.base).name,
        "soft labels from": soft,
        "tasks": ", ".join(job.tasks),
        "training rows": len(job.order.index),
        "validation": ", ".join(f"{k} {metrics[k]:.3f}" for k in ("accuracy", "macro_f1") if k in metrics) or "none",
        "best epoch": metrics["epoch"],
        "contract": f"{job.contract.name} ({job.contract.hash})",
        "identity": json.dumps(run.identity, sort_keys=True),
    }
    return "\n".join([*lines, *(f"- {k}: {v}" for k, v in facts.items())]) + "\n"
