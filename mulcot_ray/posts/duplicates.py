"""Exact and near duplicates of a posts table, as duplicates/NAME: which post repeats which earlier one, and whether their gold agrees.

exact   same text (after Unicode NFC and whitespace), same aspect, same picture bytes
near    same split, same aspect (case apart), both or neither with a picture; MinHash similarity of the texts and pHash distance of the
        pictures within the thresholds

A duplicate points to its *representative*, an earlier row of its split that is itself no duplicate. Rows are decided in table order: one
that resembles a representative is a duplicate of the earliest such, any other is a representative. So groups are stars, not chains: a
row that only resembles a duplicate is no duplicate.

Texts are compared by their character 5-grams. Among 5,148 distinct real tweets (Twitter-2015 and 2017, aspects apart) the four pairs that
say the same have a Jaccard similarity of 0.84 to 0.90, and the next, which does not, 0.72. Sets of words put a pair about two different
concerts at 0.88, above one of the four: to them a name is a word like any other. Pictures: the closest two of 727 are 10 bits apart; of
250 copies saved again at half the size 249 moved by 2 bits at most, one by 4. (Of 10,000 sample posts, six are near duplicates by the
defaults, and their pictures show the same; with 8 bits instead of 4 it is 28, and four of them show something else.)

Signatures are computed by Ray Data and kept in parts under work/ until the table is finished; the driver joins them. It holds no text
and no picture, but 36 bytes a post, and 111 at the peak of the join (measured at a million). The MinHash signatures, 128 bytes a post,
lie in a file of the temporary folder. The join of a million takes 6 CPU seconds, where pictures or aspects tell most posts apart.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import unicodedata
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest, Run, begin, need, parquet_bytes, read_rows
from mulcot_ray.cluster import mapped, session
from mulcot_ray.console import Progress
from mulcot_ray.engines.scope import Chunk, plan
from mulcot_ray.errors import ConfigError, RowFault
from mulcot_ray.posts.images import open_image, read_ref
from mulcot_ray.posts.joining import PERMUTATIONS, Column, Groups, Signatures, group
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, Post, Sentiment, Split, from_row
from mulcot_ray.storage import Store

METHOD = "char5 minhash128x8 phash64"  # in the identity: another way to compare is another result
SHINGLE = 5  # characters
PHASH_SIDE = 256  # pixels that a JPEG is decoded to at least; with 64, ten of the 250 copies moved by 4 bits or more, with 1024 one
UNITS = 8  # a post is signed a hundred times faster than it is asked: so many units of commit at a time
THREADS = 16  # that read signatures
SPLITS = tuple(Split)
# A link says nothing that two copies of a post share: t.co gives each its own. The last two: as TomBERT's tokeniser and its cuts leave them.
LINK = re.compile(
    r"(?:https?://|www\.|pic\.twitter\.com/|\bt\.co/)\S+|\bhttps?\s:\s(?:/\s/\s)?t\s\.\sco\b(?:\s/)?(?:\s\w+)?|\bhttps?(?:\s?:)?[\s./…]*$"
)
LOOSE = re.compile(r"(?<!\w)\s+|\s+(?!\w)")  # "# panda !", "#panda!": space that does not part two words

SIGNED = pa.schema(
    [("post_id", pa.string()), ("label", pa.int8()), ("split", pa.int8()), ("content", pa.binary(16)), ("block", pa.uint64()),
     ("near", pa.bool_()), ("pictured", pa.bool_()), ("unreadable", pa.bool_()), ("phash", pa.uint64()), ("text", pa.binary(PERMUTATIONS))]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Duplicate:
    """Row `row` of `file` repeats row `rep_row` of `rep_file` (counted from 0 in each file of the posts table).

    `similarity` is the share of equal MinHash values (1 for an exact duplicate), `distance` the bits in which the pHashes differ, null
    where there are no pictures. `conflict`: both have gold, and it differs.
    """

    post_id: str
    file: str
    row: int
    representative: str
    rep_file: str
    rep_row: int
    split: Split
    kind: Literal["exact", "near"]
    similarity: float
    distance: int | None
    label: Sentiment | None
    rep_label: Sentiment | None
    conflict: bool

    schema: ClassVar[pa.Schema] = pa.schema(
        [("post_id", pa.string()), ("file", pa.string()), ("row", pa.int64()), ("representative", pa.string()), ("rep_file", pa.string()),
         ("rep_row", pa.int64()), ("split", pa.string()), ("kind", pa.string()), ("similarity", pa.float64()), ("distance", pa.int32()),
         ("label", pa.string()), ("rep_label", pa.string()), ("conflict", pa.bool_())]
    )  # fmt: skip


def duplicates(
    store: Store, name: str, *, posts: str, runtime: Runtime, text_similarity: float = 0.85, image_distance: int = 4, exact_only: bool = False,
    progress: Progress,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write duplicates/NAME: a row for every duplicate, in a part for every file of the posts table that has some, under its name.

    Returns the manifest, and False where it was there already. `text_similarity` is the share of MinHash values that must agree (about
    the Jaccard similarity; its standard error is 0.03), `image_distance` how many of the 64 pHash bits may differ. A picture that cannot
    be opened makes its post no near duplicate; it can still be an exact one where its digest is known. With `exact_only` thresholds do
    not matter and pictures with a known digest are not opened. Raises ConfigError, ArtifactMissing, RecipeChanged, Busy, EngineError.
    """
    if not 0.7 <= text_similarity <= 1:
        raise ConfigError(
            f"--text-similarity {text_similarity}: from 0.7 (below, posts only share a topic) to 1 (every MinHash value agrees) is wanted"
        )
    if not 0 <= image_distance <= 10:
        raise ConfigError(f"--image-distance {image_distance}: from 0 to 10 of the 64 bits is wanted (unrelated pictures differ in 10 or more)")
    source = need(store, "posts", posts)
    thresholds = None if exact_only else {"text_similarity": float(text_similarity), "image_distance": image_distance}
    identity = {"stage": "duplicates", "posts": source.fingerprint, "method": METHOD, "near": thresholds}
    run = begin(store, "duplicates", name, identity, {"rows_per_chunk": UNITS * runtime.rows_per_chunk})
    if isinstance(run, Manifest):
        return run, False
    with run:
        chunks = plan(source.sizes, int(run.plan["rows_per_chunk"]))
        _sign_all(run, source, chunks, exact_only, runtime, progress)
        with tempfile.TemporaryFile() as spool:
            signatures, unreadable = _load(run, chunks, source.rows, spool)
            groups = group(signatures, None if exact_only else text_similarity, image_distance)
            stats = _write(run, source, chunks, signatures, groups)
        for work in run.store.files(f"{run.prefix}/work"):
            store.delete(f"{run.prefix}/work/{work}")
        return run.commit(source.rows, stats={"posts": source.rows, **stats, "unreadable": unreadable}), True


