"""Do transformers and vLLM give the same label probabilities for the same posts? Each is run in a process of its own, one after the other.

The training side of this project thinks in transformers, the labelling side in vLLM; where they differ (a processor that resizes, a position
that is lost, a head that is not tied) the labels are worse than the validation said, and nothing else shows it.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mulcot_ray.engines.base import EngineSpec, open_engine
from mulcot_ray.engines.preview import IMAGE
from mulcot_ray.errors import EngineError, MulcotError
from mulcot_ray.posts.images import post_image
from mulcot_ray.prompts import label_token_ids, render_chat
from mulcot_ray.records import Post, Task

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}  # of a probability
TIMEOUT_S = 1800.0
Probabilities = list[tuple[float, ...]]  # of LABELS, for each post


def compare(s: EngineSpec, posts: list[Post]) -> str:
    """In words, how far the two are apart. Raises EngineError where that is too far, or a label differs."""
    ours, theirs = apart(by_transformers, s, posts), apart(by_vllm, s, posts)
    gaps = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in zip(ours, theirs, strict=True)]
    worst = max(range(len(gaps)), key=lambda i: gaps[i])
    said = f"probabilities of {len(posts)} posts differ by {gaps[worst]:.1g} at most"
    limit = TOLERANCE[s.dtype]
    # Two labels may change places where they are as close to one another as the tolerance.
    turned = [p.post_id for p, x, y in zip(posts, ours, theirs, strict=True) if abs(x[_best(x)] - x[_best(y)]) > limit]
    if gaps[worst] > limit or turned:
        raise EngineError(f"{said} (post {posts[worst].post_id}), {limit:g} in {s.dtype} is allowed; {len(turned)} labels differ")
    return f"{said}, {limit:g} in {s.dtype} is allowed; the labels are the same"


def _best(p: tuple[float, ...]) -> int:
    return p.index(max(p))


def by_transformers(s: EngineSpec, posts: list[Post]) -> Probabilities:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(s.model)
    model: Any = AutoModelForImageTextToText.from_pretrained(
        s.model, dtype=getattr(torch, s.dtype), attn_implementation="sdpa", use_safetensors=True
    ).to(s.device).eval()  # fmt: skip
    words, found = label_token_ids(processor.tokenizer, s.contract), []
    for post in posts:
        text = render_chat(processor.tokenizer, s.contract.messages(Task.CLASSIFICATION, post)) + s.contract.label_prefix
        image = post_image(post, s.contract.image.side)
        seen = {} if image is None else processor.image_processor(images=[image], return_tensors="pt")
        tokens = 0 if image is None else int(seen["image_grid_thw"].prod()) // processor.image_processor.merge_size**2
        ids = torch.tensor([processor.tokenizer(text.replace(IMAGE, IMAGE * tokens), add_special_tokens=False)["input_ids"]])
        # Without mm_token_type_ids transformers 5 silently takes one-dimensional positions.
        batch = {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).long(), **seen}
        with torch.no_grad():
            logits = model(**{k: v.to(s.device) for k, v in batch.items()}).logits[0, -1, words].float()
        found.append(tuple(torch.softmax(logits, 0).tolist()))
    return found


def by_vllm(s: EngineSpec, posts: list[Post]) -> Probabilities:
    engine = open_engine(s)

    async def all_of_them() -> Probabilities:
        asked = (engine.score(s.contract.messages(Task.CLASSIFICATION, p), post_image(p, s.contract.image.side)) for p in posts)
        return [scores.probabilities for scores in await asyncio.gather(*asked)]

    try:
        return asyncio.run(all_of_them())
    finally:
        engine.close()


# --- a call in a process of its own ----------------------------------------------------------------------------------


def apart(function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> Any:
    """What the function (of a module) returns, called in a new process; what that prints is kept out of sight.

    Raises its own error where that is a MulcotError, and EngineError with the last line it printed for every other end.
    """
    with tempfile.TemporaryDirectory() as folder:
        call, answer = Path(folder) / "call", Path(folder) / "answer"
        call.write_bytes(pickle.dumps((function, args)))
        command = [sys.executable, "-m", "mulcot_ray.engines.parity", folder]
        # A session of its own: an engine has processes too, and they must not outlive a call that was given up.
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )
        try:
            out, err = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as e:
            raise EngineError(f"{function.__name__} took more than {timeout_s:g} s") from e
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.communicate()
        if not answer.exists():
            said = [x for x in (err or out).splitlines() if x.strip()] or ["it said nothing"]
            raise EngineError(f"{function.__name__} ended with status {child.returncode}: {said[-1].strip()[:300]}")
        result = pickle.loads(answer.read_bytes())
    if isinstance(result, MulcotError):
        raise result
    return result


def _main(folder: Path) -> None:
    function, args = pickle.loads((folder / "call").read_bytes())
    try:
        result = function(*args)
    except MulcotError as e:
        result = e
    (folder / "answer").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
