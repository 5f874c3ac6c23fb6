"""The import stage: every row accounted for, every picture opened, one result for one input."""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import os
import struct
import tempfile
import zlib
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mulcot_ray.artifacts import Manifest, begin, find, need, read_rows
from mulcot_ray.errors import Busy, ConfigError, ConservationError, InputError, RecipeChanged
from mulcot_ray.posts import importing
from mulcot_ray.posts.importing import SPLITS, import_posts, import_sample, split_of
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import Post, Reason, Reject, Split, from_row
from mulcot_ray.storage import Store

CONTRACT = load_recipe("paper").contract
DATA = Path(os.environ.get("MULCOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
COT = '"Text_analysis": "a"\n"Image_analysis": "b"\n"Conflict_resolution": "c"\n"Final_conclusion": "d"\n"Prediction": "positive"'


def picture(fmt: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (40, 30), colour: int = 90) -> bytes:
    out = io.BytesIO()
    Image.new(mode, size, (colour,) * len(mode)).save(out, fmt)
    return out.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a hundred bytes that says it has side² pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, file: Path, name: str = "n", fmt: str = "jsonl", **options: Any) -> tuple[Store, Manifest, bool]:
    store = Store(str(tmp_path / "root"))
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    manifest, fresh = import_posts(store, name, fmt, str(file), contract=CONTRACT, **options)
    return store, manifest, fresh


def posts_of(store: Store, manifest: Manifest) -> list[Post]:
    return [from_row(Post, r) for r in read_rows(store, manifest)]


def rejects_of(store: Store, manifest: Manifest) -> dict[str, Reason]:
    return {r.post_id: r.reason for r in (from_row(Reject, x) for x in read_rows(store, manifest, rejects=True))}


# --- pictures ------------------------------------------------------------------------------------------------------------


def test_pictures_are_opened(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    files = {
        "png-named.jpg": picture("PNG"), "rgba.png": picture("PNG", "RGBA"), "ok.jpg": picture("JPEG"),
        "cut.jpg": picture("JPEG", size=(300, 300))[:500],
        "empty.jpg": b"", "text.jpg": b"<html>",
        "bomb.png": bomb(10_000), "huge.png": bomb(100_000), "thin.png": picture(size=(900, 9)), "tiny.png": picture(size=(4, 4)),
    }  # fmt: skip
    for name, data in files.items():
        (images / name).write_bytes(data)
    rows = [{"id": name, "text": "t", "image": name} for name in [*files, "absent.jpg", ".", "x" * 300]]
    inline = picture("JPEG", colour=1)
    rows += [
        {"id": "inline", "text": "t", "image_base64": base64.b64encode(inline).decode()},
        {"id": "bad inline", "text": "t", "image_base64": "aGkK"},
    ]
    rows += [{"id": "no picture", "text": "t"}]
    store, manifest, _ = run(tmp_path, write(tmp_path / "x.jsonl", rows), images=images)
    posts = {p.post_id: p for p in posts_of(store, manifest)}
    assert list(posts) == ["png-named.jpg", "rgba.png", "ok.jpg", "inline", "no picture"]
    for name in ("png-named.jpg", "rgba.png", "ok.jpg"):
        assert posts[name].image_ref == str(images / name) and posts[name].image_bytes is None
        assert posts[name].image_sha256 == hashlib.sha256(files[name]).hexdigest()
    assert (posts["inline"].image_bytes, posts["inline"].image_sha256) == (inline, hashlib.sha256(inline).hexdigest())
    assert not posts["no picture"].has_image
    rejects = rejects_of(store, manifest)
    assert rejects.pop("huge.png") in (Reason.IMAGE_TOO_LARGE, Reason.IMAGE_UNREADABLE)  # Pillow's own limit comes first
    assert rejects == {
        "cut.jpg": Reason.IMAGE_UNREADABLE, "empty.jpg": Reason.IMAGE_UNREADABLE, "text.jpg": Reason.IMAGE_UNREADABLE,
        "bomb.png": Reason.IMAGE_TOO_LARGE, "thin.png": Reason.IMAGE_BAD_SHAPE, "tiny.png": Reason.IMAGE_BAD_SHAPE,
        "absent.jpg": Reason.IMAGE_MISSING, ".": Reason.IMAGE_MISSING,
        "x" * 300: Reason.IMAGE_UNREADABLE, "bad inline": Reason.IMAGE_UNREADABLE,
    }  # fmt: skip
    assert (manifest.rows_in, manifest.rows, manifest.rejects) == (16, 5, 11)
    assert manifest.stats["images"] == 4


def test_embedded_pictures_and_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "x.jsonl", [{"id": i, "text": "t", "image": "a.png"} for i in range(3)])
    store, kept, _ = run(tmp_path, file, "kept", images="images")
    assert {p.image_ref for p in posts_of(store, kept)} == {str(tmp_path / "images" / "a.png")}
    store, embedded, _ = run(tmp_path, file, "embedded", images="images", embed_images=True)
    assert {(p.image_ref, p.image_bytes) for p in posts_of(store, embedded)} == {(None, picture())}


def test_each_picture_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(picture())
    opened: Counter[str | bytes] = Counter()
    look = importing._look
    monkeypatch.setattr(importing, "_look", lambda image, keep: (opened.update([image]), look(image, keep))[1])
    file = write(tmp_path / "x.jsonl", [{"id": i, "text": "t", "image": "a.png" if i % 2 else "gone.png"} for i in range(200)])
    _, manifest, _ = run(tmp_path, file, images=tmp_path)
    assert opened == {str(tmp_path / "a.png"): 1, str(tmp_path / "gone.png"): 1}
    assert (manifest.rows, manifest.rejects_by_reason) == (100, {"image_missing": 100})


# --- splits --------------------------------------------------------------------------------------------------------------


def test_split_of_is_fixed_and_near_its_ratios() -> None:
    drawn = Counter(split_of(f"s{i}", 42) for i in range(20_000))
    assert all(abs(drawn[s] / 20_000 - r) < 0.01 for s, r in zip(SPLITS, (0.8, 0.1, 0.1), strict=True))
    # Frozen: a change here would move posts between the splits of data sets that exist.
    assert [split_of(f"s{i}", 42).value[:2] for i in range(12)] == ["tr", "tr", "tr", "tr", "va", "tr", "tr", "tr", "tr", "tr", "tr", "tr"]
    assert {split_of(f"s{i}", 1, (0, 1, 0)) for i in range(50)} == {Split.VALIDATION}
    assert [split_of(f"s{i}", 1) for i in range(50)] != [split_of(f"s{i}", 2) for i in range(50)]


def test_ratios_keep_a_source_together(tmp_path: Path) -> None:
    rows = [{"id": i, "text": "t", "source_id": f"s{i % 60}", "split": "test"} for i in range(300)]
    store, manifest, _ = run(tmp_path, write(tmp_path / "x.jsonl", rows), ratios=(6, 2, 2))
    splits = defaultdict(set)
    for p in posts_of(store, manifest):
        splits[p.source_id].add(p.split)
    assert len(splits) == manifest.stats["sources"] == 60 and all(len(s) == 1 for s in splits.values())
    assert set(manifest.stats["splits"]) == {"train", "validation", "test"}
    store, again, _ = run(tmp_path, write(tmp_path / "y.jsonl", list(reversed(rows))), "m", ratios=(6, 2, 2))
    assert {p.source_id: p.split for p in posts_of(store, again)} == {k: next(iter(v)) for k, v in splits.items()}


def test_own_split_and_forced_split(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"id": 1, "text": "t", "split": "validation"}, {"id": 2, "text": "t", "label": "positive"}])
    store, own, _ = run(tmp_path, file, "own")
    assert [p.split for p in posts_of(store, own)] == [Split.VALIDATION, Split.UNLABELED]
    assert own.stats == {"splits": {"unlabeled": 1, "validation": 1}, "labels": {"positive": 1}, "aspects": 0, "images": 0, "sources": 2}
    store, forced, _ = run(tmp_path, file, "forced", split=Split.TRAIN)
    assert {p.split for p in posts_of(store, forced)} == {Split.TRAIN}


