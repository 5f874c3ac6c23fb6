"""Readers of the formats that posts come in: rows of a file in, Post or Reject out, in the file's order and one at a time.

    tombert      TomBERT TSV: index, label number, image id, text with $T$, aspect (Twitter-2015, Twitter-2017)
    mulcot-json  JSON list of the authors' scripts, each post with a rationale (`cot`)
    mvsa         folder with data/<id>.txt, data/<id>.jpg and labelResultAll.txt (Single and Multiple)
    jsonl        one JSON object a line; plain, .gz or .zst; file, folder or s3://
    parquet      the same fields as columns; file, folder or s3://

A format's reader gives a locator ("dev.tsv:17") and fields by name for each row; `posts/fields.py` makes Posts and Rejects of them.
Pictures are named here, not opened.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from mulcot_ray.errors import ConfigError, InputError, RowFault
from mulcot_ray.posts.fields import Row, as_post_or_reject, as_reject, encodable, named, row_id, shown_as, unique
from mulcot_ray.posts.inputs import (
    MAX_LINE,
    SUFFIXES,
    buffered,
    check_columns,
    compression_of,
    input_fs,
    input_info,
    json_row,
    lines,
    open_parquet,
    parquet_rows,
)
from mulcot_ray.prompts import Contract
from mulcot_ray.records import SECTIONS, Post, Rationale, Reason, Reject, Sentiment, Source

FORMATS = ("tombert", "mulcot-json", "mvsa", "jsonl", "parquet")
TOMBERT_HEADER = ["index", "#1 Label", "#2 ImageID", "#3 String", "#3 String"]


def read_posts(fmt: str, path: str, *, name: str, images: str | None = None) -> Iterator[Post | Reject]:
    """Every row of the input as a Post or a Reject. `name` is put before ids that are only numbers in their file.

    `images` is the folder or s3:// prefix that image names are relative to; without it they are kept in `meta["image"]` alone.
    Raises InputError when the input or `images` is missing, has no rows or is of another format, ConfigError for an unknown format.
    """
    check_images(images)
    if fmt == "mvsa":
        images = images or str(Path(path).expanduser().absolute() / "data")
    rows = _rows(fmt, path, name)
    required = {"tombert": ("image", "aspect", "label"), "mulcot-json": ("aspect", "label"), "mvsa": ("label",)}.get(fmt, ())
    empty = True
    for post in unique((as_post_or_reject(where, row, images, required) for where, row in rows), by_aspect=fmt in SUFFIXES):
        empty = False
        yield post
    if empty:
        raise InputError(f"{path} holds no rows of the format {fmt}")


def read_rationales(path: str, *, name: str, contract: Contract, model: str) -> Iterator[Rationale | Reject]:
    """The rationales of a mulcot-json file, one for each row that has an id, complete or not, with the post's id."""
    for where, row in _rows("mulcot-json", path, name):
        if isinstance(row, RowFault):
            continue  # no post came of it
        post_id = where
        try:
            post_id = row_id(row)
            cot = row["cot"]
            if cot is None or (isinstance(cot, str) and not cot.strip()):
                raise RowFault(Reason.MISSING_FIELD, "no cot")
            if not isinstance(cot, str):
                raise RowFault(Reason.BAD_VALUE, f"cot is {shown_as(cot)}; a string is wanted")
            answer = contract.parse(encodable(cot, "cot"))
            texts = {s: answer.sections[s] for s in SECTIONS}
            yield Rationale(
                post_id, Source.IMPORTED, model, contract.hash, prediction=answer.label, attempts=1, finish_reason=None, tokens_in=0,
                tokens_out=0, **texts,
            )  # fmt: skip
        except RowFault as f:
            if post_id != where:
                yield as_reject(post_id, f)


def check_images(images: str | None) -> None:
    """Raises InputError when the folder or prefix of the pictures is not there."""
    if images is not None and input_info(images, "--images").type is not pafs.FileType.Directory:
        raise InputError(f"--images {images} is no folder; the folder or s3:// prefix that holds the pictures is wanted")


