"""A model and its prompts before any engine runs: the files, and what real posts would be asked, token for token."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mulcot_ray.artifacts import need, resolve_model
from mulcot_ray.engines.base import ENDPOINT
from mulcot_ray.engines.vllm import MIN_ANSWER
from mulcot_ray.errors import ConfigError, RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.prompts import render_chat
from mulcot_ray.recipe import Recipe, model_folder
from mulcot_ray.records import Post, Reason, Task
from mulcot_ray.storage import Store

IMAGE = "<|image_pad|>"  # where the picture's tokens go, in every model of the family
CHARS = 3.5  # per token of an English post; only where the model's own tokenizer is not there


@dataclass(frozen=True)
class Files:
    """A model's folder (None: `why` not) and its fingerprint. `whole` False: the weights are on S3 and were not fetched."""

    folder: Path | None
    fingerprint: str | None
    why: str = ""
    whole: bool = True


@dataclass(frozen=True)
class Question:
    """What a row is asked, and how often. `answer`: expected tokens, `limit`: most tokens (0: label words are weighed, nothing is written)."""

    task: Task
    times: float
    answer: float = 0.0
    limit: int = 0


@dataclass(frozen=True)
class Prompts:
    """Tokens of a question's prompts over the sample, the picture's among them; `shared`: of the beginning that all have in common, which an
    engine computes once; `tight`: how many leave less room than the longest answer."""

    question: Question
    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    shared: int
    tight: int


@contextlib.contextmanager
def model_files(store: Store, name: str) -> Iterator[Files]:
    """A model's files for as long as the context is open. Of a model under an S3 root only the small ones are fetched, not the weights.

    A folder that is not on this machine is no error here (it may be on the nodes); a name that is nowhere is one: ArtifactMissing.
    """
    if name.startswith(ENDPOINT):
        yield Files(None, name, f"{name} is behind an endpoint")
        return
    try:
        local = model_folder(name)
    except ConfigError:
        if name.startswith("builtin:"):
            raise
        yield Files(None, None, f"the folder {name} is not here")
        return
    if local is not None or not store.is_s3:
        yield Files(*resolve_model(store, name))
        return
    manifest = need(store, "models", name)
    with tempfile.TemporaryDirectory() as temporary:
        for file in manifest.files:
            if "/" not in file and not file.endswith(".safetensors"):
                (Path(temporary) / file).write_bytes(store.read(f"models/{name}/{file}") or b"")
        yield Files(Path(temporary), manifest.fingerprint, f"the weights of {name} are at {store.root} and are not fetched for this", whole=False)


Found = dict[Task, tuple[str, int, Any]]  # prompt, tokens, the ids before the picture


@dataclass(frozen=True)
class Preview:
    """Every question for every post, as a stage would put it. `tokenizer` None: a character counts as 1 / CHARS tokens."""

    recipe: Recipe
    questions: list[Question]
    gold: bool
    tokenizer: Any
    picture: int  # tokens

    def at(self, posts: list[Post]) -> list[RowFault | Found]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(self._row, posts))

    def _row(self, post: Post) -> RowFault | Found:
        contract, context = self.recipe.contract, self.recipe.max_model_len
        try:
            if self.gold and post.label is None:
                raise RowFault(Reason.NO_LABEL, "a rationale is kept where it ends on the gold label, and there is none")
            post_image(post, contract.image.side)
            found: Found = {}
            for q in self.questions:
                text = chat(self.tokenizer, contract.messages(q.task, post, post.label if q.task is Task.EXPLAIN else None))
                text += contract.label_prefix if q.task is Task.CLASSIFICATION else ""
                n = self._count(self._ids(text)) + (self.picture - 1 if post.has_image else 0)
                if context - n < MIN_ANSWER:
                    raise RowFault(Reason.PROMPT_TOO_LONG, f"{n} tokens, and the model takes {context} with the answer")
                found[q.task] = (text, n, self._ids(text.partition(IMAGE)[0]))
            return found
        except RowFault as f:
            return f

    def _ids(self, text: str) -> Any:
        return text if self.tokenizer is None else self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _count(self, ids: Any) -> int:
        return round(len(ids) / CHARS) if self.tokenizer is None else len(ids)

    def faults(self, posts: list[Post], found: list[RowFault | Found]) -> dict[str, dict[str, Any]]:
        faults: dict[str, dict[str, Any]] = {}
        for post, f in zip(posts, found, strict=True):
            if isinstance(f, RowFault):
                entry = faults.setdefault(str(f.reason), {"sampled": 0, "expected": 0, "example": f"{post.post_id}: {f.detail}"})
                entry["sampled"] += 1
        return faults

    def prompts(self, found: list[RowFault | Found]) -> list[Prompts]:
        rows = [f for f in found if not isinstance(f, RowFault)]
        made = []
        for q in self.questions:
            ns = np.array([f[q.task][1] for f in rows] or [0])
            heads = [f[q.task][2] for f in rows] or [""]
            p50, p90, p99 = (int(np.percentile(ns, x)) for x in (50, 90, 99))
            tight = int((ns + q.limit > self.recipe.max_model_len).sum())
            made.append(Prompts(q, float(ns.mean()), p50, p90, p99, int(ns.max()), self._count(_common(heads)), tight))
        return made

    def shown(self, found: list[RowFault | Found], count: int) -> list[str]:
        first = [f[self.questions[0].task][0] for f in found if not isinstance(f, RowFault)][:count]
        return [text.replace(IMAGE, f"<picture: {self.picture} tokens>") for text in first]


def chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """The prompt by the model's own template or, without its tokenizer, in the form that the family's templates have."""
    if tokenizer is not None:
        return render_chat(tokenizer, messages)
    turns = []
    for m in messages:
        parts = m["content"] if isinstance(m["content"], list) else [{"type": "text", "text": m["content"]}]
        body = "".join(f"<|vision_start|>{IMAGE}<|vision_end|>" if p["type"] == "image" else p["text"] for p in parts)
        turns.append(f"<|im_start|>{m['role']}\n{body}<|im_end|>\n")
    return "".join(turns) + "<|im_start|>assistant\n"


def tokenizer_of(files: Files) -> Any:
    """The model's own, or None where its folder is not here."""
    if files.folder is None:
        return None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(files.folder)


def _common(heads: list[Any]) -> Any:
    """The beginning that all have in common: that of the smallest and the largest."""
    a, b = min(heads), max(heads)
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))]
