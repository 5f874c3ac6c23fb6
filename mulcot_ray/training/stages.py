"""Stages 2 and 4: train the assistant, train the student. Ray Train runs `loop.worker` on the workers; the result is a model folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from mulcot_ray.artifacts import Manifest, begin, need, resolve_model
from mulcot_ray.cluster import session
from mulcot_ray.engines.base import Role, spec
from mulcot_ray.errors import ConfigError
from mulcot_ray.prices import load_prices
from mulcot_ray.prompts import digest
from mulcot_ray.recipe import Distill, Recipe, Runtime, Train
from mulcot_ray.records import Split, Task
from mulcot_ray.storage import Store

Progress = Callable[[int, int, dict[str, float]], None]  # step, steps in all, the losses or validation figures
BOTH = (Task.REASONING, Task.CLASSIFICATION)


def assistant(
    store: Store, name: str, *, posts: str, rationales: list[str], recipe: Recipe, runtime: Runtime, progress: Progress
) -> tuple[Manifest, bool]:
    """models/NAME: the assistant, on labels and the teacher's rationales (L_cls + L_rea)."""
    base, settings = recipe.models.assistant, recipe.assistant
    return train(store, name, posts, rationales, base, None, settings, BOTH, recipe, runtime, progress, "assistant")


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
    recipe: Recipe, runtime: Runtime, progress: Progress, role: Role = "student",
) -> tuple[Manifest, bool]:  # fmt: skip
    """Train, take the best epoch by validation accuracy (then F1), export, commit. Returns False where it was there already.

    With an `assistant` and `distill.soft_labels: cached`, its soft labels are written first (softlabels/…, made once for all that train from
    them), and the run does without it. `role`: whose engine and accelerator of the runtime are meant.
    """
    _check(settings, runtime, recipe.distill if assistant is not None else None)
    source = need(store, "posts", posts)
    # By fingerprint: the rows are in the same order, however the tables were named to us.
    tables = None if rationales is None else sorted((need(store, "rationales", r) for r in rationales), key=lambda t: t.fingerprint)
    folder, base_print = resolve_model(store, base)
    featured = assistant is not None and recipe.distill.features
    if featured:
        from mulcot_ray.training.model import check_features

        check_features(recipe.distill, settings, str(folder))
    soft = resolve_model(store, assistant) if assistant is not None else None
    identity = {
        "stage": "train", "posts": source.fingerprint, "rationales": None if tables is None else [t.fingerprint for t in tables],
        "base": base_print, "assistant": soft[1] if soft else None, "tasks": list(tasks), "train": settings.model_dump(mode="json"),
        "distill": _distill(recipe.distill) if soft else None, "contract": recipe.contract.hash, "seed": recipe.seed,
        "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    }  # fmt: skip
    run = begin(store, "models", name, identity)
    if isinstance(run, Manifest):
        return run, False

    from mulcot_ray.training.data import Order, index
    from mulcot_ray.training.fit import fit
    from mulcot_ray.training.loop import Job

    side = None if featured else recipe.contract.image.side
    order = Order(index(store, source, Split.TRAIN, tables), settings.epochs, settings.global_batch, recipe.seed, side)
    if order.total == 0:
        raise ConfigError(f"{len(order.index)} rows × {settings.epochs} epochs do not fill one batch of {settings.global_batch}")
    has_validation = bool(source.stats["splits"].get(Split.VALIDATION))
    accelerator = getattr(runtime, role).accelerator
    job = Job(
        # A resumed run finds its work, another recipe under a freed name does not, nor does another root on the same machine.
        work=f"{name}-{digest([run.identity, store.base])[:8]}", base=str(folder), base_print=base_print,
        assistant=str(soft[0]) if soft else None, soft=None,
        settings=settings, distill=recipe.distill, contract=recipe.contract, tasks=tasks, order=order,
        validation=index(store, source, Split.VALIDATION, None) if has_validation else None, dtype=recipe.dtype, max_model_len=recipe.max_model_len,
        device=runtime.device, micro_batch=runtime.micro_batch, packed=runtime.packed, loss_chunk=runtime.loss_chunk,
        checkpoint_steps=runtime.checkpoint_steps, checkpointing=runtime.checkpointing, compiled=runtime.compile_training, reshard=runtime.reshard,
        peak_flops=load_prices().accelerator(accelerator).tflops_bf16 * 1e12 if runtime.device == "cuda" else None, store=store,
        live=f"{run.prefix}/tensorboard",
    )  # fmt: skip
    with run, session(runtime):
        if soft is not None and recipe.distill.soft_labels == "cached":
            from mulcot_ray.training.soft_labels import kept_by
            from mulcot_ray.training.soften import soften

            assert assistant is not None and tables is not None
            same = ("posts", "rationales", "base", "assistant", "contract", "seed", "dtype", "max_model_len")
            decides = {k: run.identity[k] for k in same} | kept_by(recipe.distill)
            table, _ = soften(
                store, f"soft-{digest(decides)}", posts=posts, rationales=[t.name for t in tables], assistant=assistant,
                recipe=recipe.model_copy(update={"models": recipe.models.model_copy(update={"student": base}), "student": settings}), runtime=runtime,
                progress=lambda done, total, _: progress(done, total, {"soft_labels": done}),
            )  # fmt: skip
            job = replace(job, assistant=None, soft=table)
        return fit(run, job, runtime, spec(recipe, runtime, role, ""), progress), True


def _check(settings: Train, runtime: Runtime, distill: Distill | None) -> None:
    lo, hi = runtime.workers
    for n in range(lo, hi + 1):
        if settings.global_batch % n:
            says = f"train_workers {n} of the runtime" + ("" if lo == hi else f", which may have {lo} to {hi}")
            raise ConfigError(f"global_batch {settings.global_batch} of the recipe does not divide by {says}")
    if distill is not None and distill.soft_labels == "cached" and distill.keep == "sampled" and distill.divergence != "forward_kl":
        raise ConfigError(f"distill.divergence {distill.divergence} with keep: sampled: draws estimate forward_kl alone; use it, or keep: top_k")


def _distill(d: Distill) -> dict[str, Any]:
    """What of the settings decides a result."""
    without = {"beta"} if d.divergence != "jsd" else set[str]()
    without |= {"keep", "top_k"} if d.soft_labels == "online" else set()
    without |= set() if d.features else {"features"}  # so that results of before it was there are still found
    return d.model_dump(mode="json", exclude=without)
