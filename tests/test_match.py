"""The fates of a dump's rows: against a reference in plain Python, over two nights, and after every kind of interruption."""

import base64
import json
import os
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mulcot_ray.artifacts import Run, begin
from mulcot_ray.errors import ConservationError
from mulcot_ray.labeling import intake as taking
from mulcot_ray.labeling import match as module
from mulcot_ray.labeling.intake import intake, read_markers
from mulcot_ray.labeling.ledger import ENTRY, PAYLOAD, Ledger
from mulcot_ray.labeling.match import FOUND, match, matched
from mulcot_ray.posts.dumps import list_units
from mulcot_ray.recipe import load_runtime
from mulcot_ray.records import Post
from mulcot_ray.storage import Store

RUNTIME = load_runtime("laptop")


@pytest.fixture
def serial(monkeypatch):
    """Tasks one after the other in this process, through JSON as Ray would have them. The disk may take its time: no power fails here."""

    def tasks(_, kind, args, rows, cpus=1):
        for row in rows:
            yield json.loads(json.dumps(kind(*args)(json.loads(json.dumps(row)))))

    monkeypatch.setattr(module, "tasks", tasks)
    monkeypatch.setattr(taking, "tasks", tasks)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def small(monkeypatch):
    """Slices, row groups and parts of a few rows."""
    monkeypatch.setattr(taking, "SLICE_ROWS", 3)
    monkeypatch.setattr(taking, "GROUP_ROWS", 2)
    monkeypatch.setattr(module, "TODO_ROWS", 2)
    monkeypatch.setattr(module, "FOUND_ROWS", 2)


def post(post_id: str, text: str, aspect: str | None = None, image: str | None = None) -> dict[str, str]:
    row = {"id": post_id, "text": text, "aspect": aspect, "image": image}
    return {k: v for k, v in row.items() if v is not None}


def taken(store: Store, folder: Path, name: str, rows: list[dict[str, str]], buckets: int, runtime, unit_bytes: int = 200, files: int = 1) -> Run:
    """A night after its intake."""
    folder.mkdir()
    per = -(-len(rows) // files)
    for i in range(files):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[i * per : (i + 1) * per]) or "\n")
    run = begin(store, "nights", name, {"rows": name}, {})
    intake(run, str(folder), None, list_units(str(folder), unit_bytes), buckets, runtime, lambda *_: None)
    return run


def found_rows(run: Run, buckets: int) -> list[dict]:
    """All rows, in the order of the dump; each bucket's in order by itself."""
    rows = []
    for b in range(buckets):
        t = pq.read_table(run.store.path(f"{run.prefix}/work/found/part-{b:03d}.parquet"))
        assert t.schema.remove_metadata() == FOUND
        some = t.to_pylist()
        assert some == sorted(some, key=order_of)
        assert all(r["key"][0] * buckets >> 8 == b for r in some)
        rows += some
    return sorted(rows, key=order_of)


def order_of(row: dict) -> tuple[int, int, int]:
    return row["unit"], row["slice"], row["row"]


def todo_rows(run: Run, buckets: int) -> list[dict]:
    rows = []
    for done in matched(run, buckets):
        for name, n in done["todo_parts"]:
            t = pq.read_table(run.store.path(f"{run.prefix}/work/todo/{name}"))
            assert t.schema == Post.schema and len(t) == n and name.startswith(f"part-{done['bucket']:03d}-")
            rows += t.to_pylist()
    listed = {n for done in matched(run, buckets) for n, _ in done["todo_parts"]}
    assert listed == set(run.store.files(f"{run.prefix}/work/todo"))
    return rows


def reference(rows: list[dict[str, str]], known: set[tuple]) -> list[tuple[str, str | None]]:
    """Fate and `of` of each row, in the words of match.py's docstring."""
    fates: list[tuple[str, str | None]] = []
    first: dict[tuple, tuple] = {}  # (id, aspect) -> content
    asked: dict[tuple, str] = {}  # content -> id of who is asked
    for r in rows:
        name, content = (r["id"], r.get("aspect")), content_of(r)
        if name in first:
            fates.append(("repeated" if first[name] == content else "rejected", r["id"]))
            continue
        first[name] = content
        if content in known:
            fates.append(("carried", None))
        elif content in asked:
            fates.append(("copied", asked[content]))
        else:
            asked[content] = r["id"]
            fates.append(("scored", None))
    return fates


