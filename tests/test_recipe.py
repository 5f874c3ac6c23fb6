import pytest
from pydantic import ValidationError

from mulcot_ray.errors import ConfigError
from mulcot_ray.recipe import load_recipe, load_runtime, model_folder


def test_built_ins_hold_the_figures_of_the_paper():
    paper = load_recipe("paper")
    a, s = paper.assistant, paper.student
    assert (a.lora.r, a.lora.alpha, a.lora.dropout, s.lora.dropout, a.lr, a.epochs, a.global_batch) == (16, 32, 0.2, 0.05, 3e-4, 20, 40)
    assert (paper.distill.lam, paper.distill.temperature, paper.contract.image.side, paper.seed, paper.dtype) == (0.3, 2.0, 280, 42, "bfloat16")
    assert a.schedule == "plateau" and paper.teach.max_tokens == 512
    assert load_runtime("cluster").device == "cuda" and load_runtime("laptop").train_workers == 2


def test_recipes_are_frozen():
    with pytest.raises(ValidationError):
        load_recipe("tiny").seed = 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: tiny\nseeed: 1\n", "seeed: Extra inputs are not permitted"),
        ("base: tiny\nstudent: {lr: -1}\n", "student.lr: Input should be greater than 0"),
        ("base: tiny\nstudent: {method: full}\n", "needs a `lora` section"),
        ("base: tiny\ncontract: {base: tiny, image: {side: 100}}\n", "contract.image.side: Input should be a multiple of 28"),
        ("base: nope\n", "no recipe 'nope'"),
        ("just text", "holds no settings"),
        ("a: [", "is not YAML"),
    ],
)
def test_errors_name_the_value(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as e:
        load_recipe(str(path))
    assert message in str(e.value)


def test_base_is_merged_deeply(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("base: tiny\nstudent: {lr: 0.5}\ncontract: {base: tiny, image: {side: 56}}\n")
    mine, tiny = load_recipe(str(path)), load_recipe("tiny")
    assert mine.student.lr == 0.5 and mine.student.epochs == tiny.student.epochs
    assert mine.contract.image.side == 56 and mine.contract.hash != tiny.contract.hash


def test_models_are_found_or_named():
    assert (model_folder("builtin:student") / "model.safetensors").exists()
    assert model_folder("my-student") is None
    with pytest.raises(ConfigError, match="builtin:teacher"):
        model_folder("builtin:nope")
    with pytest.raises(ConfigError, match="no config.json"):
        model_folder("./nowhere")