def conflicts(store: Store, manifest: Manifest) -> Iterator[Duplicate]:
    """The duplicates whose gold differs from their representative's, in table order."""
    for r in read_rows(store, manifest):
        if r["conflict"]:
            yield Duplicate(**{**r, "split": Split(r["split"]), "label": Sentiment(r["label"]), "rep_label": Sentiment(r["rep_label"])})


# Signatures


def normalised(text: str) -> str:
    """The text as shingles see it: NFC, case folded, without links and without space that parts no words. Handles stay, as words."""
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return LOOSE.sub("", " ".join(LINK.sub(" ", plain).split()))


def text_signature(text: str) -> bytes | None:
    """The low byte of each of 128 MinHash values over the 5-grams of the normalised text; None where nothing is left of it.

    A byte is as good as the whole value here: unequal values share it once in 256 (b-bit minwise hashing, Li and König 2010).
    """
    from datasketch import MinHash

    plain = normalised(text)
    if not plain:
        return None
    sketch = MinHash(PERMUTATIONS, seed=1, scheme="affine32")
    grams = sorted({plain[i : i + SHINGLE] for i in range(max(1, len(plain) - SHINGLE + 1))})
    for at in range(0, len(grams), 4096):  # a block is 128 values a gram at once: 2 MB, however long the text
        sketch.update_batch([g.encode() for g in grams[at : at + 4096]])
    return bytes(sketch.hashvalues.astype(np.uint8).tobytes())