@pytest.mark.parametrize("options", [{"split": Split.TRAIN, "ratios": (8, 1, 1)}, {"ratios": (0, 0, 0)}, {"ratios": (1, -1, 1)}, {"ratios": (1, 1)}])
def test_bad_split_options(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="--ratios"):
        run(tmp_path, write(tmp_path / "x.jsonl", [{"id": 1, "text": "t"}]), **options)


# --- once, whole, in parts -----------------------------------------------------------------------------------------------


def test_second_run_is_skipped_and_a_changed_one_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [{"id": 1, "text": "t"}])
    store, first, fresh = run(tmp_path, file)
    again, other = run(tmp_path, file), run(tmp_path, file.rename(tmp_path / "moved.jsonl"))
    assert fresh and (again[1:], other[1:]) == ((first, False), (first, False))
    file = tmp_path / "moved.jsonl"
    changes: dict[str, dict[str, Any]] = {
        "split": {"split": Split.TEST}, "ratios": {"ratios": (8, 1, 1)}, "images": {"images": tmp_path}, "embed": {"embed_images": True}
    }  # fmt: skip
    for what, options in changes.items():
        with pytest.raises(RecipeChanged, match=what):
            run(tmp_path, file, **options)
    run(tmp_path, file, seed=7)  # nothing is drawn: the seed does not matter
    with pytest.raises(RecipeChanged, match="input"):
        run(tmp_path, write(file, [{"id": 2, "text": "t"}]))
    assert find(store, "posts", "n") == first


