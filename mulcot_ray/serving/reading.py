"""From the bytes of a request to a post and its prepared picture. Refuses with the field's name; never repeats the input; fetches no address.

A post comes as JSON, as a form with a file, or as a line of a batch. A picture is in it, or lies in a bucket that the endpoint may read.
"""

from __future__ import annotations

import base64
import binascii
import re
import uuid

from fastapi import Request
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mulcot_ray.errors import RowFault
from mulcot_ray.posts.images import post_image, read_ref
from mulcot_ray.records import Post, Reason
from mulcot_ray.serving.faults import invalid, log
from mulcot_ray.serving.guards import Refused
from mulcot_ray.serving.schemas import MAX_BODY, MAX_IMAGE, SentimentRequest

JSON, FORM = "application/json", "multipart/form-data"
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


def media_type(request: Request) -> str:
    """Of the body, without parameters; empty where none is stated."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read(request: Request) -> tuple[SentimentRequest, bytes | None]:
    """The request, and the picture where it came as a file. Raises Refused."""
    kind = media_type(request)
    if kind == JSON:
        return parse(await request.body()), None
    if kind == FORM:
        return await _form(request)
    raise Refused(415, "unsupported_media_type", f"the header `Content-Type: {JSON}` is wanted, or {FORM}")


def parse(body: bytes | str) -> SentimentRequest:
    """The request in a JSON text. Raises Refused."""
    try:
        return _checked(SentimentRequest.model_validate_json(body))
    except ValidationError as e:
        raise invalid(e) from e


def _checked(asked: SentimentRequest) -> SentimentRequest:
    if asked.image and asked.image_key:
        raise Refused(422, "invalid_request", "image and image_key are both given: one picture is wanted", "image_key")
    return asked


async def _form(request: Request) -> tuple[SentimentRequest, bytes | None]:
    fields: dict[str, str | bool] = {}
    picture: bytes | None = None
    try:
        async with request.form(max_files=1, max_fields=len(SentimentRequest.model_fields) + 1, max_part_size=MAX_BODY) as form:
            for name, value in form.multi_items():
                if name in fields or (name == "image" and picture is not None):
                    raise Refused(422, "invalid_request", f"{name}: given twice", name[:100])
                if not isinstance(value, UploadFile):
                    fields[name] = _FLAGS.get(value.lower(), value) if name in ("explain", "stream") else value
                elif name == "image":
                    picture = await value.read(MAX_IMAGE + 1)
                else:
                    raise Refused(422, "invalid_request", "a file is taken as `image` alone", name[:100])
    except HTTPException as e:
        if isinstance(e, Refused):
            raise
        raise Refused(400, "invalid_form", str(e.detail)) from e
    try:
        asked = _checked(SentimentRequest.model_validate(fields))
    except ValidationError as e:
        raise invalid(e) from e
    if picture and asked.image_key:
        raise Refused(422, "invalid_request", "image and image_key are both given: one picture is wanted", "image_key")
    return asked, picture or None


def prepared(asked: SentimentRequest, picture: bytes | None, side: int, prefixes: tuple[str, ...]) -> tuple[Post, Image.Image | None]:
    """The post and its picture, `side` pixels square. Blocks: decodes, and reads the bucket. Raises Refused, and RowFault for an
    image that is not base64."""
    if asked.image:
        picture = image_bytes(asked.image)
    elif asked.image_key:
        picture = _stored(asked.image_key, prefixes)
    post = Post(asked.id or uuid.uuid4().hex, "-", asked.text, asked.aspect or None, image_bytes=picture)
    try:
        if picture is not None and len(picture) > MAX_IMAGE:
            raise RowFault(Reason.IMAGE_TOO_LARGE, f"more than {MAX_IMAGE} bytes")
        return post, post_image(post, side)
    except RowFault as f:
        raise Refused(422, str(f.reason), f.detail, "image_key" if asked.image_key else "image") from f


def image_bytes(encoded: str) -> bytes:
    """The picture's bytes from base64 or a data: URI. Raises RowFault; the message never has the input in it."""
    head, comma, rest = encoded[:200].partition(",")
    if head[:5].lower() == "data:":
        if not comma or not head.lower().endswith(";base64"):
            raise RowFault(Reason.BAD_VALUE, "image is a data: URI without `;base64,`")
        encoded = rest + encoded[200:]
    elif re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]*:", head):
        raise RowFault(Reason.BAD_VALUE, "image is an address; nothing is fetched: send the picture itself as base64")
    try:
        data = base64.b64decode("".join(encoded.split()), validate=True)
    except (binascii.Error, ValueError) as e:
        raise RowFault(Reason.BAD_VALUE, f"image is not base64: {e}") from e
    if not data:
        raise RowFault(Reason.IMAGE_UNREADABLE, "the picture is empty")
    return data


def may_read(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether an s3:// key is plainly below one of the prefixes: no `..`, no empty part, nothing that another reader may take otherwise."""
    if not re.fullmatch(r"s3://[a-z0-9.-]{3,63}(/[^/\\\x00-\x1f\x7f?#%]+)+", key) or {".", ".."} & set(key.split("/")):
        return False
    return any(key.startswith(p.rstrip("/") + "/") for p in prefixes)


def _stored(key: str, prefixes: tuple[str, ...]) -> bytes:
    if not may_read(key, prefixes):
        raise Refused(422, "image_key_refused", "image_key is not s3://bucket/key in a bucket that this endpoint reads", "image_key")
    try:
        return read_ref(key)
    except RowFault as f:
        log.warning("image_key: %s", f)  # what the store says of itself is not for the client
        message = f.detail if f.reason is Reason.IMAGE_TOO_LARGE else "there is no such object, or it cannot be read"
        raise Refused(422, str(f.reason), message, "image_key") from f
