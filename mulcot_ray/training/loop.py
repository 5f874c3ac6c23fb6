"""The training loop that each Ray Train worker runs: assistant and student alike, with one or two tasks, with or without soft labels."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from mulcot_ray import calibration
from mulcot_ray.errors import RowFault, TrainingError
from mulcot_ray.posts.images import post_image
from mulcot_ray.prompts import Contract, label_token_ids
from mulcot_ray.recipe import Distill, Train
from mulcot_ray.records import LABELS, Post, Rationale, Sentiment, Task
from mulcot_ray.training.data import Index, batches, row_key, steps
from mulcot_ray.training.examples import IGNORE, Example, Picture, collate, encode_picture, supervised
from mulcot_ray.training.losses import AnswerLogits, TaskLoss, core
from mulcot_ray.training.model import build, check_vocabularies, load, load_processor, shard, trainable


@dataclass(frozen=True)
class Job:
    """All that a worker needs. `assistant` is a folder (soft labels) or None."""

    base: str
    assistant: str | None
    settings: Train
    distill: Distill
    contract: Contract
    tasks: tuple[Task, ...]
    train: Index
    validation: Index | None
    seed: int
    dtype: str
    max_model_len: int
    device: str
    micro_batch: int
    checkpointing: bool
    reshard: bool
    board: Any = None  # a progress actor, or None


@dataclass
class State:
    """Where a run is; saved with each checkpoint."""

    step: int = 0
    epoch: int = 0
    best: tuple[float, float] = (-1.0, -1.0)
    skipped: int = 0
    scheduler: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)
    validation: list[dict[str, float]] = field(default_factory=list)


def worker(job: Job) -> None:
    """Train, validate and checkpoint at each epoch's end, resume from the last checkpoint where there is one."""
    import ray.train

    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    if job.device == "cpu":
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
    trainer = Trainer(job, rank, world)
    if (checkpoint := ray.train.get_checkpoint()) is not None:
        with checkpoint.as_directory() as folder:
            trainer.restore(Path(folder))
    for metrics in trainer.run():
        with tempfile.TemporaryDirectory() as folder:
            trainer.save(Path(folder))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=f"epoch-{trainer.state.epoch:04d}")