def input_files(fmt: str, path: str) -> list[tuple[str, pafs.FileInfo]]:
    """The files that decide the posts, with the names that locators use, in order. Raises InputError when there are none."""
    if fmt not in FORMATS:
        raise ConfigError(f"--format {fmt!r}: one of {', '.join(FORMATS)} is wanted")
    if fmt == "mvsa":
        folder = Path(path).expanduser()
        if path.startswith("s3://") or not (folder / "labelResultAll.txt").is_file() or not (folder / "data").is_dir():
            raise InputError(f"{path}: a local folder with labelResultAll.txt and data/ is wanted")
        wanted = [folder / "labelResultAll.txt", *sorted((folder / "data").glob("*.txt"))]
        return [(f.name, pafs.LocalFileSystem().get_file_info(str(f.absolute()))) for f in wanted]
    info = input_info(path, "input")
    if info.type is pafs.FileType.File:
        return [(info.base_name, info)]
    if fmt not in SUFFIXES:
        raise InputError(f"{path} is a folder; the format {fmt} is one file")
    prefix = info.path.rstrip("/") + "/"
    found = input_fs(path).get_file_info(pafs.FileSelector(prefix.rstrip("/"), recursive=True))
    # Spark and editors leave files such as _SUCCESS and .part.crc beside the data.
    files = [f for f in found if f.type is pafs.FileType.File and f.base_name.endswith(SUFFIXES[fmt]) and not f.base_name.startswith((".", "_"))]
    if not files:
        raise InputError(f"no file that ends in {' or '.join(SUFFIXES[fmt])} in {path}")
    return sorted((f.path.removeprefix(prefix), f) for f in files)


# --- rows of each format -------------------------------------------------------------------------------------------------


def _rows(fmt: str, path: str, name: str) -> Iterator[Row]:
    files, fs = input_files(fmt, path), input_fs(path)
    if fmt == "mvsa":
        yield from _mvsa(Path(path).expanduser(), name)
    for shown, file in files if fmt != "mvsa" else []:
        if fmt == "tombert":
            yield from _tombert(fs, file.path, shown, name)
        elif fmt == "mulcot-json":
            yield from _mulcot_json(fs, file.path, shown, name)
        else:
            yield from (_jsonl if fmt == "jsonl" else _parquet)(fs, file.path, shown)


def _tombert(fs: pafs.FileSystem, path: str, shown: str, name: str) -> Iterator[Row]:
    labels = {str(i): s.value for i, s in enumerate(Sentiment)}
    header = False
    for i, line in _lines(fs, path, shown):
        where = f"{shown}:{i}"
        # Not the csv module: tweets contain unpaired quotes.
        cells = line.split("\t") if isinstance(line, str) else []
        if not header:
            header = [c.strip() for c in cells] == TOMBERT_HEADER
            if not header:
                raise InputError(f"{path} does not start with the TomBERT header {' '.join(TOMBERT_HEADER)!r} (tabs between): {shown_as(line)}")
        elif isinstance(line, RowFault):
            yield where, line
        elif len(cells) != len(TOMBERT_HEADER):
            yield where, RowFault(Reason.BAD_LINE, f"{len(cells)} columns, {len(TOMBERT_HEADER)} are wanted", line[:2000])
        else:
            index, label, image, text, aspect = (c.strip() for c in cells)
            label = labels.get(label, f"{label} (numbers: 0 negative, 1 neutral, 2 positive)" if label else "")
            post_id, source_id = named(name, index), named(name, image) or named(name, index)
            row = {"id": post_id, "source_id": source_id, "image": image, "label": label, "aspect": aspect}
            yield where, row | {"text": text.replace("$T$", aspect)}


