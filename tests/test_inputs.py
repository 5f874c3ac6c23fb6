"""A post as vLLM's engine takes it (engines/inputs.py), against Hugging Face's image processor and vLLM's own renderer."""

from __future__ import annotations

import asyncio
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mulcot_ray.artifacts import resolve_model
from mulcot_ray.engines import inputs
from mulcot_ray.engines.base import engine_spec, open_engine
from mulcot_ray.errors import RowFault
from mulcot_ray.posts.images import post_image
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.prompts import render_chat
from mulcot_ray.recipe import load_recipe, load_runtime
from mulcot_ray.records import Split, Task
from mulcot_ray.storage import Store

RECIPE = load_recipe("tiny")
SIDE = RECIPE.contract.image.side
MODEL = "builtin:student"


@lru_cache
def processor() -> Any:
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(str(resolve_model(Store("."), MODEL)[0]))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


@pytest.mark.parametrize("picture", [noise(84, 84), noise(280, 280), noise(112, 56), noise(84, 84, "L")], ids=["84", "280", "oblong", "gray"])
def test_patches_are_those_of_the_image_processor(picture: Image.Image) -> None:
    p = processor()
    wanted = p(images=[picture], return_tensors="pt", do_resize=False, do_rescale=False, do_normalize=False)["pixel_values"]
    made = inputs.patches(picture, p.patch_size, p.merge_size, p.temporal_patch_size)
    assert made.shape == wanted.shape
    assert (made == wanted).all()


def compared() -> dict[str, Any]:
    """In a process of its own: vLLM leaves settings behind."""
    engine: Any = open_engine(engine_spec(Store("."), RECIPE, load_runtime("laptop"), "student", MODEL))
    try:
        return asyncio.run(_compared(engine))
    finally:
        engine.close()


async def _compared(engine: Any) -> dict[str, Any]:
    async def rendered(ids: list[int], picture: Image.Image) -> Any:
        return (await engine.llm.renderer.render_cmpl_async(engine.inputs._prompts(ids, picture)))[0]

    posts = list(sample_posts(24, Split.TEST, 3))
    prompts = [render_chat(engine.tokenizer, RECIPE.contract.messages(Task.CLASSIFICATION, p)) for p in posts]
    ids = [engine.tokenizer(x, add_special_tokens=False)["input_ids"] for x in prompts]
    rows = [(i, picture) for i, p in zip(ids, posts, strict=True) if (picture := post_image(p, SIDE)) is not None]
    wanted = [await rendered(i, p) for i, p in rows]
    made = [await engine.inputs(i, p) for i, p in rows]
    untimed = [{k: v for k, v in m.items() if k != "arrival_time"} for m in made]
    found = {"direct": engine.inputs.direct, "rows": len(rows), "same": sum(map(inputs.same, untimed, wanted))}
    found["timed"] = all(abs(m["arrival_time"] - w["arrival_time"]) < 60 for m, w in zip(made, wanted, strict=True))
    found["hashes"] = len({m["mm_hashes"]["image"][0] for m in made}) == len({p.tobytes() for _, p in rows})
    text = await engine.inputs(ids[0], None)
    found["text"] = (text["type"], text["prompt_token_ids"] == ids[0])
    other_size = noise(112, 112)  # not the contract's: the renderer knows what to do
    found["other size"] = (await engine.inputs(rows[0][0], other_size))["mm_placeholders"]["image"][0].length
    try:
        await engine.inputs([engine.inputs.image_token + 1], rows[0][1])
    except RowFault as f:
        found["no place"] = f.reason
    right, inputs.patches = inputs.patches, lambda *a: right(a[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), *a[1:])
    other = inputs.Inputs(engine.llm, SIDE)
    found["other direct"] = other.direct
    found["other hashes"] = [(await other(i, p))["mm_hashes"] for i, p in rows] == [w["mm_hashes"] for w in wanted]  # the renderer's
    found["told apart"] = not any(inputs.same(other._made(i, p), w) for (i, p), w in zip(rows, wanted, strict=True))
    strange = SimpleNamespace(model_config=SimpleNamespace(hf_config=object()), renderer=engine.llm.renderer)
    found["strange direct"] = inputs.Inputs(strange, SIDE).direct
    return found


@pytest.mark.engine
def test_inputs_are_those_of_vllms_renderer_and_where_they_are_not_its_own_are_used() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(compared).result()
    rows = found.pop("rows")
    assert rows > 12
    assert found == {
        "direct": True, "same": rows, "timed": True, "hashes": True, "text": ("token", True), "other size": 16, "no place": "engine_error",
        "other direct": False, "other hashes": True, "told apart": True, "strange direct": False,
    }  # fmt: skip
