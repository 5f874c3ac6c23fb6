"""The ledger: look-ups, compaction, and who may do what at the same time."""

import itertools
import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulcot_ray.errors import ArtifactError, ConservationError
from mulcot_ray.labeling import ledger as module
from mulcot_ray.labeling.ledger import ENTRY, PAYLOAD, Ledger, as_bytes, as_keys
from mulcot_ray.recipe import load_runtime
from mulcot_ray.storage import Store

RUNTIME = load_runtime("laptop")
EDGES = [
    bytes(16),
    bytes(15) + b"\1",
    b"\1" + bytes(15),
    b"\xff" * 16,
    b"\x80" + bytes(15),
    b"\x7f" + b"\xff" * 15,
    b"ab" + bytes(14),
    b"ab\0c" + bytes(12),
]


@pytest.fixture
def serial(monkeypatch):
    """Tasks one after the other in this process, through JSON as Ray would have them. The disk may take its time: no power fails here."""

    def tasks(_, kind, args, rows, cpus=1):
        for row in rows:
            yield json.loads(json.dumps(kind(*args)(json.loads(json.dumps(row)))))

    monkeypatch.setattr(module, "tasks", tasks)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def entries(answers: dict[bytes, str]) -> pa.Table:
    rows = [{"key": k, "label": v, "positive": 0.25, "negative": 0.5, "neutral": 0.25, "label_mass": 0.9, "answered_by": "student", "scored_on": "2026-11-22"} for k, v in answers.items()]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=ENTRY)


def add(ledger: Ledger, name: str, answers: dict[bytes, str], buckets: int = 1) -> None:
    """A generation as a night writes it."""
    files = []
    for b in range(buckets):
        some = {k: v for k, v in answers.items() if k[0] * buckets >> 8 == b}
        files.append(ledger.put(name, b, entries(some)))
    ledger.add(name, [f for f in files if f])


def look(ledger: Ledger, keys, view=None) -> dict[bytes, str]:
    found = ledger.lookup(pa.array(sorted(set(keys)), pa.binary(16)), view)
    assert found.schema == ENTRY
    assert found["key"].to_pylist() == sorted(found["key"].to_pylist())
    return dict(zip(found["key"].to_pylist(), found["label"].to_pylist(), strict=True))


def random_keys(n: int, seed: int | str = 0) -> list[bytes]:
    rng = random.Random(seed)
    return [rng.randbytes(16) for _ in range(n)]


key = st.sampled_from(EDGES) | st.binary(min_size=1, max_size=2).map(lambda b: b.ljust(16, b"\0")) | st.binary(min_size=16, max_size=16)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    nights=st.lists(st.sets(key, max_size=30), max_size=6), asked=st.sets(key, max_size=40), buckets=st.sampled_from([1, 4]),
    group=st.sampled_from([1, 3, 1000]), part_bytes=st.sampled_from([200, 5000]),
)  # fmt: skip
def test_lookups_equal_a_dict(nights, asked, buckets, group, part_bytes, tmp_path_factory, serial):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "GROUP", group)
        patch.setattr(module, "READ", 2)
        patch.setattr(module, "PART_BYTES", part_bytes)
        patch.setattr(module, "MOST_PARTS", 8)
        ledger, truth = Ledger(Store(str(tmp_path_factory.mktemp("l"))), "v"), dict[bytes, str]()
        for i, night in enumerate(nights):
            add(ledger, f"night-{i}", {k: f"label {i}" for k in night}, buckets)
            truth |= {k: f"label {i}" for k in night}
        wanted = asked | set(itertools.islice(truth, 20))
        expected = {k: truth[k] for k in wanted if k in truth}
        assert look(ledger, wanted) == expected
        assert ledger.entries() == sum(map(len, nights))
        merged = ledger.compact(RUNTIME, above=1)
        assert (merged is None) == (sum(bool(n) for n in nights) <= 1)
        assert look(ledger, wanted) == expected
        while len(ledger.view()) > 1:
            assert ledger.compact(RUNTIME, above=1) is not None
        assert ledger.entries() == len(truth)
        assert look(ledger, truth) == truth


