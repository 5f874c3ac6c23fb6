"""What machines and endpoints cost and can do: the shipped table prices.yaml, and a user's own figures over it."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from mulcot_ray.errors import ConfigError
from mulcot_ray.prompts import Frozen

TABLE = Path(__file__).with_name("prices.yaml")
SECTIONS = ("accelerators", "endpoints")


class Accelerator(Frozen):
    """One device: US dollars an hour, GiB that a process can have of it, dense bf16 TFLOP/s, memory bandwidth in GB/s."""

    usd_per_hour: float = Field(ge=0)
    memory_gib: float = Field(gt=0)
    tflops_bf16: float = Field(gt=0)
    bandwidth_gbs: float = Field(gt=0)


class EndpointPrice(Frozen):
    """US dollars for a million tokens. `image_tokens`: how many a picture counts as; None: as the model family counts."""

    usd_per_million_in: float = Field(ge=0)
    usd_per_million_out: float = Field(ge=0)
    image_tokens: int | None = Field(None, ge=0)


class Prices(Frozen):
    as_of: str
    accelerators: dict[str, Accelerator]
    endpoints: dict[str, EndpointPrice]

    def accelerator(self, name: str) -> Accelerator:
        """Raises ConfigError with the names there are."""
        if name not in self.accelerators:
            raise ConfigError(f"accelerator {name!r} is not in the price table ({', '.join(self.accelerators)}): add it with --prices")
        return self.accelerators[name]


@lru_cache(maxsize=4)
def load_prices(file: str | None = None) -> Prices:
    """The shipped table, with the entries and single figures of `file` over it. Raises ConfigError with the offending key."""
    data = _read(TABLE)
    if file is not None:
        own = _read(Path(file))
        for section in SECTIONS:
            entries = own.pop(section, None) or {}
            if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
                raise ConfigError(f"prices {file!r}: {section} wants names, each with its figures")
            data[section] |= {name: {**data[section].get(name, {}), **figures} for name, figures in entries.items()}
        data |= own
    try:
        return Prices.model_validate(data)
    except ValidationError as e:
        raise ConfigError(f"prices {file!r}: " + "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())) from e


def _read(path: Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"prices {str(path)!r} cannot be read: {e}") from e
    if not isinstance(data, dict):
        raise ConfigError(f"prices {str(path)!r} holds no figures (accelerators or endpoints by name are wanted)")
    return data


def dollars(x: float) -> str:
    """Dollars: cents, and of small sums three digits."""
    return f"{x:,.2f} USD" if x >= 1 or not x else f"{x:.3g} USD" if x >= 1e-4 else f"{x:.6f} USD"