def _mulcot_json(fs: pafs.FileSystem, path: str, shown: str, name: str) -> Iterator[Row]:
    # Read whole: these lists are the authors' (3,179 posts: 8 MB), and the standard library has no streaming parser. Larger data is JSONL.
    try:
        with fs.open_input_stream(path) as f:
            items = json.loads(f.read().decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON: {type(e).__name__}: {e}") from e
    if not isinstance(items, list):
        raise InputError(f"{path} is not a JSON list of posts but {shown_as(items)}")
    for i, item in enumerate(items):
        where = f"{shown}:[{i}]"
        if not isinstance(item, dict):
            yield where, RowFault(Reason.BAD_LINE, f"a JSON object is wanted, this is {shown_as(item)}")
            continue
        post_id = named(name, item.get("id"))
        row = {"id": post_id, "source_id": named(name, item.get("image_id")) or post_id, "image": item.get("image_path")}
        yield where, row | {k: item.get(k) for k in ("text", "label", "aspect", "cot")}


def _mvsa(folder: Path, name: str) -> Iterator[Row]:
    columns, table = 0, folder / "labelResultAll.txt"
    for i, line in _lines(pafs.LocalFileSystem(), str(table.absolute()), table.name):
        where = f"{table.name}:{i}"
        head, *votes = line.split("\t") if isinstance(line, str) else [""]
        number, votes = head.strip(), [v.strip() for v in votes if v.strip()]
        if not columns:
            columns = len(votes)
            if number != "ID" or columns not in (1, 3) or set(votes) != {"text,image"}:
                raise InputError(f"{table} does not start with 'ID' and one or three times 'text,image', tabs between: {shown_as(line)}")
        elif isinstance(line, RowFault):
            yield where, line
        elif len(votes) != columns:
            yield where, RowFault(Reason.BAD_LINE, f"{len(votes)} annotations, {columns} are wanted", line[:2000])
        else:
            row: dict[str, Any] = {"id": named(name, number), "source_id": named(name, number), "image": f"{number}.jpg"}
            try:
                row["label"] = mvsa_label(votes)
                row |= _mvsa_text(folder / "data", number)
                yield where, row
            except RowFault as f:
                yield (row["id"] or where), f


def mvsa_label(votes: list[str]) -> str:
    """The label of "text,image" annotations by MVSA's usual rule (METHOD: Datasets). Raises RowFault."""
    decided = []
    pairs = [[label.strip() for label in v.split(",")] for v in votes]
    if any(len(p) != 2 or not set(p) <= set(Sentiment) for p in pairs):
        raise RowFault(Reason.BAD_LABEL, f"{'; '.join(votes)[:200]!r}: pairs of {', '.join(Sentiment)} are wanted")
    for modality, given in zip(("text", "image"), zip(*pairs, strict=True), strict=True):
        label, count = Counter(given).most_common(1)[0]
        if 2 * count <= len(given):
            raise RowFault(Reason.NO_MAJORITY, f"{modality}: {', '.join(given)}")
        decided.append(label)
    text, image = decided
    if text == image or image == Sentiment.NEUTRAL:
        return str(text)
    if text != Sentiment.NEUTRAL:
        raise RowFault(Reason.OPPOSED_MODALITIES, f"text {text}, image {image}")
    return str(image)


def _mvsa_text(data: Path, number: str) -> dict[str, str]:
    if not re.fullmatch(r"[\w-]{1,100}", number):
        raise RowFault(Reason.BAD_VALUE if number else Reason.MISSING_FIELD, f"ID {number[:100]!r}: letters, digits, '_' and '-' are allowed")
    try:
        raw = (data / f"{number}.txt").read_bytes().removeprefix(b"\xef\xbb\xbf")  # some editors' mark before UTF-8; not text
    except OSError as e:
        raise RowFault(Reason.MISSING_FIELD, f"data/{number}.txt: {e.strerror}") from e
    # The corpus was collected on Windows: tweets that are not UTF-8 have cp1252 quotes and dashes. Its five unassigned bytes are left
    # to latin-1, which takes any byte, so that no post is lost for one character.
    for encoding in ("utf-8", "cp1252", "latin-1"):
        try:
            text = raw.decode(encoding).strip()
        except UnicodeDecodeError:
            continue
        return {"text": text} | ({} if encoding == "utf-8" else {"encoding": encoding})
    raise AssertionError("latin-1 takes any byte")


def _jsonl(fs: pafs.FileSystem, path: str, shown: str) -> Iterator[Row]:
    for i, line in _lines(fs, path, shown):
        yield f"{shown}:{i}", json_row(line)


def _parquet(fs: pafs.FileSystem, path: str, shown: str) -> Iterator[Row]:
    try:
        with open_parquet(fs, path) as file:
            check_columns(file.schema_arrow.names, shown)
            groups = list(range(file.metadata.num_row_groups))
            for i, row in enumerate(parquet_rows(file, groups, batch_rows=64), 1):  # with pictures inside, a batch is some tens of MB
                yield f"{shown}:{i}", row
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{shown} cannot be read as Parquet: {e}") from e


def _lines(fs: pafs.FileSystem, path: str, shown: str) -> Iterator[tuple[int, str | RowFault]]:
    """Numbered lines (from 1), without their ends, decompressed by the file's name; blank ones are passed over."""
    try:
        with fs.open_input_stream(path, compression=None) as stream:
            for number, _, line in lines(buffered(stream, compression_of(path)), limit=MAX_LINE):
                yield number, line
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{shown} cannot be read: {e}") from e
