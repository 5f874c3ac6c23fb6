"""Loading, LoRA, sharding, and the state that a checkpoint holds."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from mulcot_ray.errors import TrainingError
from mulcot_ray.prompts import Contract, label_token_ids
from mulcot_ray.recipe import Lora, Train
from mulcot_ray.training.losses import core


def load(folder: str) -> Any:
    """A Qwen2.5-VL model in float32 from safetensors; mixed precision is FSDP's business."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True)


def load_processor(folder: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def build(folder: str, settings: Train, contract: Contract) -> Any:
    """The model to train: whole, or frozen with LoRA adapters from peft."""
    model = load(folder)
    if settings.lora is None:
        return model
    words = label_token_ids(load_processor(folder).tokenizer, contract) if settings.lora.label_words else None
    return _with_lora(model, settings.lora, words)


def _with_lora(model: Any, lora: Lora, words: list[int] | None) -> Any:
    from peft import LoraConfig, get_peft_model

    hit = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(lora.targets, n)]
    if not hit:
        raise TrainingError(f"lora.targets {lora.targets!r} matches no linear layer of the model")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets, bias="none",
        trainable_token_indices={"embed_tokens": words} if words else None,  # and the same rows of a tied output layer
    )  # fmt: skip
    return get_peft_model(model, config)


def shard(wrapper: nn.Module, device: str, dtype: str, reshard: bool) -> None:
    """FSDP2 in place: each decoder layer and vision block is a unit, and the rest (embeddings, output layer) one more.

    `reshard` False keeps the gathered weights for the whole optimizer step: more memory, one gather instead of four.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    half = torch.bfloat16 if dtype == "bfloat16" else None
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": reshard,
        "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32 if half else None),
    }
    inner = core(wrapper.model).model  # type: ignore[union-attr, arg-type]
    for block in (*inner.language_model.layers, *inner.visual.blocks):  # type: ignore[union-attr, misc]
        fully_shard(block, **options)
    fully_shard(wrapper, **options)


def trainable(model: nn.Module) -> dict[str, Any]:
    """Names and tensors of the parameters that train. Tied aliases and frozen weights are left out: they are in the base."""
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {k: v for k, v in model.state_dict().items() if k in names}


def check_vocabularies(student: Any, assistant: Any) -> None:
    """Raise TrainingError unless every token id that both tokenizers know means the same token: a soft loss compares ids."""
    a, b = student.get_vocab(), assistant.get_vocab()
    by_id = {i: t for t, i in b.items()}
    different = [(i, t, by_id[i]) for t, i in a.items() if i in by_id and by_id[i] != t]
    if different:
        i, mine, theirs = min(different)
        raise TrainingError(
            f"the vocabularies differ in {len(different)} ids (first: {i} is {mine!r} for the student and {theirs!r} for the assistant)"
        )
