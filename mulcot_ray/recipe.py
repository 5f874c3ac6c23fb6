"""What changes a result (Recipe: fingerprinted) apart from where and how fast it runs (Runtime: not).

Both are YAML files for people and frozen pydantic objects for the code; unknown keys are refused. A file may start from
another with `base: NAME_OR_PATH` and state only what differs. Built in: recipes `tiny` and `paper`, runtimes `laptop` and
`cluster`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from mulcot_ray.errors import ConfigError
from mulcot_ray.prompts import Contract, Frozen

HERE = Path(__file__).parent
T = TypeVar("T", bound=Frozen)


# What models write when they were told the answer. On 1,121 real explanations by Qwen2.5-VL-72B these match twice, both rightly.
LEAKS = (
    r"\bas\s+(given|told|labell?ed|annotated|instructed|specified)\b",
    r"\b(is|was|been)\s+(already\s+)?(labell?ed|annotated)\s+(as\s+)?\W?(positive|neutral|negative)\b",
    r"\b(given|provided|gold|true|correct|assigned|annotated|specified)\s+(sentiment\s+)?(label|annotation|answer|prediction)\b",
    r"\bthe\s+label\s+(is|says|was)\b",
    r"\bground[- ]truth\b",
    r"\b(i|we)\s+(was|were|am|are)\s+(given|told)\b",
)


class Models(Frozen):
    """`builtin:NAME` (shipped tiny models), a local folder in Hugging Face layout, the name of a model under the root, or
    `endpoint:NAME`, a model behind the endpoint that the runtime names for the role (teacher and assistant can be asked, not trained, so)."""

    teacher: str
    assistant: str
    student: str


class Teach(Frozen):
    """Label-aware generation: one predict attempt, then one explain attempt per further temperature."""

    temperatures: tuple[float, ...] = Field(min_length=1)  # of predict, then of each explain attempt
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(gt=0)
    guided: bool = False  # hold the answer to the contract's form by structured decoding; some models write better without
    quantization: str | None = None  # vLLM's name of a method that quantises while loading (`fp8`); quantised folders need none
    # An explanation that matches one of these (regular expressions, case ignored) betrays that the label was given: the attempt fails.
    leaks: tuple[str, ...] = LEAKS


class Augment(Frozen):
    """The assistant's own rationales, sampled; kept where they end on the gold label."""

    temperature: float = Field(0.7, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_tokens: int = Field(gt=0)
    samples: int = Field(1, ge=1, le=64)  # per post; the first that is right is kept
    guided: bool = False


class Lora(Frozen):
    r: int = Field(gt=0)
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    # Train the embeddings of the label words' first tokens too. A base that has hardly seen these words apart from each other keeps them nearly
    # equal, and no adapter before a frozen output layer can then make the model sure (measured: confidence stops at 0.67).
    label_words: bool = False
    projector: bool = False  # train the vision tower's merger too, whole
    # Regular expression over module names. The authors' bare suffixes also match the MLPs of the vision tower.
    targets: str = r".*language_model\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


class Train(Frozen):
    """One training run. The batch is global: results do not depend on how many workers share it."""

    method: Literal["lora", "full"]
    lora: Lora | None = None
    lr: float = Field(gt=0)
    weight_decay: float = Field(0.0, ge=0)
    beta2: float = Field(0.999, gt=0, lt=1)  # of AdamW; lower forgets old gradients sooner, and spikes less at a high lr
    global_batch: int = Field(gt=0)  # posts per optimizer step
    epochs: int = Field(gt=0)
    schedule: Literal["plateau", "cosine"]  # plateau: halve lr after 2 epochs without a better validation accuracy
    warmup: float = Field(0.0, ge=0, lt=1)  # share of the steps, cosine only
    clip: float = Field(1.0, gt=0)
    select_by: Literal["scored", "generated"] = "scored"  # the best epoch: by scored label words, or by labels that the model writes

    @model_validator(mode="after")
    def _lora(self) -> Self:
        if (self.method == "lora") != (self.lora is not None):
            raise ValueError("method: lora needs a `lora` section, method: full must not have one")
        return self


class Distill(Frozen):
    """L = (1 - lam)·CE + lam·T²·KL(assistant ‖ student) per task (METHOD: stage 4)."""

    lam: float = Field(0.3, ge=0, le=1)
    temperature: float = Field(2.0, gt=0)
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = Field(0.5, gt=0, lt=1)  # of jsd: the assistant's share of the mixture
    soft_labels: Literal["online", "cached"] = "online"  # cached: written once by `mulcot soften`, then trained from without the assistant
    keep: Literal["top_k", "sampled"] = "top_k"  # cached: the most probable tokens and their lumped rest, or unbiased draws (arXiv 2503.16870)
    top_k: int = Field(64, gt=0)  # cached: so many tokens of each distribution
    # cached: the student's picture features too, so that its vision tower does not run in training; needs LoRA without the projector
    features: bool = False


class Recipe(Frozen):
    """Everything that decides what comes out."""

    name: str
    seed: int = 42
    dtype: Literal["float32", "bfloat16"]
    max_model_len: int = Field(gt=0)  # tokens, prompt and answer together
    models: Models
    contract: Contract
    teach: Teach
    augment: Augment
    assistant: Train
    student: Train
    distill: Distill
    explain_tokens: int = Field(gt=0)  # new tokens for a rationale that `label` or the endpoint writes


class Endpoint(Frozen):
    """A server that speaks OpenAI's chat API, for models named `endpoint:NAME`."""

    url: str  # up to and with the version: http://host:8000/v1
    key_env: str | None = "OPENAI_API_KEY"  # the environment variable, on the nodes, that holds the key; None: no key is sent
    dialect: Literal["openai", "vllm"] = "openai"  # vllm: also sampling seeds as vLLM's, structured decoding, label scoring by prefix
    requests_per_minute: float | None = Field(None, gt=0)  # over all replicas
    timeout_s: float = Field(120, gt=0)  # of one attempt
    retries: int = Field(8, ge=0)  # of a request that met 408, 409, 429, 5xx, a timeout or a broken connection; waits 0.5 to 8 s with jitter


class EngineRuntime(Frozen):
    """Where an engine runs. Nothing here changes an answer, up to floating-point order."""

    replicas: int | tuple[int, int] = 1  # fixed, or from–to
    tensor_parallel: int = Field(1, ge=1)
    pipeline_parallel: int = Field(1, ge=1)
    cpus: float = Field(1, ge=0)  # per replica, on top of its GPUs
    max_num_seqs: int | None = Field(None, ge=1)  # rows that the engine works on at once; None: derived from model and memory
    kv_cache_mb: int | None = None  # per device; None: what the engine finds free
    compile: bool = False  # CUDA graphs and torch.compile; a minute of start-up on a CPU
    accelerator: str = "cpu"  # a name in the price table: what one such GPU (or this machine) holds, computes and costs
    extra: dict[str, Any] = {}  # passed to vLLM's AsyncEngineArgs as they are
    endpoint: Endpoint | None = None  # where models named `endpoint:NAME` are asked

    @property
    def devices(self) -> int:
        """GPUs of one replica."""
        return self.tensor_parallel * self.pipeline_parallel


class Runtime(Frozen):
    """Machines and sizes. `address` None starts Ray on this machine; jobs inside a cluster find it by RAY_ADDRESS."""

    name: str
    address: str | None = None
    device: Literal["cpu", "cuda"]
    local_cpus: int | None = None  # logical CPUs of a Ray started here; None: at least 4, so that stages can overlap
    rows_per_chunk: int = Field(64, ge=1)  # the unit of commit
    answer_cache: bool = True  # keep each written answer under the root's answers/, and never ask the same again
    teacher: EngineRuntime = EngineRuntime()
    assistant: EngineRuntime = EngineRuntime()
    student: EngineRuntime = EngineRuntime()
    train_workers: int | tuple[int, int] = 2  # fixed, or from–to: as many as there is room for
    train_cpus: float = Field(1, ge=0)  # per worker
    micro_batch: int = Field(8, ge=1)  # posts in one forward pass of one worker
    reshard: bool = True  # free gathered weights after each use; False: keep them for the step, where memory allows
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    packed: bool = True  # both tasks of a post in one row that shares the picture; False: a row each
    loss_chunk: int = Field(256, ge=1)  # answer tokens whose logits exist at once
    checkpoint_steps: int | None = Field(None, ge=1)  # a checkpoint after so many steps too, not only at the end of an epoch
    compile_training: bool = False
    parity_posts: int = Field(8, ge=0)  # validation posts on which transformers and vLLM must agree about an export; 0: not checked

    @property
    def workers(self) -> tuple[int, int]:
        """Training workers, from–to."""
        n = self.train_workers
        return (n, n) if isinstance(n, int) else n

    @model_validator(mode="after")
    def _range(self) -> Self:
        lo, hi = self.workers
        if not 1 <= lo <= hi:
            raise ValueError(f"train_workers {self.train_workers}: a number from 1, or [from, to] is wanted")
        return self


def load_settings(kind: type[T], name: str, folder: str) -> T:
    """Settings of another kind: a built-in file of `recipes/FOLDER` by name, or a YAML file. Raises ConfigError with the offending key."""
    return _validate(kind, _read(name, HERE / "recipes" / folder), name)


def load_recipe(name: str) -> Recipe:
    """A built-in recipe by name, or a YAML file. Raises ConfigError with the offending key."""
    data = _read(name, HERE / "recipes")
    contract = data.get("contract")
    if isinstance(contract, str):
        data["contract"] = _read(contract, HERE / "recipes" / "contracts")
    elif isinstance(contract, dict) and "base" in contract:
        data["contract"] = _merge(_read(contract.pop("base"), HERE / "recipes" / "contracts"), contract)
    return _validate(Recipe, data, name)


def load_runtime(name: str) -> Runtime:
    """A built-in runtime by name, or a YAML file. Raises ConfigError with the offending key."""
    return _validate(Runtime, _read(name, HERE / "runtimes"), name)


def model_folder(name: str) -> Path | None:
    """The folder of a model that is not an artifact: a shipped one, or a path. None: look for the name under the root."""
    if name.startswith("builtin:"):
        folder = HERE / "models" / name.removeprefix("builtin:")
        if not (folder / "config.json").exists():
            known = sorted(p.parent.name for p in (HERE / "models").glob("*/config.json"))
            raise ConfigError(f"no built-in model {name!r}; there are {', '.join('builtin:' + k for k in known)}")
        return folder
    if os.sep in name or name.startswith("."):
        if not (Path(name) / "config.json").exists():
            raise ConfigError(f"{name!r} is no model folder: it has no config.json")
        return Path(name)
    return None


def _read(name: str, builtin: Path) -> dict[str, Any]:
    path = builtin / f"{name}.yaml"
    if not path.exists():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in builtin.glob("*.yaml")))
        raise ConfigError(f"no {builtin.name.rstrip('s')} {name!r}: neither a file nor one of {known}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path} is not YAML: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds no settings (a mapping of keys to values is wanted)")
    base = data.pop("base", None)
    return _merge(_read(base, builtin), data) if base else data


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for k, v in over.items():
        old = merged.get(k)
        merged[k] = _merge(old, v) if isinstance(old, dict) and isinstance(v, dict) else v
    return merged


def _validate(kind: type[T], data: dict[str, Any], name: str) -> T:
    try:
        return kind.model_validate(data)
    except ValidationError as e:
        faults = [f"{'.'.join(map(str, x['loc'])) or 'the whole'}: {x['msg']}" for x in e.errors()]
        raise ConfigError(f"{kind.__name__.lower()} {name!r}: " + "; ".join(faults)) from e
