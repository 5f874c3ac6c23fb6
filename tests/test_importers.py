"""What each format's reader makes of good and bad rows. Nothing is opened but the input itself."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mulcot_ray.errors import ConfigError, InputError, RowFault
from mulcot_ray.posts.fields import image_ref
from mulcot_ray.posts.importers import mvsa_label, read_posts, read_rationales
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import Post, Rationale, Reason, Reject, Sentiment, Source, Split

HEADER = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"
CONTRACT = load_recipe("paper").contract
COT = '"Text_analysis": "a"\n"Image_analysis": "b"\n"Conflict_resolution": "c"\n"Final_conclusion": "d"\n"Prediction": "positive"'


def read(fmt: str, path: Path, images: Path | str | None = None) -> list[Post | Reject]:
    return list(read_posts(fmt, str(path), name="n", images=None if images is None else str(images)))


def posts(rows: list[Post | Reject]) -> list[Post]:
    assert all(isinstance(r, Post) for r in rows), rows
    return [r for r in rows if isinstance(r, Post)]


def jsonl(path: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    path.write_bytes(b"".join((r if isinstance(r, bytes) else (r if isinstance(r, str) else json.dumps(r)).encode()) + b"\n" for r in rows))
    return path


def one_reject(path: Path, row: dict[str, Any] | str | bytes, images: Path | None = None) -> tuple[str, Reason]:
    [found] = read("jsonl", jsonl(path / "x.jsonl", row), images)
    assert isinstance(found, Reject) and found.stage == "import", found
    return found.post_id, found.reason


# --- tombert -------------------------------------------------------------------------------------------------------------


def test_tombert(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    file = tmp_path / "dev.tsv"
    file.write_text(HEADER + '1\t0\ta.jpg\tI "hate $T$ , $T$ \u2028 !\tthe "Mets\n2\t2\ta.jpg\t$T$ wins\tRays\r\n', encoding="utf-8")
    first, second = posts(read("tombert", file, tmp_path / "images"))
    assert first.text == 'I "hate the "Mets , the "Mets \u2028 !'
    assert (first.post_id, first.aspect, first.label) == ("n-1", 'the "Mets', Sentiment.NEGATIVE)
    assert first.source_id == second.source_id == "n-a.jpg"
    assert first.image_ref == str(tmp_path / "images" / "a.jpg")
    assert (second.text, second.aspect, second.label) == ("Rays wins", "Rays", Sentiment.POSITIVE)


def test_tombert_without_images_keeps_the_name_only(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text("\ufeff" + HEADER + "1\t1\ta.jpg\t$T$\tx\n", encoding="utf-8")
    [post] = posts(read("tombert", file))
    assert not post.has_image and post.meta == {"image": "a.jpg"}


def test_tombert_rejects(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    rows = [b"1\t1\ta.jpg\tfour columns", b"2\t3\ta.jpg\tt\tx", b"\t1\ta.jpg\tt\tx", b"4\t1\ta.jpg\tt\t ", b"5\t1\ta.jpg\t\tx",
            b"6\t1\ta.jpg\t\xff\tx",
            b"7\t1\t\tt\tx", b"8\t\ta.jpg\tt\tx", b"9\t1\ta.jpg\tt\tx", b"9\t1\ta.jpg\tt\ty", b"10\t1\t../a.jpg\tt\tx"]  # fmt: skip
    file.write_bytes(HEADER.encode() + b"\n".join(rows))
    found = read("tombert", file)
    assert [(r.post_id, r.reason) for r in found if isinstance(r, Reject)] == [
        ("dev.tsv:2", Reason.BAD_LINE),
        ("n-2", Reason.BAD_LABEL),
        ("dev.tsv:4", Reason.MISSING_FIELD),
        ("n-4", Reason.MISSING_FIELD),
        ("n-5", Reason.EMPTY_TEXT),
        ("dev.tsv:7", Reason.BAD_ENCODING),
        ("n-7", Reason.MISSING_FIELD),
        ("n-8", Reason.MISSING_FIELD),
        ("n-9", Reason.DUPLICATE_ID),
        ("n-10", Reason.BAD_VALUE),
    ]
    assert len(found) == len(rows)


# --- mulcot-json ---------------------------------------------------------------------------------------------------------


def item(number: Any, cot: Any = COT, **more: Any) -> dict[str, Any]:
    return {"text": "t", "label": "neutral", "aspect": "x", "image_id": "7", "id": number, "image_path": "7.jpg", "cot": cot, **more}


def test_mulcot_json(tmp_path: Path) -> None:
    file = tmp_path / "val.json"
    items = [item(1), item(2, None), item(3, "no sections"), item(4, label="angry"), item(5, 17), "no post", item(None), item(6, "\ud800" + COT)]
    file.write_text(json.dumps(items), encoding="utf-8")
    found = read("mulcot-json", file, tmp_path)
    good = [r for r in found if isinstance(r, Post)]
    assert [p.post_id for p in good] == ["n-1", "n-2", "n-3", "n-5", "n-6"]
    assert good[0].source_id == "n-7" and good[0].image_ref == str(tmp_path / "7.jpg") and good[0].meta == {}
    bad = [(r.post_id, r.reason) for r in found if isinstance(r, Reject)]
    assert bad == [("n-4", Reason.BAD_LABEL), ("val.json:[5]", Reason.BAD_LINE), ("val.json:[6]", Reason.MISSING_FIELD)]

    first, *others = list(read_rationales(str(file), name="n", contract=CONTRACT, model="m"))
    assert isinstance(first, Rationale)
    assert (first.post_id, first.source, first.model, first.contract) == ("n-1", Source.IMPORTED, "m", CONTRACT.hash)
    assert first.prediction is Sentiment.POSITIVE  # gold is neutral: importing is not teaching
    assert first.text_analysis == "a" and first.final_conclusion == "d"
    assert {r.post_id: r.reason for r in others if isinstance(r, Reject)} == {
        "n-2": Reason.MISSING_FIELD,
        "n-3": Reason.ANSWER_UNPARSED,
        "n-5": Reason.BAD_VALUE,
        "n-6": Reason.BAD_ENCODING,
    }
    assert {r.raw for r in others if isinstance(r, Reject) and r.post_id == "n-3"} == {"no sections"}


@pytest.mark.parametrize("content", ['{"text": "t"}', "[1, 2", "", "[]", "[" * 100_000])
def test_mulcot_json_of_another_kind(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError, match=r"x\.json"):
        read("mulcot-json", tmp_path / "x.json")


# --- mvsa ----------------------------------------------------------------------------------------------------------------


def mvsa(folder: Path, table: str, **texts: bytes) -> Path:
    (folder / "data").mkdir(parents=True)
    (folder / "labelResultAll.txt").write_text(table)
    for name, text in texts.items():
        (folder / "data" / f"{name.removeprefix('t')}.txt").write_bytes(text)
    return folder


def test_mvsa_single_and_encodings(tmp_path: Path) -> None:
    table = "ID\ttext,image\n1\tpositive,neutral\n2\tneutral,negative\n3\tneutral,neutral\n4\tnegative,negative\n5\tpositive,negative\n"
    folder = mvsa(
        tmp_path / "m", table, t1="\ufeffgrün ✓\r\n".encode(), t2=b"it\x92s", t3=b"\x81 caf\xe9", t4=b" \n", t5=b"ironic"
    )  # fmt: skip
    a, b, c, d, e = read("mvsa", folder)
    assert isinstance(a, Post) and isinstance(b, Post) and isinstance(c, Post)
    assert (a.post_id, a.source_id, a.text, a.label, a.aspect, a.meta) == ("n-1", "n-1", "grün ✓", Sentiment.POSITIVE, None, {})
    assert a.image_ref == str(folder / "data" / "1.jpg")
    assert (b.text, b.label, b.meta) == ("it’s", Sentiment.NEGATIVE, {"encoding": "cp1252"})
    assert (c.text, c.label, c.meta) == ("\x81 café", Sentiment.NEUTRAL, {"encoding": "latin-1"})
    assert isinstance(d, Reject) and (d.post_id, d.reason) == ("n-4", Reason.EMPTY_TEXT)
    assert isinstance(e, Reject) and (e.post_id, e.reason) == ("n-5", Reason.OPPOSED_MODALITIES)


def test_mvsa_multiple(tmp_path: Path) -> None:
    rows = ["1\tpositive,neutral\tpositive,neutral\tnegative,positive", "2\tpositive,neutral\tneutral,neutral\tnegative,neutral",
            "3\tpositive,neutral\tpositive,neutral", "4\tgood,neutral\tpositive,neutral\tpositive,neutral",
            "5\tpositive,positive\tneutral,positive\tpositive,neutral",
            "../6\tpositive,neutral\tpositive,neutral\tpositive,neutral", "\tpositive,neutral\tpositive,neutral\tpositive,neutral"]  # fmt: skip
    folder = mvsa(tmp_path / "m", "ID\ttext,image\ttext,image\ttext,image\n" + "\n".join(rows), t1=b"one")
    found = read("mvsa", folder)
    assert isinstance(found[0], Post) and found[0].label is Sentiment.POSITIVE
    assert [(r.post_id, r.reason) for r in found if isinstance(r, Reject)] == [
        ("n-2", Reason.NO_MAJORITY),
        ("labelResultAll.txt:4", Reason.BAD_LINE),
        ("n-4", Reason.BAD_LABEL),
        ("n-5", Reason.MISSING_FIELD),  # its text file is not there
        ("n-../6", Reason.BAD_VALUE),
        ("labelResultAll.txt:8", Reason.MISSING_FIELD),
    ]


@pytest.mark.parametrize(
    ("votes", "label"),
    [
        (["positive,positive"], "positive"),
        (["neutral,positive"], "positive"),
        (["negative,neutral"], "negative"),
        (["negative,positive"], Reason.OPPOSED_MODALITIES),
        (["neutral,neutral", "positive,neutral", "neutral,negative"], "neutral"),
        (["neutral,neutral", "positive,negative", "negative,negative"], Reason.NO_MAJORITY),
        (["neutral"], Reason.BAD_LABEL),
    ],
)
def test_mvsa_rule(votes: list[str], label: str | Reason) -> None:
    if isinstance(label, Reason):
        with pytest.raises(RowFault) as fault:
            mvsa_label(votes)
        assert fault.value.reason is label
    else:
        assert mvsa_label(votes) == label


# --- jsonl ---------------------------------------------------------------------------------------------------------------


def test_jsonl_fields(tmp_path: Path) -> None:
    row = {"id": "007", "text": "t", "aspect": "x", "image": "sub/a.png", "label": "Positive", "split": "test", "source_id": 12,
           "lang": "en", "likes": 3, "tags": ["ü"], "none": None, "long": "y" * 900}  # fmt: skip
    rows: list[dict[str, Any]] = [
        row,
        {"id": 7, "text": "u"},
        {"id": "7 ", "text": "v", "image": "s3://b/k.jpg", "aspect": ""},
        {"id": "8", "text": "w", "image_base64": "aGkK\naGkK"},
    ]
    a, b, c, d = posts(read("jsonl", jsonl(tmp_path / "x.jsonl", *rows), tmp_path))
    assert (a.post_id, a.source_id, a.label, a.split) == ("007", "12", Sentiment.POSITIVE, Split.TEST)
    assert a.image_ref == str(tmp_path / "sub" / "a.png")
    assert a.meta == {"lang": "en", "likes": "3", "tags": '["ü"]', "long": "y" * 500}
    assert (b.post_id, b.source_id, b.aspect, b.label, b.split, b.has_image) == ("7", "7", None, None, Split.UNLABELED, False)
    assert (c.post_id, c.image_ref, c.aspect) == ("7 ", "s3://b/k.jpg", None)
    assert d.image_bytes == b"hi\nhi\n" and d.image_ref is None


def test_jsonl_meta_is_limited(tmp_path: Path) -> None:
    [post] = posts(read("jsonl", jsonl(tmp_path / "x.jsonl", {"id": 1, "text": "t", **{f"k{i}": i for i in range(50)}, "\ud800": "\ud800"})))
    assert list(post.meta) == [f"k{i}" for i in range(20)]
    [post] = posts(read("jsonl", jsonl(tmp_path / "x.jsonl", {"id": 1, "text": "t", "\ud800": "\ud800"})))
    assert post.meta == {"?": "?"}


@pytest.mark.parametrize(
    ("row", "where", "reason"),
    [
        ("{", "x.jsonl:1", Reason.BAD_LINE),
        ("[1]", "x.jsonl:1", Reason.BAD_LINE),
        ("[" * 100_000, "x.jsonl:1", Reason.BAD_LINE),
        ('{"id": ' + "9" * 5000 + ', "text": "t"}', "x.jsonl:1", Reason.BAD_LINE),
        (b'{"id": "1", "text": "\xff"}', "x.jsonl:1", Reason.BAD_ENCODING),
        ({"text": "t"}, "x.jsonl:1", Reason.MISSING_FIELD),
        ({"id": "", "text": "t"}, "x.jsonl:1", Reason.MISSING_FIELD),
        ({"id": 1.0, "text": "t"}, "x.jsonl:1", Reason.BAD_VALUE),
        ({"id": True, "text": "t"}, "x.jsonl:1", Reason.BAD_VALUE),
        ({"id": "\ud800", "text": "t"}, "x.jsonl:1", Reason.BAD_ENCODING),
        ({"id": 1}, "1", Reason.MISSING_FIELD),
        ({"id": 1, "text": ""}, "1", Reason.EMPTY_TEXT),
        ({"id": 1, "text": " \n"}, "1", Reason.EMPTY_TEXT),
        ({"id": 1, "text": ["t"]}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "\udfff"}, "1", Reason.BAD_ENCODING),
        ({"id": 1, "text": "t", "label": "happy"}, "1", Reason.BAD_LABEL),
        ({"id": 1, "text": "t", "label": 2}, "1", Reason.BAD_LABEL),
        ({"id": 1, "text": "t", "split": "dev"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "aspect": 3}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image_base64": "%%%"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image_base64": "é"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image_bytes": "aGkK"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "../../etc/passwd"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "a/../../b.jpg"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "/etc/passwd"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "a\0.jpg"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "http://x/a.jpg"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "https://x/a.jpg"}, "1", Reason.BAD_VALUE),
        ({"id": 1, "text": "t", "image": "file:///etc/passwd"}, "1", Reason.BAD_VALUE),
    ],
)
def test_jsonl_rejects(tmp_path: Path, row: dict[str, Any] | str | bytes, where: str, reason: Reason) -> None:
    assert one_reject(tmp_path, row) == (where, reason)
    assert one_reject(tmp_path, row, tmp_path) == (where, reason)


def test_a_post_is_an_id_and_an_aspect(tmp_path: Path) -> None:
    rows = [
        {"id": i, "text": "t", "aspect": a}
        for i, a in (("1", "x"), ("1", "y"), ("1", "x"), ("1", None), ("1", None), ("2", None), ("2", None), ("1#y", "z"))
    ]
    found = read("jsonl", jsonl(tmp_path / "x.jsonl", *rows))
    assert [r.post_id if isinstance(r, Post) else r.reason.value for r in found] == [
        "1", "1#y", "duplicate_id", "1#", "duplicate_id", "2", "duplicate_id", "1#y#z",
    ]  # fmt: skip
    assert {r.source_id for r in found if isinstance(r, Post)} == {"1", "2", "1#y"}


def write_gz(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data[:20]) + gzip.compress(data[20:]))


def write_zst(path: Path, data: bytes) -> None:
    with pa.output_stream(str(path), compression="zstd") as f:
        f.write(data)


@pytest.mark.parametrize(("suffix", "write"), [("", Path.write_bytes), (".gz", write_gz), (".zst", write_zst)])
def test_jsonl_compressed_with_bom_and_line_separators(tmp_path: Path, suffix: str, write: Callable[[Path, bytes], object]) -> None:
    text = "\ufeff" + "\r\n\n".join(json.dumps({"id": f"00{i}", "text": "a\u2028b\x85c"}, ensure_ascii=False) for i in range(3))
    path = tmp_path / f"x.jsonl{suffix}"
    write(path, text.encode())
    assert [(p.post_id, p.text) for p in posts(read("jsonl", path))] == [(f"00{i}", "a\u2028b\x85c") for i in range(3)]


def test_jsonl_truncated_archive(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(b'{"id": %d, "text": "t"}\n' % i for i in range(10_000)))
    (tmp_path / "x.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=r"x\.jsonl\.gz cannot be read"):
        read("jsonl", tmp_path / "x.jsonl.gz")


def test_jsonl_very_long_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulcot_ray.posts.importers.MAX_LINE", 1000)
    path = jsonl(tmp_path / "x.jsonl", {"id": 1, "text": "t"}, {"id": 2, "text": "t" * 5000}, {"id": 3, "text": "t"})
    found = read("jsonl", path)
    assert [r.post_id for r in found] == ["1", "x.jsonl:2", "3"] and isinstance(found[1], Reject) and found[1].reason is Reason.BAD_LINE


def test_jsonl_folder(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    (folder / "b").mkdir(parents=True)
    jsonl(folder / "b" / "1.ndjson", {"id": 2, "text": "t"}, "{")
    jsonl(folder / "a.json", {"id": 1, "text": "t"})
    jsonl(folder / "_part.jsonl", {"id": 3, "text": "t"})
    (folder / "notes.txt").write_text("no data")
    assert [r.post_id for r in read("jsonl", folder)] == ["1", "2", "b/1.ndjson:2"]


# --- parquet -------------------------------------------------------------------------------------------------------------


def test_parquet(tmp_path: Path) -> None:
    columns: dict[str, Any] = {
        "id": [7, 8, 9], "text": ["a", None, "c"], "label": ["neutral", "neutral", "bad"], "image_bytes": pa.array([b"\x89PNG", None, None]),
        "score": [0.5, 1.0, None], "blob": pa.array([b"x", b"y", b"z"]),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    a, b, c = read("parquet", tmp_path / "x.parquet")
    assert isinstance(a, Post) and (a.post_id, a.image_bytes, a.meta) == ("7", b"\x89PNG", {"score": "0.5"})
    assert isinstance(b, Reject) and (b.post_id, b.reason) == ("8", Reason.MISSING_FIELD)
    assert isinstance(c, Reject) and (c.post_id, c.reason) == ("9", Reason.BAD_LABEL)


def test_parquet_with_a_string_that_is_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"id": ["007", "008", "009"], "text": texts}), tmp_path / "x.parquet")
    a, b, c = read("parquet", tmp_path / "x.parquet")
    assert isinstance(a, Post) and isinstance(c, Post) and a.post_id == "007"
    assert isinstance(b, Reject) and (b.post_id, b.reason) == ("x.parquet:2", Reason.BAD_ENCODING)


def test_parquet_of_another_kind(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [1], "body": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="no column text; there are id, body"):
        read("parquet", tmp_path / "x.parquet")
    (tmp_path / "y.parquet").write_bytes(b"not parquet")
    with pytest.raises(InputError, match=r"y\.parquet"):
        read("parquet", tmp_path / "y.parquet")


# --- the input as a whole ------------------------------------------------------------------------------------------------


def test_inputs_that_are_not_there_or_not_of_the_format(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "head.tsv").write_text(HEADER)
    (tmp_path / "wrong.tsv").write_text("id,text\n1,a\n")
    (tmp_path / "folder").mkdir()
    mvsa(tmp_path / "mvsa", "ID\tlabel\n1\tpositive\n")
    for fmt, name, message in [
        ("jsonl", "none.jsonl", "does not exist"),
        ("tombert", "none.tsv", "does not exist"),
        ("mulcot-json", "none.json", "does not exist"),
        ("parquet", "none.parquet", "does not exist"),
        ("mvsa", "none", "labelResultAll.txt"),
        ("mvsa", "mvsa", "does not start with"),
        ("jsonl", "empty.jsonl", "no rows"),
        ("tombert", "head.tsv", "no rows"),
        ("tombert", "wrong.tsv", "TomBERT header"),
        ("tombert", "empty.jsonl", "no rows"),
        ("tombert", "folder", "is a folder"),
        ("jsonl", "folder", "no file that ends in .jsonl"),
        ("parquet", "folder", "no file that ends in .parquet"),
    ]:
        with pytest.raises(InputError, match=message):
            read(fmt, tmp_path / name)
    with pytest.raises(ConfigError, match="'csv': one of tombert"):
        read("csv", tmp_path / "head.tsv")
    with pytest.raises(InputError, match="not fetched"):
        list(read_posts("jsonl", "https://x/a.jsonl", name="n"))


def test_images_folder_must_exist(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "x.jsonl", {"id": 1, "text": "t"})
    cases: list[tuple[Path | str, str]] = [(tmp_path / "none", "does not exist"), (file, "is no folder"), ("http://x/", "not fetched")]
    for images, message in cases:
        with pytest.raises(InputError, match=message):
            read("jsonl", file, images)


def test_image_names() -> None:
    assert image_ref("a/b.jpg", "s3://bucket/pics/") == "s3://bucket/pics/a/b.jpg"
    assert image_ref("~.jpg", "/pics") == "/pics/~.jpg"
    assert image_ref("a..b.jpg", "/pics") == "/pics/a..b.jpg"
    assert image_ref("a.jpg", None) is None
    with pytest.raises(RowFault, match="leads out"):
        image_ref("../other/a.jpg", "s3://bucket/pics")
