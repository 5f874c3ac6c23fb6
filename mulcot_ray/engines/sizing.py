"""How much memory a model takes, how many rows an engine can work on at once, and how fast that can be. Arithmetic: no torch, no GPU.

Parameters follow from the dimensions in config.json; that they are right is tested against the weights of the shipped models. Memory
follows vLLM's rule: a share of the device, less the weights and room to work, is cache for keys and values.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.prices import Accelerator, load_prices

DEFAULT = 64  # rows at once, where model or memory is not known
FEWEST, MOST = 8, 1024  # vLLM itself takes at most 1024 by default
UTILISATION = 0.92  # vLLM 0.29's default share of a device
WORKSPACE = 2 << 30  # bytes beside weights and cache: activations of the largest batch, CUDA graphs, NCCL (1 to 3 GiB for 3B to 72B)
GIB = 1 << 30
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
QUANTISED = {"fp8": 1.0, "bitsandbytes": 0.5625}  # bytes per parameter of a decoder layer, for methods that quantise while loading
# What is reached of the data sheet, and what each row and step costs beside it. Estimates: the whole is right within a factor of about 2.
COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6
DOUBLING = 0.9  # and of that, for each doubling of the devices of a replica: they wait for one another
STEP_S = 0.006  # scheduling and launching one decoding step
ROW_S = 0.006  # tokenising, preparing the picture and bookkeeping, on one core (measured: 5 to 8 ms with a model of no size)


@dataclass(frozen=True)
class Shape:
    """Dimensions of a Qwen2.5-VL model. `stored`: bytes of its safetensors (None: none there); `quantised`: how its folder is, if it is."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int
    vision_depth: int
    vision_hidden: int
    vision_intermediate: int
    patch: int = 14
    merge: int = 2
    stored: int | None = None
    quantised: str | None = None

    @property
    def decoder(self) -> int:
        """Parameters of the decoder layers: attention with biases on q, k and v, a gated MLP, two norms."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * q + 2 * self.hidden * kv + q + 2 * kv
        return self.layers * (attention + 3 * self.hidden * self.intermediate + 2 * self.hidden)

    @property
    def visual(self) -> int:
        """Parameters of the vision tower: patches of two frames, blocks with biases, the merger."""
        h, m = self.vision_hidden, self.vision_hidden * self.merge**2
        block = 4 * h * h + 4 * h + 3 * h * self.vision_intermediate + 2 * self.vision_intermediate + h + 2 * h
        return h * 3 * 2 * self.patch**2 + self.vision_depth * block + h + m * m + m + m * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.decoder + self.visual + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)

    def image_tokens(self, side: int) -> int:
        """Visual tokens of a picture of `side` × `side` pixels."""
        return (side // (self.patch * self.merge)) ** 2


@dataclass(frozen=True)
class Fit:
    """Bytes of one device; tokens and rows of one replica. `why` says it in words."""

    weights: int
    cache: int
    tokens: int
    sequences: int  # at full context length
    fits: bool
    why: str


# The published config.json of Qwen/Qwen2.5-VL-{3B,7B,72B}-Instruct on the Hugging Face hub.
# They come to 3,754,622,976, 8,292,166,656 and 73,410,777,344 parameters; the first two are what transformers counts when it loads them.
KNOWN = {
    "Qwen2.5-VL-3B-Instruct": Shape(2048, 36, 16, 2, 128, 11008, 151936, True, 128000, 32, 1280, 3420),
    "Qwen2.5-VL-7B-Instruct": Shape(3584, 28, 28, 4, 128, 18944, 152064, False, 128000, 32, 1280, 3420),
    "Qwen2.5-VL-72B-Instruct": Shape(8192, 80, 64, 8, 128, 29568, 152064, False, 128000, 32, 1280, 3456),
}


def known_shape(name: str) -> Shape | None:
    """The shape of a published model by the last part of a folder's or model's name."""
    return KNOWN.get(name.rstrip("/").rpartition("/")[2])


def shape_of(folder: Path) -> Shape:
    """The shape by config.json (as transformers 4 or 5 writes it) and the headers of the safetensors, if there are any.

    Raises InputError when config.json cannot be read, ConfigError when it is not of a Qwen2.5-VL model.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"{folder}/config.json cannot be read: {e}") from e
    text = config.get("text_config") or config  # transformers 4 has the decoder's keys at the top
    vision = config.get("vision_config") or {}
    if config.get("model_type") != "qwen2_5_vl" or "hidden_size" not in text:
        raise ConfigError(f"{folder} holds a model of type {config.get('model_type')!r}; qwen2_5_vl is wanted")
    files = sorted(folder.glob("*.safetensors"))
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    # Keys that the published files leave out have these values by default.
    return Shape(
        text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"], text["num_key_value_heads"],
        text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"], text["intermediate_size"], text["vocab_size"],
        bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))), text.get("max_position_embeddings", 128000),
        vision.get("depth", 32), vision.get("hidden_size", 1280), vision.get("intermediate_size", 3420), vision.get("patch_size", 14),
        vision.get("spatial_merge_size", 2), sum(tensor_bytes(safetensors_header(f)) for f in files) if files else None, quantised,
    )  # fmt: skip


