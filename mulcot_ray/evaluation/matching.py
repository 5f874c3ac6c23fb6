"""Bring the rows of several tables about the same posts together, one bucket of posts at a time.

Every table is read once; a hash of its post_id sends each row to a bucket, and each bucket is worked on whole, so that no table has to fit
in memory and none has to be sorted. Ray Data does it: readers → groupby(bucket) → map_groups. For 100,000 posts with answers and references
it is as fast as the two `Dataset.join`s that these take (medians of three, two busy cores: 29.1 and 29.5 s; 1.7 GB in all processes, either
way). But a join needs polars, multiplies rows that are there twice instead of showing them, and each further table is one more shuffle.

Buckets, and the order of the rows in each, depend on the tables alone, never on the number of workers. Small tables are one bucket, worked on
in this process: Ray would take longer to start (10 s and more) than they take to score.
"""

from __future__ import annotations

import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Manifest
from mulcot_ray.cluster import session, stream
from mulcot_ray.errors import ConservationError
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import LABELS, SECTIONS, Prediction, Rationale, Split
from mulcot_ray.storage import Store

ROWS_PER_BUCKET = 16_384  # of all tables together: some 50 MB as Python objects
ROWS_HERE = 32_768  # up to which quick work is done in this process
ROWS_PER_READ = 65_536
KEYS = pa.schema([("bucket", pa.int32()), ("role", pa.int8()), ("at", pa.int64())])

RECORDS: dict[str, type[Prediction] | type[Rationale]] = {"predictions": Prediction, "rationales": Rationale}
ANSWER_COLUMNS = {
    "predictions": ("post_id", "label", "contract", *LABELS, "label_mass", *SECTIONS, "stated", "rationale_fault", "tokens_in", "tokens_out"),
    "rationales": ("post_id", "prediction", "contract", *SECTIONS, "source", "tokens_in", "tokens_out"),
}

T = TypeVar("T")
Rows = list[dict[str, Any]]
Bucket = Mapping[str, Rows]  # role -> its rows, in the order of the table


@dataclass(frozen=True)
class Input:
    """A table with its role. `columns` are read, and `keep` makes of them the columns of `schema`, "post_id" among them.

    Columns of two inputs that have one name have one type.
    """

    role: str
    manifest: Manifest
    schema: pa.Schema
    columns: tuple[str, ...]
    rejects: bool = False
    keep: Callable[[pa.Table], pa.Table] | None = None


def table(role: str, manifest: Manifest, schema: pa.Schema, columns: Sequence[str], *, rejects: bool = False) -> Input:
    """Some columns of a table, or of its rejects; `schema` is that of its record."""
    return Input(role, manifest, pa.schema([schema.field(c) for c in columns]), tuple(columns), rejects)


def posts(manifest: Manifest, splits: Sequence[Split] | None, slices: Sequence[str], *, gold: bool) -> Input:
    """The posts of some splits (None: all), as role "post": with `gold`, those alone that have a label. Pictures are not read.

    Rows: post_id, source_id, label, split, aspect and image (bool), length (characters of the text), and `meta/KEY` for each of `slices`.
    """
    derived = [("aspect", pa.bool_()), ("image", pa.bool_()), ("length", pa.int32())]
    texts = [(c, pa.string()) for c in ("post_id", "source_id", "label", "split", *(f"meta/{s}" for s in slices))]
    columns = ("post_id", "source_id", "label", "split", "aspect", "image_sha256", "image_ref", "text", "meta")
    return Input("post", manifest, pa.schema([*texts, *derived]), columns, keep=partial(_posts, splits, tuple(slices), gold))


def answers(role: str, manifest: Manifest) -> Input:
    """Predictions or rationales, with the columns that are scored."""
    return table(role, manifest, RECORDS[manifest.kind].schema, ANSWER_COLUMNS[manifest.kind])


