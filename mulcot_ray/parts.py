"""Parts of a result that is made piece by piece: each is committed whole or not there, so a killed run goes on with those that are missing.

The rejects of a part go first, into a file named by their content; then the part is *created*, and names that file: that is the commit. Of two
attempts at a part one wins, and they cannot mix. Rows of a part's share = its rows + its rejects; its counts stand in the Parquet footer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from mulcot_ray.artifacts import parquet_bytes
from mulcot_ray.records import Reject, to_table
from mulcot_ray.storage import Store

TALLY, REJECTS = b"mulcot", b"mulcot.rejects"  # keys in a part's metadata: its counts, and the name of the file of its rejects
READERS = 16
T = TypeVar("T")


@dataclass(frozen=True)
class Commit:
    """What a part was committed with: its counts, and the file of its rejects ("" where it has none)."""

    tally: Counter[str]
    rejects: str


def footers(store: Store, keys: list[str], take: Callable[[pq.FileMetaData], T]) -> list[T]:
    """What `take` makes of the footers of these Parquet files, in order. A footer may have 45 KB in memory; none is kept."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda k: take(pq.read_metadata(store.path(k), filesystem=store.fs)), keys))


def read_commits(store: Store, keys: list[str]) -> list[Commit]:
    return footers(store, keys, lambda f: Commit(Counter(json.loads(f.metadata[TALLY])), f.metadata[REJECTS].decode()))


def commit_part(
    store: Store, prefix: str, part: str, rows: pa.Table, rejected: list[Reject], tally: Counter[str], rows_per_group: int = 1024
) -> Commit:
    """Returns what stands: an earlier attempt's commit where there is one."""
    name = ""
    if rejected:
        data = parquet_bytes(to_table(Reject, rejected))
        name = f"{part}.{hashlib.sha256(data).hexdigest()[:12]}.parquet"
        store.create(f"{prefix}/rejects/{name}", data)
    table = rows.replace_schema_metadata({TALLY: json.dumps(tally), REJECTS: name})
    key = f"{prefix}/{part}.parquet"
    return Commit(tally, name) if store.create(key, parquet_bytes(table, rows_per_group)) else read_commits(store, [key])[0]


class Parts:
    """Those parts of a run that are there, and what they add up to: `tally`, and `missing`, in order."""

    def __init__(self, store: Store, prefix: str, names: Collection[str]) -> None:
        self.store, self.prefix, self.names = store, prefix, set(names)
        self.tally, self._rejects = Counter[str](), set[str]()
        there = store.files(prefix)
        self.missing = [n for n in names if f"{n}.parquet" not in there]
        for commit in read_commits(store, [f"{prefix}/{n}.parquet" for n in names if f"{n}.parquet" in there]):
            self._add(commit)

    def take(self, commits: dict[str, Iterable[str]]) -> None:
        """Add what an actor sent: see `as_batch`."""
        for tally, rejects in zip(commits["tally"], commits["rejects"], strict=True):
            self._add(Commit(Counter(json.loads(tally)), str(rejects)))

    def _add(self, commit: Commit) -> None:
        self.tally.update(commit.tally)
        self._rejects.add(commit.rejects)

    def drop_strays(self) -> None:
        """Delete files of rejects that attempts left which did not commit."""
        for name in self.store.files(f"{self.prefix}/rejects"):
            if name.partition(".")[0] in self.names and name not in self._rejects:
                self.store.delete(f"{self.prefix}/rejects/{name}")


def as_batch(commits: list[Commit]) -> dict[str, list[str]]:
    """Commits as a batch of Ray Data."""
    return {"tally": [json.dumps(c.tally) for c in commits], "rejects": [c.rejects for c in commits]}