def test_bytes_and_keys_are_the_same_in_order():
    keys = sorted(EDGES)
    array = pa.array(EDGES, pa.binary(16))
    values = np.sort(as_bytes(array))
    assert as_keys(values).to_pylist() == keys
    assert as_bytes(array.slice(2, 3)).tolist() == [k.rstrip(b"\0") for k in EDGES[2:5]]
    assert as_keys(as_bytes(pa.chunked_array([array[:2], array[2:]]))).to_pylist() == EDGES


def test_an_entry_comes_back_whole(tmp_path):
    ledger = Ledger(Store(str(tmp_path)), "v")
    full = {
        "key": EDGES[3], "label": "positive", "negative": 0.1, "neutral": 0.2, "positive": 0.7, "label_mass": 0.99, "text_analysis": "t", "image_analysis": "i",
        "conflict_resolution": "c", "final_conclusion": "f", "stated": "neutral", "rationale_fault": None, "answered_by": "teacher", "scored_on": "2026-11-21",
    }  # fmt: skip
    bare = dict.fromkeys(ENTRY.names) | {"key": EDGES[0], "label": "neutral", "answered_by": "student", "scored_on": "2026-11-22"}
    line = ledger.put("n", 0, pa.Table.from_pylist([full, bare], schema=ENTRY))
    assert line == {"key": "ledger/v/n/part-000.parquet", "rows": 2, "lo": "00" * 16, "hi": "ff" * 16, "bytes": os.path.getsize(tmp_path / "ledger/v/n/part-000.parquet")}  # fmt: skip
    assert ledger.put("n", 0, pa.Table.from_pylist([bare], schema=ENTRY)) == line  # what is there stays
    assert ledger.put("n", 1, ENTRY.empty_table()) is None
    assert ledger.lookup(pa.array([EDGES[0]], pa.binary(16))).num_rows == 0  # written, and not yet added
    ledger.add("n", [line])
    assert ledger.lookup(pa.array([EDGES[0], EDGES[3]], pa.binary(16))).to_pylist() == [bare, full]
    assert list(PAYLOAD.names) == [n for n in full if n != "key"]


def test_adding_twice_adds_once(tmp_path, serial):
    store = Store(str(tmp_path))
    ledger, keys = Ledger(store, "v"), random_keys(40)
    assert ledger.entries() == 0 and ledger.view() == [] and ledger.compact(RUNTIME) is None
    for i in range(4):
        for _ in range(2):
            add(ledger, f"n{i}", dict.fromkeys(keys[10 * i : 10 * i + 10], "neutral"))
    add(ledger, "nothing new", {})
    assert [g["name"] for g in ledger.view()] == ["n0", "n1", "n2", "n3"] and ledger.entries() == 40
    assert ledger.compact(RUNTIME, above=4) is None
    name = ledger.compact(RUNTIME, above=3)
    assert [(g["name"], g["rows"], g["of"]) for g in ledger.view()] == [(name, 40, ["n0", "n1", "n2", "n3"])]
    add(ledger, "n2", dict.fromkeys(keys[20:30], "neutral"))  # a night that is begun again after its entries were merged
    assert ledger.entries() == 40 and len(ledger.view()) == 1
    assert Ledger(store, "w").view() == []  # another version knows nothing of it


def test_reads_only_what_has_candidates(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "GROUP", 100)
    ledger, keys = Ledger(Store(str(tmp_path)), "v"), sorted(random_keys(4000))
    add(ledger, "base", dict.fromkeys(keys, "neutral"), buckets=4)
    read: list[tuple[str, tuple[int, ...]]] = []

    class Counted(pq.ParquetFile):
        def read_row_groups(self, groups, columns=None, **options):
            read.append((",".join(columns), tuple(groups)))
            return super().read_row_groups(groups, columns=columns, **options)

        def read_row_group(self, group, columns=None, **options):
            read.append(("payload" if "label" in columns else "?", (group,)))
            return super().read_row_group(group, columns=columns, **options)

    monkeypatch.setattr(module.pq, "ParquetFile", Counted)
    near = (int.from_bytes(keys[70], "big") + 1).to_bytes(16, "big")  # between two keys of the first row group
    assert look(ledger, [near]) == {}
    assert read == [("key", (0,))]
    read.clear()
    assert look(ledger, [near, keys[250], keys[251], keys[-1]]) == dict.fromkeys([keys[250], keys[251], keys[-1]], "neutral")
    assert [c for c, _ in read].count("payload") == 2  # keys[250] and keys[251] share a row group
    assert [g for c, g in read if c == "key"][0] == (0, 2)


