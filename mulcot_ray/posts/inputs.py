"""What importers and dumps share: where an input is, and its lines and rows as fields by name."""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from mulcot_ray.errors import InputError, RowFault
from mulcot_ray.posts.fields import shown_as
from mulcot_ray.records import Reason
from mulcot_ray.storage import s3_filesystem

MAX_LINE = 64 << 20  # bytes; a picture of 20 MiB is 27 MiB in base64
Compression = Literal["gzip", "zstd"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = {
    "jsonl": tuple(f"{s}{c}" for s in (".jsonl", ".ndjson", ".json") for c in ("", *COMPRESSIONS)),
    "parquet": (".parquet", ".pq"),
}
BUFFER = 4 << 20  # bytes asked for at once: on S3 each is a request
SIP = 4096  # compressed bytes taken at once; 4 bytes of zstd can stand for 128 KiB, so this is at most 128 MiB of text


class BrokenStream(OSError):
    """A compressed stream that is damaged or cut short. `at` is the byte (of the text) at which the unreadable line starts."""

    def __init__(self, message: str, at: int = 0) -> None:
        super().__init__(message)
        self.at = at


def input_fs(path: str) -> pafs.FileSystem:
    return s3_filesystem() if path.startswith("s3://") else pafs.LocalFileSystem()


def input_info(path: str, what: str) -> pafs.FileInfo:
    """What is at the path. Raises InputError when that is nothing."""
    if "://" in path and not path.startswith("s3://"):
        raise InputError(f"{what} {path}: a local path or s3://bucket/key is wanted; web addresses are not fetched")
    at = path.removeprefix("s3://").rstrip("/") if path.startswith("s3://") else str(Path(path).expanduser().absolute())
    try:
        info = input_fs(path).get_file_info(at)
    except (pa.ArrowException, OSError) as e:
        raise InputError(f"{what} {path} cannot be read: {e}") from e
    if info.type is pafs.FileType.NotFound:
        raise InputError(f"{what} {path} does not exist")
    return info


def compression_of(name: str) -> Compression | None:
    """By the end of a file's name: "gzip", "zstd" or None."""
    return next((kind for end, kind in COMPRESSIONS.items() if name.endswith(end)), None)


def buffered(stream: Any, compression: Compression | None) -> io.BufferedReader:
    """A file of Arrow's for reading by lines, decompressed on the way. Reading raises BrokenStream where the compressed data end early."""
    plain = io.BufferedReader(stream, BUFFER)
    return plain if compression is None else io.BufferedReader(_Inflated(plain, compression), 1 << 20)


class _Inflated(io.RawIOBase):
    """The text of a gzip or zstd file of one or more members. All that comes before a fault is handed out before it is raised.

    Arrow's own decompression loses up to a megabyte of good text before a fault, and reports a fault of the disk in the same way.
    """

    def __init__(self, source: io.BufferedReader, compression: Compression) -> None:
        self.source, self.zeros = source, b"\0" if compression == "gzip" else b""  # some tools pad gzip with zeros
        self.new, self.error = _decoder(compression)
        self.decoder = self.new()
        self.ready = memoryview(b"")
        self.fault: BrokenStream | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self.ready:
            if self.fault is not None:
                raise self.fault
            if not self._sip():
                return 0
        n = min(len(target), len(self.ready))
        target[:n], self.ready = self.ready[:n], self.ready[n:]
        return n

    def _sip(self) -> bool:
        """Decompress a little more. False: the file is at its end, and so is its last member."""
        data = b""
        if self.decoder.eof:
            data = self.decoder.unused_data.lstrip(self.zeros)
            while not data and (more := self.source.read(SIP)):
                data = more.lstrip(self.zeros)
            if not data:
                return False
            self.decoder = self.new()
        try:
            if not (data := data or self.source.read(SIP)):
                raise EOFError("its end is missing")
            self.ready = memoryview(self.decoder.decompress(data))
        except (self.error, EOFError) as e:
            self.fault = BrokenStream(str(e))
        return True


def _decoder(compression: Compression) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decoder of one member, and what that raises."""
    if compression == "gzip":
        return partial(zlib.decompressobj, 31), zlib.error  # 31: with gzip's header and check sum
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj, zstandard.ZstdError


def lines(f: io.BufferedReader, at: int = 0, end: int = sys.maxsize, limit: int = MAX_LINE) -> Iterator[tuple[int, int, str | RowFault]]:
    """Lines that start before byte `end`, without their ends: number (from 1), byte at which it starts, text. Blank ones are passed over.

    `f` stands at the start of a line, byte `at` of the text. Of a line of `limit` bytes or more, no more than that is held in memory.
    Raises BrokenStream, with the number of whole lines.
    """
    number, start = 0, at
    try:
        # Split at \n alone: str.splitlines would also cut at U+2028 and U+0085, which tweets contain.
        while at < end and (raw := f.readline(limit)):
            number, start, at = number + 1, at, at + len(raw)
            if len(raw) == limit and not raw.endswith(b"\n"):
                at += skip_line(f)
                yield number, start, RowFault(Reason.BAD_LINE, f"longer than {limit} bytes")
                continue
            try:
                line = raw.rstrip(b"\r\n").decode("utf-8-sig" if start == 0 else "utf-8")
            except UnicodeDecodeError as e:
                yield number, start, RowFault(Reason.BAD_ENCODING, f"not UTF-8: byte {e.object[e.start]:#04x} at {e.start}")
                continue
            if line.strip():
                yield number, start, line
    except BrokenStream as e:
        raise BrokenStream(f"the stream breaks off after {number} lines: {e}", at) from e


def skip_line(f: io.BufferedReader) -> int:
    """Go to the end of the line; the number of bytes passed."""
    passed = 0
    while rest := f.readline(1 << 20):
        passed += len(rest)
        if rest.endswith(b"\n"):
            break
    return passed


def json_row(line: str | RowFault) -> Mapping[str, Any] | RowFault:
    """The object of one line of JSONL, or why there is none."""
    if isinstance(line, RowFault):
        return line
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        return RowFault(Reason.BAD_LINE, f"not JSON: {e}", line[:2000])
    return row if isinstance(row, dict) else RowFault(Reason.BAD_LINE, f"a JSON object is wanted, this is {shown_as(row)}")


def check_columns(names: list[str], shown: str) -> None:
    """Raises InputError where a Parquet file is not one of posts."""
    if missing := {"id", "text"} - set(names):
        raise InputError(f"{shown} has no column {' and '.join(sorted(missing))}; there are {', '.join(names)[:300]}")


def open_parquet(fs: pafs.FileSystem, path: str) -> pq.ParquetFile:
    """A Parquet file whose columns are streamed. By default Arrow holds all row groups that it is asked for in memory, as stored."""
    return pq.ParquetFile(path, filesystem=fs, pre_buffer=False, buffer_size=BUFFER)


def parquet_rows(file: pq.ParquetFile, groups: list[int], batch_rows: int) -> Iterator[Mapping[str, Any] | RowFault]:
    """The rows of some row groups as dicts. Raises Arrow's exceptions."""
    for batch in file.iter_batches(batch_size=batch_rows, row_groups=groups):
        yield from _dicts(batch)


def _dicts(batch: pa.RecordBatch) -> Iterable[dict[str, Any] | RowFault]:
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as e:
        # Arrow does not check that its strings are UTF-8 before they are read: one bad cell fails the batch, so find its row.
        if batch.num_rows == 1:
            reason = Reason.BAD_ENCODING if isinstance(e, UnicodeDecodeError) else Reason.BAD_VALUE
            return [RowFault(reason, f"{type(e).__name__}: {str(e)[:200]}")]
        return [row for i in range(batch.num_rows) for row in _dicts(batch.slice(i, 1))]
