"""The stage between assistant and student: the assistant's soft labels, written once, as softlabels/NAME. The student then trains without it.

Ray Data gives each actor ranges of the training index; it goes through them some posts at a time and commits each range whole. A killed run
goes on with the ranges that are missing. An actor has one device, and the assistant on it, in the dtype of the recipe. With `distill.features` it
has the student too, and the features of pictures that its vision tower makes stand in the table: a range is held in memory until it is
committed, with features some 100 MB for 256 rows of a 3B student.

The manifest's stats tell what it costs and what is lost: bytes a token, and of some rows the KL to the untrained student by the whole
distributions (`kl_full`) and by what is kept of them (`kl_kept`), in nats a token; with features their bytes a post that has a picture.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mulcot_ray.artifacts import Manifest, Run, begin, need, resolve_model
from mulcot_ray.cluster import mapped, session
from mulcot_ray.console import Progress
from mulcot_ray.engines.scope import LIVES
from mulcot_ray.errors import ConfigError, RowFault
from mulcot_ray.parts import Commit, Parts, as_batch, commit_part, footers
from mulcot_ray.prompts import Contract, digest
from mulcot_ray.recipe import Distill, Recipe, Runtime
from mulcot_ray.records import Reject, Split, Task
from mulcot_ray.storage import Store
from mulcot_ray.training.data import Index, index, row_key
from mulcot_ray.training.examples import Encoder, Example
from mulcot_ray.training.losses import Drawn, Kept, Teacher, answer_losses
from mulcot_ray.training.model import check_alike, check_features, check_vocabularies, load, load_processor, output_weight
from mulcot_ray.training.packing import Packer, answer_rows, answer_tokens, features, last_hidden
from mulcot_ray.training.soft_labels import SoftLabel, draw, keep, kept_by, part_name, rows_per_group, tokens_digest

TASKS = (Task.REASONING, Task.CLASSIFICATION)
MEASURED = 64  # training rows, about, on which the KL is compared
MAX_DRAWS = 65_535  # counts are uint16
# What decides how a model's folder makes tokens of a post.
READING = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "chat_template.jinja", "processor_config.json", "preprocessor_config.json")  # fmt: skip


def soften(
    store: Store, name: str, *, posts: str, rationales: list[str], assistant: str, recipe: Recipe, runtime: Runtime, progress: Progress
) -> tuple[Manifest, bool]:
    """Write softlabels/NAME: a row for each task of each training row (post × rationale, in the order of `data.index`).

    Returns the manifest, and False where it was there already. Posts are tokenised as for the recipe's student, whatever the assistant's folder
    says. A row that cannot be used is a reject for each task. As many actors as the runtime has replicas of the assistant.
    Raises ConfigError, ArtifactMissing, RecipeChanged, Busy, TrainingError, EngineError.
    """
    d = recipe.distill
    if d.keep == "sampled" and d.top_k > MAX_DRAWS:
        raise ConfigError(f"distill.top_k {d.top_k}: at most {MAX_DRAWS} draws can be counted")
    source = need(store, "posts", posts)
    tables = sorted((need(store, "rationales", r) for r in rationales), key=lambda t: t.fingerprint)  # as `stages.train` has them
    (teacher, teacher_print), (student, student_print) = resolve_model(store, assistant), resolve_model(store, recipe.models.student)
    check_features(d, recipe.student, str(student))
    identity = {
        "stage": "soften", "posts": source.fingerprint, "rationales": [t.fingerprint for t in tables], "assistant": teacher_print,
        "reading": _reading(student), "tasks": list(TASKS), "distill": kept_by(d), "contract": recipe.contract.hash,
        "seed": recipe.seed if d.keep == "sampled" else None, "dtype": recipe.dtype, "max_model_len": recipe.max_model_len,
    } | ({"student": student_print} if d.features else {})  # fmt: skip
    run = begin(store, "softlabels", name, identity, {"rows_per_part": runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run, False
    check_alike(str(student), str(teacher))
    shared = check_vocabularies(load_processor(str(student)).tokenizer, load_processor(str(teacher)).tokenizer)
    work = _Work(
        store, run.prefix, index(store, source, Split.TRAIN, tables), str(teacher), str(student), shared, recipe.contract, recipe.max_model_len, d,
        recipe.dtype, recipe.seed, runtime.device, runtime.micro_batch, runtime.loss_chunk, max(1, int(runtime.assistant.cpus)),
    )  # fmt: skip
    with run:
        each = int(run.plan["rows_per_part"])
        tally = _run_all(run, work, each, runtime, progress)
        sizes = {f: n for f, n in store.files(run.prefix).items() if f.startswith("part-")}
        seen = sum(footers(store, [f"{run.prefix}/{f}" for f in sizes], _feature_bytes)) if d.features else 0
        per_token = (sum(sizes.values()) - seen) / max(1, tally["tokens"])
        stats = {"rows_per_part": each, "shared": shared, "tokens": int(tally["tokens"]), "bytes_per_token": round(per_token, 1)}
        if d.features:
            stats["feature_bytes_per_post"] = round(seen / max(1, tally["pictures"]), 1)
        return run.commit(len(work.rows) * len(TASKS), stats=stats | _measures(tally, d)), True


@dataclass(frozen=True)
class _Work:
    """All that an actor needs. `assistant` and `student` are folders, on every machine."""

    store: Store
    target: str
    rows: Index
    assistant: str
    student: str
    shared: int
    contract: Contract
    max_len: int
    distill: Distill
    dtype: str
    seed: int
    device: str
    micro_batch: int
    chunk: int
    threads: int


def _run_all(run: Run, work: _Work, each: int, runtime: Runtime, progress: Progress) -> Counter[str]:
    """Make the parts that are not there. Returns the summed counts of all."""
    ranges = {part_name(lo): {"lo": lo, "hi": min(lo + each, len(work.rows))} for lo in range(0, len(work.rows), each)}
    parts, total = Parts(run.store, run.prefix, ranges), len(work.rows) * len(TASKS)
    progress(int(parts.tally["rows_in"]), total, int(parts.tally["rejects"]))
    if todo := [ranges[n] for n in parts.missing]:
        replicas = runtime.assistant.replicas
        least, most = (replicas, replicas) if isinstance(replicas, int) else replicas
        with session(runtime):
            batches = mapped(
                todo,
                _Softener,
                fn_constructor_args=(work,),
                pool={"min_size": min(least, len(todo)), "max_size": min(most, len(todo))},
                num_cpus=runtime.assistant.cpus,
                num_gpus=1 if runtime.device == "cuda" else 0,
                max_restarts=LIVES,
                max_task_retries=LIVES,
            )
            for batch in batches:
                parts.take(batch)
                progress(int(parts.tally["rows_in"]), total, int(parts.tally["rejects"]))
    parts.drop_strays()
    return parts.tally


class _Softener:
    """The Ray Data actor: the assistant, and the student too for features, or once it has a row on which the KL is compared."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        if work.device == "cpu":
            torch.set_num_threads(work.threads)
        self.assistant, self.student = self._load(work.assistant), self._load(work.student) if work.distill.features else None
        self.encoder, self.packer = Encoder(load_processor(work.student), work.contract, work.max_len), Packer(work.student)

    def _load(self, folder: str) -> Any:
        return load(folder, getattr(torch, self.work.dtype)).to(self.work.device).eval().requires_grad_(False)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return as_batch([self._part(int(lo), int(hi)) for lo, hi in zip(batch["lo"], batch["hi"], strict=True)])

    def _part(self, lo: int, hi: int) -> Commit:
        """Rows lo to hi, exclusive."""
        work, made, rejected, tally = self.work, list[SoftLabel](), list[Reject](), Counter[str]()
        for first in range(lo, hi, work.micro_batch):
            usable = []
            for row in range(first, min(hi, first + work.micro_batch)):
                post, rationale = work.rows.fetch(row)
                try:
                    usable.append((row, post.post_id, self.encoder.tasks(TASKS, post, rationale, self.encoder.picture(post))))
                except RowFault as f:
                    rejected += [Reject(post.post_id, "soften", f.reason, f"{t}: {f.detail}") for t in TASKS]
            if usable:
                made += self._soften(usable, tally)
        tally.update(rows_in=(hi - lo) * len(TASKS), rejects=len(rejected))
        table = pa.table([pa.array([getattr(s, f.name) for s in made], f.type) for f in SoftLabel.schema], schema=SoftLabel.schema)
        return commit_part(work.store, work.target, part_name(lo), table, rejected, tally, rows_per_group(work.distill))

    @torch.no_grad()
    def _soften(self, posts: list[tuple[int, str, dict[Task, Example]]], tally: Counter[str]) -> list[SoftLabel]:
        """The rows of the table for these training rows (number, post, examples), in their order."""
        states = {row: dict[Task, Tensor]() for row, _, _ in posts}
        batch = self._batch([p for _, _, p in posts])
        for task, (hidden, _) in zip(TASKS, answer_rows(last_hidden(self.assistant, batch), batch), strict=True):
            for (row, _, _), some in zip(posts, hidden.split([answer_tokens(p[task]) for _, _, p in posts]), strict=True):
                states[row][task] = some
        seen = self._features(posts, batch, tally) if self.work.distill.features else {}
        made = []
        for row, post_id, post in posts:
            these = [
                SoftLabel(post_id, row, t, answer_tokens(post[t]), tokens_digest(post[t]), **self._keep(states[row][t], row, t, tally)) for t in TASKS
            ]
            if row % max(1, len(self.work.rows) // MEASURED) == 0:
                self._measure(post, states[row], {s.task: s.soft() for s in these}, tally)
            made += [replace(these[0], features=seen.get(row)), *these[1:]]
        return made

    def _batch(self, posts: list[dict[Task, Example]]) -> dict[str, Tensor]:
        return {k: v.to(self.work.device) for k, v in self.packer(posts, TASKS).items()}

    def _features(self, posts: list[tuple[int, str, dict[Task, Example]]], batch: dict[str, Tensor], tally: Counter[str]) -> dict[int, bytes]:
        """Of the pictures of these training rows, by row: what the student's vision tower makes of them, little-endian."""
        rows = [row for row, _, post in posts if post[TASKS[0]].picture is not None]
        each = features(self.student, batch) if rows else ()
        tally["pictures"] += len(rows)
        return {row: x.contiguous().cpu().view(torch.uint8).numpy().tobytes() for row, x in zip(rows, each, strict=True)}

    def _logs(self, states: Tensor) -> Tensor:
        """The assistant's log-probabilities at the temperature of training, over the shared ids [n, shared]."""
        logits = (states @ output_weight(self.assistant)[: self.work.shared].T).float()
        return torch.log_softmax(logits / self.work.distill.temperature, -1)

    def _keep(self, states: Tensor, row: int, task: Task, tally: Counter[str]) -> dict[str, bytes]:
        """The columns of one answer. Draws depend on the recipe's seed, row and task, not on who makes them."""
        d, out = self.work.distill, list[dict[str, Tensor]]()
        generator = torch.Generator(self.work.device).manual_seed(row_key(seed=self.work.seed, row=row, task=TASKS.index(task)))
        for some in states.split(self.work.chunk):
            logs = self._logs(some)
            out.append(draw(logs, d.top_k, generator) if d.keep == "sampled" else keep(logs, d.top_k))
            share = out[-1]["width"].long().sum() if d.keep == "sampled" else out[-1]["logs"].float().exp().sum()
            tally["kept"] += float(share)  # type: ignore[assignment]
        tally["tokens"] += len(states)
        return {k: b"".join(o[k].cpu().numpy().tobytes() for o in out) for k in (out[0] if out else ())}

    def _measure(self, post: dict[Task, Example], states: dict[Task, Tensor], soft: dict[Task, Kept | Drawn], tally: Counter[str]) -> None:
        """Count in the KL of the assistant to the student, by the whole distributions and by these."""
        self.student = self.student or self._load(self.work.student)
        t, weight = self.work.distill.temperature, output_weight(self.student)
        batch = self._batch([post])
        for task, (hidden, targets) in zip(TASKS, answer_rows(last_hidden(self.student, batch), batch), strict=True):
            here = type(soft[task])(**{k: v.to(hidden.device) for k, v in vars(soft[task]).items()})
            full, kept = (
                float(answer_losses(hidden, weight, targets, s, temperature=t, shared=self.work.shared, chunk=self.work.chunk).soft) / t**2
                for s in (Teacher(states[task], output_weight(self.assistant)), here)
            )
            if isinstance(here, Drawn):  # estimates the cross term: above the KL by the entropy
                for logs in map(self._logs, states[task].split(self.work.chunk)):
                    kept += float((logs.exp() * logs).sum())
            tally.update({"measured": len(targets), "kl_full": full, "kl_kept": kept})  # type: ignore[dict-item]


def _measures(tally: Counter[str], d: Distill) -> dict[str, float]:
    tokens, n = max(1, tally["tokens"]), max(1, tally["measured"])
    about = {
        "ids_per_token" if d.keep == "sampled" else "mass_kept": tally["kept"] / tokens,
        "kl_full": tally["kl_full"] / n,
        "kl_kept": tally["kl_kept"] / n,
    }
    return {"measured_tokens": int(tally["measured"])} | {k: round(float(v), 6) for k, v in about.items()}


def _feature_bytes(footer: pq.FileMetaData) -> int:
    """What the features of a part take, as they are stored."""
    groups = map(footer.row_group, range(footer.num_row_groups))
    columns = [g.column(i) for g in groups for i in range(g.num_columns)]
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.partition(".")[0] == "features")


def _reading(folder: Path) -> str:
    return digest({n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in READING if (folder / n).exists()})
