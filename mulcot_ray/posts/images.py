"""Pictures: from bytes of unknown origin to an RGB image of the contract's size, or a RowFault that names what is wrong.

The header is checked before anything is decoded; only then is the picture decoded, turned upright (EXIF), laid on white where it is
transparent, and resized. Only JPEG, PNG, WebP, GIF (first frame) and BMP are opened, whatever the file is called.
"""

from __future__ import annotations

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from mulcot_ray.errors import RowFault
from mulcot_ray.records import Post, Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000  # 150 MB as RGB; Pillow by itself only refuses above 179 million
MIN_SIDE = 8  # pixels
MAX_RATIO = 50  # longer to shorter side; vLLM's processor fails above 200


def open_image(data: bytes, side: int = 1024) -> Image.Image:
    """The decoded picture as RGB, upright; a JPEG may come reduced to not less than `side` pixels. Raises RowFault."""
    if not data:
        raise RowFault(Reason.IMAGE_UNREADABLE, "the file is empty")
    if len(data) > MAX_BYTES:
        raise RowFault(Reason.IMAGE_TOO_LARGE, f"{len(data)} bytes, at most {MAX_BYTES}")
    try:
        Image.MAX_IMAGE_PIXELS = None  # Pillow's limit is higher than ours, and warns in a way that threads cannot silence
        im: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = im.size
        if width * height > MAX_PIXELS:
            raise RowFault(Reason.IMAGE_TOO_LARGE, f"{width}×{height} pixels, at most {MAX_PIXELS}")
        if min(width, height) < MIN_SIDE or max(width, height) > MAX_RATIO * min(width, height):
            raise RowFault(Reason.IMAGE_BAD_SHAPE, f"{width}×{height} pixels; sides of at least {MIN_SIDE}, at most 1:{MAX_RATIO}")
        im.draft("RGB", (side, side))  # lets the JPEG decoder scale down while it decodes
        im.load()
        im = ImageOps.exif_transpose(im)
        if im.mode in ("RGBA", "LA", "PA") or "transparency" in im.info:
            im = im.convert("RGBA")
            im = Image.alpha_composite(Image.new("RGBA", im.size, "white"), im)
        return im.convert("RGB")
    except RowFault:
        raise
    except (OSError, SyntaxError, ValueError, KeyError, IndexError, TypeError, EOFError, MemoryError) as e:
        # Pillow's decoders raise whatever the broken bytes make them stumble over.
        # "cannot identify image file <_io.BytesIO object at 0x…>" would give away an address, and differ on each run
        detail = str(e).partition(" <_io.")[0]
        raise RowFault(Reason.IMAGE_UNREADABLE, f"{type(e).__name__}: {detail[:160]}") from e


def prepare(data: bytes, side: int) -> Image.Image:
    """The picture as every model of a contract sees it: RGB, side × side pixels (bicubic, as the authors do)."""
    im = open_image(data, side)
    return im if im.size == (side, side) else im.resize((side, side), Image.Resampling.BICUBIC)


def post_image(post: Post, side: int) -> Image.Image | None:
    """The post's picture, prepared; None where it has none. Raises RowFault."""
    if not post.has_image:
        return None
    return prepare(post.image_bytes if post.image_bytes is not None else read_ref(post.image_ref or ""), side)


def read_ref(ref: str) -> bytes:
    """Bytes of a picture by local path or `s3://bucket/key`. Web addresses are never fetched. Raises RowFault."""
    if "://" in ref and not ref.startswith("s3://"):
        raise RowFault(Reason.BAD_VALUE, f"image reference {ref[:120]!r} is neither a path nor an s3:// key")
    try:
        if not ref.startswith("s3://"):
            path = Path(ref)
            if path.stat().st_size > MAX_BYTES:
                raise RowFault(Reason.IMAGE_TOO_LARGE, f"{path.name}: {path.stat().st_size} bytes, at most {MAX_BYTES}")
            return path.read_bytes()
        fs = _s3()
        key = ref.removeprefix("s3://")
        size = fs.get_file_info(key).size
        if size is not None and size > MAX_BYTES:
            raise RowFault(Reason.IMAGE_TOO_LARGE, f"{ref}: {size} bytes, at most {MAX_BYTES}")
        with fs.open_input_file(key) as f:
            return bytes(f.read())
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        raise RowFault(Reason.IMAGE_MISSING, f"{ref}: not found") from e
    except (OSError, ValueError) as e:
        raise RowFault(Reason.IMAGE_UNREADABLE, f"{ref}: {type(e).__name__}: {str(e)[:160]}") from e


@lru_cache(maxsize=1)
def _s3() -> Any:
    from mulcot_ray.storage import s3_filesystem

    return s3_filesystem()
