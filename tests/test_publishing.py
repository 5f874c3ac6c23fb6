"""Publishing: the pointer and those who move it at once, going back, the lists of files beside it, and readers that are not this program."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pytest
from finished_nights import VERSION, finished, rows

from mulcot_ray.artifacts import begin
from mulcot_ray.errors import ArtifactError, ArtifactMissing, Busy, ConfigError, Held
from mulcot_ray.labeling import publishing
from mulcot_ray.labeling.gates import Verdict
from mulcot_ray.labeling.publishing import (
    MOVES,
    current,
    earlier_nights,
    history,
    kept_verdicts,
    newest,
    parts_of,
    publish,
    read_pointer,
    repair,
    rollback,
    split_name,
    withdrawn,
)
from mulcot_ray.labeling.reading import athena_sql, dataset, duckdb_sql
from mulcot_ray.records import Labelled
from mulcot_ray.storage import Store

DATE = "2026-11-22"
GOOD = [
    Verdict(gate="reject_rate", ok=True, measured=0.01, limit=0.05, why="1 of 100."),
    Verdict(gate="canary_drop", ok=None, measured=None, limit=0.03, why="None."),
]
BAD = [*GOOD, Verdict(gate="label_drift", ok=False, measured=0.3, limit=0.1, why="Shares lie 30 % off.")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "root"))


def name(revision: int = 1, date: str = DATE, version: str = VERSION) -> str:
    return f"{date}.{version}.{revision}"


def listed(store: Store, date: str = DATE) -> list[str]:
    return (store.read(f"published/dt={date}/files.txt") or b"").decode().splitlines()


def agrees(store: Store, date: str = DATE) -> bool:
    """The list of files is of the night that the pointer names."""
    labels = current(store)[date].labels
    return bool(listed(store, date)) and all(f"/{labels}/part-" in line for line in listed(store, date))


# --- publish ---------------------------------------------------------------------------------------------------------


def test_a_night_is_published_once(store: Store) -> None:
    made = finished(store)
    entry, moved = publish(store, made.name, verdicts=GOOD)
    assert moved and (entry.night, entry.labels, entry.rows, entry.forced) == (made.name, f"labels/dt={DATE}/version={VERSION}.1", 30, False)
    assert current(store) == {DATE: entry} and re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", entry.published)
    before = store.read("published.json")
    assert (
        publish(store, made.name) == (entry, False)
        and publish(store, made.name, force=True) == (entry, False)
        and store.read("published.json") == before
    )
    (move,) = history(store, DATE)
    assert (move.what, move.before, move.to, move.date, move.forced) == ("publish", None, made.name, DATE, False) and re.fullmatch(r".+@.+", move.who)
    stored = json.loads(before or b"")
    assert set(stored) == {"nights", "moves"} and stored["nights"][DATE] == entry.model_dump() and stored["moves"][0]["from"] is None
    assert kept_verdicts(store, made.name) == GOOD
    assert listed(store) == [store.path(k) for k in parts_of(made)] and len(listed(store)) == 3 and all(Path(p).is_file() for p in listed(store))


def test_a_breached_gate_holds_a_night_back_unless_forced(store: Store) -> None:
    made = finished(store)
    with pytest.raises(Held, match="was not judged"):
        publish(store, made.name)
    with pytest.raises(Held, match=r"Label drift: Shares lie 30 % off\. Its labels are kept; `mulcot publish 2026-11-22 --force` publishes it"):
        publish(store, made.name, verdicts=BAD)
    assert current(store) == {} and listed(store) == [] and kept_verdicts(store, made.name) == BAD
    with pytest.raises(Held, match="Label drift"):
        publish(store, made.name)  # what was found stays found
    entry, moved = publish(store, made.name, force=True)
    assert moved and entry.forced and history(store, DATE)[0].forced and agrees(store) and kept_verdicts(store, made.name) == BAD


def test_an_older_revision_does_not_replace_a_newer_one(store: Store) -> None:
    for revision in (1, 2, 10):
        finished(store, revision=revision)
    publish(store, name(10), verdicts=GOOD)
    with pytest.raises(Held, match="revision 10 of the same version is"):
        publish(store, name(2), verdicts=GOOD)
    assert publish(store, name(2), force=True)[1] and current(store)[DATE].night == name(2)
    finished(store, version="other-version")
    assert publish(store, name(1, version="other-version"), verdicts=GOOD)[1]  # of another version: no older and no newer
    assert [m.to for m in history(store, DATE)] == [name(10), name(2), name(1, version="other-version")]


def test_only_what_is_finished_and_whole_is_published(store: Store) -> None:
    with pytest.raises(ArtifactMissing, match="mulcot nightly"):
        publish(store, name(), verdicts=GOOD)
    assert store.read(f"nights/{name()}/gates.json") is None
    made = finished(store)
    gone = parts_of(made)[1]
    data = store.read(gone) or b""
    for damage in (lambda: store.delete(gone), lambda: store.write(gone, data + b" ")):
        damage()
        with pytest.raises(ArtifactError, match=rf"{gone} is gone, or not as .* wrote it \(1 of 3 parts\)"):
            publish(store, made.name, verdicts=GOOD, force=True)
    store.write(gone, data)
    assert publish(store, made.name, verdicts=GOOD)[1]
    with pytest.raises(ConfigError, match="DATE.VERSION.REVISION"):
        split_name("2026-11-22.1")
    assert split_name("2026-11-22.a.b-1.12") == ("2026-11-22", "a.b-1", 12)


def test_a_night_without_labels(store: Store) -> None:
    finished(store, count=0)
    publish(store, name(), verdicts=GOOD)
    assert listed(store) == [] and store.read(f"published/dt={DATE}/files.txt") == b"" and repair(store) == []
    assert dataset(store).to_table().num_rows == 0 and dataset(store).schema.names[-2:] == ["dt", "version"]
    with pytest.raises(ArtifactMissing, match="no row is published"):
        duckdb_sql(store)


def test_a_damaged_pointer_is_said_and_not_replaced(store: Store) -> None:
    finished(store)
    for data, where in (
        (b"{", "all of it"),
        (b'{"nights": {"2026-11-22": {"night": "x"}}, "moves": []}', "nights.2026-11-22"),
        (b'{"nights": {}, "moves": [], "new": 1}', "new"),
    ):
        store.write("published.json", data)
        with pytest.raises(ArtifactError, match=rf"published.json is not a pointer of this version: {where}"):
            publish(store, name(), verdicts=GOOD)
        assert store.read("published.json") == data


# --- going back ------------------------------------------------------------------------------------------------------


def test_rollback_goes_back_step_by_step(store: Store) -> None:
    for revision in (1, 2, 3):
        finished(store, revision=revision)
        publish(store, name(revision), verdicts=GOOD, force=revision == 1)
    finished(store, "2026-11-21")
    publish(store, name(1, "2026-11-21"), verdicts=GOOD)
    assert rollback(store, DATE).night == name(2) and agrees(store)
    assert rollback(store, DATE) == current(store)[DATE] and current(store)[DATE].night == name(1) and agrees(store)
    assert current(store)[DATE].forced  # as it was when it was published
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"2026-11-22: nothing was published before {re.escape(name(1))}"):
            rollback(store, DATE)
    with pytest.raises(ArtifactMissing, match=r"nothing is published for '2026-11-20' under .* \(there: 2026-11-21, 2026-11-22\)"):
        rollback(store, "2026-11-20")
    assert [(m.what, m.before, m.to) for m in history(store, DATE)[3:]] == [("rollback", name(3), name(2)), ("rollback", name(2), name(1))]
    assert withdrawn(store) == {name(3), name(2)} and current(store)["2026-11-21"].night == name(1, "2026-11-21")


def test_what_was_rolled_back_is_published_again_only_by_force(store: Store) -> None:
    for revision in (1, 2):
        finished(store, revision=revision)
        publish(store, name(revision), verdicts=GOOD)
    rollback(store, DATE)
    with pytest.raises(Held, match=r"@.* rolled back from it at \d{4}"):
        publish(store, name(2), verdicts=GOOD)
    finished(store, revision=3)
    assert publish(store, name(3), verdicts=GOOD)[1] and rollback(store, DATE).night == name(1)
    assert publish(store, name(2), force=True)[1] and withdrawn(store) == {name(3)} and rollback(store, DATE).night == name(1)


def test_nothing_is_rolled_back_to_what_is_gone(store: Store) -> None:
    first = finished(store)
    publish(store, first.name, verdicts=GOOD)
    finished(store, revision=2)
    publish(store, name(2), verdicts=GOOD)
    store.delete(parts_of(first)[0])
    with pytest.raises(ArtifactError, match="is gone"):
        rollback(store, DATE)
    assert current(store)[DATE].night == name(2)


def test_old_moves_are_forgotten_and_say_so(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "MOVES", 3)
    for revision in range(1, 6):
        finished(store, revision=revision)
        publish(store, name(revision), verdicts=GOOD)
    assert [m.to for m in read_pointer(store)[0].moves] == [name(3), name(4), name(5)]
    assert [rollback(store, DATE).night for _ in range(2)] == [name(4), name(3)]  # moves now: to 5, back to 4, back to 3
    with pytest.raises(ArtifactError, match="as far as the last 3 moves tell"):
        rollback(store, DATE)
    assert MOVES == 200


# --- several at once -------------------------------------------------------------------------------------------------


def race(store: Store) -> None:
    """Two dates published by eight threads each, and moved to and fro: no move is lost, and every state is one that somebody made."""
    for date in (DATE, "2026-11-23"):
        for revision in (1, 2, 3, 4):
            finished(store, date, 3, revision=revision, parts=1)
    wall = threading.Barrier(8)

    def go(i: int) -> int:
        date = (DATE, "2026-11-23")[i % 2]
        wall.wait()
        return int(publish(store, name(i // 2 + 1, date), verdicts=GOOD, force=True)[1])

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(go, range(8))) == 8
    pointer, _ = read_pointer(store)
    assert len(pointer.moves) == 8 and len({m.id for m in pointer.moves}) == 8
    for date in (DATE, "2026-11-23"):
        line = history(store, date)
        assert [m.before for m in line] == [None, *(m.to for m in line[:-1])] and len({m.to for m in line}) == 4
        assert current(store)[date].night == line[-1].to and agrees(store, date)
    with ThreadPoolExecutor(3) as pool:
        assert len({e.night for e in pool.map(lambda _: rollback(store, DATE), range(3))}) == 3
    assert current(store)[DATE].night == history(store, DATE)[0].to and agrees(store) and repair(store) == []


def test_those_who_publish_at_once_do_not_undo_each_other(store: Store) -> None:
    race(store)


def test_the_same_on_s3(s3_bucket: str) -> None:
    store = Store(f"s3://{s3_bucket}/publishing/root")
    race(store)
    assert listed(store)[0] == f"s3://{s3_bucket}/publishing/root/{current(store)[DATE].labels}/part-000.parquet"
    assert f"LOCATION 's3://{s3_bucket}/publishing/root/published/'" in athena_sql(store)
    with duckdb.connect() as con:
        con.register("found", dataset(store, [DATE]))  # DuckDB reads through Arrow: its own S3 is an extension to download
        assert con.sql("SELECT count(*), count(DISTINCT post_id), min(dt)::VARCHAR FROM found").fetchall() == [(3, 3, DATE)]
    assert f"'s3://{s3_bucket}/publishing/root/labels/dt={DATE}/" in duckdb_sql(store)


class Lossy(Store):
    """The first answers to a swap are lost: the swap happened, and then (`after`) somebody else's."""

    lost = 1
    after: Any = None

    def swap(self, key: str, data: bytes, tag: str | None) -> bool:
        done = super().swap(key, data, tag)
        if self.lost and done:
            self.lost -= 1
            if self.after is not None:
                self.after()
            return False
        return done