def test_parts_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "PART_ROWS", 40)
    rows = [{"id": i, "text": "" if i % 10 == 0 else "t"} for i in range(1000)]
    told: list[tuple[int, int]] = []
    store, manifest, _ = run(tmp_path, write(tmp_path / "x.jsonl", rows), progress=lambda n, bad: told.append((n, bad)))
    assert [p.post_id for p in posts_of(store, manifest)] == [str(i) for i in range(1000) if i % 10]
    assert list(rejects_of(store, manifest)) == [str(i) for i in range(0, 1000, 10)]
    assert [f["rows"] for n, f in manifest.files.items() if "/" not in n] == [40] * 22 + [20]
    assert [f["rows"] for n, f in manifest.files.items() if "/" in n] == [40, 40, 20]
    assert told[0] == (100, 10) and told[-1] == (1000, 100)
    monkeypatch.setattr(importing, "PART_BYTES", 5 * len(picture()))
    pictures = [{"id": i, "text": "t", "image_base64": base64.b64encode(picture()).decode()} for i in range(12)]
    _, by_size, _ = run(tmp_path, write(tmp_path / "y.jsonl", pictures), "by-size")
    assert [f["rows"] for f in by_size.files.values()] == [5, 5, 2]
    monkeypatch.setattr(importing, "GROUP_BYTES", 2 * len(picture()))
    store, grouped, _ = run(tmp_path, tmp_path / "y.jsonl", "grouped")
    meta = pq.read_metadata(store.path("posts/grouped/part-00000.parquet"), filesystem=store.fs)
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [2, 2, 1] and grouped.rows == 12


def test_killed_import_starts_again_though_pictures_came_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "PART_ROWS", 10)
    (tmp_path / "a.png").write_bytes(picture())
    file = write(tmp_path / "x.jsonl", [{"id": i, "text": "t", "image": "b.png" if i % 2 else "a.png"} for i in range(100)])

    def kill(rows: int, rejects: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, file, images=tmp_path, progress=kill)
    store = Store(str(tmp_path / "root"))
    assert len(store.files("posts/n")) > 5 and find(store, "posts", "n") is None
    (tmp_path / "b.png").write_bytes(picture())
    _, manifest, fresh = run(tmp_path, file, images=tmp_path)
    assert fresh and [p.post_id for p in posts_of(store, manifest)] == [str(i) for i in range(100)]


def test_unreadable_input_leaves_nothing(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"id": i, "text": os.urandom(30).hex()}) + "\n" for i in range(9000)).encode())
    file.write_bytes(whole[:-1000])
    with pytest.raises(InputError):
        run(tmp_path, file)
    assert Store(str(tmp_path / "root")).files("posts") == {}
    file.write_bytes(whole)
    assert run(tmp_path, file)[1].rows == 9000


