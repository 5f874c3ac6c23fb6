"""One row of an input, as fields by name, into a Post, or into a Reject that says which field is at fault and what would be right.

The same rules for every format. Rows are not trusted: names of pictures may not lead out of their folder, text must be storable.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from mulcot_ray.errors import RowFault
from mulcot_ray.records import Post, Reason, Reject, Sentiment, Split

STAGE = "import"
FIELDS = frozenset({"id", "text", "aspect", "image", "image_base64", "image_bytes", "label", "split", "source_id"})
META_FIELDS, META_CHARS = 20, 500

E = TypeVar("E", Sentiment, Split)
Row = tuple[str, Mapping[str, Any] | RowFault]  # a locator ("dev.tsv:17"), and the fields or why there are none


def as_post_or_reject(where: str, row: Mapping[str, Any] | RowFault, images: str | None, required: Iterable[str]) -> Post | Reject:
    post_id = where
    try:
        if isinstance(row, RowFault):
            raise row
        post_id = row_id(row)
        for field in required:
            if row.get(field) in (None, ""):
                raise RowFault(Reason.MISSING_FIELD, f"no {field}")
        return _post(post_id, row, images)
    except RowFault as f:
        return as_reject(post_id, f)
    except RecursionError:
        return as_reject(post_id, RowFault(Reason.BAD_LINE, "nested too deep"))


def _post(post_id: str, row: Mapping[str, Any], images: str | None) -> Post:
    text = _string(row, "text")
    if text is None:
        raise RowFault(*((Reason.EMPTY_TEXT, "the text is empty") if row.get("text") == "" else (Reason.MISSING_FIELD, "no text")))
    if not text.strip():
        raise RowFault(Reason.EMPTY_TEXT, "the text is blank")
    data, image = _image_bytes(row), _string(row, "image")
    ref = image_ref(image, images) if image is not None else None
    unknown = {k: v for k, v in row.items() if k not in FIELDS and k != "cot" and v is not None and not isinstance(v, bytes)}
    if image is not None and ref is None:
        unknown = {"image": image, **unknown}
    return Post(
        post_id, _string(row, "source_id", number=True) or post_id, text, _string(row, "aspect"), None if data else ref, data,
        label=_enum(row, "label", Sentiment, Reason.BAD_LABEL), split=_enum(row, "split", Split, Reason.BAD_VALUE) or Split.UNLABELED,
        meta={_clean(k[:META_CHARS]): _meta(v) for k, v in list(unknown.items())[:META_FIELDS]},
    )  # fmt: skip


def image_ref(name: str, images: str | None) -> str | None:
    """The absolute path or s3:// key of a picture; None for a relative one where there is no `images`. Raises RowFault BAD_VALUE.

    The rows are not trusted: a name may not lead out of `images`. (Links inside that folder are its owner's choice and are followed.)
    """
    if "\0" in name or ("://" in name and not name.startswith("s3://")):
        raise RowFault(Reason.BAD_VALUE, f"image {name[:200]!r}: a name under --images or an s3:// key is wanted; web addresses are not fetched")
    if name.startswith("/") or ".." in name.split("/"):
        raise RowFault(Reason.BAD_VALUE, f"image {name[:200]!r} leads out of --images")
    if name.startswith("s3://"):
        return name
    if images is None:
        return None
    return f"{images.rstrip('/')}/{name}" if images.startswith("s3://") else str(Path(images).expanduser().absolute() / name)


def _image_bytes(row: Mapping[str, Any]) -> bytes | None:
    data = row.get("image_bytes")
    if data not in (None, b""):
        if not isinstance(data, bytes):
            raise RowFault(Reason.BAD_VALUE, f"image_bytes is {shown_as(data)}; a binary column is wanted (base64 belongs in image_base64)")
        return data
    encoded = _string(row, "image_base64")
    try:
        return base64.b64decode("".join(encoded.split()), validate=True) or None if encoded else None
    except (binascii.Error, ValueError) as e:
        raise RowFault(Reason.BAD_VALUE, f"image_base64 is not base64: {e}") from e


def unique(rows: Iterable[Post | Reject], *, by_aspect: bool) -> Iterator[Post | Reject]:
    """The rows, with a Reject for a post_id that came before.

    With `by_aspect` a post is an id and an aspect: the first keeps the id as it is, further aspects of it become `id#aspect`.
    """
    # 12 bytes of a hash instead of ids of any length: all that grows with the file.
    seen: set[bytes] = set()

    def new(*key: str | None) -> bool:
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=12).digest()
        known = digest in seen
        seen.add(digest)
        return not known

    for row in rows:
        if isinstance(row, Post):
            given, also = row.post_id, f" with aspect {row.aspect!r}" if by_aspect else ""
            fault = RowFault(Reason.DUPLICATE_ID, f"id {given!r}{also} stands in an earlier row")
            if by_aspect and not new(given, row.aspect):
                row = as_reject(given, fault)
            elif not new(given):
                other = f"{given}#{row.aspect or ''}"
                row = replace(row, post_id=other) if by_aspect and new(other) else as_reject(given, fault)
        yield row


def row_id(row: Mapping[str, Any]) -> str:
    value = _string(row, "id", number=True)
    if value is None:
        raise RowFault(Reason.MISSING_FIELD, "no id")
    return value


def named(name: str, value: Any) -> Any:
    """`name-value`; what cannot be an id is left for the check to complain about."""
    return f"{name}-{value}" if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else value


def _string(row: Mapping[str, Any], field: str, *, number: bool = False) -> str | None:
    """A field as a string, None where it is absent, null or empty. With `number` a whole number will do ("007" stays as it is)."""
    value = row.get(field)
    if value is None or value == "":
        return None
    if number and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise RowFault(Reason.BAD_VALUE, f"{field} is {shown_as(value)}; a string{' or a whole number' if number else ''} is wanted")
    return encodable(value, field)


def encodable(value: str, field: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as e:  # JSON can spell half a surrogate pair; Arrow cannot store it
        raise RowFault(Reason.BAD_ENCODING, f"{field} is not Unicode: {e.reason} at {e.start}") from e
    return value


def _enum(row: Mapping[str, Any], field: str, kind: type[E], reason: Reason) -> E | None:
    value = row.get(field)
    if value is None or value == "":
        return None
    try:
        return kind(value.strip().lower())
    except (ValueError, AttributeError):
        raise RowFault(reason, f"{field} is {shown_as(value)}; one of {', '.join(kind)} is wanted") from None


def _meta(value: Any) -> str:
    return _clean((value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))[:META_CHARS])


def as_reject(post_id: str, fault: RowFault) -> Reject:
    return Reject(_clean(post_id), STAGE, fault.reason, _clean(fault.detail), None if fault.raw is None else _clean(fault.raw))


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def shown_as(value: Any) -> str:
    text = repr(value.detail if isinstance(value, RowFault) else value)
    return text if len(text) <= 100 else text[:97] + "…"