def test_a_swap_whose_answer_was_lost_is_not_made_twice(store: Store) -> None:
    for revision in (1, 2, 3):
        finished(store, revision=revision)
    publish(store, name(1), verdicts=GOOD)
    lossy = Lossy(store.root)
    assert publish(lossy, name(2), verdicts=GOOD) == (current(store)[DATE], True) and lossy.lost == 0
    assert [m.to for m in history(store, DATE)] == [name(1), name(2)]
    back = Lossy(store.root)
    back.after = lambda: publish(store, name(3), verdicts=GOOD)
    assert rollback(back, DATE).night == name(3)  # went back to 1, and another one published 3 since: not one step further
    assert [(m.what, m.to) for m in history(store, DATE)[2:]] == [("rollback", name(1)), ("publish", name(3))] and agrees(store)


def test_it_gives_up_where_others_are_always_faster(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store)
    monkeypatch.setattr(Store, "swap", lambda *_: False)
    monkeypatch.setattr(publishing.time, "sleep", lambda _: None)
    with pytest.raises(Busy, match="moved by others 30 times"):
        publish(store, name(), verdicts=GOOD)
    assert listed(store) == []


# --- lists of files --------------------------------------------------------------------------------------------------


def test_lists_are_repaired_after_a_crash(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for date in (DATE, "2026-11-23", "2026-11-24"):
        for revision in (1, 2):
            finished(store, date, revision=revision)
        publish(store, name(1, date), verdicts=GOOD)
    assert repair(store) == []
    with monkeypatch.context() as m:  # killed after the pointer moved
        m.setattr(publishing, "_list_parts", lambda *_: None)
        publish(store, name(2), verdicts=GOOD)
    store.delete("published/dt=2026-11-23/files.txt")
    store.write("published/dt=2026-11-24/files.txt", b"")
    store.write("published/dt=2026-11-25/files.txt", b"/of/a/date/that/is/not/published\n")
    assert current(store)[DATE].night == name(2) and not agrees(store)
    assert repair(store) == [DATE, "2026-11-23", "2026-11-24", "2026-11-25"]
    assert agrees(store) and agrees(store, "2026-11-23") and agrees(store, "2026-11-24") and repair(store) == []
    assert store.read("published/dt=2026-11-25/files.txt") is None
    with monkeypatch.context() as m:
        m.setattr(publishing, "_list_parts", lambda *_: None)
        publish(store, name(2, "2026-11-23"), verdicts=GOOD)
    publish(store, name(2, "2026-11-23"))  # the same command again does what was left
    assert agrees(store, "2026-11-23")


def test_whoever_writes_a_list_last_writes_what_is_right(store: Store) -> None:
    """The pointer moves on while a list is being written."""
    for revision in (1, 2):
        finished(store, revision=revision)

    class Slow(Store):
        waiting = True

        def write(self, key: str, data: bytes) -> None:
            if key.startswith("published/") and self.waiting:
                self.waiting = False
                publish(store, name(2), verdicts=GOOD)
            super().write(key, data)

    publish(Slow(store.root), name(1), verdicts=GOOD)
    assert current(store)[DATE].night == name(2) and agrees(store) and repair(store) == []


# --- readers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def two_dates(store: Store) -> Store:
    """30 rows of each of two dates, each in revision 2; revision 1 is under the root too, and another night that was never published."""
    for date in (DATE, "2026-11-23"):
        for revision in (1, 2):
            finished(store, date, revision=revision)
            publish(store, name(revision, date), verdicts=GOOD)
    finished(store, "2026-11-24")
    return store


def wanted(date: str) -> list[tuple[str, str]]:
    return sorted((r.post_id, r.label.value) for r in rows(date, 30, 2))


def test_readers_see_exactly_what_is_published(two_dates: Store) -> None:
    found = dataset(two_dates)
    table = found.to_table()
    assert table.schema.names == [*Labelled.schema.names, "dt", "version"] and table.schema.field("dt").type == pa.date32()
    assert sorted(zip(table["post_id"].to_pylist(), table["label"].to_pylist(), strict=True)) == wanted(DATE) + wanted("2026-11-23")
    assert set(table["version"].to_pylist()) == {f"{VERSION}.2"}
    sql = duckdb_sql(two_dates)
    assert sorted(duckdb.sql(f"SELECT post_id, label FROM ({sql})").fetchall()) == wanted(DATE) + wanted("2026-11-23")
    assert duckdb.sql(f"SELECT dt::VARCHAR, version, count(*) FROM ({sql}) GROUP BY ALL ORDER BY 1").fetchall() == [
        (DATE, f"{VERSION}.2", 30), ("2026-11-23", f"{VERSION}.2", 30)]  # fmt: skip
    one = dataset(two_dates, ["2026-11-23"]).to_table(columns=["post_id", "label"])
    assert sorted(zip(*one.to_pydict().values(), strict=True)) == wanted("2026-11-23") and DATE not in duckdb_sql(two_dates, ["2026-11-23"])
    rollback(two_dates, DATE)
    assert sorted(found.to_table()["post_id"].to_pylist()) == sorted(table["post_id"].to_pylist())  # who read before reads on
    back = dataset(two_dates, [DATE]).to_table()
    assert set(back["version"].to_pylist()) == {f"{VERSION}.1"}
    assert sorted(zip(back["post_id"].to_pylist(), back["label"].to_pylist(), strict=True)) == sorted(
        (r.post_id, r.label.value) for r in rows(DATE, 30, 1)
    )


def test_readers_by_lists_of_files_see_the_same(two_dates: Store) -> None:
    """What Athena does: the list of a partition, and of its files all rows."""
    for date in (DATE, "2026-11-23"):
        files = ", ".join(f"'{p}'" for p in listed(two_dates, date))
        assert sorted(duckdb.sql(f"SELECT post_id, label FROM read_parquet([{files}])").fetchall()) == wanted(date)
    assert [p.parent.name for p in sorted(Path(two_dates.path("published")).glob("*/files.txt"))] == [f"dt={DATE}", "dt=2026-11-23"]


def test_the_table_for_athena_is_that_of_the_parts(two_dates: Store) -> None:
    sql = athena_sql(two_dates, "posts.labels")
    columns = re.findall(r"^  `(\w+)` (\w+)", sql, re.M)
    assert columns == [(f.name, {"string": "string", "double": "double"}[str(f.type)]) for f in Labelled.schema]
    assert sql.startswith("CREATE EXTERNAL TABLE posts.labels (") and f"LOCATION '{two_dates.path('published')}/'" in sql and f"'{DATE},NOW'" in sql
    assert "SymlinkTextInputFormat" in sql and "PARTITIONED BY (dt string)" in sql


def test_readers_are_told_what_is_not_there(store: Store, tmp_path: Path) -> None:
    for read in (dataset, duckdb_sql):
        with pytest.raises(ArtifactMissing, match="nothing is published under"):
            read(store)
    finished(store)
    publish(store, name(), verdicts=GOOD)
    for read in (dataset, duckdb_sql):
        with pytest.raises(ArtifactMissing, match=r"'2026-11-30'.*\(there: 2026-11-22\)"):
            read(store, ["2026-11-30"])
    odd = Store(str(tmp_path / "it's [odd]*?"))
    finished(odd)
    publish(odd, name(), verdicts=GOOD)
    assert len(duckdb.sql(duckdb_sql(odd)).fetchall()) == 30 and dataset(odd).count_rows() == 30


def test_nights_before_and_the_newest_of_a_date(store: Store) -> None:
    dates = [f"2026-11-{d}" for d in range(18, 23)]
    for date in dates:
        finished(store, date, 3)
        publish(store, name(1, date), verdicts=GOOD)
    finished(store, "2026-11-23", 3)  # finished, not published
    assert [m.stats["date"] for m in earlier_nights(store, "2026-11-22", 3)] == dates[1:4]
    assert [m.name for m in earlier_nights(store, "2026-11-30", 9)] == [name(1, d) for d in dates] and earlier_nights(store, dates[0], 3) == []
    store.delete(f"nights/{name(1, dates[1])}/manifest.json")
    assert [m.stats["date"] for m in earlier_nights(store, "2026-11-22", 3)] == dates[2:4]
    finished(store, revision=2, count=3)
    begin(store, "nights", name(3), {"date": DATE})
    assert store.folders("nights")[-2:] == [name(3), name(1, "2026-11-23")]  # begun, and not finished
    assert newest(store, DATE) == name(2)
    with pytest.raises(ArtifactMissing, match="no finished night of '2026-12-01'"):
        newest(store, "2026-12-01")