def test_a_view_outlives_a_compaction(tmp_path, serial, monkeypatch):
    store = Store(str(tmp_path))
    ledger, keys = Ledger(store, "v"), random_keys(90)
    truth = {k: f"{i // 10}" for i, k in enumerate(keys)}
    for i in range(9):
        add(ledger, f"n{i}", {k: f"{i}" for k in keys[10 * i : 10 * i + 10]}, buckets=2)
    old = ledger.view()
    assert ledger.compact(RUNTIME) is not None
    assert look(ledger, keys, old) == look(ledger, keys) == truth

    def grow(name: str) -> list[dict]:
        for i in range(9):
            add(ledger, f"{name}{i}", dict.fromkeys(random_keys(3, f"{name}{i}"), "new"))
        return ledger.view()

    grow("m")
    assert ledger.compact(RUNTIME) is not None  # the first nine were merged a moment ago: they stay
    assert look(ledger, keys, old) == truth
    monkeypatch.setattr(module, "KEEP", -1.0)
    before = grow("o")
    assert ledger.compact(RUNTIME) is not None  # now they go
    assert look(ledger, keys) == look(ledger, keys, before) == truth
    with pytest.raises(ArtifactError, match=r"ledger/v/n8/part-00\d.parquet is gone: it was merged"):
        look(ledger, keys, old)
    left = {f.split("/")[0] for f in store.files("ledger/v")} - {"index.json"}
    assert left == {g["name"] for g in [*ledger.view(), *before]}


def test_a_large_old_generation_is_not_written_again(tmp_path, serial):
    ledger, keys = Ledger(Store(str(tmp_path)), "v"), random_keys(1000)
    add(ledger, "base", dict.fromkeys(keys[:900], "old"))
    for i in range(8):
        add(ledger, f"n{i}", dict.fromkeys(keys[900 + 5 * i : 905 + 5 * i], "new"))
    name = ledger.compact(RUNTIME, above=8)
    assert [(g["name"], g["rows"]) for g in ledger.view()] == [("base", 900), (name, 40)]
    add(ledger, "more", dict.fromkeys(keys[880:], "newest"))
    add(ledger, "even more", dict.fromkeys(random_keys(200, 1), "newest"))
    whole = ledger.compact(RUNTIME, above=3)
    assert [(g["name"], g["rows"]) for g in ledger.view()] == [(whole, 1200)]
    assert ledger.view()[0]["of"] == ["base", name, *(f"n{i}" for i in range(8)), "more", "even more"]
    found = look(ledger, keys)
    assert [found[keys[i]] for i in (0, 879, 880, 999)] == ["old", "old", "newest", "newest"]


def test_a_killed_compaction_is_ended_by_the_next(tmp_path, serial, monkeypatch):
    monkeypatch.setattr(module, "PART_BYTES", 2000)
    store = Store(str(tmp_path))
    ledger, keys = Ledger(store, "v"), random_keys(600)
    for i in range(3):
        add(ledger, f"n{i}", dict.fromkeys(keys[200 * i : 200 * i + 200], f"{i}"))
    real, done = module._Merge.__call__, []

    def dies(self, row):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(row)
        return real(self, row)

    monkeypatch.setattr(module._Merge, "__call__", dies)
    with pytest.raises(KeyboardInterrupt):
        ledger.compact(RUNTIME, above=2)
    begun = {f.split("/")[0] for f in store.files("ledger/v") if f.startswith("merged-")}
    assert len(begun) == 1 and look(ledger, keys) == {k: f"{i // 200}" for i, k in enumerate(keys)}
    monkeypatch.setattr(module._Merge, "__call__", real)
    monkeypatch.setattr(module, "PART_BYTES", 10**9)  # the cut is that of the attempt that was begun
    add(ledger, "n3", {bytes(16): "3"})
    assert ledger.compact(RUNTIME, above=8) in begun
    assert [(g["name"], g["rows"]) for g in ledger.view()] == [(*begun, 600), ("n3", 1)]
    assert look(ledger, [*keys, bytes(16)]) == {k: f"{i // 200}" for i, k in enumerate(keys)} | {bytes(16): "3"}
    listed = {f["key"] for f in ledger.view()[0]["files"]}
    assert {f"ledger/v/{f}" for f in store.files("ledger/v") if f.startswith("merged-")} == listed


