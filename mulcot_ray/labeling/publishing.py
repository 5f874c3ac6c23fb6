"""What readers take for the labels of a date: ROOT/published.json, the one pointer. A night is published when the pointer names it, at once and whole.

    {"nights": {"2026-11-22": {"night": NAME, "labels": "labels/dt=2026-11-22/version=…", "rows": n, "published": utc, "forced": false}},
     "moves":  [the last moves, oldest first: {"id", "when", "who", "what", "date", "from", "to", "forced"}]}

It is moved by Store.swap alone, so of two who move it at once neither undoes the other, and whoever reads it sees a state that somebody made.

**Engines that cannot read it** (Athena, Trino, Presto, Redshift Spectrum) read lists of files in the layout of Hive's SymlinkTextInputFormat:

    ROOT/published/dt=2026-11-22/files.txt      one absolute path or s3:// URI a line: exactly the parts of the published night

A list is one object, replaced whole, after the pointer has moved: between the two, and after a crash until `repair` has run, such a reader sees
the night that was published before, complete. labeling/reading.py has what readers need for both ways.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import random
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

from pydantic import Field, TypeAdapter, ValidationError

from mulcot_ray.artifacts import Manifest, find, need
from mulcot_ray.errors import ArtifactError, ArtifactMissing, Busy, ConfigError, Held
from mulcot_ray.html import words
from mulcot_ray.labeling.gates import Verdict, breaches
from mulcot_ray.prompts import Frozen
from mulcot_ray.storage import Store

POINTER, LISTS = "published.json", "published"
MOVES = 200  # kept: half a year of nights
TRIES = 30  # swaps lost to others before giving up; each is lost only because another one was won
THREADS = 16  # reads at once: on S3 they wait for answers


class Published(Frozen):
    """What is published for a date. `labels` is the prefix of its parts under the root, `published` when (UTC), `forced` whether against the gates."""

    night: str
    labels: str
    rows: int
    published: str
    forced: bool


class Move(Frozen):
    """One move of the pointer, from a night (`before`, "from" in the file; None where there was none) to a night."""

    id: str
    when: str
    who: str
    what: Literal["publish", "rollback"]
    date: str
    before: str | None = Field(validation_alias="from", serialization_alias="from")
    to: str
    forced: bool


class Pointer(Frozen):
    nights: dict[str, Published] = {}
    moves: tuple[Move, ...] = ()


class Named(NamedTuple):
    """The parts of a night's name, DATE.VERSION.REVISION."""

    date: str
    version: str
    revision: int


def publish(store: Store, night: str, *, verdicts: Sequence[Verdict] | None = None, force: bool = False) -> tuple[Published, bool]:
    """Make a finished night the one of its date. Returns what is published, and False where it was that already.

    verdicts: kept beside the night (`keep_verdicts`); None: those kept are looked at. Raises Held where a gate is breached, where the night was
    never judged, over a newer revision of the same version, and after a rollback from it, unless `force`; ArtifactMissing where the night is not
    finished; ArtifactError where its parts are not what its manifest says.
    """
    manifest, name = need(store, "nights", night), split_name(night)
    if verdicts is not None:
        keep_verdicts(store, night, verdicts)

    def change(pointer: Pointer) -> tuple[Published, Move] | None:
        now = pointer.nights.get(name.date)
        if now is not None and now.night == night:
            return None
        if not force:
            _check_fit(store, night, pointer)
        _check_parts(store, manifest)
        return _step("publish", manifest, now, force)

    entry, moved = _move(store, name.date, change)
    _list_parts(store, name.date)
    return entry, moved


def rollback(store: Store, date: str) -> Published:
    """Publish again what was published for the date before the present night; a second rollback goes one further.

    Raises ArtifactMissing where nothing is published for the date, ArtifactError where nothing before it is known or its parts are gone.
    """

    def change(pointer: Pointer) -> tuple[Published, Move]:
        now = published(store, pointer, date)
        line = _line(pointer.moves, date)
        if len(line) < 2:
            known = f"as far as the last {MOVES} moves tell: there is nothing to go back to"
            raise ArtifactError(f"{date}: nothing was published before {now.night}, {known}")
        manifest = need(store, "nights", line[-2])
        _check_parts(store, manifest)
        return _step("rollback", manifest, now, any(m.to == line[-2] and m.forced for m in pointer.moves))

    entry, _ = _move(store, date, change)
    _list_parts(store, date)
    return entry


def current(store: Store) -> dict[str, Published]:
    """What is published, by date, in order."""
    return dict(sorted(read_pointer(store)[0].nights.items()))


def history(store: Store, date: str) -> list[Move]:
    """The moves of a date that are known, oldest first."""
    return [m for m in read_pointer(store)[0].moves if m.date == date]


def withdrawn(store: Store) -> set[str]:
    """Nights that somebody rolled back from, and that were not published since: they are published again only by force."""
    return _withdrawn(read_pointer(store)[0].moves)


