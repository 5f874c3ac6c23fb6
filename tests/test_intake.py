"""The intake of a night: counts, the order of rows by bucket, and that a unit done twice comes out the same."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mulcot_ray.artifacts import Manifest, Run, begin
from mulcot_ray.errors import ArtifactError, InputError, RecipeChanged
from mulcot_ray.labeling import intake as module
from mulcot_ray.labeling.intake import IDS, ROWS, _Intake, buckets_for, intake, read_groups, read_markers
from mulcot_ray.posts.dumps import Unit, list_units, read_unit
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Post, Reject, from_row
from mulcot_ray.storage import Store

BUCKETS = 8


def write_dump(root: Path) -> str:
    """300 rows of JSONL, 200 compressed, 100 of Parquet; 21 of the 600 are broken."""
    folder = root / "dt=2026-11-22"
    folder.mkdir(parents=True)

    def line(i: int) -> bytes:
        if i % 24 == 5:
            return b"{" if i % 48 == 5 else json.dumps({"id": f"{i:04d}", "text": " "}).encode()
        post = {
            "id": f"{i:04d}",
            "text": f"text {i % 250}",
            "aspect": "ü" if i % 3 else None,
            "lang": "en",
            "image": f"{i % 7}.jpg" if i % 5 == 0 else None,
        }
        return json.dumps(post).encode()

    (folder / "a.jsonl").write_bytes(b"\n".join(map(line, range(300))))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(map(line, range(300, 500)))))
    ids = [f"{i:04d}" for i in range(500, 600)]
    pq.write_table(pa.table({"id": ids, "text": [f"text {i}" for i in range(100)]}), folder / "c.parquet", row_group_size=40)
    return str(folder)


def a_run(store: Store, name: str = "night") -> Run:
    run = begin(store, "nights", name, {"stage": "night"})
    assert not isinstance(run, Manifest)
    return run


def in_process(store: Store, path: str, units: list[Unit], buckets: int = BUCKETS, images: str | None = "s3://b/pics") -> Run:
    """What the tasks do, without Ray."""
    run = a_run(store)
    for unit in units:
        _Intake(store, f"{run.prefix}/work", path, images, buckets)(asdict(unit))
    return run


def contents(store: Store, prefix: str) -> dict[str, bytes]:
    return {name: store.read(f"{prefix}/work/{name}") or b"" for name in store.files(f"{prefix}/work")}


def bucket_of(digest: bytes, buckets: int = BUCKETS) -> int:
    return digest[0] * buckets // 256


@pytest.fixture
def dump(tmp_path: Path) -> str:
    return write_dump(tmp_path / "dump")


def test_buckets_for() -> None:
    def units(*sizes: int, compression: Any = None) -> list[Unit]:
        return [Unit(i, f"{i}", "jsonl", compression, 0, s, s, "") for i, s in enumerate(sizes)]

    mib = 1 << 20
    assert [buckets_for(units(n * mib)) for n in (0, 1, 64, 65, 128, 129, 640, 64 << 8, 1 << 20)] == [1, 1, 1, 2, 2, 4, 16, 64, 64]
    assert buckets_for(units(64 * mib, 64 * mib, compression="zstd")) == 8


def check_cells(run: Run, path: str, units: list[Unit], images: str | None, buckets: int = BUCKETS) -> Iterator[tuple[int, int, Post]]:
    """Every row of the units lies where the markers say, in order, with its digests; yields unit, row and post."""
    for unit, marker in zip(units, read_markers(run), strict=True):
        assert (marker["unit"], marker["source"]) == (unit.number, asdict(unit))
        rows = dict(read_unit(path, unit, images))
        kept = {n: r for n, r in rows.items() if isinstance(r, Post)}
        rejects = [replace(r, stage="intake") for r in rows.values() if isinstance(r, Reject)]
        assert (marker["rows"], marker["rejects"]) == (len(kept), len(rejects))
        assert marker["reasons"] == Counter(r.reason for r in rejects) and marker["images"] == sum(p.has_image for p in kept.values())
        seen, identified, rejected = list[int](), dict[int, tuple[bytes, bytes]](), list[Reject]()
        for s in marker["slices"]:
            part = f"part-{unit.number:05d}-{s['slice']:04d}.parquet"
            in_slice = []
            for folder, groups, schema in (("posts", s["groups"], ROWS), ("ids", s["id_groups"], IDS)):
                key, at = f"{run.prefix}/work/{folder}/{part}", 0
                for bucket, (first, count) in groups.items():
                    assert first == at and count > 0
                    at += count
                    table = read_groups(run.store, key, first, count, schema.names)
                    assert table.schema.equals(schema) and table["row"].to_pylist() == sorted(table["row"].to_pylist())
                    for r in table.to_pylist():
                        if folder == "posts":
                            assert bucket_of(r["key"], buckets) == int(bucket)
                            post = from_row(Post, r)
                            assert post == kept[r["row"]] and r["key"].hex() == post.content
                            in_slice.append(r["row"])
                        else:
                            assert bucket_of(r["id"], buckets) == int(bucket)
                            identified[r["row"]] = r["id"], r["key"]
                if groups:
                    assert at == pq.read_metadata(run.store.path(key), filesystem=run.store.fs).num_row_groups
            assert list(map(int, s["groups"])) == sorted(map(int, s["groups"])) and len(in_slice) == s["rows"]
            assert not seen or not in_slice or min(in_slice) > max(seen)
            seen += in_slice
            if s["rejects"]:
                rejected += [
                    from_row(Reject, r) for r in pq.read_table(pa.BufferReader(run.store.read(f"{run.prefix}/work/rejects/{part}"))).to_pylist()
                ]
        assert sorted(seen) == list(kept) and rejected == rejects
        for n, post in kept.items():
            digest = hashlib.blake2b(json.dumps([post.post_id, post.aspect]).encode(), digest_size=16).digest()
            assert identified[n] == (digest, bytes.fromhex(post.content))
            yield unit.number, n, post


@pytest.mark.ray
def test_all_rows_by_bucket_and_again_after_a_kill(tmp_path: Path, dump: str, runtime: Runtime, ray_session: None) -> None:
    units, images = list_units(dump, 4000), str(tmp_path)
    assert [u.file for u in units].count("a.jsonl") > 3
    run, told = a_run(Store(str(tmp_path / "root"))), list[tuple[int, int, int]]()
    total = intake(run, dump, images, units, BUCKETS, runtime, lambda *x: told.append(x))
    posts = list(check_cells(run, dump, units, images))
    pictures = sum(p.has_image for *_, p in posts)
    assert total == {"rows": 579, "rejects": 21, "images": pictures, "reasons/bad_line": 11, "reasons/empty_text": 10}
    assert len(posts) == 579 and 50 < pictures < 120
    assert told[0] == (0, 0, 0) and told[-1] == (600, 600, total["rejects"]) and [t[0] for t in told] == sorted(t[0] for t in told)

    # Killed before the commit of unit 2 and in the middle of unit 3; the parts of the others are not made again.
    before = contents(run.store, run.prefix)
    for name in ("intake/00002.json", "intake/00003.json", "posts/part-00003-0000.parquet", "posts/part-00000-0000.parquet"):
        run.store.delete(f"{run.prefix}/work/{name}")
    again = list[tuple[int, int, int]]()
    assert intake(run, dump, images, units, BUCKETS, runtime, lambda *x: again.append(x)) == total
    after = contents(run.store, run.prefix)
    assert before.keys() - after.keys() == {"posts/part-00000-0000.parquet"} and after == {k: before[k] for k in after}
    assert 0 < again[0][0] < 600 and again[-1] == told[-1]
    assert intake(run, dump, images, units, BUCKETS, runtime, lambda *x: again.append(x)) == total and again[-1] == told[-1]


@pytest.mark.ray
def test_a_file_that_changed_stops_the_night(tmp_path: Path, dump: str, runtime: Runtime, ray_session: None) -> None:
    units, run = list_units(dump), a_run(Store(str(tmp_path / "root")))
    with (Path(dump) / "b.jsonl.gz").open("ab") as f:
        f.write(gzip.compress(b'{"id": "late", "text": "t"}'))
    with pytest.raises(InputError, match=r"b\.jsonl\.gz changed while it was being read; run again"):
        intake(run, dump, None, units, BUCKETS, runtime, lambda *_: None)
    assert "00001.json" not in run.store.files(f"{run.prefix}/work/intake")
    with pytest.raises(InputError, match="--images .*none does not exist"):
        intake(run, dump, str(tmp_path / "none"), units, BUCKETS, runtime, lambda *_: None)


def test_other_units_than_those_that_were_begun_with(tmp_path: Path, dump: str, runtime: Runtime) -> None:
    run = in_process(Store(str(tmp_path / "root")), dump, list_units(dump)[:1])
    with pytest.raises(RecipeChanged, match="unit 0 was .*a.jsonl"):
        intake(run, dump, None, list_units(dump, 4000), BUCKETS, runtime, lambda *_: None)


@pytest.mark.parametrize("buckets", [1, 2, 256])
def test_slices_and_groups_are_bounded(tmp_path: Path, dump: str, monkeypatch: pytest.MonkeyPatch, buckets: int) -> None:
    monkeypatch.setattr(module, "SLICE_ROWS", 70)
    monkeypatch.setattr(module, "GROUP_ROWS", 9)
    units = list_units(dump)
    run = in_process(Store(str(tmp_path / "root")), dump, units, buckets)
    assert len(list(check_cells(run, dump, units, "s3://b/pics", buckets))) > 500
    slices = [s for m in read_markers(run) for s in m["slices"]]
    assert [s["rows"] + s["rejects"] for s in slices] == [70, 70, 70, 70, 20, 70, 70, 60, 70, 30]
    for name in run.store.files(f"{run.prefix}/work/posts"):
        meta = pq.read_metadata(run.store.path(f"{run.prefix}/work/posts/{name}"))
        assert max(meta.row_group(i).num_rows for i in range(meta.num_row_groups)) <= 9


def test_slices_and_groups_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLICE_BYTES", 5000)
    monkeypatch.setattr(module, "GROUP_BYTES", 2500)
    folder = tmp_path / "dt=2026-11-22"
    folder.mkdir()
    sizes = [1000, 1000, 1000, 1000, 9000, 100, 4000, 3000, 1000]
    (folder / "a.jsonl").write_bytes(b"".join(json.dumps({"id": i, "text": "x" * n}).encode() + b"\n" for i, n in enumerate(sizes)))
    units = list_units(str(folder))
    run = in_process(Store(str(tmp_path / "root")), str(folder), units, 1, None)
    assert len(list(check_cells(run, str(folder), units, None, 1))) == len(sizes)
    [marker] = read_markers(run)
    assert [s["rows"] for s in marker["slices"]] == [4, 1, 2, 2]
    assert [s["groups"]["0"][1] for s in marker["slices"]] == [2, 1, 2, 2]


def test_a_unit_done_twice_is_the_same_to_the_byte(tmp_path: Path, dump: str) -> None:
    units = list_units(dump, 4000)
    first = in_process(Store(str(tmp_path / "a")), dump, units)
    second = in_process(Store(str(tmp_path / "b")), dump, units[::-1])
    made = contents(first.store, first.prefix)
    assert made and made == contents(second.store, second.prefix)
    in_process(first.store, dump, units)
    assert contents(first.store, first.prefix) == made


def test_parts_of_another_version_are_not_mixed_in(tmp_path: Path, dump: str) -> None:
    store = Store(str(tmp_path / "root"))
    store.create("nights/night/work/ids/part-00000-0000.parquet", b"cut at other rows")
    with pytest.raises(ArtifactError, match=r"ids/part-00000-0000.parquet was made by another version .* Delete nights/night/work and run again"):
        in_process(store, dump, list_units(dump))
    assert not store.files("nights/night/work/intake")


def test_units_without_posts(tmp_path: Path) -> None:
    folder = tmp_path / "dt=2026-11-22"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"{" * 500 + b"\n" + b'{"id": "1", "text": "t"}\n')
    units = list_units(str(folder), 100)
    run = in_process(Store(str(tmp_path / "root")), str(folder), units, 1, None)
    assert [(m["rows"], m["rejects"], len(m["slices"])) for m in read_markers(run)] == [(0, 1, 1), *[(0, 0, 0)] * 4, (1, 0, 1)]
    assert list(run.store.files(f"{run.prefix}/work/posts")) == ["part-00005-0000.parquet"]
    assert list(run.store.files(f"{run.prefix}/work/rejects")) == ["part-00000-0000.parquet"]


def test_on_s3(tmp_path: Path, dump: str, s3_bucket: str, s3_server: Any, runtime: Runtime) -> None:
    for file in Path(dump).iterdir():
        s3_server.client().put_object(Bucket=s3_bucket, Key=f"intake/dump/dt=2026-11-22/{file.name}", Body=file.read_bytes())
    path = f"s3://{s3_bucket}/intake/dump/dt=2026-11-22"
    units = list_units(path, 4000)
    run = in_process(Store(f"s3://{s3_bucket}/intake/root"), path, units)
    local = in_process(Store(str(tmp_path / "root")), dump, list_units(dump, 4000))
    assert len(list(check_cells(run, path, units, "s3://b/pics"))) > 500
    mine, theirs = contents(run.store, run.prefix), contents(local.store, local.prefix)
    assert {k: v for k, v in mine.items() if "intake/" not in k} == {k: v for k, v in theirs.items() if "intake/" not in k}
    total = intake(run, path, None, units, BUCKETS, runtime, lambda *_: None)  # all is done: no Ray
    assert total["rows"] + total["rejects"] == 600