def safetensors_header(file: Path) -> dict[str, Any]:
    """{tensor: {dtype, shape, data_offsets}}: an eight-byte length and JSON at the file's start. Raises InputError."""
    try:
        with file.open("rb") as f:
            (n,) = struct.unpack("<Q", f.read(8))
            if n > 100 << 20:
                raise ValueError("its header is larger than the format allows")
            header: dict[str, Any] = json.loads(f.read(n))
    except (OSError, ValueError, struct.error) as e:
        raise InputError(f"{file.name} is not a safetensors file: {e}") from e
    header.pop("__metadata__", None)
    return header


def tensor_bytes(header: dict[str, Any]) -> int:
    return int(max((t["data_offsets"][1] for t in header.values()), default=0))


def weights_bytes(shape: Shape, dtype: str, quantization: str | None = None) -> int:
    """Bytes in memory: as stored where the folder is quantised, else in `dtype`, with the decoder as `quantization` makes it while loading."""
    if shape.quantised is not None and shape.stored is not None:
        return shape.stored
    item = ITEM[dtype]
    return int(shape.decoder * QUANTISED.get(quantization or "", item)) + (shape.parameters - shape.decoder) * item


def kv_bytes_per_token(shape: Shape, dtype: str) -> int:
    """Bytes of keys and values of one token, over all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * ITEM[dtype]


def fit(
    shape: Shape, memory: float, *, dtype: str, max_model_len: int, tensor_parallel: int = 1, pipeline_parallel: int = 1,
    utilisation: float = UTILISATION, quantization: str | None = None, cache: int | None = None,
) -> Fit:  # fmt: skip
    """What of `memory` (bytes of one device) is left for the cache; `cache` states that size instead, as `kv_cache_mb` does.

    Under tensor parallelism each device has a share of the heads, and a key-value head at least.
    """
    devices = tensor_parallel * pipeline_parallel
    weights = weights_bytes(shape, dtype, quantization) // devices
    layers, heads = -(-shape.layers // pipeline_parallel), max(1, shape.kv_heads // tensor_parallel)
    per_token = 2 * layers * heads * shape.head_dim * ITEM[dtype]
    free = int(memory * utilisation) - weights - WORKSPACE if cache is None else cache
    tokens = max(0, free) // per_token
    rows = tokens // max_model_len
    sums = f"{_gib(weights)} of weights{f' on each of {devices} devices' if devices > 1 else ''} and {_gib(WORKSPACE)} to work, of {_gib(memory)}"
    if shape.heads % tensor_parallel or (tensor_parallel > shape.kv_heads and tensor_parallel % shape.kv_heads):
        fits, why = False, f"{shape.heads} heads ({shape.kv_heads} for keys and values) do not divide over tensor_parallel {tensor_parallel}"
    elif cache is not None and weights + WORKSPACE + cache > memory:
        fits, why = False, f"{sums}: no room for a cache of {_gib(cache)}"
    elif rows < 1:
        fits, why = False, f"{sums}: {_gib(max(0, free))} of cache hold {tokens:,} tokens, and one row may have {max_model_len:,}"
    else:
        fits, why = True, f"{sums}: {_gib(free)} of cache hold {tokens:,} tokens, {rows:,} rows of {max_model_len:,}"
    return Fit(weights, max(0, free), tokens, rows, fits, why)


def spec_fit(s: EngineSpec, shape: Shape, memory: float) -> Fit:
    """`fit` as the spec's runtime and the options that it hands on to vLLM say."""
    r = s.runtime
    return fit(
        shape, memory, dtype=s.dtype, max_model_len=s.max_model_len, tensor_parallel=r.tensor_parallel, pipeline_parallel=r.pipeline_parallel,
        utilisation=float(r.extra.get("gpu_memory_utilization", UTILISATION)), quantization=s.quantization,
        cache=None if r.kv_cache_mb is None else r.kv_cache_mb << 20,
    )  # fmt: skip