def image_hash(data: bytes) -> int:
    """The 64-bit pHash of a picture. Raises RowFault."""
    import imagehash

    bits = imagehash.phash(open_image(data, PHASH_SIDE)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def sign(post: Post, known: dict[str, tuple[str | None, int | None]], exact_only: bool) -> dict[str, Any]:
    """A post's row of SIGNED. `known` remembers pictures, by reference or digest."""
    sha, phash = post.image_sha256, 0 if exact_only or not post.has_image else None
    if post.has_image and not (exact_only and sha):
        key = sha or hashlib.sha256(post.image_bytes).hexdigest() if post.image_bytes is not None else post.image_ref or ""
        if key not in known:
            known[key] = _look(post, exact_only)
        sha, phash = sha or known[key][0], known[key][1]
    picture = None if not post.has_image else sha or f"unknown, of {post.post_id}"
    text, aspect = (t and " ".join(unicodedata.normalize("NFC", t).split()) for t in (post.text, post.aspect))
    signature = None if exact_only or phash is None else text_signature(post.text)
    return {
        "post_id": post.post_id, "label": -1 if post.label is None else LABELS.index(post.label), "split": SPLITS.index(post.split),
        "content": _digest([text, aspect, picture], 16), "near": signature is not None, "pictured": post.has_image, "unreadable": phash is None,
        "block": int.from_bytes(_digest([post.split, aspect and aspect.casefold(), post.has_image], 8), "big"),
        "phash": phash or 0, "text": signature or bytes(PERMUTATIONS),
    }  # fmt: skip


def _look(post: Post, exact_only: bool) -> tuple[str | None, int | None]:
    """SHA-256 and pHash of the post's picture; None for what cannot be had, 0 for a pHash that is not wanted."""
    sha = None
    try:
        data = post.image_bytes if post.image_bytes is not None else read_ref(post.image_ref or "")
        sha = hashlib.sha256(data).hexdigest()
        return sha, 0 if exact_only else image_hash(data)
    except RowFault:
        return sha, None


def _digest(value: Any, size: int) -> bytes:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=size).digest()


def _sign_all(run: Run, posts: Manifest, chunks: list[Chunk], exact_only: bool, runtime: Runtime, progress: Progress) -> None:
    """Make the parts under work/ that are not there yet."""
    there = run.store.files(f"{run.prefix}/work")
    todo = [c for c in chunks if f"{c.part}.parquet" not in there]
    done = posts.rows - sum(c.hi - c.lo for c in todo)
    progress(done, posts.rows, 0)
    if not todo:
        return
    with session(runtime):
        work = {"store": run.store, "source": f"posts/{posts.name}", "target": f"{run.prefix}/work", "exact_only": exact_only}
        for batch in mapped([asdict(c) for c in todo], _sign_chunks, fn_kwargs=work, num_cpus=1):
            done += int(sum(batch["rows"]))
            progress(done, posts.rows, 0)


def _sign_chunks(batch: dict[str, Any], store: Store, source: str, target: str, exact_only: bool) -> dict[str, list[int]]:
    """The task of a worker: the part of each chunk, created whole."""
    for file, lo, hi in zip(batch["file"], batch["lo"], batch["hi"], strict=True):
        chunk, known = Chunk(str(file), int(lo), int(hi)), dict[str, tuple[str | None, int | None]]()
        signed = [sign(p, known, exact_only) for p in _posts(store, source, chunk)]
        store.create(f"{target}/{chunk.part}.parquet", parquet_bytes(pa.Table.from_pylist(signed, schema=SIGNED)))
    return {"rows": [int(n) for n in batch["hi"] - batch["lo"]]}


def _posts(store: Store, source: str, chunk: Chunk) -> Iterator[Post]:
    """The chunk's posts, streamed from the row groups that hold them: their pictures may be large."""
    with pq.ParquetFile(store.path(f"{source}/{chunk.file}"), filesystem=store.fs) as f:
        sizes = [f.metadata.row_group(g).num_rows for g in range(f.metadata.num_row_groups)]
        starts = [sum(sizes[:g]) for g in range(len(sizes))]
        groups = [g for g, at in enumerate(starts) if at < chunk.hi and at + sizes[g] > chunk.lo]
        at = starts[groups[0]]
        for batch in f.iter_batches(batch_size=32, row_groups=groups, columns=[c for c in Post.schema.names if c != "meta"]):
            rows = batch.slice(max(0, chunk.lo - at), max(0, min(len(batch), chunk.hi - at) - max(0, chunk.lo - at)))
            at += len(batch)
            yield from (from_row(Post, r) for r in rows.to_pylist())


# The table


def _load(run: Run, chunks: list[Chunk], n: int, spool: Any) -> tuple[Signatures, int]:
    """All signatures, those of the texts in the file `spool`; and how many pictures could not be read."""
    texts = np.memmap(spool, np.uint8, "w+", shape=(max(n, 1), PERMUTATIONS))[:n]
    s = Signatures(
        np.empty((2, n), np.uint64), np.empty(n, np.int8), np.empty(n, np.int8), np.empty(n, np.uint64), np.empty(n, bool),
        np.empty(n, bool), np.empty(n, np.uint64), texts,
    )  # fmt: skip

    def fill(chunk: Chunk, at: int) -> int:
        table = pq.read_table(run.store.path(f"{run.prefix}/work/{chunk.part}.parquet"), columns=SIGNED.names[1:], filesystem=run.store.fs)
        rows = slice(at, at + len(table))
        for name in ("split", "label", "block", "near", "pictured", "phash"):
            getattr(s, name)[rows] = table[name].to_numpy()
        s.content[:, rows] = _fixed(table["content"], np.uint64).T
        s.texts[rows] = _fixed(table["text"], np.uint8)
        return int(table["unreadable"].to_numpy().sum())

    with ThreadPoolExecutor(THREADS, "signatures") as pool:
        return s, sum(pool.map(fill, chunks, _offsets(chunks)))


