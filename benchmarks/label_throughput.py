"""Labels per second: our pipeline against a bare vLLM AsyncLLM, against itself with rationales, and against the way the authors evaluate.

    python benchmarks/label_throughput.py [--posts 4000] [--repeat 5] [--model builtin:teacher] [--only pipeline,bare,lean]

pipeline   `mulcot label`: posts table → chunks on Ray Data → vLLM actor → committed parts; scored label words, one prefill a post
bare       a program without Ray that does the same for the same rows: reads the same table, decodes, renders, AsyncLLM
lean       the same program, but pictures made into vLLM's inputs by engines/inputs.py as the pipeline does, not by vLLM's renderer
rationale  the pipeline with the whole answer for every post, four sections and the label (on --posts / 8 posts, in smaller chunks: they end one by one)
reference  plain transformers `generate` of the whole answer, a batch of one, as METHOD.md says of the authors' scripts (on 24 posts)

Everything is timed without the engine's start and without the beginning and end of a run: over the middle half of its rows (`reference`: all but
the first). Same model, same engine settings, same prompts; one thread each for engine and everything around it. The model must write whole
answers, else the last two are too easy (the tiny base student says a label alone): the tokens of an answer are printed. Runs are interleaved; medians
and ratios of pairs are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mulcot_ray.artifacts import need, parquet_bytes, read_rows, resolve_model
from mulcot_ray.cluster import session
from mulcot_ray.engines.base import engine_spec, open_engine
from mulcot_ray.engines.parity import apart
from mulcot_ray.labeling.label import label
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.prompts import render_chat
from mulcot_ray.recipe import Runtime, load_recipe, load_runtime
from mulcot_ray.records import LABELS, Post, Prediction, Task, from_row, to_table
from mulcot_ray.storage import Store

RECIPE = load_recipe("tiny")


def middle(marks: list[tuple[float, int]]) -> float:
    """Rows per second over the middle half, of (time, rows done until then)."""
    total = marks[-1][1]
    (t0, n0), (t1, n1) = next(m for m in marks if m[1] >= total / 4), next(m for m in marks if m[1] >= 3 * total / 4)
    return (n1 - n0) / (t1 - t0)


def pipeline(store: Store, name: str, posts: str, model: str, runtime: Runtime, mode: Any = "score") -> tuple[float, str]:
    """Rows per second, and what each row was answered with."""
    marks: list[tuple[float, int]] = []
    made, _ = label(
        store, name, posts=posts, model=model, mode=mode, recipe=RECIPE, runtime=runtime,
        progress=lambda done, total, rejects: marks.append((time.time(), done)),
    )  # fmt: skip
    return middle(marks), f"{made.stats['tokens']['out'] / made.rows_in:.1f} tokens written a row"


def bare(root: str, posts: str, model: str, places: int, lean: bool) -> tuple[float, str]:
    """Rows per second of an AsyncLLM fed by a loop, in a process of its own."""
    store = Store(root)
    spec = engine_spec(store, RECIPE, load_runtime("laptop"), "student", model)
    engine: Any = open_engine(spec)  # an AsyncLLM, opened with the same arguments
    from vllm import SamplingParams
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.sampling_params import RequestOutputKind

    llm, tokenizer, ids = engine.llm, engine.tokenizer, engine.label_ids
    params = SamplingParams(
        max_tokens=1, temperature=0.0, logprob_token_ids=ids, allowed_token_ids=ids, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )

    async def one(post: Post, number: int, gate: asyncio.Semaphore) -> Prediction:
        async with gate:
            image = post_image(post, RECIPE.contract.image.side)
            text = render_chat(tokenizer, RECIPE.contract.messages(Task.CLASSIFICATION, post)) + RECIPE.contract.label_prefix
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            if lean:
                ready = await engine.inputs(tokens, image)
            else:
                prompt = {"prompt_token_ids": tokens} | ({} if image is None else {"multi_modal_data": {"image": image}})
                (ready,) = await llm.renderer.render_cmpl_async([parse_model_prompt(llm.model_config, prompt)])
            async for out in llm.generate(ready, params, str(number)):
                logs = out.outputs[0].logprobs[0]
            best = max(range(3), key=lambda i: logs[ids[i]].logprob)
            marks.append((time.time(), len(marks) + 1))
            return Prediction(post.post_id, LABELS[best], model, "-")

    async def run() -> tuple[float, str]:
        gate = asyncio.Semaphore(places)
        rows = [from_row(Post, r) for r in read_rows(store, need(store, "posts", posts))]
        found = await asyncio.gather(*(one(p, i, gate) for i, p in enumerate(rows)))
        Path(f"{root}/bare.parquet").write_bytes(parquet_bytes(to_table(Prediction, found)))
        return middle(marks), "labels alone"

    marks: list[tuple[float, int]] = []
    try:
        return asyncio.run(run())
    finally:
        engine.close()


def reference(root: str, posts: str, name: str, count: int) -> tuple[float, str]:
    """Rows per second of transformers' generate, a post at a time, the whole answer, greedy."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    torch.set_num_threads(1)
    store = Store(root)
    folder, _ = resolve_model(store, name)
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    rows = [from_row(Post, r) for r, _ in zip(read_rows(store, need(store, "posts", posts)), range(count + 1), strict=False)]

    def answer(post: Post) -> int:
        text = render_chat(processor.tokenizer, RECIPE.contract.messages(Task.PREDICT, post))
        image = post_image(post, RECIPE.contract.image.side)
        inputs = processor(text=[text], images=None if image is None else [image], return_tensors="pt")
        with torch.no_grad():
            return int(model.generate(**inputs, max_new_tokens=RECIPE.explain_tokens, do_sample=False).shape[1] - inputs["input_ids"].shape[1])

    answer(rows[0])
    started = time.time()
    written = sum(map(answer, rows[1:]))
    return (len(rows) - 1) / (time.time() - started), f"{written / (len(rows) - 1):.1f} tokens written a row"


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--posts", type=int, default=4000)
    ap.add_argument("--repeat", type=int, default=5)
    ap.add_argument("--model", default="builtin:teacher")
    ap.add_argument("--only", default="pipeline,bare,lean,rationale,reference")
    a = ap.parse_args()
    chosen = a.only.split(",")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    here = str(Path(__file__).parent)  # what runs in a process of its own must be importable there
    sys.path.insert(0, here)
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    module = importlib.import_module(Path(__file__).stem)
    runtime = load_runtime("laptop").model_copy(update={"answer_cache": False})
    places = 2 * (runtime.student.max_num_seqs or 64)
    found: dict[str, list[float]] = {k: [] for k in chosen}
    with tempfile.TemporaryDirectory() as folder, session(runtime):
        store = Store(folder)
        import_sample(store, "sample", train=0, validation=0, test=a.posts, seed=1)
        import_sample(store, "few", train=0, validation=0, test=max(256, a.posts // 8), seed=2)
        ways: dict[str, Any] = {
            "pipeline": lambda i: pipeline(store, f"p-{i}", "sample", a.model, runtime),
            "bare": lambda i: apart(module.bare, folder, "sample", a.model, places, False),
            "lean": lambda i: apart(module.bare, folder, "sample", a.model, places, True),
            "rationale": lambda i: pipeline(store, f"r-{i}", "few", a.model, runtime.model_copy(update={"rows_per_chunk": 8}), "generate"),
            "reference": lambda i: apart(module.reference, folder, "sample", a.model, 24),
        }
        for i in range(a.repeat):
            for way in chosen if i % 2 == 0 else reversed(chosen):
                rate, what = ways[way](i)
                found[way].append(rate)
                print(f"{way:10} {rate:8.1f} rows/s, {what}", flush=True)
    for way, rates in found.items():
        print(f"{way:10} median {statistics.median(rates):8.1f} rows/s of {len(rates)}")
    for other in [w for w in chosen if w != "pipeline" and "pipeline" in chosen]:
        pairs = [x / y for x, y in zip(found["pipeline"], found[other], strict=True)]
        print(
            f"pipeline ÷ {other}: {statistics.median(found['pipeline']) / statistics.median(found[other]):.2f} (pairs {statistics.median(pairs):.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
