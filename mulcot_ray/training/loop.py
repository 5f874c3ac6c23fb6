"""The training loop that each Ray Train worker runs: assistant and student alike, with one or two tasks, with or without soft labels."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mulcot_ray.artifacts import Manifest
from mulcot_ray.console import log_in_worker
from mulcot_ray.errors import TrainingError
from mulcot_ray.observing import trained
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Distill, Train
from mulcot_ray.records import Task
from mulcot_ray.storage import Store
from mulcot_ray.training import checkpoints
from mulcot_ray.training.checkpoints import Drafts, State
from mulcot_ray.training.collate import Collate, Slice
from mulcot_ray.training.data import Index, Order, row_key
from mulcot_ray.training.examples import Encoder
from mulcot_ray.training.joint import Joint, TaskLosses
from mulcot_ray.training.metrics import EVENTS, EventFile, cost
from mulcot_ray.training.model import build, check_alike, check_vocabularies, load, load_processor, prepare, shard
from mulcot_ray.training.packing import Packer
from mulcot_ray.training.validation import Validation

AHEAD = 2  # steps whose tensors are made ahead
LIVE_SECONDS = 60.0  # between copies of the TensorBoard file to the store


@dataclass(frozen=True)
class Job:
    """All that a worker needs. `assistant` is a folder (soft labels online), `soft` a finished table of them; both None: hard labels alone."""

    work: str  # a name for this run's temporary files
    base: str
    base_print: str  # its fingerprint
    assistant: str | None
    soft: Manifest | None
    settings: Train
    distill: Distill
    contract: Contract
    tasks: tuple[Task, ...]
    order: Order
    validation: Index | None
    dtype: str
    max_model_len: int
    device: str
    micro_batch: int
    packed: bool
    loss_chunk: int
    checkpoint_steps: int | None
    checkpointing: bool
    compiled: bool
    reshard: bool
    peak_flops: float | None  # of one device, for the MFU
    store: Store
    live: str  # folder of the TensorBoard file, as a key of the store
    board: Any = None  # a progress actor, or None


def worker(job: Job) -> None:
    """Train from the last checkpoint on, where there is one; validate at each epoch's end; checkpoint then, and in between as the job says."""
    import ray.train
    from ray.train import Checkpoint, CheckpointUploadMode

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    log_in_worker(run=job.live.rpartition("/")[0], stage="train", rank=str(rank))
    if job.device == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    drafts = Drafts(job.work, rank)
    trainer = Trainer(job, rank, world)
    if (last := ray.train.get_checkpoint()) is not None:
        with last.as_directory() as folder:
            trainer.restore(Path(folder))
    trainer.watch()
    if trainer.state.step == job.order.total:
        return
    rows = ray.train.get_dataset_shard("train").iter_torch_batches(
        batch_size=job.settings.global_batch // world, prefetch_batches=AHEAD, collate_fn=trainer.collate, device="cpu"
    )
    for metrics in trainer.run(rows):
        folder = drafts.new(trainer.state.step)
        trainer.save(folder)
        ray.train.report(
            metrics,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_dir_name=f"step-{trainer.state.step:07d}",
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        )


