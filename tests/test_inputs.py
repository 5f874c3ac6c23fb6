"""A post as vLLM's engine takes it (engines/inputs.py), against Hugging Face's image processor and vLLM's own renderer."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mulcot_ray.artifacts import resolve_model
from mulcot_ray.engines import inputs
from mulcot_ray.engines.base import engine_spec, open_engine
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
        posts = list(sample_posts(24, Split.TEST, 3))
        pictures = [post_image(p, SIDE) for p in posts]
        prompts = [render_chat(engine.tokenizer, RECIPE.contract.messages(Task.CLASSIFICATION, p)) for p in posts]
        ids = [engine.tokenizer(x, add_special_tokens=False)["input_ids"] for x in prompts]
        rows = [(i, p) for i, p in zip(ids, pictures, strict=True) if p is not None]
        rendered = [engine.inputs._rendered(i, p) for i, p in rows]
        made = [engine.inputs(i, p) for i, p in rows]
        one = {"direct": engine.inputs.direct, "rows": len(rows), "same": sum(map(inputs.same, made, rendered))}
        one["hashes"] = len({m["mm_hashes"]["image"][0] for m in made}) == len({p.tobytes() for _, p in rows})
        text = engine.inputs(ids[0], None)
        one["text"] = (text["type"], text["prompt_token_ids"] == ids[0])
        right, inputs.patches = inputs.patches, lambda *a: right(a[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), *a[1:])
        other = inputs.Inputs(engine.llm, SIDE)
        one["other direct"] = other.direct
        one["other same"] = sum(inputs.same(other(i, p), r) for (i, p), r in zip(rows, rendered, strict=True))
        one["told apart"] = not any(inputs.same(other._made(i, p), r) for (i, p), r in zip(rows, rendered, strict=True))
        return one
    finally:
        engine.close()


@pytest.mark.engine
def test_inputs_are_those_of_vllms_renderer_and_where_they_are_not_its_own_are_used() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(compared).result()
    rows = found.pop("rows")
    assert rows > 12
    assert found == {
        "direct": True, "same": rows, "hashes": True, "text": ("token", True), "other direct": False, "other same": rows, "told apart": True,
    }  # fmt: skip
