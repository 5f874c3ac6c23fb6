"""Exact and near duplicates of a posts table, on a real local Ray; and their join against the comparison of all pairs."""

import io
import math
import os
import random
import time
import tracemalloc
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mulcot_ray.artifacts import begin, find, need, read_rows
from mulcot_ray.errors import ConfigError, RecipeChanged
from mulcot_ray.posts import duplicates as module
from mulcot_ray.posts.duplicates import Duplicate, Signatures, conflicts, duplicates, group, image_hash, normalised, text_signature
from mulcot_ray.posts.importing import import_posts
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.recipe import load_recipe
from mulcot_ray.records import Post, Sentiment, Split, to_table
from mulcot_ray.storage import Store

DATA = Path(os.environ.get("MULCOT_DATA", Path(__file__).parents[2] / "shared" / "data"))
TWEET = "Better than # panda ! Live cam of California condors at Hopper Mountain # WildlifeRefuge , CA . https://t.co/90KDQQs9UE"
POS, NEU, NEG = Sentiment.POSITIVE, Sentiment.NEUTRAL, Sentiment.NEGATIVE


def quiet(*_):
    pass


def photo(seed: int, fmt: str = "PNG", side: int = 240, **options) -> bytes:
    """Soft blotches, as in a photo out of focus."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(small).resize((240, 240), Image.Resampling.BICUBIC).resize((side, side)).save(sink, fmt, **options)
    return sink.getvalue()


def write(store: Store, name: str, *files: list[Post]) -> None:
    with begin(store, "posts", name, {"made": name}) as run:
        for i, posts in enumerate(files):
            run.write_table(f"part-{i:05d}", to_table(Post, posts), rows_per_group=5)
        run.commit(sum(map(len, files)), stats={})


def post(post_id: str, text: str = TWEET, split: Split = Split.TRAIN, **more) -> Post:
    return Post(post_id, post_id, text, split=split, **more)


def table_of(store: Store, manifest) -> dict[str, Duplicate]:
    return {r["post_id"]: Duplicate(**r) for r in read_rows(store, manifest)}


def similarity(a: str, b: str) -> float:
    x, y = (np.frombuffer(text_signature(t), np.uint8) for t in (a, b))
    return float((x == y).mean())


# The texts and the pictures


@pytest.mark.parametrize(
    "text",
    [
        "rt @user: so #good, isn't it? https://t.co/90KDQQs9UE",
        "RT @ user :  SO # good , isn't it ?",
        "RT @user: so #good, isn't it? pic.twitter.com/abc",
        "rt @user : so # good , isn't it ? https : t . co 90KDQQs9UE",
        "rt @user : so # good , isn't it ? http : / / t . co / 90KDQQs9UE",
        "rt @user : so # good , isn't it ? http : . . .",
        "rt @user : so # good , isn't it ? http",
    ],
)
def test_what_does_not_count_is_taken_out(text):
    assert normalised(text) == "rt@user:so#good,isn't it?"


def test_what_counts_stays():
    assert normalised("a http b") == "a http b" and normalised("Café") == normalised("Cafe\u0301") == "café"
    assert normalised("see www.example.org/x now") == "see now" and normalised("@ann") != normalised("@ben")
    assert normalised(" https://t.co/a ") == "" and text_signature("https://t.co/a") is None
    assert text_signature("ok") == text_signature(" OK ") != text_signature("no")


def test_similar_texts_and_the_threshold():
    """Real pairs: the first say the same, the others are about different people."""
    assert similarity(TWEET, TWEET.replace(" !", "").replace("https://t.co/90KDQQs9UE", "")) >= 0.85
    a = "RT @ 1DAlert : The boys on stage in Buenos Aires , Argentina last night ! ( 3 5 14 ) # 33"
    assert similarity(a, a.replace("The boys", "Niall").replace("33", "36")) < 0.8
    b = "Missed {} ' s live performance ? Watch whole concert here . Now !"
    assert similarity(b.format("@ djfive"), b.format("@ ForeignerMusic")) < 0.75


def test_the_estimate_is_the_jaccard_similarity():
    rng, off, letters = random.Random(0), [], "abcdefghijklmnopqrstuvwxyz    "
    for _ in range(100):
        a = "".join(rng.choices(letters, k=rng.randrange(30, 140)))
        b = a[: rng.randrange(20)] + "".join(rng.choices(letters, k=rng.randrange(10))) + a[20:]
        x, y = ({t[i : i + 5] for i in range(len(t) - 4)} for t in map(normalised, (a, b)))
        off.append(similarity(a, b) - len(x & y) / len(x | y))
    assert abs(np.mean(off)) < 0.02 and np.std(off) < 0.06


def test_a_copy_of_a_picture_is_near_and_another_picture_is_not():
    original = image_hash(photo(1))
    for copy in (photo(1, "JPEG", quality=60), photo(1, "WEBP", side=120), photo(1, "JPEG", side=100, quality=50)):
        assert (image_hash(copy) ^ original).bit_count() <= 4
    assert min((image_hash(photo(s)) ^ original).bit_count() for s in range(2, 12)) > 10


# The join


def signatures(seed: int, n: int, *, drift: bool) -> Signatures:
    """Posts around a few texts and pictures, each some steps off; with `drift` often some steps off the post before."""
    rng = np.random.default_rng(seed)
    texts, hashes = rng.integers(0, 256, (4, 128), dtype=np.uint8), rng.integers(0, 2**63, 2, dtype=np.uint64)
    pictured, split, aspect = rng.random(n) < 0.6, rng.integers(0, 2, n).astype(np.int8), rng.integers(0, 2, n)
    content = rng.integers(0, 2 * n, (2, n)).astype(np.uint64)
    out, phash = np.empty((n, 128), np.uint8), np.empty(n, np.uint64)
    for i in range(n):
        follows = drift and i > 0 and rng.random() < 0.8
        pictured[i] = pictured[i - 1] if follows else pictured[i]
        out[i], phash[i] = (out[i - 1], phash[i - 1]) if follows else (texts[rng.integers(4)], hashes[rng.integers(2)])
        steps = rng.choice(128, rng.integers(0, 14), replace=False)
        out[i][steps] = rng.integers(0, 256, len(steps))
        for bit in rng.integers(0, 64, rng.integers(0, 4)):
            phash[i] ^= np.uint64(1 << int(bit))
        if i % 9 == 8:  # an exact copy, sometimes in another split
            j = rng.integers(i)
            content[:, i], out[i], phash[i], pictured[i], aspect[i] = content[:, j], out[j], phash[j], pictured[j], aspect[j]
    phash[~pictured] = 0
    block = (split * 4 + aspect * 2 + pictured).astype(np.uint64)
    return Signatures(content, split, rng.integers(-1, 3, n).astype(np.int8), block, np.ones(n, bool), pictured, phash, out)


def compare_all(s: Signatures, text_similarity: float | None, distance: int) -> tuple[list[int], list[bool]]:
    """The definition, row by row."""
    n, first, exact, kept = len(s.split), {}, [], []
    for i in range(n):
        exact.append(first.setdefault((s.split[i], *s.content[:, i]), i))
    best, near = list(exact), [False] * n
    if text_similarity is None:
        return best, near
    for i in range(n):
        if exact[i] != i:
            best[i], near[i] = best[exact[i]], near[exact[i]]
            continue
        for k in kept:
            equal = int((s.texts[i] == s.texts[k]).sum())
            if s.block[i] == s.block[k] and int(s.phash[i] ^ s.phash[k]).bit_count() <= distance and equal >= math.ceil(text_similarity * 128):
                best[i], near[i] = k, True
                break
        else:
            kept.append(i)
    return best, near


@pytest.mark.parametrize("drift", [False, True])
@pytest.mark.parametrize(("text_similarity", "distance"), [(0.85, 4), (0.7, 10), (0.96, 0), (1.0, 2), (None, 4)])
def test_the_join_equals_the_comparison_of_all_pairs(text_similarity, distance, drift):
    found = 0
    for seed in range(6):
        s = signatures(seed, 90, drift=drift)
        g, (best, near) = group(s, text_similarity, distance), compare_all(s, text_similarity, distance)
        assert g.representative.tolist() == best and g.near.tolist() == near
        rows = np.flatnonzero(g.representative != np.arange(90))
        assert (g.representative[rows] < rows).all() and (g.representative[g.representative] == g.representative).all()
        equal = (s.texts[rows] == s.texts[g.representative[rows]]).sum(axis=1)
        assert (g.matches[rows] == equal).all() and (equal >= 128 * (text_similarity or 1)).all()
        found += len(rows)
    assert found > 20


def test_a_chain_is_no_group():
    """b resembles a, c resembles b alone: c is kept, and d, which resembles c, is its duplicate."""
    texts = np.zeros((4, 128), np.uint8)
    for i in range(4):
        texts[i, : 15 * i] = 1
    one, none = np.ones(4, bool), np.zeros(4, np.uint64)
    content = np.arange(8, dtype=np.uint64).reshape(2, 4)
    g = group(Signatures(content, np.zeros(4, np.int8), np.zeros(4, np.int8), none, one, ~one, none, texts), 0.85, 4)
    assert g.representative.tolist() == [0, 0, 2, 2] and g.matches.tolist() == [128, 113, 128, 113]


def test_content_in_two_splits_is_counted_not_joined():
    content = np.array([[5, 5, 6, 7, 7, 8], [1, 1, 1, 1, 1, 1]], np.uint64)
    split = np.array([0, 2, 0, 1, 1, 0], np.int8)
    nothing = np.zeros(6, np.uint64)
    s = Signatures(content, split, split, nothing, np.zeros(6, bool), np.zeros(6, bool), nothing, np.zeros((6, 128), np.uint8))
    g = group(s, 0.85, 4)
    assert g.across_splits == 2 and g.representative.tolist() == [0, 1, 2, 3, 3, 5] and not g.near.any()


def test_a_large_table_is_joined_in_little_memory():
    """100,000 posts, a tenth of them near copies, and 5,000 that share one text, each with another picture."""
    n, rng = 100_000, np.random.default_rng(0)
    texts, phash = rng.integers(0, 256, (n, 128), dtype=np.uint8), rng.integers(1, 2**63, n).astype(np.uint64)
    copies = np.arange(n // 2, n, 5)
    texts[copies], phash[copies] = texts[copies - n // 2], phash[copies - n // 2] ^ np.uint64(5)
    texts[copies, :10] ^= 1
    texts[n // 2 + 1 : n // 2 + 25_000 : 5] = texts[1]
    s = Signatures(
        rng.integers(0, 2**63, (2, n)).astype(np.uint64), np.zeros(n, np.int8), np.zeros(n, np.int8), np.zeros(n, np.uint64), np.ones(n, bool),
        np.ones(n, bool), phash, texts,
    )  # fmt: skip
    held = sum(getattr(s, f.name).nbytes for f in fields(s) if f.name != "texts") / n
    tracemalloc.start()
    started = time.process_time()
    g = group(s, 0.85, 4)
    seconds, peak = time.process_time() - started, tracemalloc.get_traced_memory()[1] / n
    tracemalloc.stop()
    assert (g.representative[copies] == copies - n // 2).all() and g.near.sum() == len(copies)
    assert held == 36 and peak < 90 and seconds < 20


# The table


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    """posts/p: two files, with every case."""
    store = Store(str(tmp_path_factory.mktemp("duplicates")))
    missing = str(tmp_path_factory.mktemp("pictures") / "gone.png")
    plain, twin = photo(1), photo(2)
    first = [
        post("original", image_bytes=plain, label=POS),
        post("other-picture", image_bytes=twin, label=NEG),
        post("with-aspect", image_bytes=plain, aspect="Hopper Mountain", label=POS),
        post("no-picture", label=POS),
        post("café", "Café de\u0301ja vu , a long day at the office and no end in sight", label=NEU),
        post("gone", image_ref=missing),
    ]
    second = [
        post("exact", TWEET.replace(" ", "  ") + "\n", image_bytes=plain, label=NEG),
        post("other-aspect", image_bytes=plain, aspect="California", label=NEG),
        post("edited", TWEET.replace(" !", "").replace("https://t.co/90KDQQs9UE", "https://t.co/x"), image_bytes=plain, label=POS),
        post("reencoded", image_bytes=photo(1, "JPEG", quality=60)),
        post("resized", TWEET.upper(), image_bytes=photo(1, "JPEG", side=120, quality=80), label=NEG),
        post("aspect-in-capitals", image_bytes=plain, aspect="HOPPER mountain"),
        post("words-only", TWEET.replace(" !", "")),
        post("decomposed", "Cafe\u0301 déja vu , a long day at the office and no end in sight", label=POS),
        post("gone-too", image_ref=missing),
        post("gone-known", image_ref=missing, image_sha256="ab" * 32),
        post("gone-known-too", image_ref=missing, image_sha256="ab" * 32),
        post("leaked", image_bytes=plain, split=Split.TEST),
        post("link", "https://t.co/a"),
        post("link-too", "https://t.co/b"),
        post("another", "Something else altogether , about the weather in the north", image_bytes=plain),
    ]
    write(store, "p", first, second)
    return store


@pytest.mark.ray
def test_duplicates(store, runtime, ray_session):
    seen = []
    manifest, fresh = duplicates(store, "d", posts="p", runtime=runtime, progress=lambda *a: seen.append(a))
    assert fresh and seen[-1] == (21, 21, 0) and manifest == need(store, "duplicates", "d")
    rows = table_of(store, manifest)
    assert {i: (r.kind, r.representative) for i, r in rows.items()} == {
        "exact": ("exact", "original"),
        "edited": ("near", "original"),
        "reencoded": ("near", "original"),
        "resized": ("near", "original"),
        "aspect-in-capitals": ("near", "with-aspect"),
        "words-only": ("near", "no-picture"),
        "decomposed": ("exact", "café"),
        "gone-known-too": ("exact", "gone-known"),
    }
    exact, edited, resized = rows["exact"], rows["edited"], rows["resized"]
    assert (exact.file, exact.row, exact.rep_file, exact.rep_row) == ("part-00001.parquet", 0, "part-00000.parquet", 0)
    assert (exact.similarity, exact.distance, exact.split, exact.label, exact.rep_label) == (1.0, 0, "train", "negative", "positive")
    assert 0.85 <= edited.similarity < 1 and edited.distance == 0 and not edited.conflict
    assert resized.similarity == 1 and resized.distance <= 4 and rows["words-only"].distance is None and rows["reencoded"].label is None
    assert rows["gone-known-too"].rep_file == "part-00001.parquet" and rows["gone-known-too"].rep_row == 9
    assert [r.row for r in rows.values()] == sorted(r.row for r in rows.values())
    assert manifest.stats == {
        "posts": 21, "exact": 3, "near": 5, "conflicts": 3, "groups": 5, "largest_group": 5, "across_splits": 3, "unreadable": 4
    }  # fmt: skip
    assert manifest.rows_in == 21 and manifest.rows == 8 and list(manifest.files) == ["part-00001.parquet"]
    assert pq.read_schema(store.path("duplicates/d/part-00001.parquet")).equals(Duplicate.schema)
    assert not [f for f in store.files("duplicates/d") if f.startswith("work")]

    found = list(conflicts(store, manifest))
    assert [c.post_id for c in found] == ["exact", "resized", "decomposed"] and all(c.conflict for c in found)
    assert found[0].label is NEG and found[0].rep_label is POS and found[0].split is Split.TRAIN

    assert duplicates(store, "d", posts="p", runtime=runtime, progress=quiet) == (manifest, False)
    with pytest.raises(RecipeChanged, match="text_similarity"):
        duplicates(store, "d", posts="p", runtime=runtime, text_similarity=0.9, progress=quiet)


@pytest.mark.ray
def test_exact_only_and_other_chunks(store, runtime, ray_session):
    """Exact duplicates need no picture to be opened; how the work is cut makes no difference."""
    manifest, _ = duplicates(store, "exact", posts="p", runtime=runtime, exact_only=True, progress=quiet)
    assert set(table_of(store, manifest)) == {"exact", "decomposed", "gone-known-too"} and manifest.stats["unreadable"] == 2
    assert manifest.stats["across_splits"] == 3 and manifest.stats["near"] == 0
    whole, _ = duplicates(store, "whole", posts="p", runtime=runtime, progress=quiet)
    cut, _ = duplicates(store, "cut", posts="p", runtime=runtime.model_copy(update={"rows_per_chunk": 1}), progress=quiet)
    assert list(read_rows(store, whole)) == list(read_rows(store, cut)) and whole.stats == cut.stats
    stricter, _ = duplicates(store, "strict", posts="p", runtime=runtime, text_similarity=1, image_distance=0, progress=quiet)
    assert set(table_of(store, stricter)) < set(table_of(store, whole)) and "edited" not in table_of(store, stricter)


@pytest.mark.ray
def test_an_interrupted_run_goes_on_where_it_was(store, runtime, ray_session, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    small = runtime.model_copy(update={"rows_per_chunk": 1})
    with monkeypatch.context() as m:
        m.setattr(module, "_load", stop)
        with pytest.raises(KeyboardInterrupt):
            duplicates(store, "r", posts="p", runtime=small, progress=quiet)
    parts = sorted(store.files("duplicates/r/work"))
    assert parts == [f"part-{i}.parquet" for i in ("00000-00000000", "00001-00000000", "00001-00000008")]
    assert find(store, "duplicates", "r") is None
    store.delete(f"duplicates/r/work/{parts[1]}")
    old = {p: os.stat(store.path(f"duplicates/r/work/{p}")).st_mtime_ns for p in (parts[0], parts[2])}
    seen, times = [], {}

    def look(*args):
        times.update({p: os.stat(store.path(f"duplicates/r/work/{p}")).st_mtime_ns for p in old})
        seen.append(args)

    # Another size of chunk changes nothing: the first attempt's plan holds.
    manifest, fresh = duplicates(store, "r", posts="p", runtime=runtime, progress=look)
    assert fresh and seen == [(13, 21, 0), (21, 21, 0)] and times == old
    again, _ = duplicates(store, "not-interrupted", posts="p", runtime=runtime, progress=quiet)
    assert list(read_rows(store, manifest)) == list(read_rows(store, again)) and manifest.stats == again.stats


@pytest.mark.ray
def test_sample_posts_are_not_merged(sample_store, runtime, ray_session):
    """The sample's texts are templates: few words differ, and yet they say other things."""
    manifest, _ = duplicates(sample_store, "sample", posts="sample", runtime=runtime, progress=quiet)
    assert manifest.stats["posts"] == 168 and manifest.rows == 0 and manifest.files == {}


