"""The import stage: rows of an input, with every picture opened once, as posts/NAME (and, for mulcot-json, rationales/NAME).

It has no parallel workers of Ray: the work is one pass over a file, and decoding the pictures in a few threads keeps up with a disk.
What is written depends on the input alone, in its order; an interrupted import starts again from nothing.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import pyarrow.fs as pafs

from mulcot_ray.artifacts import Manifest, Run, begin, check_name, find, read_rows
from mulcot_ray.errors import Busy, ConfigError, InputError, RowFault
from mulcot_ray.posts.fields import STAGE, as_reject
from mulcot_ray.posts.images import open_image, read_ref
from mulcot_ray.posts.importers import check_images, input_files, read_posts, read_rationales
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.prompts import Contract, digest
from mulcot_ray.records import Post, Rationale, Reject, Split, to_table
from mulcot_ray.storage import Store

SPLITS = (Split.TRAIN, Split.VALIDATION, Split.TEST)  # what ratios stand for
PART_ROWS, PART_BYTES = 4096, 64 << 20
GROUP_ROWS, GROUP_BYTES = 256, 8 << 20  # a row group is read for each chunk of it
THREADS = max(2, min(8, os.cpu_count() or 1))
WINDOW = 64  # rows being looked at; with a picture of 20 MiB in each, 1.3 GB
REMEMBERED, REMEMBERED_BYTES = 8192, 32  # verdicts on pictures, without and with their bytes

Progress = Callable[[int, int], None]
Verdict = tuple[str, bytes | None] | RowFault  # SHA-256 and, where they are to be kept, the bytes


def split_of(source_id: str, seed: int, ratios: tuple[float, float, float] = (8, 1, 1)) -> Split:
    """The split of a source by a hash of seed and id: the same wherever it is asked, and one for all rows that share the source."""
    at = int.from_bytes(hashlib.sha256(f"{seed}/{source_id}".encode()).digest()[:8], "big") / 2**64 * sum(ratios)
    train, validation, _ = ratios
    return Split.TRAIN if at < train else Split.VALIDATION if at < train + validation else Split.TEST


def import_posts(
    store: Store, name: str, fmt: str, path: str, *, contract: Contract, images: str | None = None, split: Split | None = None,
    ratios: tuple[float, float, float] | None = None, seed: int = 42, embed_images: bool = False, model: str = "imported",
    progress: Progress | None = None,
) -> tuple[Manifest, bool]:  # fmt: skip
    """Write posts/NAME from a file or folder. Returns its manifest, and False where everything was there already.

    The split of a row is `split`, or drawn for its source by `ratios` (train, validation, test) and `seed`, or, with neither, the
    row's own; a row without one is UNLABELED. `progress` is told rows and rejects so far. With mulcot-json, rationales/NAME is
    written too, as of `model`. Raises ConfigError, InputError, RecipeChanged, Busy.
    """
    check_name(name)
    if split is not None and ratios is not None:
        raise ConfigError(f"--split {split} and --ratios {':'.join(map(str, ratios))}: one of them is wanted")
    if ratios is not None and (len(ratios) != 3 or min(ratios) < 0 or not 0 < sum(ratios) < float("inf")):
        raise ConfigError(f"--ratios {':'.join(map(str, ratios))}: three numbers, train:validation:test, not all zero, are wanted (8:1:1)")
    check_images(images)
    identity = {
        "stage": STAGE, "format": fmt, "input": _input_digest(fmt, path), "images": images is not None, "split": split,
        "ratios": ratios and [float(r) for r in ratios], "seed": seed if ratios else None, "embed": embed_images,
    }  # fmt: skip

    def placed() -> Iterator[Post | Reject]:
        for row in read_posts(fmt, path, name=name, images=images):
            if isinstance(row, Post) and (split or ratios):
                row = replace(row, split=split or split_of(row.source_id, seed, ratios or (8, 1, 1)))
            yield row

    posts, fresh = _write_posts(store, name, identity, placed(), embed_images, progress)
    if fmt == "mulcot-json":
        fresh |= _write_rationales(store, name, posts, path, contract, model)
    return posts, fresh


def import_sample(
    store: Store, name: str, *, train: int, validation: int, test: int, seed: int, progress: Progress | None = None
) -> tuple[Manifest, bool]:
    """Write the sample corpus (posts/sample.py) as posts/NAME: so many posts of each split, pictures inside."""
    counts = dict(zip(SPLITS, (train, validation, test), strict=True))
    if min(counts.values()) < 0 or not sum(counts.values()):
        raise ConfigError(f"sample of {train} train, {validation} validation and {test} test posts: none may be negative, one must be positive")
    identity = {"stage": STAGE, "format": "sample", "seed": seed, **{s.value: n for s, n in counts.items()}}
    rows = chain.from_iterable(sample_posts(n, s, seed) for s, n in counts.items())
    return _write_posts(store, name, identity, rows, True, progress)


def _write_posts(
    store: Store, name: str, identity: dict[str, Any], rows: Iterable[Post | Reject], embed: bool, progress: Progress | None
) -> tuple[Manifest, bool]:
    run = begin(store, "posts", name, identity)
    if isinstance(run, Manifest):
        return run, False
    splits, labels, n = Counter[str](), Counter[str](), Counter[str]()
    sources: set[bytes] = set()
    with run, _whole(run):
        out = _Parts(run)
        for row in _looked_at(rows, embed):
            out.add(row)
            n["rows"] += 1
            if isinstance(row, Post):
                splits[str(row.split)] += 1
                if row.label is not None:
                    labels[str(row.label)] += 1
                n["aspects"] += row.aspect is not None
                n["images"] += row.has_image
                sources.add(hashlib.blake2b(row.source_id.encode(), digest_size=12).digest())
            else:
                n["rejects"] += 1
            if progress and n["rows"] % 100 == 0:
                progress(n["rows"], n["rejects"])
        out.flush()
        if progress:
            progress(n["rows"], n["rejects"])
        stats = {"splits": dict(sorted(splits.items())), "labels": dict(sorted(labels.items())), "aspects": n["aspects"], "images": n["images"]}
        return run.commit(n["rows"], stats={**stats, "sources": len(sources)}), True


def _write_rationales(store: Store, name: str, posts: Manifest, path: str, contract: Contract, model: str) -> bool:
    """A second pass over the file, beside the posts table, so that each table can be finished without the other."""
    run = begin(store, "rationales", name, {"stage": STAGE, "posts": posts.fingerprint, "contract": contract.hash, "model": model})
    if isinstance(run, Manifest):
        return False
    golds = read_rows(store, posts, columns=["post_id", "label"])
    imported = agreeing = 0
    with run, _whole(run):
        out = _Parts(run)
        post = next(golds, None)
        for row in read_rationales(path, name=name, contract=contract, model=model):
            if post is None or row.post_id != post["post_id"]:
                continue  # its post was rejected
            out.add(row)
            if isinstance(row, Rationale):
                imported += 1
                agreeing += row.prediction == post["label"]
            post = next(golds, None)
        out.flush()
        stats = {"sources": {"imported": imported}, "agreement": round(agreeing / imported, 4) if imported else None}
        run.commit(posts.rows, stats=stats)
    return True


@contextmanager
def _whole(run: Run) -> Iterator[None]:
    """Start without the parts of an earlier attempt; when the input turns out unreadable half-way, leave nothing behind.

    Nothing of a killed import is worth keeping, and where pictures came or went since then its parts would be cut at other rows than
    ours: some rows twice, others lost, the sum the same. And a name must not stay tied to a file that could not be read.
    """
    if find(run.store, run.kind, run.name) is not None:  # published between our `begin` and our lease: not to be touched
        raise Busy(f"{run.prefix}: another run finished it at this moment; run again to use it")
    _delete(run, ".parquet")
    try:
        yield
    except InputError:
        _delete(run, ".parquet", "identity.json")
        raise


def _delete(run: Run, *ends: str) -> None:
    for file in run.store.files(run.prefix):
        if file.endswith(ends):
            run.store.delete(f"{run.prefix}/{file}")


class _Parts:
    """Rows on their way into parts: results and rejects apart, each part bounded in rows and bytes."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.rows: dict[bool, list[Any]] = {False: [], True: []}  # by: is it a reject?
        self.size = {False: 0, True: 0}
        self.count = {False: 0, True: 0}

    def add(self, row: Post | Rationale | Reject) -> None:
        rejects = isinstance(row, Reject)
        self.rows[rejects].append(row)
        self.size[rejects] += len(row.image_bytes or b"") if isinstance(row, Post) else 0
        if len(self.rows[rejects]) >= PART_ROWS or self.size[rejects] >= PART_BYTES:
            self._write(rejects)

    def flush(self) -> None:
        for rejects in (False, True):
            if self.rows[rejects]:
                self._write(rejects)

    def _write(self, rejects: bool) -> None:
        rows = self.rows[rejects]
        group = max(1, min(GROUP_ROWS, len(rows) * GROUP_BYTES // max(1, self.size[rejects])))
        self.run.write_table(f"part-{self.count[rejects]:05d}", to_table(type(rows[0]), rows), rejects=rejects, rows_per_group=group)
        self.rows[rejects], self.size[rejects] = [], 0
        self.count[rejects] += 1


def _looked_at(rows: Iterable[Post | Reject], embed: bool) -> Iterator[Post | Reject]:
    """The rows in their order, pictures decoded in threads: with the picture's hash, or as a Reject where it cannot be opened."""
    window: deque[tuple[Post | Reject, Future[Verdict] | None]] = deque()
    known: OrderedDict[str, Future[Verdict]] = OrderedDict()
    with ThreadPoolExecutor(THREADS, "image") as pool:

        def look(post: Post) -> Future[Verdict] | None:
            ref = post.image_ref
            if post.image_bytes is not None:
                return pool.submit(_look, post.image_bytes, True)
            if ref is None:
                return None
            if ref not in known:
                known[ref] = pool.submit(_look, ref, embed)
                if len(known) > (REMEMBERED_BYTES if embed else REMEMBERED):
                    known.popitem(last=False)
            known.move_to_end(ref)
            return known[ref]

        for row in rows:
            window.append((row, look(row) if isinstance(row, Post) else None))
            if len(window) >= WINDOW:
                yield _decided(*window.popleft())
        while window:
            yield _decided(*window.popleft())


def _look(image: str | bytes, keep: bool) -> Verdict:
    try:
        data = image if isinstance(image, bytes) else read_ref(image)
        open_image(data)
        return hashlib.sha256(data).hexdigest(), data if keep else None
    except RowFault as f:
        return f


def _decided(row: Post | Reject, verdict: Future[Verdict] | None) -> Post | Reject:
    if verdict is None or isinstance(row, Reject):
        return row
    result = verdict.result()
    if isinstance(result, RowFault):
        return as_reject(row.post_id, result)
    sha256, data = result
    return replace(row, image_sha256=sha256, image_bytes=data, image_ref=row.image_ref if data is None else None)


def _input_digest(fmt: str, path: str) -> str:
    """Digest of what the input holds. Files under s3:// are known by name, size and time; reading them all just for this is too much."""
    facts: list[list[Any]] = []
    files = input_files(fmt, path)
    for shown, info in files:
        label = shown if len(files) > 1 else ""  # the names of a folder's files order its rows; that of a single file does not matter
        if path.startswith("s3://"):
            facts.append([shown, info.size, info.mtime_ns])
            continue
        try:
            with pafs.LocalFileSystem().open_input_file(info.path) as f:
                total = hashlib.sha256()
                while block := f.read(8 << 20):
                    total.update(block)
        except OSError as e:
            raise InputError(f"{info.path} cannot be read: {e}") from e
        facts.append([label, info.size, total.hexdigest()])
    return digest(facts)
