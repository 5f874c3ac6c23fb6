"""The command line as a new user meets it: help that teaches, errors in one line, exit codes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mulcot_ray.cli import app

COMMANDS = (
    "demo", "import", "duplicates", "teach", "assistant", "augment", "student", "label", "serve",
    "plan", "doctor", "evaluate", "compare", "faithfulness", "sweep",
)  # fmt: skip
ROOT = Path(__file__).parents[1]


def mulcot(*words: str, cwd: Path, program: tuple[str, ...] = ("-m", "mulcot_ray.cli")) -> tuple[int, str]:
    done = subprocess.run([sys.executable, *program, *words], cwd=cwd, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    assert result.exit_code == 0 and "--root" in text and "--runtime" in text or command == "import"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("import", "nope.tsv", "--format", "tombert", "--name", "a"), "InputError: input nope.tsv does not exist"),
        (("import", "empty.jsonl", "--format", "jsonl", "--name", "a"), "InputError: empty.jsonl holds no rows"),
        (("import", "empty.jsonl", "--format", "jsonl", "--name", "../a"), "ConfigError: name '../a'"),
        (("import", "empty.jsonl", "--format", "jsonl", "--name", "a", "--ratios", "8:1"), "ConfigError: --ratios '8:1'"),
        (("label", "--posts", "nope", "--model", "builtin:student"), "ArtifactMissing: no posts 'nope'"),
        (("teach", "--posts", "x", "--recipe", "nope"), "ConfigError: no recipe 'nope': neither a file nor one of paper, tiny"),
        (("teach", "--posts", "x", "--runtime", "nope"), "ConfigError: no runtime 'nope'"),
        (("student", "--posts", "x"), "ConfigError: give --rationales and --assistant, or --labels-only"),
        (("evaluate", "--root", "r"), "ConfigError: give --answers NAME, or --model NAME with --posts NAME"),
        (("serve", "--model", "builtin:nope"), "builtin:student"),
        (("teach", "--posts", "x", "--root", "http://x"), "ConfigError: --root 'http://x'"),
    ],
)
def test_errors_are_one_line_without_a_traceback(tmp_path, words, message):
    (tmp_path / "empty.jsonl").touch()
    code, out = mulcot(*words, cwd=tmp_path)
    assert code == 1 and message in out and "Traceback" not in out


def test_a_job_is_the_command(tmp_path):
    code, out = mulcot("--posts", "nope", "--model", "builtin:student", cwd=tmp_path, program=(str(ROOT / "jobs" / "label.py"),))
    assert code == 1 and "ArtifactMissing: no posts 'nope'" in out


def test_dry_run_starts_nothing(tmp_path, sample_store):
    code, out = mulcot("teach", "--posts", "sample", "--root", sample_store.base, "--dry-run", cwd=tmp_path)
    assert code == 0 and "builtin:teacher on posts/sample, train" in out and "Analyse the text and the image" in out and "Nothing was started" in out
    assert not (Path(sample_store.base) / "rationales" / "sample.teacher").exists()