def test_two_exact_posts_far_apart_lead_to_one_representative(tmp_path, runtime, monkeypatch):
    """An exact copy of a near duplicate points to what is kept, over three files; signed here, without Ray."""
    store = Store(str(tmp_path))
    base = next(sample_posts(1, Split.TRAIN, 1))
    other = replace(base, post_id="near", text=base.text.upper() + " !")
    write(store, "p", [base], [other], [replace(other, post_id="copy")])

    def here(run, posts, chunks, exact_only, *_):
        batch = {k: np.array([getattr(c, k) for c in chunks]) for k in ("file", "lo", "hi")}
        assert module._sign_chunks(batch, run.store, f"posts/{posts.name}", f"{run.prefix}/work", exact_only) == {"rows": [1, 1, 1]}

    monkeypatch.setattr(module, "_sign_all", here)
    manifest, _ = duplicates(store, "d", posts="p", runtime=runtime, progress=quiet)
    rows = table_of(store, manifest)
    assert list(manifest.files) == ["part-00001.parquet", "part-00002.parquet"]
    assert {(r.kind, r.representative, r.rep_file, r.rep_row) for r in rows.values()} == {("near", base.post_id, "part-00000.parquet", 0)}
    assert rows["copy"].similarity == rows["near"].similarity < 1 and manifest.stats["largest_group"] == 3


