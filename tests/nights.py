"""Dumps for the tests of nights, and a scripted student that counts what it is asked."""

from __future__ import annotations

import base64
import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.labeling.version import NightSettings, Version, version_of
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import EngineRuntime, load_recipe
from mulcot_ray.records import Split

RECIPE = load_recipe("tiny")
FULL = '"Text_analysis": "t"\n"Image_analysis": "i"\n"Conflict_resolution": "c"\n"Final_conclusion": "f"\n"Prediction": "{}"'


def script(messages, sampling) -> str:
    """A label from the words of the post, the same whenever it is asked."""
    text = messages[-1]["content"][-1]["text"]
    return FULL.format(("negative", "neutral", "positive")[sum(map(ord, text)) % 3])


def scripted(fingerprint: str = "fake", script=script, **options) -> EngineSpec:
    """An EngineSpec of the scripted engine."""
    return EngineSpec("fake", fingerprint, RECIPE.contract, "float32", 1024, 42, "cpu", EngineRuntime(**options), "scripted", script=script)


def version(store, settings: NightSettings | None = None, engines=None, model: str = "student") -> Version:
    engines = {r: scripted(r) for r in ("student", "assistant", "teacher")} | (engines or {})
    from mulcot_ray.recipe import load_runtime

    return version_of(store, model, RECIPE, load_runtime("laptop"), settings or NightSettings(name="t"), engines)


def posts(n: int, seed: int, pictures: bool = False) -> list[dict]:
    """Rows of a dump. Texts are made distinct by a number: the sample corpus repeats itself."""
    rows = []
    for i, p in enumerate(sample_posts(n, Split.TEST, seed)):
        row = {"id": f"{seed}-{i:05d}", "text": f"{p.text} ({seed}/{i})"}
        if p.aspect is not None:
            row["aspect"] = p.aspect
        if pictures and p.image_bytes:
            row["image_base64"] = base64.b64encode(p.image_bytes).decode()
        rows.append(row)
    return rows


def dump(folder: Path, date: str, rows: list[dict | bytes], files: int = 2, name: str = "posts") -> Path:
    """Write rows (bytes: a line as it is) as JSONL files of a partition."""
    part = folder / f"dt={date}"
    part.mkdir(parents=True, exist_ok=True)
    each = -(-len(rows) // files)
    for i in range(files):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows[i * each : (i + 1) * each]]
        (part / f"{name}-{i}.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return part


def spoilt(rows: list[dict], seed: int, broken: float, doubled: float) -> tuple[list[dict | bytes], dict[str, int]]:
    """The rows with a share of broken lines and of duplicates (half word for word, half under another id) strewn in; and what is in it."""
    rng, out = random.Random(seed), [*rows]
    bad, twice = round(len(rows) * broken), round(len(rows) * doubled)
    for i in range(bad):
        out.append(b'{"id": "bad-%d", "text": ' % i if i % 2 else json.dumps({"id": f"bad-{i}"}).encode())
    for i, r in enumerate(rng.sample(rows, twice)):
        out.append(dict(r) if i % 2 else r | {"id": f"again-{i}"})
    rng.shuffle(out)
    return out, {"rows": len(out), "rejected": bad, "repeated": twice // 2, "copied": twice - twice // 2}


@contextlib.contextmanager
def quiet(step: str) -> Iterator:
    yield lambda *_: None
