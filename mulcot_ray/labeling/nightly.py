"""Every night: which partitions are new, have grown or are unfinished; label them, judge them, publish them, and say what happened.

A night that a gate holds back stays where it is, whole and unpublished, and the command ends with an error. It is published with
`mulcot publish --force`, or replaced by another version. What was rolled back is not published again by itself.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mulcot_ray.artifacts import Manifest, find, need
from mulcot_ray.engines.pace import Pace
from mulcot_ray.errors import Held, InputError
from mulcot_ray.html import duration
from mulcot_ray.labeling.gates import Gates, Verdict, breaches, judge
from mulcot_ray.labeling.ledger import Ledger
from mulcot_ray.labeling.night import Steps, listing, night, night_rows, revisions
from mulcot_ray.labeling.publishing import current, earlier_nights, keep_verdicts, publish, repair, withdrawn
from mulcot_ray.labeling.report import metrics, night_page
from mulcot_ray.labeling.version import NightSettings, Version
from mulcot_ray.posts.dumps import list_units, partitions
from mulcot_ray.prices import dollars
from mulcot_ray.recipe import Runtime
from mulcot_ray.storage import Store

log = logging.getLogger(__name__)
EARLIER = 30  # nights before that are looked at
EXAMPLES = 3  # rejects shown for each reason


@dataclass(frozen=True)
class Outcome:
    """What became of a partition. `state`: published, held, unchanged (it was published before), or rolled back before."""

    manifest: Manifest
    fresh: bool
    state: str
    verdicts: list[Verdict]


def nightly(
    store: Store, path: str, *, version: Version, settings: NightSettings, runtime: Runtime, images: str | None = None,
    dates: Sequence[str] | None = None, since: str | None = None, pace: Pace | None = None, steps: Steps, told: Callable[[Outcome], None] = lambda _: None,
) -> list[Outcome]:  # fmt: skip
    """Do what there is to do, oldest date first. `told` hears of each partition. Raises Held at the end where a night was held back."""
    found = partitions(path)
    wanted = {d: p for d, p in sorted(found.items()) if (dates is None or d in dates) and (since is None or d >= since)}
    if missing := sorted(set(dates or ()) - set(found)):
        raise InputError(f"{path} has no partition dt={missing[0]}; there are {', '.join(sorted(found)[-5:])}")
    repair(store)
    outcomes: list[Outcome] = []
    for date, folder in wanted.items():
        manifest, fresh = night(store, date, folder, version=version, settings=settings, runtime=runtime, images=images, pace=pace, steps=steps)
        outcomes.append(_release(store, manifest, fresh, settings.gates))
        told(outcomes[-1])
    if outcomes:
        Ledger(store, version.name).compact(runtime)
    if held := [o for o in outcomes if o.state == "held"]:
        raise Held(
            "; ".join(f"{o.manifest.name}: {_why(o.verdicts)}" for o in held) + " See its report.html; `mulcot publish --force` publishes it as it is"
        )
    return outcomes


def pending(store: Store, path: str, *, version: Version, dates: Sequence[str] | None = None, since: str | None = None) -> Iterator[str]:
    """What `nightly` would do, a line for each partition; with how long it would take and what it would cost, if it went as the last one."""
    last = next((m for m in reversed(earlier_nights(store, "9999", EARLIER)) if m.stats["version"] == version.name and m.stats.get("bytes")), None)
    for date, folder in sorted(partitions(path).items()):
        if (dates is None or date in dates) and (since is None or date >= since):
            units = list_units(folder)
            weight = sum(u.weight for u in units)
            size = f"{len({u.file for u in units})} files, {weight:,} bytes"
            known = revisions(store, date, version.name)
            done = find(store, "nights", known[-1]) if known else None
            if not known:
                what = "new"
            elif done is None:
                what = f"{known[-1]} was interrupted and goes on"
            elif done.identity["units"] != listing(units):
                what = f"has changed since {known[-1]}: a new revision; what is known is not asked again"
            elif done.stats["deferred"]:
                what = f"{done.stats['deferred']} rows were deferred by {known[-1]}: a new revision"
            else:
                yield f"{date}  {size}: done ({known[-1]})"
                continue
            yield f"{date}  {size}: {what}"
            yield f"            {_as_before(weight, last)}"


def _as_before(weight: int, last: Manifest | None) -> str:
    if last is None:
        return "no night of this version is published yet, to tell what it takes by; `mulcot plan` prices an imported table"
    share = weight / last.stats["bytes"]
    seconds, rows, usd = (share * x for x in (sum(last.stats["seconds_by_step"].values()), last.rows_in, last.stats["usd"]))
    return f"as {last.name} went: about {rows:,.0f} rows, {duration(seconds)}, {dollars(usd)}"


def release(store: Store, name: str, gates: Gates, *, force: bool) -> Outcome:
    """Judge a finished night again and publish it, forced or not. Raises Held."""
    manifest = need(store, "nights", name)
    verdicts = judge(manifest, _before(store, manifest), gates)
    publish(store, name, verdicts=verdicts, force=force)
    write_pages(store, manifest, verdicts, gates)
    return Outcome(manifest, False, "published", verdicts)


def write_pages(store: Store, manifest: Manifest, verdicts: list[Verdict], gates: Gates) -> None:
    """report.html and metrics.prom beside the manifest, made from it, and made again whenever the verdicts are."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for r in itertools.islice(night_rows(store, manifest, "rejects"), 2000):
        some = shown.setdefault(r["reason"], [])
        if len(some) < EXAMPLES:
            some.append(r)
    page = night_page(manifest, verdicts, _before(store, manifest), shown, nights=gates.nights, root=store.root)
    store.write(f"nights/{manifest.name}/report.html", page.encode())
    store.write(f"nights/{manifest.name}/metrics.prom", metrics(manifest, verdicts).encode())


def _release(store: Store, manifest: Manifest, fresh: bool, gates: Gates) -> Outcome:
    now = current(store).get(manifest.stats["date"])
    if now is not None and now.night == manifest.name:
        return Outcome(manifest, fresh, "unchanged", [])
    verdicts = judge(manifest, _before(store, manifest), gates)
    if manifest.name in withdrawn(store):
        keep_verdicts(store, manifest.name, verdicts)
        return Outcome(manifest, fresh, "rolled back before", verdicts)
    try:
        publish(store, manifest.name, verdicts=verdicts)
        state = "published"
    except Held as e:
        log.warning("%s is held back: %s", manifest.name, e)
        state = "held"
    write_pages(store, manifest, verdicts, gates)
    return Outcome(manifest, fresh, state, verdicts)


def _before(store: Store, manifest: Manifest) -> list[Manifest]:
    """The nights that the gates compare with."""
    return earlier_nights(store, manifest.stats["date"], EARLIER)


def _why(verdicts: list[Verdict]) -> str:
    return "; ".join(f"{v.gate}: {v.why}" for v in breaches(verdicts))
