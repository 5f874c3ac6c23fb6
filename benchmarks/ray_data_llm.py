"""Rationales per second: our chunk pipeline against `ray.data.llm`'s processor, same posts, same prompts, same model.

    python benchmarks/ray_data_llm.py [--posts 2000] [--repeat 3]

Both write the five sections for each post with the same greedy sampling. Engine start is part of neither: each run is timed over the middle half of its rows. Runs are interleaved; medians and their ratio are printed. One replica, one machine.
What an engine may hold at once is the same: sequences, context, cache, prompts whole. Not the same, as each needs it: there the engine's executor is
a process of its own (`mp`), pictures travel as PNG in base64, as its picture stage takes them, and prompts are rendered before the clock starts.
docs/decisions/0002-engine-in-the-actor.md says what else decided between the two.
"""

from __future__ import annotations

import argparse
import base64
import io
import statistics
import tempfile
import time
from functools import partial
from typing import Any

from PIL import Image
from transformers import AutoTokenizer

from mulcot_ray.artifacts import need, read_rows, resolve_model
from mulcot_ray.cluster import session
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.images import prepare
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.prompts import render_chat
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Post, Task, from_row
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")


def ours(store: Store, name: str) -> tuple[float, int]:
    """Rows per second of `mulcot label --mode generate`, and the tokens it wrote."""
    marks: list[tuple[float, int]] = []
    made, _ = label(
        store, name, posts="sample", model="builtin:teacher", mode="generate", role="teacher", recipe=RECIPE,
        runtime=RUNTIME.model_copy(update={"answer_cache": False}), progress=lambda done, total, rejects: marks.append((time.time(), done)),
    )  # fmt: skip
    return _rate(marks), made.stats["tokens"]["out"]


def processor(store: Store) -> tuple[float, int]:
    """Rows per second of ray.data.llm over the same table, and the tokens it wrote."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    folder, _ = resolve_model(store, "builtin:teacher")
    r = RUNTIME.teacher
    config = vLLMEngineProcessorConfig(
        model_source=str(folder),
        engine_kwargs=dict(
            dtype="float32", max_model_len=RECIPE.max_model_len, enforce_eager=True, max_num_seqs=r.max_num_seqs, block_size=32,
            kv_cache_memory_bytes=(r.kv_cache_mb or 256) << 20, limit_mm_per_prompt={"image": 1, "video": 0}, distributed_executor_backend="mp",
            enable_chunked_prefill=False, max_num_batched_tokens=max(8192, RECIPE.max_model_len), mm_processor_cache_gb=0,
        ),
        concurrency=1, batch_size=16, placement_group_config={"bundles": [{"CPU": 1}], "strategy": "PACK"},
        runtime_env={"env_vars": {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        prepare_multimodal_stage={"enabled": True}, chat_template_stage={"enabled": False}, tokenize_stage={"enabled": False}, detokenize_stage={"enabled": False},
    )  # fmt: skip
    contract, side, tokens = RECIPE.contract, RECIPE.contract.image.side, RECIPE.explain_tokens
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        """The prompt as our stages render it; its own template stage renders another, and the tiny teacher then answers with a label alone."""
        post = from_row(Post, row)
        png = io.BytesIO()
        Image.Image.save(prepare(post.image_bytes or b"", side), png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]  # where its picture stage looks for pictures
        return {"messages": messages, "prompt": row["prompt"], "sampling_params": {"temperature": 0.0, "max_tokens": tokens}}

    run = build_processor(
        config, preprocess=ask, postprocess=lambda row: {"id": row["post_id"], "text": row["generated_text"], "tokens": row["num_generated_tokens"]}
    )
    rows = [{k: v for k, v in r.items() if k != "meta"} for r in read_rows(store, need(store, "posts", "sample"))]
    rows = [r | {"prompt": render_chat(tokenizer, contract.messages(Task.PREDICT, from_row(Post, r)))} for r in rows]
    marks: list[tuple[float, int]] = []
    done = 0
    written = 0
    for batch in run(ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 32))).iter_batches(batch_size=None, prefetch_batches=0):
        done += len(batch["text"])
        written += int(sum(batch["tokens"]))
        marks.append((time.time(), done))
    return _rate(marks), written


def _rate(marks: list[tuple[float, int]]) -> float:
    """Rows per second of the middle half: what an engine had done before its first result came out is not counted as fast."""
    total = marks[-1][1]
    (t0, n0), (t1, n1) = next(m for m in marks if m[1] >= total / 4), next(m for m in marks if m[1] >= 3 * total / 4)
    return (n1 - n0) / (t1 - t0)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--posts", type=int, default=2000)
    ap.add_argument("--repeat", type=int, default=3)
    a = ap.parse_args()
    found: dict[str, list[float]] = {"mulcot": [], "ray.data.llm": []}
    with tempfile.TemporaryDirectory() as folder, session(RUNTIME):
        store = Store(folder)
        import_sample(store, "sample", train=a.posts, validation=0, test=0, seed=1)
        for i in range(a.repeat):
            turn = {"mulcot": partial(ours, store, f"run-{i}"), "ray.data.llm": partial(processor, store)}
            for name in turn if i % 2 == 0 else reversed(turn):
                rate, written = turn[name]()
                found[name].append(rate)
                print(f"{name:12} {rate:8.1f} rows/s, {written / a.posts:.1f} tokens a row", flush=True)
    medians = {k: statistics.median(v) for k, v in found.items()}
    print(f"rows/s, medians of {a.repeat}: {medians}; mulcot ÷ ray.data.llm = {medians['mulcot'] / medians['ray.data.llm']:.2f}")


if __name__ == "__main__":
    main()