class Trainer:
    """Model, optimizer and state of one worker."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        s = job.settings
        if s.global_batch % world:
            raise TrainingError(f"global_batch {s.global_batch} does not divide by {world} workers")
        self.job, self.rank, self.world, self.state = job, rank, world, State()
        self.device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
        torch.manual_seed(job.order.seed)  # the same adapters on every worker
        frozen = torch.bfloat16 if job.dtype == "bfloat16" else torch.float32
        processor, packer = load_processor(job.base), Packer(job.base)
        encoder = Encoder(processor, job.contract, job.max_model_len)
        self.model = build(job.base, s, job.contract, frozen)
        self.cost = cost(self.model, frozen=False)
        assistant, shared, soft, features = None, None, None, None
        if job.assistant is not None:
            check_alike(job.base, job.assistant)
            shared = check_vocabularies(processor.tokenizer, load_processor(job.assistant).tokenizer)
            assistant = load(job.assistant, frozen)
            self.cost += cost(assistant, frozen=True)
        elif job.soft is not None:
            from mulcot_ray.training.soft_labels import SoftLabels

            soft = SoftLabels(job.store, job.soft, job.distill, job.base_print)
            shared, features = soft.shared, soft.features if job.distill.features else None
        self.collate = Collate(encoder, packer, job.tasks, job.micro_batch, job.packed, soft, features)
        self.validation: Validation | None = None
        if job.validation is not None:
            self.validation = Validation(job.validation, encoder, packer, rank, world, job.micro_batch, self.device)
        models = [m for m in (self.model, assistant) if m is not None]
        for m in models:
            prepare(m, checkpointing=job.checkpointing and m is self.model, compiled=job.compiled)
        self.root = Joint(self.model, assistant, job.distill, shared, job.loss_chunk)
        shard(self.root, models, job.device, job.dtype, job.reshard)
        self.parameters = [p for p in self.root.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay)
        self.scheduler = _scheduler(self.optimizer, s, job.order.total)
        self.events: EventFile | None = None
        self.published = time.time()

    # --- one run -----------------------------------------------------------------------------------------------------

    def run(self, slices: Iterable[Slice]) -> Iterator[dict[str, Any]]:
        """Train on this worker's slices of the steps to come. Yields metrics whenever the caller is to make a checkpoint."""
        job, s, state = self.job, self.job.settings, self.state
        at = time.perf_counter()
        for piece in slices:
            if piece.step != state.step:
                raise TrainingError(f"the data goes on with step {piece.step}, the checkpoint with {state.step}: start the command again")
            waited = time.perf_counter() - at
            torch.manual_seed(row_key(seed=job.order.seed, step=state.step, rank=self.rank))  # dropout agrees after a resume
            found = self.step(piece)
            state.step += 1
            self._note(found, time.perf_counter() - at, waited)
            if not math.isfinite(found["loss"]):
                raise TrainingError(f"the loss is {found['loss']} at step {state.step}: lower lr (now {s.lr})")
            epoch = s.epochs if state.step == job.order.total else state.step * s.global_batch // len(job.order.index)
            if epoch > state.epoch:
                state.epoch = epoch
                yield self._end_epoch()
            elif job.checkpoint_steps and state.step % job.checkpoint_steps == 0:
                yield {"step": state.step, "epoch": state.epoch}
            at = time.perf_counter()

    def step(self, piece: Slice) -> dict[str, float]:
        """One optimizer step. Losses are means over the answer tokens of the global batch, task by task, whoever has how many of them."""
        tasks, first_epoch = self.job.tasks, self.state.step * self.job.settings.global_batch < len(self.job.order.index)
        mine = [[*m.answers, m.tokens, self.cost.of(m.tokens, m.patches, sum(m.answers))] for m in piece.micro]
        sums = torch.tensor([*(sum(column) for column in zip(*mine, strict=True)), piece.posts, piece.skipped], dtype=torch.float64)
        sums = sums.to(self.device)
        dist.all_reduce(sums)
        *answers, tokens, flops, posts, skipped = sums.tolist()
        self.state.skipped += int(skipped) * first_epoch
        # FSDP averages gradients over workers; the mean wanted is over the tokens of all of them.
        scales = [self.world / max(n, 1.0) for n in answers]
        parts = torch.zeros(len(tasks), 3, device=self.device, dtype=torch.float64)
        for i, micro in enumerate(piece.micro):
            last = i == len(piece.micro) - 1
            self.root.set_requires_gradient_sync(last)  # type: ignore[operator]
            self.root.set_reshard_after_backward(last or self.job.reshard)  # type: ignore[operator]
            here = micro.to(self.device)
            losses = self.root(here.batch, scales, here.soft)
            assert isinstance(losses, TaskLosses)
            losses.total.backward()
            parts += losses.parts
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.job.settings.clip)
        lr = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.scheduler.step()
        dist.all_reduce(parts)
        means = (parts / torch.tensor(answers, device=self.device).clamp(min=1)[:, None]).tolist()
        soft = self.job.assistant is not None or self.job.soft is not None
        lam = self.job.distill.lam if soft else 0.0
        found = {"loss": sum((1 - lam) * ce + lam * kl for ce, kl, _ in means), "lr": lr}
        for task, (ce, kl, _) in zip(tasks, means, strict=True):
            short = "cls" if task is Task.CLASSIFICATION else "rea"
            found |= {f"ce_{short}": ce} | ({f"kl_{short}": kl} if soft else {})
        if soft:
            found["dropped"] = float(parts[:, 2].sum()) / max(sum(answers), 1.0)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        return found | {"grad_norm": grad_norm, "tokens": tokens, "posts": posts, "flops": flops}

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """This worker's part of a checkpoint."""
        self.state.scheduler = self.scheduler.state_dict()
        checkpoints.save(folder, self.root, self.model, self.optimizer, self.state, self.rank)
        self._publish(always=True)

    def restore(self, folder: Path) -> None:
        self.state = checkpoints.restore(folder, self.root, self.model, self.optimizer)
        self.scheduler.load_state_dict(self.state.scheduler)

    # --- what a person watches ---------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Write TensorBoard's file (worker 0), from the first step on."""
        if self.rank == 0:
            self.events = EventFile(self.state.rows)

    def _note(self, found: dict[str, float], seconds: float, waited: float) -> None:
        flops, state = found.pop("flops"), self.state
        row = {"step": state.step, "epoch": state.epoch, "time": time.time(), **found, "seconds": seconds, "waited": waited}
        row |= {"tokens_s": found["tokens"] / seconds, "posts_s": found["posts"] / seconds, "workers": self.world}
        if self.job.peak_flops:
            row["mfu"] = flops / seconds / self.world / self.job.peak_flops
        if self.rank == 0:
            state.rows.append(row)
            if self.events is not None:
                self.events.add(row)
        self._tell(row)
        self._publish()

    def _end_epoch(self) -> dict[str, Any]:
        job, state = self.job, self.state
        found: dict[str, float] = {}
        if self.validation is not None:
            self.root.eval()
            with torch.no_grad():
                found = self.validation.scored(self.root)
                if job.settings.select_by == "generated":
                    scored = {f"scored_{k}": found[k] for k in ("accuracy", "macro_f1")}
                    found |= scored | self.validation.generated(self.root)
            self.root.train()
        state.validation.append({"step": state.step, "epoch": state.epoch, **found})
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(found.get("accuracy", 0.0))
        if self.rank == 0 and found:
            state.rows[-1] |= found
            if self.events is not None:
                self.events.add({"step": state.step, "time": time.time(), **found})
        self._tell(found)
        # One number for Ray Train's "best checkpoint": accuracy, then F1; without validation, the last epoch.
        score = found["accuracy"] + 1e-4 * found["macro_f1"] if found else float(state.epoch)
        return {"score": score, "epoch": state.epoch, "step": state.step, **found}

    def _tell(self, values: dict[str, float]) -> None:
        if self.rank == 0:
            trained(self.job.live.rpartition("/")[0], self.state.step, self.job.order.total, values)
        if self.rank == 0 and self.job.board is not None:
            with contextlib.suppress(Exception):  # progress is never a reason to fail
                self.job.board.put.remote(self.state.step, self.job.order.total, values)

    def _publish(self, always: bool = False) -> None:
        if self.events is not None and (always or time.time() - self.published > LIVE_SECONDS):
            self.published = time.time()
            self.job.store.write(f"{self.job.live}/{EVENTS}", bytes(self.events.data))


def _scheduler(optimizer: torch.optim.Optimizer, s: Train, total: int) -> Any:
    if s.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2, min_lr=1e-6)
    warm = max(1, int(s.warmup * total))

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
