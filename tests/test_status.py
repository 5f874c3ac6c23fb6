"""What `mulcot status` says of runs at every point of their lives, of nights, and of errors. In a folder and on S3."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from finished_nights import VERSION, finished
from rich.console import Console

from mulcot_ray.artifacts import Run, begin, need, parquet_bytes
from mulcot_ray.errors import ArtifactMissing
from mulcot_ray.labeling.gates import Verdict
from mulcot_ray.labeling.publishing import keep_verdicts, publish, rollback
from mulcot_ray.posts.importing import import_sample
from mulcot_ray.records import Prediction, to_table
from mulcot_ray.status import Status, last_errors, show, status, write_textfile
from mulcot_ray.storage import Store

GOOD = [Verdict(gate="reject_rate", ok=True, measured=0.01, limit=0.05, why="fine")]
BAD = [Verdict(gate="label_drift", ok=False, measured=0.3, limit=0.1, why="a third of the posts are in another class"), *GOOD]


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store(str(tmp_path / "root"))
    return Store(f"s3://{request.getfixturevalue('s3_bucket')}/status-{os.urandom(4).hex()}")


@pytest.fixture
def no_tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may be opened as Parquet."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a table was read")

    monkeypatch.setattr(Store, "parquet", never)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.__init__", never)
    monkeypatch.setattr("pyarrow.parquet.read_table", never)
    yield


def text_of(s: Status) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as found:
        console.print(show(s))
    return found.get()


def labelling(store: Store, posts: str, name: str) -> Run:
    run = begin(store, "predictions", name, {"stage": "label", "posts": need(store, "posts", posts).fingerprint}, {"rows_per_chunk": 16})
    assert isinstance(run, Run)
    return run


def test_an_empty_root(store: Store) -> None:
    s = status(store)
    assert (s.underway, s.finished, s.nights, s.errors) == ([], [], [], []) and "nothing under" in text_of(s)
    with pytest.raises(ArtifactMissing, match="nightly"):
        write_textfile(store, Path("never.prom"))


def test_a_run_at_work_interrupted_and_done(store: Store, request: pytest.FixtureRequest) -> None:
    import_sample(store, "mine", train=40, validation=4, test=6, seed=1)
    sizes = need(store, "posts", "mine").sizes
    planned = sum(-(-n // 16) for n in sizes.values())
    part = parquet_bytes(to_table(Prediction, []))
    run = labelling(store, "mine", "mine.student")
    with run:
        for i in range(2):
            store.create(f"{run.prefix}/part-00000-{16 * i:08d}.parquet", part)
        store.create(f"{run.prefix}/rejects/part-00000-00000000.abc.parquet", part)
        store.create(f"{run.prefix}/attempts/o/part-00000-00000032.1", b"")
        request.getfixturevalue("no_tables")
        (u,) = status(store).underway
        assert (u.kind, u.name, u.stage, u.state, u.step, u.done, u.planned) == (
            "predictions",
            "mine.student",
            "label",
            "at work",
            "chunks",
            2,
            planned,
        )
        assert u.holder is not None and u.holder.startswith(f"process {os.getpid()} on ") and u.seen is not None and u.seen < 30
    assert [(u.state, u.holder, u.seen, u.done) for u in status(store).underway] == [("interrupted", None, None, 2)]
    dead = {"owner": "x", "host": json.loads(run._lease())["host"], "pid": 2**22 - 1, "time": "2026-11-23T00:00:00+00:00"}
    store.write(f"{run.prefix}/lease.json", json.dumps(dead).encode())
    s = status(store)
    assert s.underway[0].state == "interrupted" and s.underway[0].seen is not None and s.underway[0].seen > 0
    text = text_of(s)
    assert "predictions/mine.student" in text and "interrupted" in text and f"chunks 2 of {planned}" in text
    assert [f.name for f in s.finished] == ["mine"] and s.finished[0].rows == sum(sizes.values()) and "posts/mine" in text
    assert json.loads(json.dumps(s.as_dict())) == s.as_dict()


def test_the_last_results_and_dates_are_listed(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for i in range(4):
        import_sample(store, f"p{i}", train=4, validation=0, test=0, seed=i)
        finished(store, f"2026-11-{20 + i}", 6, parts=1)
    s = status(store, nights=2, results=3)
    assert len(s.finished) == 3 and s.more == {"finished": 1, "dates": 2} and [n.date for n in s.nights] == ["2026-11-22", "2026-11-23"]
    text = text_of(s)
    assert "and 1 before" in text and "and 2 dates before" in text and "unpublished" in text and "not judged" in text
    assert status(store, nights=0, results=0).nights == []


def test_nights_by_what_became_of_them(store: Store) -> None:
    for date, revision in (("2026-11-20", 1), ("2026-11-20", 2), ("2026-11-21", 1), ("2026-11-22", 1), ("2026-11-23", 1), ("2026-11-23", 2)):
        m = finished(store, date, 6, revision=revision, parts=1)
        keep_verdicts(store, m.name, BAD if date in ("2026-11-21", "2026-11-22") else GOOD)
        if date != "2026-11-21":
            publish(store, m.name, force=date == "2026-11-22")
    rollback(store, "2026-11-23")
    s = status(store)
    found = {(n.date, n.revision): n for n in s.nights}
    assert {k: (n.state, n.forced) for k, n in found.items()} == {
        ("2026-11-20", 1): ("superseded", False), ("2026-11-20", 2): ("published", False), ("2026-11-21", 1): ("held", False),
        ("2026-11-22", 1): ("published", True), ("2026-11-23", 1): ("published", False), ("2026-11-23", 2): ("rolled back", False),
    }  # fmt: skip
    assert found["2026-11-21", 1].breached == ["label_drift"] and found["2026-11-20", 2].breached == [] and found["2026-11-21", 1].version == VERSION
    text = text_of(s)
    assert "held" in text and "Label drift" in text and "published by force" in text and "passed" in text


def test_a_night_says_how_far_it_is(store: Store, no_tables: None) -> None:
    plan = {"rows_per_chunk": 16, "buckets": 2, "units": [{}, {}, {}]}
    run = begin(store, "nights", f"2026-11-22.{VERSION}.1", {"stage": "night", "date": "2026-11-22"}, plan)
    assert isinstance(run, Run)

    def at(*keys: str) -> tuple[str, int | None, int | None]:
        for k in keys:
            store.create(f"{run.prefix}/work/{k}", b"x")
        (u,) = status(store).underway
        return u.step, u.done, u.planned

    with run:
        assert at() == ("intake, units", 0, 3)
        assert at("posts/part-00000-0000.parquet", "intake/00000.json", "intake/00001.json") == ("intake, units", 2, 3)
        assert at("intake/00002.json") == ("match, buckets", 0, 2)
        assert at("found/part-000.parquet", "todo/part-000-0000.parquet") == ("match, buckets", 1, 2)
        assert at("found/part-001.parquet") == ("score, chunks of the student", 0, None)
        assert at("student/part-000-0000-00000000.parquet", "student/rejects/part-000-0000-00000000.a.parquet", "student/attempts/o/x.1") == (
            "score, chunks of the student", 1, None,
        )  # fmt: skip
        assert at("todo-assistant/000.json", "assistant/part-000-0000-00000000.parquet") == ("score, chunks of the assistant", 1, None)
        assert at("scored.json", "assembled/000.json") == ("assemble, buckets", 1, 2)


def test_the_textfile_is_the_last_nights(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "text" / "mulcot.prom"
    path.parent.mkdir()
    for date in ("2026-11-21", "2026-11-22"):
        m = finished(store, date, 6, parts=1)
        store.write(f"nights/{m.name}/metrics.prom", f'mulcot_night_fit{{version="{date}"}} 1.0\n'.encode())
    begin(store, "nights", f"2026-11-23.{VERSION}.1", {"date": "2026-11-23"})  # not finished
    assert write_textfile(store, path) == f"2026-11-22.{VERSION}.1" and "2026-11-22" in path.read_text()
    assert os.listdir(path.parent) == ["mulcot.prom"]
    ended = need(store, "nights", f"2026-11-22.{VERSION}.1").finished
    assert ended.startswith(datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC).isoformat()[:19])


def test_the_last_errors_of_the_logs(tmp_path: Path) -> None:
    def line(level: str, at: int, message: str, **more: str) -> str:
        return json.dumps({"time": f"2026-11-23T02:00:{at:02d}.000Z", "level": level, "logger": "x", "message": message, **more})

    (tmp_path / "nightly.jsonl").write_text("\n".join([line("INFO", 1, "fine"), line("ERROR", 4, "[bold]Held[/]: a gate", run="nights/a"), '{"cut']))
    (tmp_path / "label.jsonl").write_text(
        "x" * 70_000 + "\n" + "\n".join([line("ERROR", 3, "EngineError: it died"), line("WARNING", 9, "no")]) + "\n"
    )
    (tmp_path / "label.log").write_text("ERROR not json\n")
    found = list(last_errors(tmp_path, 5))
    assert [(e["log"], e["message"]) for e in found] == [("label.jsonl", "EngineError: it died"), ("nightly.jsonl", "[bold]Held[/]: a gate")]
    assert [e["message"] for e in last_errors(tmp_path, 1)] == ["[bold]Held[/]: a gate"] and list(last_errors(tmp_path / "none", 5)) == []
    text = text_of(status(Store(str(tmp_path / "root")), logs=tmp_path))
    assert "2026-11-23 02:00:04  nightly.jsonl  nights/a  [bold]Held[/]: a gate" in text
