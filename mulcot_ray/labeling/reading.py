"""Reading what is published: as an Arrow dataset, and the SQL with which DuckDB and Athena read it in place.

Spark has no symlink tables over Parquet (SPARK-32432), but takes the same lists of files:

    files = [r.value for r in spark.read.text("ROOT/published/dt=2026-11-22").collect()]
    spark.read.option("basePath", "ROOT/labels").parquet(*files)
"""

from __future__ import annotations

import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.dataset as ds

from mulcot_ray.artifacts import need
from mulcot_ray.errors import ArtifactMissing
from mulcot_ray.labeling.publishing import LISTS, THREADS, Published, current, parts_of, published, read_pointer, uri
from mulcot_ray.records import Labelled
from mulcot_ray.storage import Store

FOLDERS = pa.schema([("dt", pa.date32()), ("version", pa.string())])  # of Hive's layout: columns that are not in the files


def dataset(store: Store, dates: Collection[str] | None = None) -> ds.Dataset:
    """The published labels of these dates (None: all), with the columns of `Labelled`, and `dt` (date32) and `version` (of model and revision).

    It is what was published when this was called; its parts are never changed. Raises ArtifactMissing where nothing is published for a date.
    """
    nights = [p.night for p in _chosen(store, dates)]
    with ThreadPoolExecutor(THREADS) as pool:
        files = [store.path(key) for keys in pool.map(lambda n: parts_of(need(store, "nights", n)), nights) for key in keys]
    schema = pa.schema([*Labelled.schema, *FOLDERS])
    if not files:
        return ds.dataset(schema.empty_table())
    return ds.dataset(
        files, schema=schema, format="parquet", filesystem=store.fs, partitioning=ds.partitioning(FOLDERS, flavor="hive"),
        partition_base_dir=store.path("labels"),
    )  # fmt: skip


def duckdb_sql(store: Store, dates: Collection[str] | None = None) -> str:
    """A SELECT over the published labels of these dates (None: all). On S3, DuckDB needs its httpfs and a secret. Raises ArtifactMissing."""
    folders = [uri(store, p.labels) for p in _chosen(store, dates) if p.rows]
    if not folders:
        raise ArtifactMissing(f"no row is published under {store.root} for these dates")
    patterns = [re.sub(r"([*?[])", r"[\1]", f).replace("'", "''") for f in folders]
    lines = ",\n".join(f"  '{p}/*.parquet'" for p in patterns)
    return f"SELECT * FROM read_parquet([\n{lines}\n], hive_partitioning = true, hive_types = {{'dt': DATE, 'version': VARCHAR}})"


def athena_sql(store: Store, table: str = "labels") -> str:
    """CREATE TABLE over the lists of files, whose partitions Athena finds by itself. Trino and Presto: leave out TBLPROPERTIES, then sync partitions."""
    types = {pa.string(): "string", pa.float64(): "double"}
    columns = ",\n".join(f"  `{f.name}` {types[f.type]}" for f in Labelled.schema)
    return f"""\
CREATE EXTERNAL TABLE {table} (
{columns}
)
PARTITIONED BY (dt string)
ROW FORMAT SERDE 'org.apache.hadoop.hive.ql.io.parquet.serde.ParquetHiveSerDe'
STORED AS INPUTFORMAT 'org.apache.hadoop.hive.ql.io.SymlinkTextInputFormat'
OUTPUTFORMAT 'org.apache.hadoop.hive.ql.io.HiveIgnoreKeyTextOutputFormat'
LOCATION '{uri(store, LISTS)}/'
TBLPROPERTIES (
  'projection.enabled' = 'true',
  'projection.dt.type' = 'date',
  'projection.dt.format' = 'yyyy-MM-dd',
  'projection.dt.range' = '{min(current(store), default="2026-01-01")},NOW'
)"""


def _chosen(store: Store, dates: Collection[str] | None) -> list[Published]:
    pointer, _ = read_pointer(store)
    if not pointer.nights:
        raise ArtifactMissing(f"nothing is published under {store.root}; `mulcot nightly` and `mulcot publish DATE` do it")
    return [published(store, pointer, d) for d in sorted(pointer.nights if dates is None else set(dates))]