def earlier_nights(store: Store, date: str, count: int) -> list[Manifest]:
    """Manifests of the last `count` published nights before a date, oldest first: what the gates compare with. Those that are gone are left out."""
    nights = [p.night for d, p in current(store).items() if d < date][-count:]
    with ThreadPoolExecutor(THREADS) as pool:
        return [m for m in pool.map(lambda n: find(store, "nights", n), nights) if m is not None]


def newest(store: Store, date: str) -> str:
    """The night of a date that was finished last: what `mulcot publish DATE` means. Raises ArtifactMissing."""
    names = [n for n in store.folders("nights") if n.startswith(f"{date}.")]
    with ThreadPoolExecutor(THREADS) as pool:
        found = [m for m in pool.map(lambda n: find(store, "nights", n), names) if m is not None]
    if not found:
        raise ArtifactMissing(f"no finished night of {date!r} under {store.root}; a date as 2026-11-22 is wanted, labelled by `mulcot nightly`")
    return max(found, key=lambda m: (m.finished, split_name(m.name).revision)).name


def keep_verdicts(store: Store, night: str, verdicts: Sequence[Verdict]) -> None:
    """nights/NAME/gates.json. Judging again replaces it."""
    store.write(f"nights/{night}/gates.json", json.dumps([v.model_dump() for v in verdicts], indent=1, ensure_ascii=False).encode())


def kept_verdicts(store: Store, night: str) -> list[Verdict] | None:
    """What the gates said of a night, or None where it was not judged."""
    data = store.read(f"nights/{night}/gates.json")
    return None if data is None else TypeAdapter(list[Verdict]).validate_json(data)


def split_name(night: str) -> Named:
    """Raises ConfigError where it is no name of a night."""
    match = re.fullmatch(r"(\d{4}-\d\d-\d\d)\.(.+)\.(\d+)", night)
    if match is None:
        raise ConfigError(f"night {night!r}: DATE.VERSION.REVISION is wanted, as 2026-11-22.student-3f9a1c2b.1")
    return Named(match[1], match[2], int(match[3]))


# --- the pointer -----------------------------------------------------------------------------------------------------


def read_pointer(store: Store) -> tuple[Pointer, str | None]:
    """The pointer and its tag; an empty one and None where nothing was ever published. Raises ArtifactError where it is damaged."""
    found = store.tagged(POINTER)
    if found is None:
        return Pointer(), None
    try:
        return Pointer.model_validate_json(found[0]), found[1]
    except ValidationError as e:
        at = ".".join(map(str, e.errors()[0]["loc"])) or "all of it"
        raise ArtifactError(f"{store.root}/{POINTER} is not a pointer of this version: {at}: {e.errors()[0]['msg']}") from e


def published(store: Store, pointer: Pointer, date: str) -> Published:
    """What the pointer says of a date. Raises ArtifactMissing, naming the dates there are."""
    if date not in pointer.nights:
        known = sorted(pointer.nights)
        there = ", ".join(known[-5:]) + (f" and {len(known) - 5} before" if len(known) > 5 else "") if known else "nothing"
        raise ArtifactMissing(f"nothing is published for {date!r} under {store.root} (there: {there})")
    return pointer.nights[date]


def _move(store: Store, date: str, change: Callable[[Pointer], tuple[Published, Move] | None]) -> tuple[Published, bool]:
    """Swap until it is done; `change` is asked anew each time, for another may have moved it meanwhile. None: nothing to do."""
    made = set[str]()
    for attempt in range(TRIES):
        pointer, tag = read_pointer(store)
        if any(m.id in made for m in pointer.moves):  # the answer to an earlier swap was lost, and another's came after it
            return published(store, pointer, date), True
        step = change(pointer)
        if step is None:
            return pointer.nights[date], False
        entry, move = step
        made.add(move.id)
        after = Pointer(nights=dict(sorted({**pointer.nights, date: entry}.items())), moves=(*pointer.moves, move)[-MOVES:])
        if store.swap(POINTER, after.model_dump_json(indent=1, by_alias=True).encode(), tag):
            return entry, True
        time.sleep(random.uniform(0, 0.05 * min(8, attempt + 1)))
    raise Busy(f"{store.root}/{POINTER} was moved by others {TRIES} times while this was to move it; try again")


def _step(what: Literal["publish", "rollback"], manifest: Manifest, now: Published | None, forced: bool) -> tuple[Published, Move]:
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    entry = Published(night=manifest.name, labels=labels_of(manifest.name), rows=manifest.rows, published=when, forced=forced)
    move = {
        "id": uuid.uuid4().hex, "when": when, "who": _who(), "what": what, "date": split_name(manifest.name).date, "from": now and now.night,
        "to": manifest.name, "forced": forced,
    }  # fmt: skip
    return entry, Move.model_validate(move)


