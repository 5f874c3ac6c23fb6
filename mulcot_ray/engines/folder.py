"""Is this folder the model that a contract wants, and is it whole? Each function returns what it found in words, and raises what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mulcot_ray.engines.preview import IMAGE
from mulcot_ray.engines.sizing import safetensors_header, shape_of, tensor_bytes
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.prompts import Contract, label_token_ids, render_chat
from mulcot_ray.records import LABELS, Post, Task

INDEX = "model.safetensors.index.json"


def family(folder: Path, contract: Contract) -> str:
    kind = _json(folder / "config.json").get("model_type")
    if kind != contract.family:
        raise ConfigError(f"config.json says {kind!r}, and contract {contract.name!r} is for {contract.family!r}")
    return f"{kind}, {shape_of(folder).parameters:,} parameters"


def weights(folder: Path) -> str:
    """Every shard of the index is there and as long as its header says, with every tensor that the index puts there."""
    where: dict[str, str] = _json(folder / INDEX)["weight_map"] if (folder / INDEX).exists() else {}
    names = sorted(set(where.values())) or sorted(f.name for f in folder.glob("*.safetensors"))
    if not names:
        raise InputError(f"{folder} has no safetensors files")
    if gone := [n for n in names if not (folder / n).exists()]:
        raise InputError(f"{len(gone)} of {len(names)} shards of the index are missing, {gone[0]} for one")
    total = 0
    for n in names:
        header = safetensors_header(folder / n)
        with (folder / n).open("rb") as f:
            full = 8 + int.from_bytes(f.read(8), "little") + tensor_bytes(header)
        if (size := (folder / n).stat().st_size) != full:
            raise InputError(f"{n} has {size:,} bytes, and its header says {full:,}: the copy is not whole")
        if missing := [t for t, shard in where.items() if shard == n and t not in header]:
            raise InputError(f"{n} lacks {len(missing)} tensors of the index, {missing[0]} for one")
        total += tensor_bytes(header)
    return f"{len(names)} safetensors file{'s' if len(names) > 1 else ''}, {total / 1e6:,.1f} MB, whole"


def chat_template(tokenizer: Any, contract: Contract) -> str:
    text = render_chat(tokenizer, contract.messages(Task.CLASSIFICATION, Post("-", "-", "a post", "a target", image_bytes=b"-")))
    if text.count(IMAGE) != 1:
        raise ConfigError(f"the chat template gives a picture {text.count(IMAGE)} places ({IMAGE}); one is wanted")
    return f"{len(tokenizer.get_vocab()):,} tokens, with a chat template"


def label_words(tokenizer: Any, contract: Contract) -> str:
    ids = label_token_ids(tokenizer, contract)
    return "scored by token " + ", ".join(f"{i} ({contract.label_words[x]})" for x, i in zip(LABELS, ids, strict=True))


def picture(folder: Path, tokenizer: Any, contract: Contract) -> str:
    """The picture's tokens are what config.json says, and the processor leaves a picture of the contract's size as large as it is."""
    ids = {t: tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("<|vision_start|>", IMAGE, "<|vision_end|>")}
    if broken := [t for t, i in ids.items() if len(i) != 1]:
        raise ConfigError(f"the tokenizer has no token {' and no token '.join(broken)}")
    if ids[IMAGE] != [wanted := _json(folder / "config.json").get("image_token_id")]:
        raise ConfigError(f"{IMAGE} is token {ids[IMAGE][0]}, and config.json says image_token_id {wanted}")
    side, (least, most) = contract.image.side, _pixels(folder)
    if not least <= side**2 <= most:
        raise ConfigError(f"the processor takes {least:,} to {most:,} pixels: it would resize the contract's {side} × {side} = {side**2:,}")
    return f"{side} × {side} pixels in {contract.image.tokens} tokens"


def contract_of(folder: Path) -> Contract | None:
    """The contract that the model was trained with; None where it was not trained by us."""
    file = folder / "contract.json"
    return Contract.model_validate_json(file.read_text(encoding="utf-8")) if file.exists() else None


def _pixels(folder: Path) -> tuple[int, int]:
    """The fewest and most pixels that the processor leaves alone, as transformers 4 (preprocessor_config) or 5 writes them."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            config = _json(folder / name)
            config = config.get("image_processor", config)
            size = config.get("size") or {}
            return config.get("min_pixels") or size.get("shortest_edge", 0), config.get("max_pixels") or size.get("longest_edge", 1 << 60)
    raise InputError(f"{folder} has neither processor_config.json nor preprocessor_config.json")


def _json(file: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{file.name} cannot be read: {e}") from e
    return data
