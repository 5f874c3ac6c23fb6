"""Rationales per second: our chunk pipeline against `ray.data.llm`'s processor, same posts, same model, same engine settings.

    python benchmarks/label_throughput.py [--posts 512] [--repeat 3]

Both write the five sections for each post with the same greedy sampling. Engine start is part of neither: each run is timed from its first
finished row to its last. Runs are interleaved; the medians and their ratio are printed. One replica, one machine.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tempfile
import time

from PIL import Image

from mulcot_ray.artifacts import need, read_rows, resolve_model
from mulcot_ray.cluster import session
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.images import prepare
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Post, Task, from_row
from mulcot_ray.storage import Store

RECIPE, RUNTIME = load_recipe("tiny"), load_runtime("laptop")


def ours(store: Store, name: str, cache: bool = False) -> float:
    """Rows per second of `mulcot label --mode generate`; with `cache`, each answer is kept (and found missing before)."""
    marks: list[tuple[float, int]] = []
    label(
        store, name, posts="sample", model="builtin:teacher", mode="generate", role="teacher", recipe=RECIPE, runtime=RUNTIME.model_copy(update={"answer_cache": cache}),
        progress=lambda done, total, rejects: marks.append((time.time(), done)),
    )  # fmt: skip
    return _rate(marks)


def processor(store: Store) -> float:
    """Rows per second of ray.data.llm over the same table."""
    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    folder, _ = resolve_model(store, "builtin:teacher")
    r = RUNTIME.teacher
    config = vLLMEngineProcessorConfig(
        model_source=str(folder),
        engine_kwargs=dict(
            dtype="float32", max_model_len=RECIPE.max_model_len, enforce_eager=True, max_num_seqs=r.max_num_seqs, block_size=32,
            kv_cache_memory_bytes=(r.kv_cache_mb or 256) << 20, limit_mm_per_prompt={"image": 1, "video": 0}, distributed_executor_backend="mp",
        ),
        concurrency=1, batch_size=16, placement_group_config={"bundles": [{"CPU": 1}], "strategy": "PACK"},
        runtime_env={"env_vars": {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}},
        prepare_multimodal_stage={"enabled": True}, chat_template_stage={"enabled": True}, tokenize_stage={"enabled": False}, detokenize_stage={"enabled": False},
    )  # fmt: skip
    contract, side, tokens = RECIPE.contract, RECIPE.contract.image.side, RECIPE.explain_tokens

    def ask(row: dict) -> dict:
        import base64

        post = from_row(Post, row)
        png = io.BytesIO()
        Image.Image.save(prepare(post.image_bytes or b"", side), png, "PNG")
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        messages = contract.messages(Task.PREDICT, post)
        for part in messages[-1]["content"]:
            if part["type"] == "image":
                part.update({"type": "image_url", "image_url": {"url": url}})
        return {"messages": messages, "sampling_params": {"temperature": 0.0, "max_tokens": tokens}, "__inference_error__": ""}

    run = build_processor(config, preprocess=ask, postprocess=lambda row: {"text": row["generated_text"]})
    rows = [{k: v for k, v in r.items() if k != "meta"} for r in read_rows(store, need(store, "posts", "sample"))]
    marks: list[tuple[float, int]] = []
    done = 0
    for batch in run(ray.data.from_items(rows, override_num_blocks=max(1, len(rows) // 32))).iter_batches(batch_size=None, prefetch_batches=0):
        done += len(batch["text"])
        marks.append((time.time(), done))
    return _rate(marks)


def _rate(marks: list[tuple[float, int]]) -> float:
    started = next(m for m in marks if m[1] > 0)
    return (marks[-1][1] - started[1]) / (marks[-1][0] - started[0])


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--posts", type=int, default=512)
    ap.add_argument("--repeat", type=int, default=3)
    a = ap.parse_args()
    found: dict[str, list[float]] = {"mulcot": [], "mulcot, answers kept": [], "ray.data.llm": []}
    with tempfile.TemporaryDirectory() as folder, session(RUNTIME):
        store = Store(folder)
        import_sample(store, "sample", train=a.posts, validation=0, test=0, seed=1)
        for i in range(a.repeat):
            found["mulcot"].append(ours(store, f"run-{i}"))
            found["mulcot, answers kept"].append(ours(store, f"kept-{i}", cache=True))
            shutil.rmtree(store.path("answers"))
            found["ray.data.llm"].append(processor(store))
            print({k: [round(x, 1) for x in v] for k, v in found.items()}, flush=True)
    medians = {k: statistics.median(v) for k, v in found.items()}
    print(f"rows/s, medians of {a.repeat}: {medians}; mulcot ÷ ray.data.llm = {medians['mulcot'] / medians['ray.data.llm']:.2f}")


if __name__ == "__main__":
    main()