def test_a_result_published_meanwhile_is_not_touched(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    late = begin(store, "posts", "n", {"a": 1})
    early = begin(store, "posts", "n", {"a": 1})
    assert not isinstance(late, Manifest) and not isinstance(early, Manifest)
    with early, importing._whole(early):
        out = importing._Parts(early)
        out.add(Post("1", "1", "t"))
        out.flush()
        manifest = early.commit(1)
    with pytest.raises(Busy, match="finished"), late, importing._whole(late):
        pass
    assert [p.post_id for p in posts_of(store, manifest)] == ["1"]


def test_lost_rows_are_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing._Parts, "flush", lambda self: None)
    with pytest.raises(ConservationError):
        run(tmp_path, write(tmp_path / "x.jsonl", [{"id": 1, "text": "t"}]))


# --- formats from end to end ---------------------------------------------------------------------------------------------


def test_mulcot_json_makes_two_tables(tmp_path: Path) -> None:
    (tmp_path / "7.jpg").write_bytes(picture("JPEG"))
    row = {"text": "t", "label": "neutral", "aspect": "x", "image_id": "7", "image_path": "7.jpg", "cot": COT}
    items = [row | {"id": 1}, row | {"id": 2, "image_path": "8.jpg"}, row | {"id": 2}, row | {"id": 3, "cot": None},
             row | {"id": 4, "label": "positive"}, row | {"id": 1}, row | {"id": None}, row | {"id": 5, "cot": "Prediction: neutral"}]  # fmt: skip
    file = tmp_path / "val.json"
    file.write_text(json.dumps(items))
    store, posts, fresh = run(tmp_path, file, fmt="mulcot-json", images=tmp_path, split=Split.VALIDATION)
    assert fresh and (posts.rows_in, posts.rows) == (8, 4)
    assert posts.rejects_by_reason == {"image_missing": 1, "duplicate_id": 2, "missing_field": 1}
    rationales = need(store, "rationales", "n")
    assert (rationales.rows_in, rationales.rows, rationales.rejects) == (4, 2, 2)
    assert [(r["post_id"], r["prediction"], r["model"]) for r in read_rows(store, rationales)] == [
        ("n-1", "positive", "imported"),
        ("n-4", "positive", "imported"),
    ]
    assert rejects_of(store, rationales) == {"n-3": Reason.MISSING_FIELD, "n-5": Reason.SECTIONS_MISSING}
    assert rationales.stats == {"sources": {"imported": 2}, "agreement": 0.5}
    assert rationales.identity["posts"] == posts.fingerprint

    assert not run(tmp_path, file, fmt="mulcot-json", images=tmp_path, split=Split.VALIDATION)[2]
    store.delete("rationales/n/manifest.json")  # killed between the two tables
    assert run(tmp_path, file, fmt="mulcot-json", images=tmp_path, split=Split.VALIDATION)[2]
    with pytest.raises(RecipeChanged, match="model"):
        run(tmp_path, file, fmt="mulcot-json", images=tmp_path, split=Split.VALIDATION, model="other")


def test_mvsa_and_tombert(tmp_path: Path) -> None:
    data = tmp_path / "mvsa" / "data"
    data.mkdir(parents=True)
    (data.parent / "labelResultAll.txt").write_text("ID\ttext,image\n1\tpositive,neutral\n2\tneutral,neutral\n")
    for i in (1, 2):
        (data / f"{i}.txt").write_text(f"text {i}")
    (data / "1.jpg").write_bytes(picture("JPEG"))
    store, manifest, _ = run(tmp_path, data.parent, "mvsa", "mvsa")
    assert [p.image_ref for p in posts_of(store, manifest)] == [str(data / "1.jpg")]
    assert rejects_of(store, manifest) == {"mvsa-2": Reason.IMAGE_MISSING}
    (data / "2.txt").write_text("text changed")
    with pytest.raises(RecipeChanged, match="input"):
        run(tmp_path, data.parent, "mvsa", "mvsa")
    file = tmp_path / "dev.tsv"
    header = "index\t#1 Label\t#2 ImageID\t#3 String\t#3 String\n"
    file.write_text(header + "1\t1\t1.jpg\t$T$ plays\tAnn\n2\t1\t3.jpg\t$T$ plays\tAnn\n")
    store, manifest, _ = run(tmp_path, file, "dev", "tombert", images=data)
    assert [p.text for p in posts_of(store, manifest)] == ["Ann plays"] and manifest.rejects_by_reason == {"image_missing": 1}