def sequences(s: EngineSpec) -> int:
    """Rows that the engine works on at once: the runtime's number, or what the cache holds at half the context length, from 8 to 1024.

    64 where model, accelerator or, on a CPU, the cache's size is not known.
    """
    r = s.runtime
    if r.max_num_seqs is not None:
        return r.max_num_seqs
    prices = load_prices()
    unknown = r.kv_cache_mb is None if s.device == "cpu" else r.accelerator == "cpu" or r.accelerator not in prices.accelerators
    if s.backend != "vllm" or unknown:
        return DEFAULT
    try:
        shape: Shape | None = shape_of(Path(s.model))
    except (InputError, ConfigError):
        shape = known_shape(s.model)
    if shape is None or s.dtype not in ITEM:
        return DEFAULT
    tokens = spec_fit(s, shape, prices.accelerators[r.accelerator].memory_gib * GIB).tokens
    return max(FEWEST, min(MOST, tokens // max(1, s.max_model_len // 2)))


def row_seconds(s: EngineSpec, shape: Shape, a: Accelerator, *, prefill: float, pictures: float, written: float, context: float, batch: int) -> float:
    """Seconds of one replica for one row, by a roofline.

    `prefill` prompt tokens are computed (what a shared prefix spares not counted), `pictures` of them are visual tokens to encode, `written`
    tokens are decoded at a mean length of `context`, `batch` rows together: a step reads all weights once and each row's keys and values.
    """
    devices = s.runtime.devices if s.device == "cuda" else 1
    together = devices * DOUBLING ** math.log2(devices)
    flops, bandwidth = together * a.tflops_bf16 * 1e12 * COMPUTE_SHARE, together * a.bandwidth_gbs * 1e9 * BANDWIDTH_SHARE
    read = 2 * (prefill * shape.decoder + pictures * shape.merge**2 * shape.visual) / flops
    weights = weights_bytes(shape, s.dtype, s.quantization)
    step = max(weights / bandwidth, 2 * batch * shape.decoder / flops) + batch * context * kv_bytes_per_token(shape, s.dtype) / bandwidth + STEP_S
    device = read + written * step / batch
    # On a GPU the engine computes in a process of its own while the next rows are prepared; on a CPU both want the same core.
    return max(device, ROW_S) if s.device == "cuda" else device + ROW_S


def _gib(n: float) -> str:
    return f"{n / GIB:.1f} GiB" if n >= GIB / 10 else f"{n / (1 << 20):.0f} MiB"
