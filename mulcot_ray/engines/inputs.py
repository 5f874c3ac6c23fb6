"""A post as vLLM's engine takes it: token ids and, where it has a picture, its patches, their hash and their place.

vLLM's renderer makes that by Hugging Face's processor, whose checks of options and searching for the placeholder take 0.5 ms of Python a row,
more than a small model needs for the row itself. All pictures of a contract have one size, so all but patches, hash and place is the same for
each: `Inputs` takes it from an input that the renderer made. When an engine opens, one more picture is made both ways: where the two differ
(another version, another family), the renderer makes every input.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mulcot_ray.errors import RowFault
from mulcot_ray.records import Reason

LARGE = 448  # pixels of a side: above it, patches and hash take longer (milliseconds) than handing them to a thread
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
        self.llm, self.size, self.direct = llm, (side, side), False
        try:
            config = llm.model_config.hf_config
            vision = config.vision_config
            self.image_token: int = config.image_token_id
            self.cut = (vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
            self.name = repr((llm.model_config.model, self.size, self.cut)).encode()  # what a picture's hash depends on beside its pixels
            noise = np.random.default_rng(0)
            first, second = (Image.fromarray(noise.integers(0, 256, (side, side, 3), np.uint8)) for _ in range(2))
            (self.like,) = llm.renderer.render_cmpl(self._prompts([0, self.image_token], first))
            elsewhere = [0, 0, self.image_token, 0]
            self.direct = same(self._made(elsewhere, second), llm.renderer.render_cmpl(self._prompts(elsewhere, second))[0])
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # what a stranger's objects raise where they are other than expected
            log.debug("an input cannot be made like vLLM's", exc_info=True)
        if not self.direct:
            log.warning("this vLLM makes pictures in another way than mulcot_ray.engines.inputs: its renderer is used, which is slower")

    async def __call__(self, ids: list[int], image: Image.Image | None) -> Mapping[str, Any]:
        """ids: the prompt, the picture one token of it. Raises vLLM's errors, and RowFault where the prompt has no place for the picture."""
        if image is None:
            made: dict[str, Any] = {"type": "token", "prompt_token_ids": ids}
        elif not self.direct or image.mode != "RGB" or image.size != self.size:
            (rendered,) = await self.llm.renderer.render_cmpl_async(self._prompts(ids, image))
            return rendered  # type: ignore[no-any-return]
        elif self.image_token not in ids:
            raise RowFault(Reason.ENGINE_ERROR, "the chat template gives the picture no place in the prompt")
        else:
            made = await asyncio.to_thread(self._made, ids, image) if image.width > LARGE else self._made(ids, image)
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
            "mm_hashes": {"image": [hashlib.sha256(self.name + image.tobytes()).hexdigest()]},
            "mm_placeholders": {"image": [dataclasses.replace(place, offset=at)]},
        }

    def _prompts(self, ids: list[int], image: Image.Image) -> list[Any]:
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        return [parse_model_prompt(self.llm.model_config, {"prompt_token_ids": ids, "multi_modal_data": {"image": image}})]


def same(made: Mapping[str, Any], rendered: Mapping[str, Any]) -> bool:
    """Whether two inputs are the same to the model: all but the hash, which only names the picture, and the time."""
    equal = ("type", "prompt_token_ids", "mm_placeholders")
    if (
        made.keys() != rendered.keys() - {"arrival_time"}
        or any(made[k] != rendered[k] for k in equal)
        or [*made["mm_kwargs"]] != [*rendered["mm_kwargs"]]
    ):
        return False
    (x,), (y,) = made["mm_kwargs"]["image"], rendered["mm_kwargs"]["image"]
    return x.keys() == y.keys() and all(
        x[k].field == y[k].field and x[k].data.dtype == y[k].data.dtype and torch.equal(x[k].data, y[k].data) for k in x
    )
