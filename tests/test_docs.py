"""What README and docs say can be typed: `sh` blocks are run, in order, in an empty folder; every other `mulcot …` line is at least understood."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from mulcot_ray.errors import ConfigError
from mulcot_ray.labeling.version import NightSettings
from mulcot_ray.recipe import load_recipe, load_runtime, load_settings

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text()) if kind == language]


def lines(page: Path) -> list[str]:
    """Lines of all blocks, fenced or indented, that begin with `mulcot`, and `code` in the text that does; comments and pipes cut off."""
    text = page.read_text()
    found = [line.strip() for line in text.splitlines() if re.match(r"\s*mulcot [a-z]", line)]
    found += re.findall(r"`(mulcot [a-z][^`]*)`", text)
    return [re.split(r"\s+#|\s+\||\s+&&|\s+>|\s+…$", line)[0] for line in found]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.stem)
@pytest.mark.engine
def test_commands_run(page, tmp_path):
    script = "set -euo pipefail\n" + "\n".join(blocks(page, "sh"))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "MULCOT_", "RAY_"))}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=570)
    assert done.returncode == 0, f"{page.name} ended with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def words(line: str) -> list[str]:
    """A command line's words; what stands for a value (NAME, M, DATE) will do for one."""
    return [w.replace("DATE", "2026-11-22") for w in shlex.split(line)[1:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_are_understood(page):
    """Every option that is written down is there, and takes what is written behind it."""
    from mulcot_ray.cli import app

    program = typer.main.get_command(app)
    for line in lines(page):
        name, *rest = words(line)
        assert name in program.commands, f"{page.name}: {line!r}: there is no command {name!r}"
        if any(w.startswith("-") for w in rest):
            try:
                program.commands[name].make_context(name, rest)
            except Exception as e:
                assert type(e).__name__ == "MissingParameter", f"{page.name}: {line!r}: {e}"  # what is needed beside it may stand elsewhere


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_settings_are_valid(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i, text in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{i}.yaml"
        file.write_text(text)
        assert isinstance(yaml.safe_load(text), dict)
        faults = []
        for load in (lambda f: load_settings(NightSettings, f, "nights"), load_runtime, load_recipe):
            try:
                load(str(file))
                break
            except ConfigError as e:
                faults.append(str(e))
        else:
            pytest.fail(f"{page.name}, block {i} is neither a night's settings nor a runtime nor a recipe: {faults}")


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