def content_of(r: dict[str, str]) -> tuple:
    return r["text"], r.get("aspect"), r.get("image")


def answer(ledger: Ledger, run: Run, night: str, buckets: int) -> None:
    """The ledger after everything that was to be asked has been: the label is the post's text."""
    files = []
    for b in range(buckets):
        rows = [r for r in todo_rows(run, buckets) if bytes.fromhex(r["post_id"])[0] * buckets >> 8 == b]
        entries = [{**dict.fromkeys(ENTRY.names), "key": bytes.fromhex(r["post_id"]), "label": r["text"], "positive": 0.5, "answered_by": "student", "scored_on": night} for r in rows]  # fmt: skip
        files.append(ledger.put(night, b, pa.Table.from_pylist(entries, schema=ENTRY)))
    ledger.add(night, [f for f in files if f])


def check(run: Run, buckets: int, rows: list[dict[str, str]], known: dict[tuple, str], tally: Counter) -> None:
    """Everything that the night has written, against the reference."""
    expected = reference(rows, set(known))
    found = found_rows(run, buckets)
    assert [(r["fate"], r["of"]) for r in found] == expected
    assert [(r["post_id"], r["aspect"], r["has_image"]) for r in found] == [(r["id"], r.get("aspect"), "image" in r) for r in rows]
    for r, row in zip(found, rows, strict=True):
        payload = {n: r[n] for n in PAYLOAD.names}
        if r["fate"] == "carried":
            assert payload == {**dict.fromkeys(PAYLOAD.names), "label": row["text"], "positive": 0.5, "answered_by": "student", "scored_on": known[content_of(row)]}  # fmt: skip
        else:
            assert payload == dict.fromkeys(PAYLOAD.names)
    assert tally == Counter(f for f, _ in expected) and tally.total() == len(rows)
    counts = matched(run, buckets)
    for done in counts:
        of_bucket = [r for r in found if r["key"][0] * buckets >> 8 == done["bucket"]]
        assert done["rows"] == len(of_bucket) == sum(done["fates"].values())
        assert Counter(done["fates"]) == Counter(r["fate"] for r in of_bucket)
        assert done["images"] == sum(r["has_image"] for r in of_bucket)
    todo = {t["post_id"]: t for t in todo_rows(run, buckets)}
    assert set(todo) == {r["key"].hex() for r in found if r["fate"] == "scored"}
    assert len(todo) == tally["scored"] == sum(n for done in counts for _, n in done["todo_parts"])
    for r, row in zip(found, rows, strict=True):
        if r["fate"] == "scored":
            image = row.get("image")
            assert todo[r["key"].hex()] == {
                "post_id": r["key"].hex(), "source_id": r["key"].hex(), "text": row["text"], "aspect": row.get("aspect"), "image_ref": image,
                "image_bytes": None, "image_sha256": None, "label": None, "split": "unlabeled", "meta": [],
            }  # fmt: skip