def match(store: Store, inputs: Sequence[Input], work: Callable[[Bucket], T], runtime: Runtime, *, quick: bool = True) -> Iterator[T]:
    """The result of `work` for each bucket, in no certain order. `work` and its results must pickle. `quick` says that ten thousand rows
    are no more than some seconds of work.

    Raises what `work` raises of our own errors, EngineError when the workers fail otherwise.
    """
    pieces = _pieces(inputs)
    rows = sum(p.rows for p in pieces)
    if rows > max(ROWS_PER_BUCKET, ROWS_HERE if quick else 0):
        yield from _by_ray(store, inputs, pieces, -(-rows // ROWS_PER_BUCKET), work, runtime)
        return
    tables = [t for p in pieces for t in _read(store, inputs, 1, p)]
    yield work(_bucket(inputs, pa.concat_tables(tables) if tables else _schema(inputs).empty_table()))


@dataclass(frozen=True)
class _Piece:
    """One file of an input. `first` is the place of its first row in the order of the table."""

    role: int
    file: str
    first: int
    rows: int


def _pieces(inputs: Sequence[Input]) -> list[_Piece]:
    found = []
    for role, i in enumerate(inputs):
        first = 0
        for file in i.manifest.parts(rejects=i.rejects):
            rows = i.manifest.files[file]["rows"]
            found.append(_Piece(role, file, first, rows))
            first += rows
    return found


def _by_ray(
    store: Store, inputs: Sequence[Input], pieces: Sequence[_Piece], count: int, work: Callable[[Bucket], T], runtime: Runtime
) -> Iterator[T]:
    with session(runtime):
        import ray.data

        inputs = [replace(i, manifest=i.manifest.model_copy(update={"files": {}})) for i in inputs]  # workers need no long lists of files
        reads = [{"pieces": json.dumps([vars(p) for p in some])} for some in _together(pieces)]
        matched = (
            ray.data.from_items(reads, override_num_blocks=len(reads))
            .map_batches(partial(_read_task, store, inputs, count), batch_size=1, batch_format="pyarrow")
            .groupby("bucket", num_partitions=count)
            .map_groups(partial(_work_task, inputs, work), batch_format="pyarrow")
        )
        seen = set[int]()
        for results in stream(matched, batch_format="pyarrow"):
            for bucket, result in zip(results["bucket"].to_pylist(), results["result"].to_pylist(), strict=True):
                if bucket in seen:
                    raise ConservationError(f"bucket {bucket} was worked on in two parts. Nothing is published; please report this.")
                seen.add(bucket)
                yield pickle.loads(result)


def _together(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Small files are read several to a task."""
    some: list[_Piece] = []
    for p in pieces:
        some.append(p)
        if sum(x.rows for x in some) >= ROWS_PER_READ:
            yield some
            some = []
    if some:
        yield some


def _read_task(store: Store, inputs: Sequence[Input], count: int, batch: pa.Table) -> Iterator[pa.Table]:
    for pieces in batch["pieces"].to_pylist():
        for p in json.loads(pieces):
            yield from _read(store, inputs, count, _Piece(**p))


def _work_task(inputs: Sequence[Input], work: Callable[[Bucket], Any], group: pa.Table) -> pa.Table:
    result = pickle.dumps(work(_bucket(inputs, group)))
    return pa.table({"bucket": group["bucket"].slice(0, 1), "result": pa.array([result], pa.large_binary())})


def _schema(inputs: Sequence[Input]) -> pa.Schema:
    return pa.unify_schemas([KEYS, *(i.schema for i in inputs)])


def _read(store: Store, inputs: Sequence[Input], count: int, piece: _Piece) -> Iterator[pa.Table]:
    """A file's rows with bucket, role and place; the columns of other inputs are null."""
    i, schema, at = inputs[piece.role], _schema(inputs), piece.first
    with pq.ParquetFile(store.path(f"{i.manifest.kind}/{i.manifest.name}/{piece.file}"), filesystem=store.fs) as f:
        for batch in f.iter_batches(batch_size=8192, columns=list(i.columns)):
            t = pa.Table.from_batches([batch]).append_column("at", pa.array(range(at, at + batch.num_rows), pa.int64()))
            at += batch.num_rows
            t = i.keep(t) if i.keep else t
            t = t.append_column("bucket", pa.array([zlib.crc32(p.encode()) % count for p in t["post_id"].to_pylist()], pa.int32()))
            t = t.append_column("role", pa.array([piece.role] * t.num_rows, pa.int8()))
            has = set(t.column_names)
            yield pa.table([t[c.name] if c.name in has else pa.nulls(t.num_rows, c.type) for c in schema], schema=schema)


def _bucket(inputs: Sequence[Input], rows: pa.Table) -> Bucket:
    parts = ((i, rows.filter(pc.equal(rows["role"], role)).sort_by("at")) for role, i in enumerate(inputs))
    return {i.role: part.select(i.schema.names).to_pylist() for i, part in parts}


def _posts(splits: Sequence[Split] | None, slices: Sequence[str], gold: bool, t: pa.Table) -> pa.Table:
    if gold:
        t = t.filter(pc.is_valid(t["label"]))
    if splits is not None:
        t = t.filter(pc.is_in(t["split"], pa.array([s.value for s in splits])))
    image = pc.or_(pc.is_valid(t["image_sha256"]), pc.is_valid(t["image_ref"]))
    meta = [dict(m or ()) for m in t["meta"].to_pylist()]
    columns = {
        **{c: t[c] for c in ("post_id", "source_id", "label", "split", "at")}, "aspect": pc.is_valid(t["aspect"]), "image": image,
        "length": pc.utf8_length(t["text"]), **{f"meta/{s}": pa.array([m.get(s) for m in meta], pa.string()) for s in slices},
    }  # fmt: skip
    return pa.table(columns)
