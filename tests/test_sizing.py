"""Parameters, memory and rows at once, against weights that are there, published sizes, and what vLLM itself reports."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from mulcot_ray.engines.base import spec
from mulcot_ray.engines.sizing import (
    GIB,
    KNOWN,
    fit,
    known_shape,
    kv_bytes_per_token,
    row_seconds,
    safetensors_header,
    sequences,
    shape_of,
    spec_fit,
    weights_bytes,
)
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.prices import load_prices
from mulcot_ray.recipe import load_recipe, load_runtime, model_folder

TINY, PAPER = load_recipe("tiny"), load_recipe("paper")
LAPTOP, CLUSTER = load_runtime("laptop"), load_runtime("cluster")
B3, B7, B72 = (KNOWN[f"Qwen2.5-VL-{n}B-Instruct"] for n in (3, 7, 72))
# As published, without what has no bearing on size: transformers 4, all keys of the decoder at the top.
PUBLISHED_7B = {
    "model_type": "qwen2_5_vl", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_hidden_layers": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 128000, "tie_word_embeddings": False,
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2},
}  # fmt: skip


def engine(role="student", recipe=TINY, runtime=LAPTOP, model="builtin:student", **changes):
    runtime = runtime.model_copy(update={role: getattr(runtime, role).model_copy(update=changes)})
    folder = model_folder(model) if model.startswith("builtin:") else model
    return spec(recipe, runtime, role, str(folder))


@pytest.mark.parametrize("name", ["student", "assistant", "teacher"])
def test_parameters_follow_from_the_dimensions(name):
    folder = model_folder(f"builtin:{name}")
    shape, header = shape_of(folder), safetensors_header(folder / "model.safetensors")
    assert shape.parameters == sum(math.prod(t["shape"]) for t in header.values())
    assert shape.visual == sum(math.prod(t["shape"]) for k, t in header.items() if k.startswith("visual."))
    assert shape.decoder == sum(math.prod(t["shape"]) for k, t in header.items() if k.startswith("model.layers."))
    assert shape.stored == 2 * shape.parameters  # shipped as float16


def test_published_models_have_the_published_sizes():
    assert (B3.parameters, B7.parameters) == (3_754_622_976, 8_292_166_656)  # as transformers counts them
    assert B7.visual == 676_550_144
    assert B72.parameters == 73_410_777_344
    assert known_shape("./models/Qwen2.5-VL-7B-Instruct/") == B7 == known_shape("Qwen/Qwen2.5-VL-7B-Instruct")
    assert known_shape("Qwen2.5-VL-7B") is None


def test_both_layouts_of_config_json_are_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_7B))
    assert shape_of(tmp_path) == B7  # no weights there: nothing stored
    text = {k: v for k, v in PUBLISHED_7B.items() if k not in ("model_type", "vision_config")}
    nested = {"model_type": "qwen2_5_vl", "tie_word_embeddings": False, "text_config": text, "vision_config": {"hidden_size": 1280}}
    (tmp_path / "config.json").write_text(json.dumps(nested))
    assert shape_of(tmp_path) == B7


def test_a_folder_that_is_no_such_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="config.json cannot be read"):
        shape_of(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_7B | {"model_type": "llama"}))
    with pytest.raises(ConfigError, match="'llama'; qwen2_5_vl is wanted"):
        shape_of(tmp_path)
    for data in (b"", b"\xff" * 64, (10).to_bytes(8, "little") + b"{"):
        (tmp_path / "x.safetensors").write_bytes(data)
        with pytest.raises(InputError, match="x.safetensors is not a safetensors file"):
            safetensors_header(tmp_path / "x.safetensors")


def test_weights_in_memory():
    assert weights_bytes(B7, "bfloat16") == 16_584_333_312  # total_size of the published index
    assert weights_bytes(B7, "float32") == 2 * weights_bytes(B7, "bfloat16")
    assert weights_bytes(B72, "bfloat16", "fp8") == weights_bytes(B72, "bfloat16") - B72.decoder
    assert weights_bytes(replace(B72, quantised="awq", stored=45 * GIB), "bfloat16") == 45 * GIB
    assert (kv_bytes_per_token(B7, "bfloat16"), kv_bytes_per_token(B72, "bfloat16")) == (57_344, 327_680)


def test_the_cache_holds_what_vllm_says_it_holds():
    """vLLM 0.29 reports 3640 and 4096 blocks of 32 tokens for the laptop's 256 MiB."""
    for role, blocks in (("student", 3640), ("teacher", 4096)):
        s = engine(role, model=f"builtin:{role}", kv_cache_mb=256)
        assert spec_fit(s, shape_of(Path(s.model)), 8 * GIB).tokens // 32 == blocks


