"""A post as vLLM's engine takes it: token ids and, where it has a picture, its patches, their hash and their place.

vLLM's renderer makes that by Hugging Face's processor, whose checks of options and searching for the placeholder take 0.6 ms of Python a row,
more than a small model needs for the row itself. All pictures of a contract have one size, so all but patches, hash and place is the same for
each: `Inputs` takes it from an input that the renderer made. When an engine opens, one more picture is made both ways: where the two differ
(another version, another family), the renderer makes every input.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

log = logging.getLogger(__name__)


def patches(image: Image.Image, size: int, merge: int, frames: int) -> Tensor:
    """The picture cut for the vision tower of Qwen2.5-VL: uint8 [patches, 3 · frames · size²], in its order.

    `size`: pixels of a patch; blocks of merge × merge patches stand together, as they become one token; the picture is shown `frames` times.
    Width and height must be multiples of size × merge.
    """
    pixels = np.asarray(image.convert("RGB"))
    rows, columns = (n // (size * merge) for n in pixels.shape[:2])
    cut = pixels.reshape(rows, merge, size, columns, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    shown = np.repeat(cut[:, :, :, :, :, None], frames, axis=5)
    return torch.from_numpy(shown.reshape(rows * columns * merge * merge, -1))


class Inputs:
    """Makes inputs for one AsyncLLM whose pictures are all `side` pixels square. `direct`: whether pictures go past the renderer."""

    def __init__(self, llm: Any, side: int) -> None:
        config = llm.model_config.hf_config
        self.llm, self.image_token, vision = llm, config.image_token_id, config.vision_config
        self.cut = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
        noise = np.random.default_rng(0)
        first, second = (Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(2))
        self.like = self._rendered([0, self.image_token], first)
        try:
            elsewhere = [0, 0, self.image_token, 0]
            self.direct = same(self._made(elsewhere, second), self._rendered(elsewhere, second))
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            log.debug("an input cannot be made like vLLM's", exc_info=True)
            self.direct = False
        if not self.direct:
            log.warning("this vLLM makes pictures in another way than mulcot_ray.engines.inputs: its renderer is used, which is slower")

    def __call__(self, ids: list[int], image: Image.Image | None) -> dict[str, Any]:
        """ids: the prompt, the picture one token of it. Raises vLLM's errors."""
        if image is not None and not self.direct:
            return self._rendered(ids, image)
        made = self._made(ids, image) if image is not None else {"type": "token", "prompt_token_ids": ids}
        return made | {"arrival_time": time.time()}

    def _made(self, ids: list[int], image: Image.Image) -> dict[str, Any]:
        from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems

        (item,), (place,) = self.like["mm_kwargs"]["image"], self.like["mm_placeholders"]["image"]
        at = ids.index(self.image_token)
        pixels = dataclasses.replace(item["pixel_values"], data=patches(image, *self.cut))
        return {
            "type": "multimodal",
            "prompt_token_ids": [*ids[:at], *[self.image_token] * place.length, *ids[at + 1 :]],
            "mm_kwargs": MultiModalKwargsItems({"image": [MultiModalKwargsItem({**item, "pixel_values": pixels})]}),
            "mm_hashes": {"image": [hashlib.sha256(image.tobytes()).hexdigest()]},
            "mm_placeholders": {"image": [dataclasses.replace(place, offset=at)]},
        }

    def _rendered(self, ids: list[int], image: Image.Image) -> dict[str, Any]:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": image}}
        (made,) = self.llm.renderer.render_cmpl([parse_model_prompt(self.llm.model_config, prompt)])
        return dict(made)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two inputs are the same to the model; the hash only names the picture."""
    if (
        a["prompt_token_ids"] != b["prompt_token_ids"]
        or a["mm_placeholders"] != b["mm_placeholders"]
        or a["mm_kwargs"].keys() != b["mm_kwargs"].keys()
    ):
        return False
    (x,), (y,) = a["mm_kwargs"]["image"], b["mm_kwargs"]["image"]
    return x.keys() == y.keys() and all(
        x[k].field == y[k].field and x[k].data.dtype == y[k].data.dtype and torch.equal(x[k].data, y[k].data) for k in x
    )