def _fixed(column: pa.ChunkedArray, dtype: Any) -> Column:
    """Fixed-size binary values as rows of numbers."""
    array = column.combine_chunks()
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return data.view(dtype).reshape(len(array), -1)


def _offsets(chunks: list[Chunk]) -> list[int]:
    """The row of the table at which each chunk begins."""
    return [int(x) for x in np.cumsum([0, *(c.hi - c.lo for c in chunks)])[:-1]]


def _post_ids(run: Run, placed: list[tuple[Chunk, int]], rows: Column) -> pa.Array:
    """The post ids of ascending rows of the table, all of them in these chunks (each with the row at which it begins)."""

    def read(chunk: Chunk, wanted: Column) -> pa.Array:
        path = run.store.path(f"{run.prefix}/work/{chunk.part}.parquet")
        column = pq.read_table(path, columns=["post_id"], filesystem=run.store.fs)["post_id"]
        return column.take(pa.array(wanted)).combine_chunks().cast(pa.large_string())

    ends = np.searchsorted(rows, [at + chunk.hi - chunk.lo for chunk, at in placed])
    parts = [(chunk, rows[lo:hi] - at) for (chunk, at), lo, hi in zip(placed, [0, *ends], ends, strict=False) if hi > lo]
    with ThreadPoolExecutor(THREADS, "ids") as pool:
        return pa.concat_arrays([pa.array([], pa.large_string()), *pool.map(read, *zip(*parts, strict=True))])


def _write(run: Run, posts: Manifest, chunks: list[Chunk], s: Signatures, g: Groups) -> dict[str, int]:
    """The parts of the result. Returns its statistics."""
    rows = np.flatnonzero(g.representative != np.arange(len(s.split)))
    reps = g.representative[rows]
    kept, sizes = np.unique(reps, return_counts=True)
    placed: dict[str, list[tuple[Chunk, int]]] = {}
    for chunk, at in zip(chunks, _offsets(chunks), strict=True):
        placed.setdefault(chunk.file, []).append((chunk, at))
    rep_ids = _post_ids(run, [x for of_file in placed.values() for x in of_file], kept)
    files = list(placed)
    starts = np.cumsum([0, *(posts.files[f]["rows"] for f in files)])
    labels, splits, names = (pa.array([str(x) for x in values]) for values in (LABELS, SPLITS, files))
    conflict = (s.label[rows] >= 0) & (s.label[reps] >= 0) & (s.label[rows] != s.label[reps])
    for number, file in enumerate(files):
        lo, hi = np.searchsorted(rows, starts[number : number + 2])
        if hi == lo:
            continue
        row, rep = rows[lo:hi], reps[lo:hi]
        home = np.searchsorted(starts, rep, side="right") - 1
        label, rep_label = (labels.take(pa.array(s.label[x], mask=s.label[x] < 0)) for x in (row, rep))
        columns = [
            _post_ids(run, placed[file], row), pa.repeat(file, len(row)), row - starts[number], rep_ids.take(pa.array(np.searchsorted(kept, rep))),
            names.take(pa.array(home)), rep - starts[home], splits.take(pa.array(s.split[row])),
            np.where(g.near[row], "near", "exact"), g.matches[row] / PERMUTATIONS,
            pa.array(np.bitwise_count(s.phash[row] ^ s.phash[rep]).astype(np.int32), mask=~s.pictured[row]), label, rep_label, conflict[lo:hi],
        ]  # fmt: skip
        arrays = [pa.array(c).cast(field.type) for c, field in zip(columns, Duplicate.schema, strict=True)]
        run.write_table(file.removesuffix(".parquet"), pa.Table.from_arrays(arrays, schema=Duplicate.schema))
    return {
        "exact": len(rows) - int(g.near[rows].sum()), "near": int(g.near[rows].sum()), "conflicts": int(conflict.sum()), "groups": len(kept),
        "largest_group": int(sizes.max()) + 1 if len(kept) else 0, "across_splits": g.across_splits,
    }  # fmt: skip