def test_a_table_without_posts_has_no_duplicates(tmp_path, runtime):
    store = Store(str(tmp_path))
    write(store, "p", [])
    manifest, fresh = duplicates(store, "d", posts="p", runtime=runtime, progress=quiet)
    assert fresh and manifest.rows == 0 and manifest.stats["largest_group"] == 0


@pytest.mark.parametrize("bad", [{"text_similarity": 0.5}, {"text_similarity": 1.1}, {"image_distance": -1}, {"image_distance": 11}])
def test_thresholds_out_of_range_name_the_value(store, runtime, bad):
    with pytest.raises(ConfigError, match=str(next(iter(bad.values())))):
        duplicates(store, "bad", posts="p", runtime=runtime, progress=quiet, **bad)
    assert store.read("duplicates/bad/identity.json") is None


@pytest.mark.ray
@pytest.mark.skipif(not (DATA / "t15" / "dev.tsv").exists(), reason="Twitter-2015 is not here (MULCOT_DATA)")
def test_twitter_2015(tmp_path, runtime, ray_session):
    """Where a tweet names its aspect twice, TomBERT has a row for each: the same input, sometimes with another label."""
    store, t15 = Store(str(tmp_path)), DATA / "t15"
    import_posts(
        store, "t15", "tombert", str(t15 / "dev.tsv"), contract=load_recipe("tiny").contract, images=str(t15 / "images"), split=Split.VALIDATION
    )
    manifest, _ = duplicates(store, "d", posts="t15", runtime=runtime, progress=quiet)
    assert {k: manifest.stats[k] for k in ("posts", "exact", "near", "conflicts", "unreadable")} == {
        "posts": 1122, "exact": 14, "near": 0, "conflicts": 5, "unreadable": 0
    }  # fmt: skip