def test_sample(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    manifest, fresh = import_sample(store, "sample", train=30, validation=10, test=0, seed=1)
    assert fresh and manifest.stats["splits"] == {"train": 30, "validation": 10} and manifest.stats["images"] == manifest.stats["aspects"] == 40
    assert all(p.image_sha256 == hashlib.sha256(p.image_bytes or b"").hexdigest() for p in posts_of(store, manifest))
    assert import_sample(store, "sample", train=30, validation=10, test=0, seed=1) == (manifest, False)
    with pytest.raises(RecipeChanged, match="seed"):
        import_sample(store, "sample", train=30, validation=10, test=0, seed=2)
    with pytest.raises(ConfigError, match="one must be positive"):
        import_sample(store, "none", train=0, validation=0, test=0, seed=1)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["007", "a.png", "../x", "positive", "aGkK"])
fields = st.sampled_from(["id", "text", "aspect", "image", "image_base64", "image_bytes", "label", "split", "source_id", "x", "cot"])
objects = st.dictionaries(fields, values | st.lists(values, max_size=2) | st.dictionaries(st.text(max_size=3), values, max_size=2), max_size=8)
likely = st.fixed_dictionaries(
    {"id": st.integers(0, 5), "text": st.text(min_size=1, max_size=5)}, optional={"aspect": st.sampled_from("ab"), "x": values}
)
lines = st.lists(st.binary(max_size=30) | (objects | likely).map(lambda o: json.dumps(o).encode()), max_size=20)


@given(lines)
@settings(max_examples=60, deadline=None)
def test_no_line_vanishes(content: list[bytes]) -> None:
    raw = b"\n".join(content)
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        (tmp / "a.png").write_bytes(picture())
        (tmp / "x.jsonl").write_bytes(raw)

        def counts(line: bytes, first: bool) -> bool:
            try:
                return bool(line.rstrip(b"\r").decode("utf-8-sig" if first else "utf-8").strip())
            except UnicodeDecodeError:
                return True

        wanted = sum(counts(line, i == 0) for i, line in enumerate(raw.split(b"\n")))
        if not wanted:
            with pytest.raises(InputError):
                run(tmp, tmp / "x.jsonl", images=tmp)
            return
        store, manifest, _ = run(tmp, tmp / "x.jsonl", images=tmp)
        ids = [p.post_id for p in posts_of(store, manifest)]
        assert manifest.rows_in == wanted == len(ids) + len(list(read_rows(store, manifest, rejects=True)))
        assert len(set(ids)) == len(ids)


# --- the real data -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (DATA / "t15" / "dev.tsv").exists(), reason="Twitter-2015 is not here (MULCOT_DATA)")
def test_real_twitter_2015(tmp_path: Path) -> None:
    t15 = DATA / "t15"
    store, dev, _ = run(tmp_path, t15 / "dev.tsv", "dev", "tombert", images=t15 / "images", split=Split.VALIDATION)
    assert (dev.rows, dev.rejects, dev.stats["images"], dev.stats["sources"]) == (1122, 0, 1122, 727)
    assert dev.stats["labels"] == {"negative": 149, "neutral": 670, "positive": 303}
    _, train, _ = run(tmp_path, t15 / "train.tsv", "train", "tombert")
    assert (train.rows, train.rejects, train.stats["images"]) == (3179, 0, 0)
    _, val, _ = run(tmp_path, t15 / "val_rationales.json", "val", "mulcot-json", images=t15 / "images")
    assert (val.rows, val.rejects) == (1122, 0)
    rationales = need(store, "rationales", "val")
    assert (rationales.rows_in, rationales.rows, rationales.rejects_by_reason) == (1122, 1121, {"sections_missing": 1})
