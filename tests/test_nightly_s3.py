"""Two nights of 20,000 posts on a real S3 server: mixed formats, pictures by key, broken rows, duplicates; read as DuckDB and pyarrow read it."""

import gzip
import io
import json
import random
import sys

import nights
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from nights import posts, quiet, scripted, spoilt, version

from mulcot_ray.artifacts import need
from mulcot_ray.labeling.gates import Gates
from mulcot_ray.labeling.nightly import nightly
from mulcot_ray.labeling.publishing import current
from mulcot_ray.labeling.reading import dataset
from mulcot_ray.labeling.version import NightSettings
from mulcot_ray.storage import Store

pytestmark = pytest.mark.ray
POSTS = 20_000


@pytest.fixture(scope="module", autouse=True)
def _scripts_travel_by_value(ray_session):
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    cloudpickle.register_pickle_by_value(nights)


def picture(n: int) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (32, 32), (n, n, n)).save(out, "PNG")
    return out.getvalue()


def upload(store: Store, date: str, rows: list) -> None:
    """A partition in all formats: JSONL plain, gzip and zstd, and Parquet (what is no row of JSON goes into the first)."""
    zstandard = pytest.importorskip("zstandard")
    rows = sorted(rows, key=lambda r: isinstance(r, dict))  # lines that are no rows first
    cuts = [0, len(rows) // 4, len(rows) // 2, 3 * len(rows) // 4, len(rows)]
    plain, zipped, packed, columns = (rows[a:b] for a, b in zip(cuts, cuts[1:], strict=False))

    def lines(some: list) -> bytes:
        return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in some)

    store.write(f"dump/dt={date}/a.jsonl", lines(plain))
    store.write(f"dump/dt={date}/b.jsonl.gz", gzip.compress(lines(zipped)))
    store.write(f"dump/dt={date}/c.jsonl.zst", zstandard.compress(lines(packed)))
    names = ["id", "text", "aspect", "image"]
    sink = io.BytesIO()
    pq.write_table(pa.table({n: [r.get(n) for r in columns] for n in names}), sink, row_group_size=1000)
    store.write(f"dump/dt={date}/d.parquet", sink.getvalue())
    store.write(f"dump/dt={date}/_SUCCESS", b"")


def test_two_nights_of_20000_posts_on_s3(s3_bucket, runtime):
    duckdb = pytest.importorskip("duckdb")
    root = f"s3://{s3_bucket}/nights"
    store, inputs = Store(f"{root}/root"), Store(f"{root}/in")
    rng, first = random.Random(1), posts(POSTS, 31)
    for n in range(20):
        inputs.write(f"pictures/{n}.png", picture(n))
    for r in first[:40]:
        r["image"] = f"{rng.randrange(20)}.png"
    first[40]["image"] = "missing.png"
    rows, there = spoilt(first, 31, 0.01, 0.05)
    upload(inputs, "2026-11-21", rows)
    fast = runtime.model_copy(update={"rows_per_chunk": 1024})
    settings = NightSettings(name="t", gates=Gates())
    options = dict(settings=settings, runtime=fast, images=f"{root}/in/pictures", steps=quiet)
    v = version(store, settings)
    (one,) = nightly(store, f"{root}/in/dump", version=v, **options)
    m = one.manifest
    # The post whose picture is missing may have been doubled: its copies are rejected with it.
    lost = m.rejects - there["rejected"]
    assert one.state == "published" and m.rows_in == there["rows"] and 1 <= lost <= 2 and m.rejects_by_reason["image_missing"] == lost
    assert m.stats["repeated"] == there["repeated"] and m.stats["fates"]["scored"] == POSTS - 1 and m.stats["deferred"] == 0
    assert m.rows == POSTS + there["copied"] - lost
    files = dataset(store)
    duck = duckdb.connect()
    duck.register("labels", files)
    counted = dict(duck.execute("select label, count(*) from labels group by label").fetchall())
    assert counted == {k: n for k, n in m.stats["labels"].items() if n} and files.count_rows() == m.rows
    assert duck.execute("select count(distinct post_id) from labels").fetchone() == (m.rows,)
    (apart,) = duck.execute("select max(abs(negative + neutral + positive - 1)) from labels").fetchone()
    assert apart < 1e-9
    assert store.read("published/dt=2026-11-21/files.txt").decode().count("s3://") == len([k for k in m.files if k.startswith("labels/")])

    new = posts(POSTS // 100, 32)
    upload(inputs, "2026-11-22", [*first, *new])
    _, two = nightly(store, f"{root}/in/dump", version=v, **options)
    s = two.manifest.stats
    asked = sum(e["rows_in"] for e in s["engine"].values())
    assert asked == s["fates"]["scored"] + 1 == len(new) + 1 <= 0.03 * POSTS, "the new ones, and the one that had no picture last night"
    assert s["fates"]["carried"] == POSTS - 1 and two.state == "published" and dataset(store, ["2026-11-22"]).count_rows() == POSTS + len(new) - 1
    before = {
        r["post_id"]: (r["label"], r["positive"]) for r in dataset(store, ["2026-11-21"]).to_table(["post_id", "label", "positive"]).to_pylist()
    }
    after = {r["post_id"]: (r["label"], r["positive"]) for r in dataset(store, ["2026-11-22"]).to_table(["post_id", "label", "positive"]).to_pylist()}
    assert all(after[i] == x for i, x in before.items() if i in after)

    another = version(store, settings, {"student": scripted("another")})
    (again,) = nightly(store, f"{root}/in/dump", version=another, dates=["2026-11-22"], **options)
    assert again.manifest.stats["fates"]["scored"] == POSTS + len(new) - 1 and again.manifest.stats["fates"]["carried"] == 0
    assert current(store)["2026-11-22"].night == again.manifest.name and need(store, "nights", two.manifest.name).rows == two.manifest.rows
