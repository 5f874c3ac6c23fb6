"""Who repeats whom: the join of signatures, in numpy columns. Pure: no files, no Ray.

36 bytes a post stay in memory, and 111 at the peak of the join (measured at a million posts); text signatures may be memory-mapped.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PERMUTATIONS, PHASH_BITS = 128, 64
Column = NDArray[Any]


@dataclass
class Signatures:
    """What is compared, one row a post, in table order. `texts` may be memory-mapped."""

    content: Column  # uint64 (2, n): digest of text, aspect and picture
    split: Column  # int8 (n,): index in SPLITS
    label: Column  # int8 (n,): index in LABELS, or -1
    block: Column  # uint64 (n,): digest of split, aspect and "has a picture"
    near: Column  # bool (n,): there is something to compare
    pictured: Column  # bool (n,)
    phash: Column  # uint64 (n,), 0 where there is no picture
    texts: Column  # uint8 (n, 128): the low byte of each MinHash value


@dataclass
class Groups:
    representative: Column  # int64 (n,): row of the representative; a row that is kept has its own
    matches: Column  # uint8 (n,): MinHash values, of 128, that are equal to the representative's
    near: Column  # bool (n,): near duplicates
    across_splits: int  # posts whose content stands in more than one split


def group(s: Signatures, text_similarity: float | None, image_distance: int) -> Groups:
    """Who repeats whom. `text_similarity` None: exact duplicates alone. The same for any order of the work, and equal to comparing all pairs.

    No pair is lost to hashing: two signatures that differ in at most d places, cut into d + 1 bands, agree in one whole band. So the pairs
    that share a bucket, which is a band of the text's signature and one of the picture's, are all that need comparing.
    """
    n = len(s.split)
    order = np.lexsort((s.split, *s.content))  # stable: the rows of a group ascend
    other, new = np.ones(n, bool), np.zeros(n, bool)  # begins a content; begins a split within one
    other[1:] = False
    for column in s.content:
        other[1:] |= np.diff(column[order]) != 0
    new[1:] = np.diff(s.split[order]) != 0
    new |= other
    contents = np.flatnonzero(other)
    across = np.diff(contents, append=n)[np.add.reduceat(new, contents, dtype=np.int64) > 1].sum() if n else 0
    del other, contents
    starts = np.flatnonzero(new)
    representative = np.empty(n, np.int64)
    representative[order] = np.repeat(order[starts], np.diff(starts, append=n))
    del order, new, starts
    found = Groups(representative, np.full(n, PERMUTATIONS, np.uint8), np.zeros(n, bool), int(across))
    if text_similarity is not None:
        _join_near(s, found, math.ceil(text_similarity * PERMUTATIONS - 1e-9), image_distance)
    return found


def _join_near(s: Signatures, found: Groups, least: int, distance: int) -> None:
    """Decide, in rounds, who is kept of the rows that are no exact duplicates.

    In a round each row that seeks finds the earliest similar row that is not known to be a duplicate. Who finds none is kept; who finds
    a kept row is its duplicate; who finds one that turns out to be a duplicate seeks again; the others wait for the one they found.
    A round settles a dense group whole; a drift (each row like the last, none like the first) takes one for each representative on its way.
    """
    best, n = found.representative, len(s.split)
    open_ = (best == np.arange(n)) & s.near
    seeking, kept, duplicate = open_.copy(), np.zeros(n, bool), np.zeros(n, bool)
    rows = np.flatnonzero(open_)
    while seeking.any():
        meets = np.zeros(n, bool)
        for members, first in _buckets(s, rows, open_, least, distance):
            meets[members] = True
            _seek(s, found, members, first, seeking, least, distance)
        seeking[:] = False
        waiting, before = np.flatnonzero(open_), -1
        while len(waiting) != before:
            before, target = len(waiting), best[waiting]
            alone = target == waiting
            kept[waiting[alone]] = True
            duplicate[waiting[~alone & kept[target]]] = True
            again = waiting[~alone & duplicate[target]]
            seeking[again], best[again], found.matches[again] = True, again, PERMUTATIONS
            waiting = waiting[~alone & ~kept[target] & ~duplicate[target]]
        open_ &= ~kept & ~duplicate
        rows = rows[meets[rows] & ~duplicate[rows]]  # who met no open row now will meet none later
    followers = np.flatnonzero(duplicate[best])  # exact copies of what turned out to be a near duplicate
    found.matches[followers] = found.matches[best[followers]]
    best[followers] = best[best[followers]]
    found.near |= duplicate
    found.near[followers] = True


def _buckets(s: Signatures, rows: Column, open_: Column, least: int, distance: int) -> Iterator[tuple[Column, Column]]:
    """For each pair of bands: the rows that share a bucket with a later open one, by bucket and row, and where in them each one's bucket begins."""
    bands, parts = PERMUTATIONS - least + 1, distance + 1
    cuts, bits = [i * PERMUTATIONS // bands for i in range(bands + 1)], [i * PHASH_BITS // parts for i in range(parts + 1)]
    for lo, hi in zip(cuts, cuts[1:], strict=False):
        width = min(hi - lo, 8)  # of a wider band the first 8 values are enough to tell unlike texts apart
        band = np.zeros((len(rows), 8), np.uint8)
        band[:, :width] = s.texts[rows, lo : lo + width]
        of_text = _mix(_mix(band.view(np.uint64)[:, 0]) ^ s.block[rows])
        del band
        members, _ = _shared(rows, of_text, open_)
        of_text = of_text[np.searchsorted(rows, members := np.sort(members))]
        for a, b in zip(bits, bits[1:], strict=False):
            if a:  # posts without a picture meet in the first part
                with_picture = s.pictured[members]
                members, of_text = members[with_picture], of_text[with_picture]
            part = (s.phash[members] >> np.uint64(a)) & np.uint64((1 << (b - a)) - 1)
            found, first = _shared(members, _mix(of_text ^ _mix(part + np.uint64(1))), open_)
            if len(found):
                yield found, first


def _shared(rows: Column, keys: Column, open_: Column) -> tuple[Column, Column]:
    """Of ascending rows those whose key is also that of an open row that is not the first with it; sorted by key, then row."""
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = keys[1:] != keys[:-1]
    starts = np.flatnonzero(new)
    if not len(starts):
        return rows, starts
    wanted = np.logical_or.reduceat(open_[rows[order]] & ~new, starts)
    sizes = np.diff(starts, append=len(keys))
    order = order[np.repeat(wanted, sizes)]
    sizes = sizes[wanted]
    return rows[order], np.repeat(np.cumsum(sizes) - sizes, sizes)


def _mix(x: Column) -> Column:
    """splitmix64's finisher: every bit of the key depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _seek(s: Signatures, found: Groups, members: Column, first: Column, seeking: Column, least: int, distance: int) -> None:
    """Compare each seeker with its bucket's rows in their order until one is similar, or none is left before the one it knows already."""
    place = np.arange(len(members)) - first
    who, step = np.flatnonzero((place > 0) & seeking[members]), 0
    while len(who):
        who = who[(place[who] > step) & (members[first[who] + step] < found.representative[members[who]])]
        row, target = members[who], members[first[who] + step]
        matches = _matches(s, row, target, distance)
        alike = matches >= least
        found.representative[row[alike]] = target[alike]
        found.matches[row[alike]] = matches[alike]
        who, step = who[~alike], step + 1


def _matches(s: Signatures, a: Column, b: Column, distance: int) -> Column:
    """How many of 128 MinHash values are equal, for each pair of rows; 0 where aspect, split or picture part them."""
    matches = np.zeros(len(a), np.uint8)
    possible = np.flatnonzero((s.block[a] == s.block[b]) & (np.bitwise_count(s.phash[a] ^ s.phash[b]) <= distance))
    for at in range(0, len(possible), 1 << 16):  # 16 MB at a time
        some = possible[at : at + (1 << 16)]
        matches[some] = np.count_nonzero(s.texts[a[some]] == s.texts[b[some]], axis=1)
    return matches
