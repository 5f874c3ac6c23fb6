"""Dumps: what is listed, and that a unit holds the same rows however the files are cut, compressed or broken."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mulcot_ray.errors import InputError
from mulcot_ray.posts.dumps import Unit, list_units, partitions, read_unit
from mulcot_ray.posts.importers import read_posts
from mulcot_ray.records import Post, Reason, Reject

DAY = "dt=2026-11-22"
Row = Post | Reject


def day(tmp_path: Path) -> Path:
    folder = tmp_path / DAY
    folder.mkdir(exist_ok=True)
    return folder


def line(i: int | str, text: str = "t", **more: Any) -> bytes:
    return json.dumps({"id": i, "text": text, **more}, ensure_ascii=False).encode() + b"\n"


def read(folder: Path, unit_bytes: int = 64 << 20, images: str | None = None) -> list[Row]:
    """All rows of a partition, and that each unit numbers its own from 0."""
    rows: list[Row] = []
    for unit in list_units(str(folder), unit_bytes):
        found = list(read_unit(str(folder), unit, images))
        assert [n for n, _ in found] == list(range(len(found)))
        rows += [r for _, r in found]
    return rows


def shown(rows: list[Row]) -> list[str]:
    return [r.post_id if isinstance(r, Post) else f"{r.post_id} {r.reason}" for r in rows]


# --- partitions ----------------------------------------------------------------------------------------------------------


def test_partitions(tmp_path: Path) -> None:
    for name in ("dt=2026-11-22", "dt=2025-01-01", "dt=2026-13-01", "dt=2026-1-1", "_logs", "xdt=2026-11-22", "dt=2026-11-23.bak"):
        (tmp_path / name).mkdir()
    (tmp_path / "dt=2026-11-24").write_text("a file")
    found = {"2025-01-01": f"{tmp_path}/dt=2025-01-01", "2026-11-22": f"{tmp_path}/dt=2026-11-22"}
    assert list(partitions(str(tmp_path)).items()) == list(found.items())
    assert partitions(f"{tmp_path}/dt=2026-11-22/") == {"2026-11-22": found["2026-11-22"]}


def test_partitions_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert partitions(".") == {"2026-11-22": f"{tmp_path}/{DAY}"}  # workers have another working folder


def test_what_is_no_dump(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "file").write_text("")
    for path, message in [("x", r"has no folder dt=YYYY-MM-DD"), ("file", "is a file"), ("none", "does not exist")]:
        with pytest.raises(InputError, match=message):
            partitions(str(tmp_path / path))
    with pytest.raises(InputError, match="web addresses are not fetched"):
        partitions("https://host/dump")


# --- the listing ---------------------------------------------------------------------------------------------------------


def test_units_cover_each_file_once(tmp_path: Path) -> None:
    folder = day(tmp_path)
    (folder / "hour=03").mkdir()
    (folder / "_temporary").mkdir()
    (folder / "b.jsonl").write_bytes(line(1) * 10)
    (folder / "hour=03" / "a.ndjson").write_bytes(line(2))
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(line(3) * 100))
    (folder / "empty.jsonl").write_bytes(b"")
    pq.write_table(pa.table({"id": list(range(100)), "text": [f"text {i:>100}" for i in range(100)]}), folder / "d.parquet", row_group_size=30)
    for name in ("_SUCCESS", ".b.jsonl.crc", "b.jsonl.crc", ".hidden.jsonl", "_temporary/part.jsonl"):
        (folder / name).write_bytes(line(9))
    units = list_units(str(folder), 100)
    assert [u.number for u in units] == list(range(len(units)))
    assert sorted({u.file for u in units}) == list(dict.fromkeys(u.file for u in units)) == ["b.jsonl", "c.jsonl.gz", "d.parquet", "hour=03/a.ndjson"]
    by_file = {name: [u for u in units if u.file == name] for name in dict.fromkeys(u.file for u in units)}
    size = (folder / "b.jsonl").stat().st_size
    assert [(u.lo, u.hi) for u in by_file["b.jsonl"]] == [(0, 100), (100, 200), (200, size)] and sum(u.weight for u in by_file["b.jsonl"]) == size
    [packed] = by_file["c.jsonl.gz"]
    assert (packed.format, packed.compression, packed.lo, packed.hi) == ("jsonl", "gzip", 0, (folder / "c.jsonl.gz").stat().st_size)
    assert [(u.format, u.lo, u.hi) for u in by_file["d.parquet"]] == [("parquet", i, i + 1) for i in range(4)]
    assert list_units(str(folder), 100) == units
    assert [Unit(**json.loads(json.dumps(asdict(u)))) for u in units] == units
    [whole] = [u for u in list_units(str(folder)) if u.file == "d.parquet"]
    assert (whole.lo, whole.hi, whole.weight) == (0, 4, sum(u.weight for u in by_file["d.parquet"]))
    assert len(read(folder, 100)) == len(read(folder)) == 10 + 100 + 100 + 1


def test_what_is_no_partition(tmp_path: Path) -> None:
    folder = day(tmp_path)
    with pytest.raises(InputError, match="there is no file in it"):
        list_units(str(folder))
    (folder / "a.jsonl").write_bytes(b"")
    with pytest.raises(InputError, match="its 1 files have no rows"):
        list_units(str(folder))
    with pytest.raises(InputError, match="is a file"):
        list_units(str(folder / "a.jsonl"))
    for name in ("posts.csv", "a.jsonl.bz2", "a.parquet.gz"):
        (folder / name).write_bytes(line(1))
        with pytest.raises(InputError, match=f"holds {name}, which is of no format"):
            list_units(str(folder))
        (folder / name).unlink()
    (folder / "broken.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match=r"broken\.parquet cannot be read as Parquet"):
        list_units(str(folder))
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), folder / "broken.parquet")
    with pytest.raises(InputError, match=r"broken\.parquet has no column text; there are id, body"):
        list_units(str(folder))


def test_ten_thousand_files(tmp_path: Path) -> None:
    folder = day(tmp_path)
    for i in range(10_000):
        (folder / f"{i:05d}.jsonl").write_bytes(b"\n")
    started = time.process_time()
    assert len(list_units(str(folder))) == 10_000
    assert time.process_time() - started < 5


# --- units of plain JSONL ------------------------------------------------------------------------------------------------

LIMIT = 60  # bytes of a line in these tests

ends = st.sampled_from([b"\n", b"\n", b"\r\n", b"\n\n", b"\n \r\n"])
lines_ = st.one_of(
    st.integers(0, 999).map(lambda i: line(f"{i:03d}")[:-1]),
    st.text(st.characters(codec="utf-8"), max_size=8).map(lambda t: line("u", f"x\u2028{t}\x85")[:-1]),
    st.sampled_from([b"", b"{", b"\xff", b"[1]", b"\r", b"\xef\xbb\xbf" + line(7)[:-1], b"\0", b'{"id": 1}', b"9" * (LIMIT - 1), b"9" * LIMIT]),
    st.integers(LIMIT - 2, 3 * LIMIT).map(lambda n: b'"' + b"y" * n),
)
files = st.tuples(st.lists(st.tuples(lines_, ends), min_size=1, max_size=8), st.booleans()).map(
    lambda x: b"".join(a + b for a, b in x[0])[: -1 if x[1] else None] or b"\n"
)


def expected(data: bytes, name: str) -> list[str]:
    """The rows of a file by another way: cut at each newline."""
    rows, at = [], 0
    for raw in data.split(b"\n"):
        where, at, row = f"{name}:{at}", at + len(raw) + 1, raw.rstrip(b"\r")
        if at - 1 < len(data) and len(raw) + 1 > LIMIT or at - 1 == len(data) and len(raw) >= LIMIT:
            rows.append(f"{where} bad_line")
            continue
        try:
            text = row.decode("utf-8-sig" if where.endswith(":0") and rows == [] else "utf-8")
            if text.strip():
                found = json.loads(text)
                rows.append((found["id"] if "text" in found else f"{found['id']} missing_field") if isinstance(found, dict) else f"{where} bad_line")
        except UnicodeDecodeError:
            rows.append(f"{where} bad_encoding")
        except ValueError:
            rows.append(f"{where} bad_line")
    return [str(r) for r in rows]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files)
@example(line("a") + b"\n\n" + line("b")[:-1])
@example(b"\xef\xbb\xbf" + line("a") + b"y" * 3 * LIMIT + b"\n" + line("b"))
@example(b"y" * 3 * LIMIT)
def test_a_line_is_in_one_unit_however_a_file_is_cut(tmp_path: Path, data: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mulcot_ray.posts.dumps.MAX_LINE", LIMIT)
        folder = day(tmp_path)
        (folder / "x.jsonl").write_bytes(data)
        whole = read(folder)
        assert shown(whole) == expected(data, "x.jsonl")
        for size in (*range(1, min(len(data), 24)), len(data) // 2 + 1, len(data) - 1 or 1, len(data)):
            assert read(folder, size) == whole, size


def test_every_cut_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulcot_ray.posts.dumps.MAX_LINE", LIMIT)
    data = b"\xef\xbb\xbf" + line(1) + b"\r\n" + b"y" * 100 + b"\n" + line("ü\u2028") + b"{\n\xff\n" + line(2)[:-1]
    folder = day(tmp_path)
    (folder / "x.jsonl").write_bytes(data)
    assert shown(whole := read(folder)) == [
        "1", "x.jsonl:28 bad_line", "ü\u2028", "x.jsonl:158 bad_line", "x.jsonl:160 bad_encoding", "2",
    ]  # fmt: skip
    for size in range(1, len(data) + 1):
        assert read(folder, size) == whole


def test_an_overlong_line_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulcot_ray.posts.dumps.MAX_LINE", 1 << 20)
    folder = day(tmp_path)
    with (folder / "x.jsonl").open("wb") as f:
        f.write(line(1))
        for _ in range(100):
            f.write(b"y" * (1 << 20))
        f.write(b"\n" + line(2))
    tracemalloc.start()
    rows = read(folder, 16 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown(rows) == ["1", "x.jsonl:23 bad_line", "2"] and "longer than 1048576 bytes" in str(rows[1])
    assert peak < 16 << 20


def test_the_same_outcome_as_an_import(tmp_path: Path) -> None:
    """Numbers, doubled keys, NaN, meta, aspects, pictures, labels: one parser, one set of rules."""
    rows = [
        b'{"id": "007", "text": "a", "text": "b", "likes": NaN, "big": 123456789012345678901234567890, "x": {"y": [1.50]}}\n',
        b'{"id": 123456789012345678901234567890, "text": "t", "image": "a/b.jpg", "label": "positive", "aspect": ""}\n',
        b'{"id": 1e3, "text": "t"}\n', b'{"id": "1", "text": "\\ud800"}\n', b'{"id": "2", "text": "t", "image": "../x"}\n',
        b'{"id": "3", "text": " "}\n', b'{"id": ' + b"9" * 5000 + b', "text": "t"}\n', b"[" * 100_000 + b"\n",
    ]  # fmt: skip
    folder = day(tmp_path)
    (folder / "x.jsonl").write_bytes(b"".join(rows))
    mine = read(folder, images=str(tmp_path))
    other = list(read_posts("jsonl", str(folder / "x.jsonl"), name="n", images=str(tmp_path)))
    assert [r if isinstance(r, Post) else (r.reason, r.detail, r.raw) for r in mine] == [
        r if isinstance(r, Post) else (r.reason, r.detail, r.raw) for r in other
    ]
    assert shown(mine)[:2] == ["007", "123456789012345678901234567890"]
    first, second = (r for r in mine[:2] if isinstance(r, Post))
    assert first.text == "b" and first.meta["big"] == "123456789012345678901234567890"
    assert second.image_ref == str(tmp_path / "a/b.jpg") and second.image_sha256 is None


def test_pictures_inside_are_hashed_and_named_ones_are_not_opened(tmp_path: Path) -> None:
    folder, picture = day(tmp_path), b"no JPEG, and nobody looks"
    rows = line(1, image_base64=b64encode(picture).decode()) + line(2, image_base64=b64encode(b"other").decode()) + line(3, image="s3://b/none.jpg")
    (folder / "x.jsonl").write_bytes(rows)
    pq.write_table(pa.table({"id": ["4"], "text": ["t"], "image_bytes": [picture]}), folder / "y.parquet")
    a, b, c, d = (r for r in read(folder) if isinstance(r, Post))
    assert a.image_sha256 == hashlib.sha256(picture).hexdigest() and a.content == d.content != b.content
    assert (c.image_ref, c.image_sha256) == ("s3://b/none.jpg", None)
    assert c.content == replace(c, post_id="5").content != a.content


def test_a_row_that_is_nested_as_deep_as_can_be_parsed(tmp_path: Path) -> None:
    folder = day(tmp_path)
    with (folder / "x.jsonl").open("wb") as f:
        for depth in range(900, 1100):
            f.write(b'{"id": "%d", "text": "t", "deep": %s}\n' % (depth, b"[" * depth + b"]" * depth))
    rows = read(folder)
    assert len(rows) == 200 and isinstance(rows[0], Post) and isinstance(rows[-1], Reject)
    assert {r.reason for r in rows if isinstance(r, Reject)} == {Reason.BAD_LINE}, (
        "wherever Python's stack ends: in reading, or in writing it into meta"
    )


# --- compressed ----------------------------------------------------------------------------------------------------------


def gz(data: bytes) -> bytes:
    """Three members, an empty one among them, with zeros behind as tapes leave them."""
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:]) + b"\0" * 9000


def zst(data: bytes) -> bytes:
    """Two frames with check sums, between skippable ones."""
    half, skip, c = len(data) // 2, b"\x50\x2a\x4d\x18\x04\0\0\0skip", zstandard.ZstdCompressor(write_checksum=True)
    return skip + c.compress(data[:half]) + skip + c.compress(data[half:]) + skip


PACKED: list[tuple[str, Callable[[bytes], bytes]]] = [(".gz", gz), (".zst", zst)]
MANY = b"".join(line(f"{i:05d}", f"text {i * 7919 % 10007} ü") for i in range(20_000))


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
def test_a_compressed_file_has_the_rows_of_the_plain_one(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    data = b"\xef\xbb\xbf" + MANY + b"{\n\xff\n\n[]\n" + line("last")[:-1]
    plain, packed = tmp_path / "a" / DAY, tmp_path / "b" / DAY
    for folder, name, content in ((plain, "x.jsonl", data), (packed, f"x.jsonl{suffix}", pack(data))):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
    assert len(list_units(str(packed), 1000)) == 1
    rows = read(packed, 1000)
    assert len(rows) == 20_004
    assert shown(rows) == [s.replace("x.jsonl:", f"x.jsonl{suffix}:") for s in shown(read(plain, 100_000))]


@pytest.mark.parametrize("damage", ["cut", "cut in the header", "flipped", "nothing", "no such stream", "rubbish behind"])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".zst", zstandard.ZstdCompressor(write_checksum=True).compress)])
def test_a_stream_that_breaks_off(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes], damage: str) -> None:
    data, folder = pack(MANY), day(tmp_path)
    half = len(data) // 2
    broken = {
        "cut": data[:half], "cut in the header": data[:2], "flipped": data[:half] + bytes([data[half] ^ 255]) + data[half + 1 :], "nothing": b"",
        "no such stream": MANY, "rubbish behind": data + b"rubbish",
    }[damage]  # fmt: skip
    (folder / f"x.jsonl{suffix}").write_bytes(broken)
    *kept, last = rows = read(folder)
    assert isinstance(last, Reject) and last.reason is Reason.BAD_LINE
    assert f"x.jsonl{suffix}: the stream breaks off after {len(kept)} lines: " in last.detail
    good = [f"{i:05d}" for i in range(20_000)]
    if damage == "flipped":  # may be seen only at the check sum: what was decompressed until then is text, right or not
        assert shown(kept)[:100] == good[:100]
    else:
        assert shown(kept) == good[: len(kept)]
        assert last.post_id == f"x.jsonl{suffix}:{sum(map(len, MANY.splitlines(keepends=True)[: len(kept)]))}"
    least = {"cut": 5000, "flipped": 5000, "rubbish behind": 20_000}.get(damage, 0)
    assert least <= len(kept) <= (0 if least == 0 else 20_000)
    assert read(folder) == rows


# --- files that change ---------------------------------------------------------------------------------------------------


def test_a_file_that_changed(tmp_path: Path) -> None:
    folder = day(tmp_path)
    file = folder / "x.jsonl"
    file.write_bytes(line(1) * 3)
    [unit] = list_units(str(folder))
    assert len(list(read_unit(str(folder), unit, None))) == 3
    file.write_bytes(line(2) * 3)
    os.utime(file, ns=(1, 1))
    with pytest.raises(InputError, match=r"x\.jsonl changed while it was being read; run again"):
        next(read_unit(str(folder), unit, None))
    file.unlink()
    with pytest.raises(InputError, match=r"x\.jsonl changed while it was being read; run again"):
        next(read_unit(str(folder), unit, None))


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    folder = day(tmp_path)
    (folder / "x.jsonl").write_bytes(line(1) * 1000)
    [unit] = list_units(str(folder))
    rows = read_unit(str(folder), unit, None)
    next(rows)
    (folder / "x.jsonl").write_bytes(line(1) * 1001)
    with pytest.raises(InputError, match="run again"):
        list(rows)


# --- Parquet -------------------------------------------------------------------------------------------------------------


def test_row_groups(tmp_path: Path) -> None:
    folder = day(tmp_path)
    columns: dict[str, Any] = {
        "id": pa.array([str(i) if i != 33 else None for i in range(100)]),
        "text": pa.array([b"\xff" if i == 77 else f"text {i}".encode() for i in range(100)]).view(pa.string()),
        "lang": ["en"] * 100, "scores": [[0.5, i] for i in range(100)], "blob": [b"x"] * 100, "image": [f"{i}.jpg" for i in range(100)],
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "x.parquet", row_group_size=15)
    whole = read(folder, images="s3://b/pics")
    assert len(list_units(str(folder), 1)) == 7 and read(folder, 1, "s3://b/pics") == whole
    assert shown(whole) == [{33: "x.parquet:34 missing_field", 77: "x.parquet:78 bad_encoding"}.get(i, str(i)) for i in range(100)]
    first = whole[0]
    assert isinstance(first, Post) and first.meta == {"lang": "en", "scores": "[0.5, 0.0]"} and first.image_ref == "s3://b/pics/0.jpg"


def test_a_large_row_group_is_streamed(tmp_path: Path) -> None:
    folder = day(tmp_path)
    pictures = [os.urandom(100_000) for _ in range(600)]
    table = pa.table({"id": list(range(600)), "text": ["t"] * 600, "image_bytes": pictures})
    pq.write_table(table, folder / "x.parquet", use_dictionary=False, write_batch_size=10)  # or all of them are one page
    [unit] = list_units(str(folder), 1)
    before, peak, read_ = pa.total_allocated_bytes(), 0, 0
    for _, row in read_unit(str(folder), unit, None):
        assert isinstance(row, Post) and row.image_bytes == pictures[read_]
        peak, read_ = max(peak, pa.total_allocated_bytes() - before), read_ + 1
    assert read_ == 600 and peak < 40 << 20


# --- S3 ------------------------------------------------------------------------------------------------------------------


def test_a_listing_of_several_pages(s3_bucket: str, s3_server: Any) -> None:
    client = s3_server.client()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket=s3_bucket, Key=f"pages/{DAY}/{i:04d}.jsonl", Body=b"\n"), range(1100)))
    assert [u.file for u in list_units(f"s3://{s3_bucket}/pages/{DAY}")] == [f"{i:04d}.jsonl" for i in range(1100)]


def test_a_dump_on_s3(s3_bucket: str, s3_server: Any) -> None:
    from mulcot_ray.storage import s3_filesystem

    root, client = f"s3://{s3_bucket}/dt=none/dump", s3_server.client()

    def put(name: str, data: bytes) -> None:
        client.put_object(Bucket=s3_bucket, Key=f"dt=none/dump/{DAY}/{name}", Body=data)

    put("a.jsonl", MANY)
    put("_SUCCESS", b"")
    put("sub/b.jsonl.gz", gz(MANY))
    table = pa.table({"id": list(range(1000)), "text": ["t" * 100] * 1000})
    pq.write_table(table, f"{root.removeprefix('s3://')}/{DAY}/c.parquet", filesystem=s3_filesystem(), row_group_size=300, use_dictionary=False)
    folder = partitions(root)["2026-11-22"]
    assert folder == f"{root}/{DAY}" and partitions(folder + "/") == {"2026-11-22": folder}
    units = list_units(folder, 300_000)
    assert units[0].tag == hashlib.md5(MANY).hexdigest()  # the ETag of one PUT
    assert [u.file for u in units] == ["a.jsonl"] * 3 + ["c.parquet", "sub/b.jsonl.gz"]
    rows = [shown([r for _, r in read_unit(folder, u, None)]) for u in units]
    good = [f"{i:05d}" for i in range(20_000)]
    assert sum(rows[:3], []) == good and rows[4] == good and rows[3] == [str(i) for i in range(1000)]
    put("a.jsonl", MANY[:-1] + b" ")
    with pytest.raises(InputError, match=r"a\.jsonl changed"):
        list(read_unit(folder, units[0], None))
    client.delete_object(Bucket=s3_bucket, Key=f"dt=none/dump/{DAY}/a.jsonl")
    with pytest.raises(InputError, match=r"a\.jsonl changed"):
        list(read_unit(folder, units[0], None))
