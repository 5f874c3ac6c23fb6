"""The page of any finished result: what went in, what came out, what was refused, how long it took, what it was made of.

Stages with something to show have a page of their own (cards of rationales, evaluations, nights); this one is for all, from the manifest alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mulcot_ray.artifacts import Manifest
from mulcot_ray.evaluation.plots import curve
from mulcot_ray.html import environment, words
from mulcot_ray.storage import Store

FILE = "run.html"
OWN_PAGES = {"rationales": "card.html", "evaluations": "report.html", "nights": "report.html"}
FILES = 40  # that are named; of more the rest is counted
MADE = {"models": "optimizer steps", "duplicates": "duplicates", "evaluations": "posts"}  # what "rows" are, where they are not rows of a table


def write_page(store: Store, manifest: Manifest) -> str:
    """Write run.html beside the manifest, of which it is no part; returns its key."""
    key = f"{manifest.kind}/{manifest.name}/{FILE}"
    history = store.read(f"models/{manifest.name}/history.json") if manifest.kind == "models" else None
    store.write(key, page(manifest, json.loads(history) if history else None).encode())
    return key


def page(manifest: Manifest, history: Mapping[str, Any] | None = None) -> str:
    """HTML. `history`: of a training (history.json), for its curves."""
    files = sorted(manifest.files.items(), key=lambda x: -x[1]["bytes"])
    return environment(Path(__file__).parent).get_template("run.html.j2").render(
        m=manifest, rows=MADE.get(manifest.kind, "rows out"), own=OWN_PAGES.get(manifest.kind), facts=list(_facts(manifest.stats)), files=files[:FILES],
        more=max(0, len(files) - FILES), size=sum(f["bytes"] for f in manifest.files.values()), curve=curve(manifest.name, history) if history and history.get("steps") else None,
        identity=json.dumps(manifest.identity, indent=1, ensure_ascii=False),
    )  # fmt: skip


def _facts(stats: Mapping[str, Any]) -> Any:
    """(name, value) of what the stage counted; groups as one value."""
    for key, value in stats.items():
        if isinstance(value, Mapping):
            shown = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, Mapping | list))
        elif isinstance(value, list):
            shown = f"{len(value)} entries"
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
        if shown:
            yield words(key), shown