def _check_fit(store: Store, night: str, pointer: Pointer) -> None:
    """Raises Held."""
    name, verdicts = split_name(night), kept_verdicts(store, night)
    force = f"`mulcot publish {name.date} --force` publishes it all the same"
    if verdicts is None:
        raise Held(f"{night} is not published: it was not judged; `mulcot nightly` does that, and {force}")
    if bad := breaches(verdicts):
        raise Held(f"{night} is not published: {' '.join(f'{words(v.gate)}: {v.why}' for v in bad)} Its labels are kept; {force}")
    now = pointer.nights.get(name.date)
    if now is not None:
        there = split_name(now.night)
        if there.version == name.version and there.revision > name.revision:
            raise Held(f"{night} is not published: revision {there.revision} of the same version is, which knows more; {force}")
    if night in _withdrawn(pointer.moves):
        last = next(m for m in reversed(pointer.moves) if m.before == night and m.what == "rollback")
        raise Held(f"{night} is not published: {last.who} rolled back from it at {last.when}; {force}")


def _check_parts(store: Store, manifest: Manifest) -> None:
    """A night is published whole or not at all, also where somebody has cleaned up under the root meanwhile."""
    parts, labels = parts_of(manifest), labels_of(manifest.name)
    rows = sum(int(manifest.files[k]["rows"]) for k in parts)
    if rows != manifest.rows:
        raise ArtifactError(f"nights/{manifest.name}: its manifest says {manifest.rows} rows, and {rows} in the parts under {labels}")
    there = store.files(labels)
    gone = [k for k in parts if there.get(k.removeprefix(f"{labels}/")) != manifest.files[k]["bytes"]]
    if gone:
        raise ArtifactError(f"{store.root}/{gone[0]} is gone, or not as {manifest.name} wrote it ({len(gone)} of {len(parts)} parts): not published")


def _line(moves: Iterable[Move], date: str) -> list[str]:
    """The nights of a date from the first one known to the present one, without those that were rolled back from."""
    line: list[str] = []
    for m in (m for m in moves if m.date == date):
        if m.what == "publish":
            line = [*(line or ([m.before] if m.before else [])), m.to]
            continue
        line = line[:-1]
        while line and line[-1] != m.to:
            line.pop()
        line = line or [m.to]
    return line


def _withdrawn(moves: Iterable[Move]) -> set[str]:
    found = set[str]()
    for m in moves:
        found.discard(m.to)
        if m.what == "rollback" and m.before:
            found.add(m.before)
    return found


# --- parts, and lists of them ----------------------------------------------------------------------------------------


def labels_of(night: str) -> str:
    """The prefix of a night's labels under the root."""
    date, _, rest = night.partition(".")
    return f"labels/dt={date}/version={rest}"


def parts_of(manifest: Manifest) -> list[str]:
    """Keys of the parts of a night's labels. A night without labels has none."""
    start = f"{labels_of(manifest.name)}/"
    return sorted(k for k in manifest.files if k.startswith(start) and k.endswith(".parquet"))


def uri(store: Store, key: str) -> str:
    """For readers other than this program: an absolute path, or s3://bucket/…"""
    return f"s3://{store.path(key)}" if store.is_s3 else store.path(key)


def repair(store: Store) -> list[str]:
    """Make the lists of files agree with the pointer, after a crash between the two. Returns the dates whose list was not right.

    Reads one small object for each date that is published, THREADS at once.
    """
    nights = current(store)
    listed = [n.partition("/")[0].removeprefix("dt=") for n in store.files(LISTS) if re.fullmatch(r"dt=[^/]+/files\.txt", n)]

    def wrong(date: str) -> bool:
        data, entry = store.read(_list_key(date)), nights.get(date)
        if data is None or entry is None:
            return (data is None) != (entry is None)
        start = uri(store, f"{entry.labels}/")  # a list is written whole: if it is of this night, all of it is
        lines = data.decode(errors="replace").splitlines()
        return bool(lines) != bool(entry.rows) or not all(line.startswith(start) for line in lines)

    dates = sorted(nights.keys() | set(listed))
    with ThreadPoolExecutor(THREADS) as pool:
        bad = [d for d, is_wrong in zip(dates, pool.map(wrong, dates), strict=True) if is_wrong]
    for date in bad:
        _list_parts(store, date)
    return bad


def _list_parts(store: Store, date: str) -> None:
    """Write the list of files of what the pointer says now. Looks again afterwards: whoever writes last has then written what is right."""
    seen: object = ()
    while seen != (entry := read_pointer(store)[0].nights.get(date)):
        seen = entry
        if entry is None:
            store.delete(_list_key(date))
            continue
        lines = [f"{uri(store, k)}\n" for k in parts_of(need(store, "nights", entry.night))]
        store.write(_list_key(date), "".join(lines).encode())


def _list_key(date: str) -> str:
    return f"{LISTS}/dt={date}/files.txt"


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
