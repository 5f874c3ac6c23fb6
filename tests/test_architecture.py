"""The layering that README and STYLE promise, held by reading the imports of every module."""

import ast
from pathlib import Path

import pytest

import mulcot_ray

ROOT = Path(mulcot_ray.__file__).parent
# Each layer may import itself and those above it in this list. Stages import no other stage.
LAYERS = [
    {"errors", "records"},
    {"prompts", "recipe", "storage", "artifacts", "calibration", "cluster", "console", "html", "observing", "parts", "prices"},
    {"posts", "engines"},
    {"teaching", "training", "evaluation", "labeling", "serving"},
    {"cli", "demo", "plan", "plan_table", "doctor", "machines", "sweep", "lineage", "replay", "submit", "following", "status", "run_page", "spot"},
]
STAGES = LAYERS[3]
HEAVY = {
    "torch": {"training", "engines/inputs.py", "engines/parity.py", "machines.py"},
    "transformers": {"training", "evaluation", "engines/parity.py", "engines/preview.py"},
    "peft": {"training"},
    "vllm": {"engines/vllm.py", "engines/inputs.py"},
    "sentence_transformers": {"evaluation"},
}


def modules() -> list[Path]:
    return sorted(p for p in ROOT.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names imported anywhere in a module, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def layer(name: str) -> int:
    return next(i for i, members in enumerate(LAYERS) if name in members)


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    mine = package(path)
    if mine == "__init__":
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "mulcot_ray" and len(parts) > 1:
            assert layer(parts[1]) <= layer(mine), f"{path.name} imports {name} from a higher layer"
            if mine in STAGES and parts[1] in STAGES:
                assert parts[1] == mine, f"stage {mine} imports stage {parts[1]}"
        for heavy, where in HEAVY.items():
            if parts[0] == heavy:
                assert any(str(path.relative_to(ROOT)).startswith(w) for w in where), f"{path.relative_to(ROOT)} imports {heavy}"


def test_core_imports_nothing_heavy_and_does_no_work() -> None:
    """`mulcot --help` and every import of the core stay light: no torch, vllm, ray or transformers."""
    import subprocess
    import sys

    code = "import sys, mulcot_ray.cli, mulcot_ray.engines.base, mulcot_ray.labeling.label; print([m for m in ('torch','vllm','ray','transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_jobs_are_thin_and_complete() -> None:
    jobs = {p.stem: p.read_text() for p in (ROOT.parent / "jobs").glob("*.py")}
    assert set(jobs) == {
        "import",
        "duplicates",
        "teach",
        "assistant",
        "augment",
        "student",
        "soften",
        "label",
        "nightly",
        "replay",
        "evaluate",
        "compare",
        "faithfulness",
        "sweep",
        "serve",
    }
    for name, text in jobs.items():
        assert f'run_job("{name}")' in text and len(text.splitlines()) <= 8