def test_a_merged_part_that_lacks_rows_is_not_used(tmp_path, serial):
    store = Store(str(tmp_path))
    ledger, keys = Ledger(store, "v"), random_keys(30)
    for i in range(3):
        add(ledger, f"n{i}", dict.fromkeys(keys[10 * i : 10 * i + 10], "neutral"))
    index = json.loads((tmp_path / "ledger/v/index.json").read_bytes())
    index["generations"][1]["rows"] += 1  # as if a file were not what it was when it was added
    (tmp_path / "ledger/v/index.json").write_text(json.dumps(index))
    with pytest.raises(ConservationError, match="31 entries to merge, 30 merged"):
        ledger.compact(RUNTIME, above=2)
    assert len(ledger.view()) == 3 and len(look(ledger, keys)) == 30


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_nights_add_while_others_compact(where, tmp_path, serial, request, monkeypatch):
    """Four nights' worth of adders, two compactors and two readers at once: nothing is lost, and no look-up fails."""
    root = str(tmp_path) if where == "folder" else f"s3://{request.getfixturevalue('s3_bucket')}/ledger-races"
    ledger, rounds, adders = Ledger(Store(root), "v"), 5 if where == "folder" else 2, 4
    monkeypatch.setattr(module, "PART_BYTES", 3000)
    keys = random_keys(rounds * adders * 20)
    faults: list[BaseException] = []
    added: list[bytes] = []
    done = threading.Event()

    def guarded(work):
        def run(*args):
            try:
                work(*args)
            except BaseException as e:
                faults.append(e)

        return run

    def adds(mine):
        for r in range(rounds):
            some = keys[(mine * rounds + r) * 20 :][:20]
            add(ledger, f"night-{mine}-{r}", dict.fromkeys(some, "neutral"), buckets=2)
            added.extend(some)

    def compacts():
        while not done.is_set():
            ledger.compact(RUNTIME, above=2)

    def reads():
        while not done.is_set():
            known = list(added)
            assert look(ledger, known).keys() == set(known)

    adding = [threading.Thread(target=guarded(adds), args=(i,)) for i in range(adders)]
    others = [threading.Thread(target=guarded(w)) for w in (compacts, compacts, reads, reads)]
    for t in adding + others:
        t.start()
    for t in adding:
        t.join()
    done.set()
    for t in others:
        t.join()
    assert faults == []
    ledger.compact(RUNTIME, above=1)
    assert look(ledger, keys) == dict.fromkeys(keys, "neutral")
    names = {n for g in ledger.view() for n in (g["name"], *g["of"])}
    assert {f"night-{a}-{r}" for a in range(adders) for r in range(rounds)} <= names
    assert ledger.entries() == len(keys)


@pytest.mark.ray
def test_compaction_on_ray(tmp_path: Path, ray_session, runtime, monkeypatch):
    ledger, keys = Ledger(Store(str(tmp_path)), "v"), random_keys(5000)
    monkeypatch.setattr(module, "PART_BYTES", 50_000)  # the driver cuts
    for i in range(9):
        add(ledger, f"n{i}", {k: f"{i}" for k in keys[500 * i : 500 * i + 1000]}, buckets=4)
    assert ledger.entries() == 9000
    name = ledger.compact(runtime)
    (merged,) = ledger.view()
    assert merged["name"] == name and merged["rows"] == 5000 and len(merged["files"]) == 8
    assert all(a["hi"] < b["lo"] for a, b in itertools.pairwise(merged["files"]))
    assert look(ledger, keys) == {k: str(min(8, i // 500)) for i, k in enumerate(keys)}