def test_what_fits_a_device_and_why_not():
    h100 = 79.2 * GIB
    good = fit(B72, h100, dtype="bfloat16", max_model_len=4096, tensor_parallel=8)
    assert good.fits and 17 * GIB < good.weights < 17.2 * GIB and good.sequences == good.tokens // 4096 > 300
    one = fit(B72, h100, dtype="bfloat16", max_model_len=4096)
    assert not one.fits and one.tokens == 0 and "136.7 GiB of weights" in one.why and "of 79.2 GiB" in one.why
    assert fit(B72, h100, dtype="bfloat16", max_model_len=4096, quantization="fp8", tensor_parallel=2).fits
    odd = fit(B7, h100, dtype="bfloat16", max_model_len=4096, tensor_parallel=8)
    assert not odd.fits and "28 heads (4 for keys and values) do not divide over tensor_parallel 8" in odd.why
    # Two key-value heads over eight devices: each holds one, so a token costs four times as much as over two.
    two, eight = (fit(B3, h100, dtype="bfloat16", max_model_len=4096, tensor_parallel=n) for n in (2, 8))
    assert two.tokens / two.cache == pytest.approx(eight.tokens / eight.cache, rel=1e-3)
    staged = fit(B72, h100, dtype="bfloat16", max_model_len=4096, tensor_parallel=4, pipeline_parallel=2)
    assert staged.tokens == pytest.approx(good.tokens, rel=0.01)
    long = fit(B7, 22 * GIB, dtype="bfloat16", max_model_len=128_000)
    assert not long.fits and "one row may have 128,000" in long.why
    stated = fit(B7, 22 * GIB, dtype="bfloat16", max_model_len=4096, cache=8 * GIB)
    assert not stated.fits and "no room for a cache of 8.0 GiB" in stated.why


def test_rows_at_once_are_the_runtimes_or_follow_from_the_cache(tmp_path):
    assert sequences(engine(max_num_seqs=3)) == 3
    assert sequences(engine(max_num_seqs=None, kv_cache_mb=256)) == 116_508 // 512
    assert sequences(engine(max_num_seqs=None, kv_cache_mb=1)) == 8
    assert sequences(engine(max_num_seqs=None, kv_cache_mb=4096)) == 1024
    assert sequences(engine(max_num_seqs=None, kv_cache_mb=None)) == 64  # how large vLLM makes it there is not ours to know
    assert sequences(replace(engine(max_num_seqs=None, kv_cache_mb=256), backend="endpoint")) == 64
    paper = dict(recipe=PAPER, runtime=CLUSTER, max_num_seqs=None)
    assert sequences(engine("teacher", model="./Qwen2.5-VL-72B-Instruct", accelerator="H100", **paper)) == 1_409_593 // 2048
    assert sequences(engine("student", model="./Qwen2.5-VL-3B-Instruct", accelerator="L4", **paper)) == 327_577 // 2048
    for accelerator in ("cpu", "TPU"):  # none named, or one that the table does not have
        assert sequences(engine("student", model="./Qwen2.5-VL-3B-Instruct", accelerator=accelerator, **paper)) == 64
    assert sequences(engine("student", model="./of-our-own", accelerator="L4", **paper)) == 64
    # The folder is believed before its name.
    shutil.copytree(model_folder("builtin:student"), tmp_path / "Qwen2.5-VL-72B-Instruct")
    assert sequences(engine(model=str(tmp_path / "Qwen2.5-VL-72B-Instruct"), max_num_seqs=None, kv_cache_mb=256)) == 116_508 // 512


def test_a_roofline_moves_as_it_should():
    a = load_prices().accelerator("H100")
    s = engine("teacher", recipe=PAPER, runtime=CLUSTER, model="./Qwen2.5-VL-72B-Instruct", accelerator="H100")

    def seconds(s=s, **changes):
        return row_seconds(s, B72, a, **(dict(prefill=200, pictures=100, written=300, context=600, batch=256) | changes))

    assert seconds(batch=1) > 20 * seconds(batch=256), "a step reads the weights once for all its rows"
    assert seconds(written=600) > 1.5 * seconds(written=300)
    assert seconds(prefill=400) > seconds() and seconds(pictures=400) > seconds() and seconds(context=4000) > seconds()
    # Eight H100 write some 4,000 to 10,000 tokens a second of a 72B model at this batch size.
    assert 4000 < 300 / seconds() < 10000
    fp8 = seconds(replace(s, quantization="fp8"), batch=8)
    assert fp8 < seconds(batch=8)
    half = engine("teacher", recipe=PAPER, runtime=CLUSTER, model="./Qwen2.5-VL-72B-Instruct", accelerator="H100", tensor_parallel=4)
    assert seconds() < seconds(half) < 2 * seconds(), "twice the devices are less than twice as fast"
    tiny = engine()
    cost = row_seconds(tiny, shape_of(Path(tiny.model)), load_prices().accelerator("cpu"), prefill=40, pictures=9, written=70, context=90, batch=64)
    assert 0.01 < cost < 0.03, "measured: 10 ms in the engine alone, 21 ms in the demo"