class Trainer:
    """Model, optimizer and state of one worker; knows nothing of Ray."""

    def __init__(self, job: Job, rank: int, world: int) -> None:
        s = job.settings
        if s.global_batch % world:
            raise TrainingError(f"global_batch {s.global_batch} does not divide by {world} workers")
        self.job, self.rank, self.world, self.state = job, rank, world, State()
        self.device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
        torch.manual_seed(job.seed)  # the same adapters on every worker
        self.processor = load_processor(job.base)
        model = build(job.base, s, job.contract)
        if job.checkpointing:
            core(model).gradient_checkpointing_enable()  # type: ignore[operator]
        self.image_token = core(model).config.image_token_id  # type: ignore[union-attr]
        self.label_ids = label_token_ids(self.processor.tokenizer, job.contract)
        self.loss = TaskLoss(model.to(self.device), job.distill.temperature).train()
        shard(self.loss, job.device, job.dtype, job.reshard)
        self.soft: AnswerLogits | None = None
        if job.assistant is not None:
            check_vocabularies(self.processor.tokenizer, load_processor(job.assistant).tokenizer)
            # eval(): the authors' assistant keeps its dropout on, and the soft labels their noise
            self.soft = AnswerLogits(load(job.assistant).to(self.device)).eval().requires_grad_(False)
            shard(self.soft, job.device, job.dtype, job.reshard)
        self.parameters = [p for p in self.loss.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=s.lr, betas=(0.9, s.beta2), weight_decay=s.weight_decay)
        self.blank = self._blank()
        self.total = steps(len(job.train), s.epochs, s.global_batch)
        if self.total == 0:
            raise TrainingError(f"{len(job.train)} rows × {s.epochs} epochs do not fill one batch of {s.global_batch}")
        self.scheduler = _scheduler(self.optimizer, s, self.total)

    # --- one run -----------------------------------------------------------------------------------------------------

    def run(self) -> Any:
        """Yield the metrics at the end of every epoch; the caller checkpoints."""
        job, s = self.job, self.job.settings
        for rows in batches(len(job.train), s.epochs, s.global_batch, job.seed, self.rank, self.world, self.state.step):
            torch.manual_seed(row_key(seed=job.seed, step=self.state.step, rank=self.rank))  # dropout agrees after a resume
            losses = self.step(rows)
            self.state.step += 1
            self.state.steps.append({"step": self.state.step, **losses})
            if not math.isfinite(losses["loss"]):
                raise TrainingError(f"the loss is {losses['loss']} at step {self.state.step}: lower lr (now {s.lr})")
            self._tell(losses)
            if (self.state.step * s.global_batch) // len(job.train) > self.state.epoch or self.state.step == self.total:
                self.state.epoch += 1
                yield self._end_epoch()

    def step(self, rows: np.ndarray) -> dict[str, float]:
        """One optimizer step over this worker's rows; the losses are means over the answer tokens of the global batch."""
        micro = [self._examples(rows[i : i + self.job.micro_batch]) for i in range(0, len(rows), self.job.micro_batch)]
        lam = self.job.distill.lam if self.soft is not None else 0.0
        counts = torch.tensor(
            [[float(sum((e.labels[1:] != IGNORE).sum() for e in m[t])) for t in self.job.tasks] for m in micro], device=self.device
        ).sum(0)
        dist.all_reduce(counts)
        sums = torch.zeros(len(self.job.tasks), 2, device=self.device)
        for i, m in enumerate(micro):
            for j, task in enumerate(self.job.tasks):
                last = i == len(micro) - 1 and j == len(self.job.tasks) - 1
                self.loss.set_requires_gradient_sync(last)  # type: ignore[operator]
                self.loss.set_reshard_after_backward(last or self.job.reshard)  # type: ignore[operator]
                batch = self._batch(m[task])
                soft = self.soft(batch) if self.soft is not None else None
                hard, kl = self.loss(batch, soft)
                # FSDP averages gradients over workers; the mean wanted is over the tokens of all of them.
                (((1 - lam) * hard + lam * kl) * self.world / counts[j].clamp(min=1)).backward()
                sums[j] += torch.stack([hard.detach(), kl.detach()])
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.job.settings.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.LambdaLR):
            self.scheduler.step()
        dist.all_reduce(sums)
        means = (sums / counts.clamp(min=1)[:, None]).tolist()
        out = {"loss": sum((1 - lam) * ce + lam * kl for ce, kl in means), "lr": self.optimizer.param_groups[0]["lr"]}
        for task, (ce, kl) in zip(self.job.tasks, means, strict=True):
            short = "cls" if task is Task.CLASSIFICATION else "rea"
            out[f"ce_{short}"] = ce
            if self.soft is not None:
                out[f"kl_{short}"] = kl
        return out | {"grad_norm": float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Accuracy and macro F1 of the classification task by scored label words, over the whole validation split, and the temperature
        that would make the probabilities fit it (calibration.py)."""
        index = self.job.validation
        assert index is not None
        self.loss.eval()
        mine_said: list[tuple[int, list[float]]] = []  # gold, probabilities
        each = -(-len(index) // (self.world * self.job.micro_batch)) * self.job.micro_batch  # every worker takes part in every forward
        for lo in range(0, each, self.job.micro_batch):
            mine = [self.rank * each + lo + i for i in range(self.job.micro_batch)]
            posts = [index.fetch(i % len(index))[0] for i in mine]
            batch = self._batch([self._classify(post) for post in posts])
            p = torch.softmax(self._label_logits(batch).float(), -1).tolist()
            mine_said += [(LABELS.index(_gold(post)), x) for i, post, x in zip(mine, posts, p, strict=False) if i < len(index)]
        self.loss.train()
        everyone: list[list[tuple[int, list[float]]]] = [[] for _ in range(self.world)]
        dist.all_gather_object(everyone, mine_said)
        said = [x for part in everyone for x in part]
        confusion = torch.zeros(3, 3)
        for gold, p in said:
            confusion[gold, p.index(max(p))] += 1
        hit, found, answered = confusion.diag(), confusion.sum(1), confusion.sum(0)
        f1 = 2 * hit / (found + answered).clamp(min=1)
        t = calibration.fit([p for _, p in said], [gold for gold, _ in said])
        return {"accuracy": float(hit.sum() / confusion.sum()), "macro_f1": float(f1.mean()), "temperature": t}

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """This worker's shards of what trains and of the optimizer, and the state (worker 0)."""
        self.state.scheduler = self.scheduler.state_dict()
        content = {"model": trainable(self.loss.model), "optimizer": get_optimizer_state_dict(self.loss, self.optimizer)}
        dcp.save(content, checkpoint_id=folder / "shards")
        if self.rank == 0:
            (folder / "state.json").write_text(json.dumps(asdict(self.state)))

    def restore(self, folder: Path) -> None:
        content = {"model": trainable(self.loss.model), "optimizer": get_optimizer_state_dict(self.loss, self.optimizer)}
        dcp.load(content, checkpoint_id=folder / "shards")  # in place, whatever number of workers wrote it
        set_optimizer_state_dict(self.loss, self.optimizer, content["optimizer"])
        self.state = State(**json.loads((folder / "state.json").read_text()))
        self.state.best = (self.state.best[0], self.state.best[1])
        self.scheduler.load_state_dict(self.state.scheduler)

    # --- pieces ------------------------------------------------------------------------------------------------------

    def _end_epoch(self) -> dict[str, Any]:
        found = self.validate() if self.job.validation is not None else {}
        score = (found.get("accuracy", 0.0), found.get("macro_f1", 0.0))
        self.state.best = max(self.state.best, score)
        self.state.validation.append({"step": self.state.step, "epoch": self.state.epoch, **found})
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(score[0])
        self._tell(found)
        # One number for Ray Train's "best checkpoint": accuracy, then F1.
        return {"score": score[0] + 1e-4 * score[1], "epoch": self.state.epoch, "step": self.state.step, **found}

    def _examples(self, rows: np.ndarray) -> dict[Task, list[Example]]:
        made: dict[Task, list[Example]] = {t: [] for t in self.job.tasks}
        for i in rows:
            post, rationale = self.job.train.fetch(int(i))
            try:
                picture = self._picture(post)
                pair = {t: self._example(t, post, rationale, picture) for t in self.job.tasks}
            except RowFault:
                self.state.skipped += 1  # too long or unreadable: counted, and told in the model's card
                continue
            for t, e in pair.items():
                made[t].append(e)
        return made

    def _picture(self, post: Post) -> Picture | None:
        image = post_image(post, self.job.contract.image.side)
        return encode_picture(self.processor, image) if image is not None else None

    def _example(self, task: Task, post: Post, rationale: Rationale | None, picture: Picture | None) -> Example:
        gold = _gold(post)
        answer = self.job.contract.answer(task, gold, rationale if task is Task.REASONING else None)
        return supervised(self.processor, self.job.contract, task, post, gold, answer, picture, self.job.max_model_len)

    def _blank(self) -> Example:
        """A white picture and no targets: takes part in every collective, and in no loss."""
        side = self.job.contract.image.side
        post = Post("-", "-", "-", image_bytes=b"-", label=Sentiment.NEUTRAL)
        picture = encode_picture(self.processor, Image.new("RGB", (side, side), "white"))
        answer = self.job.contract.answer(Task.CLASSIFICATION, Sentiment.NEUTRAL)
        e = supervised(self.processor, self.job.contract, Task.CLASSIFICATION, post, Sentiment.NEUTRAL, answer, picture, self.job.max_model_len)
        return Example(e.ids, np.full_like(e.labels, IGNORE), e.picture)

    def _classify(self, post: Post) -> Example:
        try:
            return self._example(Task.CLASSIFICATION, post, None, self._picture(post))
        except RowFault:  # too long or unreadable: the label has to be found without it
            bare = Post(post.post_id, post.source_id, "-", post.aspect, label=post.label)
            return self._example(Task.CLASSIFICATION, bare, None, None)

    def _batch(self, examples: list[Example]) -> dict[str, Tensor]:
        if not any(e.picture for e in examples):
            # Every worker must run the vision tower when one does, or the others wait for its shards for ever.
            examples = [*examples, self.blank]
        made = collate(examples, self.processor.tokenizer.pad_token_id, self.image_token)
        return {k: v.to(self.device, non_blocking=True) for k, v in made.items()}

    def _label_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the three label words [b, 3] where the answer's label stands."""
        return self.loss(batch, label_ids=self.label_ids)

    def _tell(self, values: dict[str, float]) -> None:
        if self.rank == 0 and self.job.board is not None:
            with contextlib.suppress(Exception):  # progress is never a reason to fail
                self.job.board.put.remote(self.state.step, self.total, values)


def _gold(post: Post) -> Sentiment:
    assert post.label is not None, "the index holds labelled posts only"
    return post.label


def _scheduler(optimizer: torch.optim.Optimizer, s: Train, total: int) -> Any:
    if s.schedule == "plateau":
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=2, min_lr=1e-6)
    warm = max(1, int(s.warmup * total))

    def factor(step: int) -> float:
        return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
