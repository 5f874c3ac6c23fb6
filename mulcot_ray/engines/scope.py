"""What is done with posts, to which of them, and where it goes: the nouns of work in chunks.

A chunk is a row range of one part of a posts table, cut the same way on every attempt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from PIL import Image

from mulcot_ray.artifacts import Manifest, Run
from mulcot_ray.engines.base import Engine
from mulcot_ray.errors import InputError
from mulcot_ray.records import Post, Prediction, Rationale, Split
from mulcot_ray.storage import Store

IN_FLIGHT = 3  # chunks an actor works on at once: the tail of one is filled by the next
LIVES = 8  # attempts that one actor gives a chunk; a killer row is found in the fifth


class Work(Protocol):
    """What is done with one post. Raises RowFault where the row is at fault. Must pickle."""

    kind: ClassVar[type[Rationale] | type[Prediction]]

    async def __call__(self, engine: Engine, post: Post, image: Image.Image | None) -> Any:
        """A record of `kind`."""

    def tally(self, post: Post, result: Any) -> Iterable[str]:
        """Names of the counters that go up by one for this row; `result` may be a Reject."""

    def plain(self) -> Work:
        """The same without what can be left out when time or money is short."""


@dataclass(frozen=True)
class Source:
    """A table of posts, somewhere under the root: its Parquet files with their rows, and how many of them are to be asked."""

    prefix: str
    files: Mapping[str, int]
    total: int


def source_of(posts: Manifest, split: Split | None) -> Source:
    """A finished posts table. Raises InputError where the split has no rows."""
    total = posts.rows if split is None else int(posts.stats["splits"].get(split, 0))
    if total == 0:
        raise InputError(f"posts {posts.name!r} has no rows in split {split!r}; there are {posts.stats['splits']}")
    return Source(f"{posts.kind}/{posts.name}", posts.sizes, total)


@dataclass(frozen=True)
class Target:
    """Where parts and rejects go. `owner` tells this run of the stage from the ones before it."""

    store: Store
    prefix: str
    stage: str
    owner: str
    rows_per_chunk: int

    @property
    def run(self) -> str:
        """The result that this is for, in logs and metrics."""
        return self.prefix.partition("/work/")[0]

    @property
    def role(self) -> str:
        """Who answers, where several do one after the other (labeling/scoring.py has a folder for each); empty elsewhere."""
        return self.prefix.partition("/work/")[2]


def target_of(run: Run) -> Target:
    return Target(run.store, run.prefix, run.identity["stage"], run.owner, int(run.plan["rows_per_chunk"]))


@dataclass(frozen=True)
class Chunk:
    """Rows lo to hi (exclusive) of one file of the posts table."""

    file: str
    lo: int
    hi: int

    @property
    def part(self) -> str:
        return f"part-{self.file.removeprefix('part-').removesuffix('.parquet')}-{self.lo:08d}"


@dataclass(frozen=True)
class Selection:
    """Which rows are asked. `redo` (a finished table of the same plan): only its rejects; what it kept is taken over.

    `apart` (a duplicates table): not those that get their representative's rationale.
    """

    split: Split | None = None
    redo: Manifest | None = None
    apart: Manifest | None = None


def plan(files: Mapping[str, int], rows_per_chunk: int) -> list[Chunk]:
    """The chunks of files with so many rows each."""
    return [Chunk(f, lo, min(lo + rows_per_chunk, n)) for f, n in files.items() for lo in range(0, n, rows_per_chunk)]