dump = st.lists(
    st.builds(
        post,
        st.sampled_from(["1", "2", "007", "é"]),
        st.sampled_from(["a", "b", "c", "d"]),
        st.sampled_from([None, "x"]),
        st.sampled_from([None, "s3://p/p"]),
    ),
    min_size=4,
    max_size=25,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(  # copies of what is carried
    nights=[[post("1", "a"), post("2", "a")], [post("3", "a"), post("4", "a"), post("4", "a"), post("3", "b")]], buckets=2, unit_bytes=60
)
@given(nights=st.lists(dump, min_size=1, max_size=3), buckets=st.sampled_from([1, 2, 16]), unit_bytes=st.sampled_from([60, 400, 10_000]))
def test_fates_equal_the_reference(nights, buckets, unit_bytes, tmp_path_factory, serial, small):
    here = tmp_path_factory.mktemp("n")
    store, known = Store(str(here / "root")), dict[tuple, str]()
    ledger = Ledger(store, "v")
    for i, rows in enumerate(nights):
        night = f"2026-11-{i + 10}"
        run = taken(store, here / night, night, rows, buckets, RUNTIME, unit_bytes)
        tally = match(run, buckets, read_markers(run), ledger, RUNTIME, lambda *_: None)
        check(run, buckets, rows, known, tally)
        answer(ledger, run, night, buckets)
        known |= {content_of(r): night for r, (fate, _) in zip(rows, reference(rows, set(known)), strict=True) if fate == "scored"}
    assert ledger.entries() == len(known)


def corpus(n: int) -> list[dict[str, str]]:
    """Rows with copies, repetitions and clashes of rows that lie far before them, in other units, slices and buckets."""
    rows = []
    for i in range(n):
        r = post(str(i), f"text {i % (n - n // 4)}", "x" if i % 3 else None, f"s3://p/{i % 5}.jpg" if i % 2 else None)
        if i % 10 == 7 and i > 20:
            r = rows[i - 20]  # repeated
        if i % 10 == 8 and i > 20:
            r = {**rows[i // 2], "text": f"edited {i}"}  # clash
        if i % 10 == 9 and i > 20:
            r = {**rows[i // 3], "id": f"copy {i}"}  # copied
        rows.append(r)
    return rows


@pytest.mark.ray
def test_two_nights_on_ray(tmp_path, ray_session, runtime, monkeypatch):
    store, buckets = Store(str(tmp_path / "root")), 4
    ledger, rows = Ledger(store, "v"), corpus(400)
    run = taken(store, tmp_path / "one", "one", rows, buckets, runtime, unit_bytes=8000, files=2)
    assert len(read_markers(run)) > 3
    seen: list[tuple[int, int, int]] = []
    with run:
        tally = match(run, buckets, read_markers(run), ledger, runtime, lambda *p: seen.append(p))
    check(run, buckets, rows, {}, tally)
    assert min(tally[f] for f in ("scored", "copied", "repeated", "rejected")) > 10 and tally["carried"] == 0
    assert seen[0] == (0, 400, 0) and seen[-1] == (400, 400, tally["rejected"]) and seen == sorted(seen)
    answer(ledger, run, "one", buckets)

    again = match(run, buckets, read_markers(run), ledger, runtime, lambda *p: seen.append(p))
    assert again == tally and seen[-1] == (400, 400, tally["rejected"])

    known = {content_of(r): "one" for r, (fate, _) in zip(rows, reference(rows, set()), strict=True) if fate == "scored"}
    second = [*rows[:300], *(post(f"new {i}", f"new {i // 2}") for i in range(8)), {**rows[0], "text": "edited since"}]
    run = taken(store, tmp_path / "two", "two", second, buckets, runtime, unit_bytes=8000)
    tally = match(run, buckets, read_markers(run), ledger, runtime, lambda *_: None)
    check(run, buckets, second, known, tally)
    assert tally["scored"] == 4 and tally["copied"] == 4 and tally["carried"] > 200


def test_what_is_lost_is_made_again_the_same(tmp_path, serial, small):
    """A bucket whose found part is gone (as before its commit) comes out the same, whatever the ledger has learnt meanwhile."""
    store, buckets = Store(str(tmp_path / "root")), 4
    ledger, rows = Ledger(store, "v"), corpus(120)
    run = taken(store, tmp_path / "dump", "night", rows, buckets, RUNTIME, unit_bytes=1500)
    do = partial(match, run, buckets, read_markers(run), ledger, RUNTIME, lambda *_: None)
    tally = do()
    check(run, buckets, rows, {}, tally)
    written = contents(run)
    answer(ledger, run, "another night", buckets)
    for lost in ("found/part-002", "found/", "todo/part-001-0001", "clashes/part-000"):
        gone = [f for f in written if lost in f]
        assert gone
        if "todo" in lost:
            gone.append("found/part-001.parquet")
        for f in gone:
            store.delete(f"{run.prefix}/work/{f}")
        assert do() == tally
        assert contents(run) == written
    check(run, buckets, rows, {}, tally)


def contents(run: Run) -> dict[str, bytes]:
    return {f: run.store.read(f"{run.prefix}/work/{f}") for f in run.store.files(f"{run.prefix}/work") if f.startswith(("found", "todo", "clashes"))}


def test_what_was_done_is_not_done_again(tmp_path, serial, small, monkeypatch):
    store = Store(str(tmp_path / "root"))
    run = taken(store, tmp_path / "dump", "night", corpus(60), 4, RUNTIME)
    do = partial(match, run, 4, read_markers(run), Ledger(store, "v"), RUNTIME, lambda *_: None)
    tally = do()
    store.delete(f"{run.prefix}/work/found/part-003.parquet")
    done: list[int] = []
    real = module.FindFates.__call__
    monkeypatch.setattr(module.FindFates, "__call__", lambda self, task: done.append(task["bucket"]) or real(self, task))
    monkeypatch.setattr(module.FindClashes, "__call__", None)
    assert do() == tally and done == [3]


def test_parts_to_ask_are_cut_by_rows_and_bytes(tmp_path, serial, monkeypatch):
    monkeypatch.setattr(module, "TODO_ROWS", 5)
    monkeypatch.setattr(module, "TODO_BYTES", 1000)
    monkeypatch.setattr(module, "GROUP_BYTES", 500)
    sizes = [10] * 12 + [400, 400, 400, 3000, 7, 987, 10, 999, 1]
    rows = [post(str(i), f"{i:03d}") | {"image_base64": base64.b64encode(bytes([i]) * n).decode()} for i, n in enumerate(sizes)]
    store = Store(str(tmp_path / "root"))
    run = taken(store, tmp_path / "dump", "night", rows, 1, RUNTIME, unit_bytes=10**6)
    tally = match(run, 1, read_markers(run), Ledger(store, "v"), RUNTIME, lambda *_: None)
    assert tally["scored"] == tally.total() == len(sizes)
    todo = todo_rows(run, 1)
    assert [t["image_bytes"] for t in todo] == [bytes([i]) * n for i, n in enumerate(sizes)]
    assert [t["text"] for t in todo] == [f"{i:03d}" for i in range(len(sizes))]
    assert all(len(t["image_sha256"]) == 64 for t in todo)
    (done,) = matched(run, 1)
    # Bytes are those of text and picture: 3 of text each.
    assert [n for _, n in done["todo_parts"]] == [5, 5, 4, 1, 1, 2, 1, 1, 1]
    assert done["images"] == len(sizes)


def test_a_row_that_is_missing_is_noticed(tmp_path, serial, small):
    store = Store(str(tmp_path / "root"))
    run = taken(store, tmp_path / "dump", "night", corpus(30), 2, RUNTIME)
    markers = read_markers(run)
    markers[0]["slices"][0]["rows"] += 1
    with pytest.raises(ConservationError, match="31 ids taken in, 30 matched"):
        match(run, 2, markers, Ledger(store, "v"), RUNTIME, lambda *_: None)
    markers[0]["slices"][0]["rows"] -= 1
    del markers[0]["slices"][0]["groups"]["1"]
    with pytest.raises(ConservationError):
        match(run, 2, markers, Ledger(store, "v"), RUNTIME, lambda *_: None)


def test_a_dump_without_good_rows(tmp_path, serial):
    store = Store(str(tmp_path / "root"))
    run = taken(store, tmp_path / "dump", "night", [{"id": "1"}], 2, RUNTIME)
    assert match(run, 2, read_markers(run), Ledger(store, "v"), RUNTIME, lambda *_: None) == Counter()
    assert found_rows(run, 2) == [] and todo_rows(run, 2) == []


def test_on_s3(tmp_path, serial, small, s3_bucket):
    store, buckets, rows = Store(f"s3://{s3_bucket}/match"), 2, corpus(40)
    ledger = Ledger(store, "v")
    run = taken(store, tmp_path / "one", "one", rows, buckets, RUNTIME, unit_bytes=3000)
    tally = match(run, buckets, read_markers(run), ledger, RUNTIME, lambda *_: None)
    assert tally == Counter(f for f, _ in reference(rows, set()))
    keys = [
        {"key": r["key"], "label": "neutral"}
        for b in range(buckets)
        for r in pq.read_table(store.path(f"{run.prefix}/work/found/part-{b:03d}.parquet"), filesystem=store.fs).to_pylist()
        if r["fate"] == "scored"
    ]
    line = ledger.put("one", 0, pa.Table.from_pylist(keys, schema=ENTRY))
    ledger.add("one", [line])
    run = taken(store, tmp_path / "two", "two", [*rows, post("new", "new")], buckets, RUNTIME, unit_bytes=3000)
    tally = match(run, buckets, read_markers(run), ledger, RUNTIME, lambda *_: None)
    assert tally["scored"] == 1 and tally["carried"] == 40 - tally["repeated"] - tally["rejected"]
