"""Loading, LoRA, compilation, sharding."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from mulcot_ray.errors import ConfigError, TrainingError
from mulcot_ray.prompts import Contract, label_token_ids
from mulcot_ray.recipe import Distill, Lora, Train


def load(folder: str, dtype: torch.dtype = torch.float32) -> Any:
    """A Qwen2.5-VL model from safetensors."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", use_safetensors=True)


def skeleton(folder: str) -> Any:
    """The model of a folder without weights, on torch's `meta` device."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))


def load_processor(folder: str) -> Any:
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def build(folder: str, settings: Train, contract: Contract, frozen: torch.dtype = torch.float32) -> Any:
    """The model to train: whole, or frozen with LoRA adapters from peft. What trains is float32; mixed precision is FSDP's business.

    `frozen` is the dtype of what does not train: weights that never change lose nothing in the precision in which they are used.
    """
    if settings.lora is None:
        return load(folder)
    words = label_token_ids(load_processor(folder).tokenizer, contract) if settings.lora.label_words else None
    model = _with_lora(load(folder, frozen), settings.lora, words)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    return model


def _with_lora(model: Any, lora: Lora, words: list[int] | None) -> Any:
    from peft import LoraConfig, get_peft_model

    hit = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and re.fullmatch(lora.targets, n)]
    if not hit:
        raise TrainingError(f"lora.targets {lora.targets!r} matches no linear layer of the model")
    if lora.projector and any(".merger." in n for n in hit):
        raise TrainingError(f"lora.targets {lora.targets!r} matches the vision merger too, which lora.projector trains whole: one of them")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=lora.targets, bias="none",
        trainable_token_indices={"embed_tokens": words} if words else None,  # and the same rows of a tied output layer
        modules_to_save=["merger"] if lora.projector else None,
    )  # fmt: skip
    return get_peft_model(model, config)


def core(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model  # type: ignore[operator]


def blocks(model: nn.Module) -> list[nn.Module]:
    """Vision blocks and decoder layers: what is compiled and sharded one by one."""
    inner = core(model).model
    return [*inner.visual.blocks, *inner.language_model.layers]


def output_weight(model: nn.Module) -> Tensor:
    """The output layer [v, d] with what LoRA trains of it (the label words' rows)."""
    head = core(model).lm_head
    found: Tensor = head.get_merged_weights(head.active_adapters) if hasattr(head, "get_merged_weights") else head.weight
    return found


def prepare(model: nn.Module, *, checkpointing: bool, compiled: bool) -> None:
    """Recompute activations in the backward pass; compile each block (one for all of a kind: they share their code)."""
    if checkpointing:
        core(model).gradient_checkpointing_enable({"use_reentrant": False})
    if compiled:
        for block in blocks(model):
            block.compile()


def shard(root: nn.Module, models: list[nn.Module], device: str, dtype: str, reshard: bool) -> None:
    """FSDP2 in place: of each model in `root`, every decoder layer and vision block is a unit; the rest of all of them is one more.

    The root's unit is gathered in the root's forward, so both output layers are there for the losses. Each unit is moved to the device when it
    is sharded, so no device ever holds a whole model. `reshard` False keeps the gathered weights for the whole optimizer step: more memory,
    one gather instead of four.
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
    for model in models:
        for block in blocks(model):
            fully_shard(block, **options)
        if not core(model).config.text_config.tie_word_embeddings:
            fully_shard(core(model).get_input_embeddings(), **options)  # 1 GB of a 7B model that is needed for a moment only
    fully_shard(root, **options)


def trainable(model: nn.Module) -> dict[str, Any]:
    """Names and tensors of the parameters that train. Tied aliases and frozen weights are left out: they are in the base."""
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    return {k: v for k, v in model.state_dict().items() if k in names}


def check_vocabularies(student: Any, assistant: Any) -> int:
    """The number of ids that both tokenizers have: the vocabulary of the soft loss, without the padding of either output layer.

    Raises TrainingError unless every id that both know means the same token: a soft loss compares ids.
    """
    a, b = student.get_vocab(), assistant.get_vocab()
    by_id = {i: t for t, i in b.items()}
    different = [(i, t, by_id[i]) for t, i in a.items() if i in by_id and by_id[i] != t]
    if different:
        i, mine, theirs = min(different)
        raise TrainingError(
            f"the vocabularies differ in {len(different)} ids (first: {i} is {mine!r} for the student and {theirs!r} for the assistant)"
        )
    return 1 + min(max(a.values()), max(b.values()))


def check_features(distill: Distill, settings: Train, folder: str) -> None:
    """Raise ConfigError where picture features are to be kept, and a student trained so would not make the same ones in every epoch.

    Its vision tower has to be frozen whole, the merger with it, and soft labels have to be read from a table, in which the features stand.
    """
    if not distill.features:
        return
    if distill.soft_labels != "cached":
        raise ConfigError(
            f"distill.features with soft_labels: {distill.soft_labels}: features stand in the table of soft labels; use soft_labels: cached"
        )
    if settings.lora is None:
        raise ConfigError(f"distill.features with method: {settings.method}: the vision tower trains, so its features change; use method: lora")
    if settings.lora.projector:
        raise ConfigError("distill.features with lora.projector: the merger trains, so the features change; use one of them")
    targets, inner = settings.lora.targets, skeleton(folder).model
    tower = {id(m) for m in inner.visual.modules()}
    hit = [n for n, m in inner.named_modules(prefix="model") if id(m) in tower and re.fullmatch(targets, n)]
    if hit:
        raise ConfigError(f"distill.features with lora.targets {targets!r}: it matches {hit[0]} of the vision tower, so the features change")


def check_alike(student: str, assistant: str) -> None:
    """Raise TrainingError unless both folders' models take the same batch: image token, patches and rotary positions."""
    from transformers import AutoConfig

    def facts(folder: str) -> dict[str, Any]:
        c = AutoConfig.from_pretrained(folder)
        vision = {k: getattr(c.vision_config, k, None) for k in ("patch_size", "temporal_patch_size", "spatial_merge_size", "tokens_per_second")}
        return {"image_token_id": c.image_token_id, **vision}

    ours, theirs = facts(student), facts(assistant)
    if different := [f"{k} is {ours[k]} for the student and {theirs[k]} for the assistant" for k in ours if ours[k] != theirs[k]]:
        raise TrainingError(f"the models cannot share a batch: {'; '.join(different)}")
