"""The commands of the night, as a person types them."""

import datetime
import re

import pytest
from nights import dump, posts

from mulcot_ray.cli.nights import parse_deadline
from mulcot_ray.errors import ConfigError


def run(capsys, *words) -> tuple[int, str]:
    from mulcot_ray.cli import main

    with pytest.raises(SystemExit) as end:
        main([str(w) for w in words])
    said = capsys.readouterr()
    return end.value.code or 0, re.sub(r"\s+", " ", said.out + said.err)


def test_deadlines():
    noon = datetime.datetime(2026, 11, 22, 12, 0).timestamp()
    assert parse_deadline("+90m", noon) == noon + 5400 and parse_deadline("+2h", noon) == noon + 7200
    assert parse_deadline("18:00", noon) == noon + 6 * 3600 and parse_deadline("06:00", noon) == noon + 18 * 3600
    assert parse_deadline("2026-11-22T13:00", noon) == noon + 3600
    with pytest.raises(ConfigError, match="has passed"):
        parse_deadline("2026-11-22T11:00", noon)
    for bad in ("noon", "25:00", "+2d", ""):
        with pytest.raises(ConfigError, match="is wanted"):
            parse_deadline(bad, noon)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nightly", "--input", "nowhere", "--model", "builtin:student"], "nowhere"),
        (["nightly", "--input", "{dump}", "--model", "nope"], "no models 'nope'"),
        (["nightly", "--input", "{dump}", "--model", "builtin:student", "--date", "22.11.2026"], "YYYY-MM-DD"),
        (["nightly", "--input", "{dump}", "--model", "builtin:student", "--settings", "{bad}"], "gates.reject_rate"),
        (["label", "--input", "{dump}", "--model", "builtin:student"], "say with --date"),
        (["label", "--model", "builtin:student"], "either --posts"),
        (["publish", "2026-11-22"], "no finished night"),
        (["rollback", "2026-11-22"], "2026-11-22"),
        (["lineage", "p-1"], "no label of post 'p-1'"),
        (["replay", "2026-11-22", "--input", "{dump}", "--old", "builtin:student", "--new", "builtin:student"], "the same version"),
        (["replay", "2020-01-01", "--input", "{dump}", "--old", "builtin:student", "--new", "builtin:assistant"], "no partition dt=2020-01-01"),
        (["published", "--sql"], "published"),
    ],
)
def test_errors_say_what_would_be_right(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    dump(tmp_path / "in", "2026-11-22", posts(3, 1))
    (tmp_path / "bad.yaml").write_text("base: default\ngates: {reject_rate: 1}\n")
    places = {"dump": str(tmp_path / "in"), "bad": str(tmp_path / "bad.yaml")}
    code, text = run(capsys, *(w.format(**places) for w in words), "--root", tmp_path / "root")
    assert code == 1 and said in text and "Traceback" not in text


def test_a_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, capsys):
    dump(tmp_path / "in", "2026-11-21", posts(3, 1))
    dump(tmp_path / "in", "2026-11-22", posts(4, 2))
    code, text = run(capsys, "nightly", "--input", tmp_path / "in", "--model", "builtin:student", "--root", tmp_path / "root", "--dry-run")
    assert code == 0 and text.count(": new") == 2 and "Nothing was started or written" in text
    assert not (tmp_path / "root" / "nights").exists()
