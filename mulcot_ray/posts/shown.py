"""A few rows of a large table for a page that people read: found by their ids, texts clipped, pictures made small."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from markupsafe import Markup

from mulcot_ray.artifacts import Manifest
from mulcot_ray.errors import RowFault
from mulcot_ray.html import data_uri, words
from mulcot_ray.posts.images import open_image, read_ref
from mulcot_ray.records import Post
from mulcot_ray.storage import Store

SIDE = 320  # pixels of the longer side of a picture shown
CLIP = 2000  # characters of a text shown
THREADS = 8  # files at once: on S3 they wait for answers


def rows_by_id(store: Store, manifest: Manifest, ids: Collection[str]) -> dict[str, dict[str, Any]]:
    """The rows with these post_ids, and no others: ids that the table lacks are left out.

    The ids of a file are read first, and of whole rows only the row groups that hold one that is wanted, 16 rows at a time.
    """
    files = manifest.parts()
    prefix, found = f"{manifest.kind}/{manifest.name}", dict[str, dict[str, Any]]()
    with ThreadPoolExecutor(THREADS) as pool:
        for at in range(0, len(files), 8 * THREADS):
            if not (left := set(ids) - found.keys()):
                break
            for some in pool.map(partial(_in_file, store, prefix, sorted(left)), files[at : at + 8 * THREADS]):
                found |= some
    return found


def _in_file(store: Store, prefix: str, ids: Sequence[str], file: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    with pq.ParquetFile(store.path(f"{prefix}/{file}"), filesystem=store.fs, buffer_size=1 << 20) as f:
        wanted = pa.array(ids, pa.string())
        for group in range(f.num_row_groups):
            if not pc.any(pc.is_in(f.read_row_group(group, columns=["post_id"])["post_id"], wanted)).as_py():
                continue
            for batch in f.iter_batches(batch_size=16, row_groups=[group]):
                found |= {r["post_id"]: r for r in batch.filter(pc.is_in(batch["post_id"], wanted)).to_pylist()}
    return found


def picture(post: Post) -> tuple[Markup | None, str]:
    """A small JPEG as a data: address, without what a camera wrote into the file; or else why there is none."""
    if not post.has_image:
        return None, "no picture"
    try:
        image = open_image(post.image_bytes if post.image_bytes is not None else read_ref(post.image_ref or ""), SIDE)
    except RowFault as f:
        return None, f"picture not shown: {words(f.reason).lower()}"
    image.thumbnail((SIDE, SIDE))
    image.info.clear()
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return data_uri(out.getvalue()), ""


def clip(text: str, limit: int = CLIP) -> str:
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"
