"""Work through a posts table in chunks: Ray Data hands chunks to actors, each with an engine; an actor commits a chunk whole.

After a kill, chunks whose part exists are skipped; a chunk in flight is done again, and finds the answers that it had already paid for
(engines/answers.py). The nouns are in engines/scope.py, the actor is in engines/worker.py, what a commit is in parts.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pyarrow.parquet as pq

from mulcot_ray.cluster import mapped, session
from mulcot_ray.console import Progress, about
from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.engines.pace import Pace
from mulcot_ray.engines.scope import IN_FLIGHT, LIVES, Selection, Source, Target, Work, plan
from mulcot_ray.engines.worker import ChunkWorker
from mulcot_ray.errors import ConservationError
from mulcot_ray.observing import Watch
from mulcot_ray.parts import Parts
from mulcot_ray.recipe import Runtime
from mulcot_ray.storage import Store


def run_chunks(
    target: Target, source: Source, chosen: Selection, spec: EngineSpec, work: Work, runtime: Runtime, progress: Progress, pace: Pace | None = None
) -> Counter[str]:
    """Do what is not yet done. Returns the summed counts of all chunks, `rows_in` and `rejects` among them; `deferred` are rows for which
    the pace left no time or money: they have no part, and the same call again asks them.

    Raises EngineError when the engine cannot start or keeps dying.
    """
    store, total = target.store, source.total - _apart(target.store, chosen)
    chunks = {c.part: c for c in plan(source.files, target.rows_per_chunk)}
    parts = Parts(store, target.prefix, chunks)
    tally, todo = parts.tally, [chunks[n] for n in parts.missing]
    progress(tally["rows_in"], total, tally["rejects"])
    if todo:
        lo, hi = runtime_replicas(spec, len(todo))
        brake = f"{target.prefix}/attempts/{target.owner}/brake"
        purse = pace or _purse(spec)
        before = purse.spent if purse is not None else 0.0
        if purse is not None and (word := purse.begin(spec, tally["rows_in"], total)):
            store.write(brake, word)
        with session(runtime), about(run=target.run, stage=target.stage, role=target.role):
            watch = Watch(target.run, target.stage, target.role)
            watch.rows(tally["rows_in"], total)
            gpus = spec.runtime.devices if spec.device == "cuda" and spec.backend != "endpoint" else 0
            batches = mapped(
                [asdict(c) for c in todo],
                ChunkWorker,
                fn_constructor_args=(target, source.prefix, chosen, spec, work, runtime.answer_cache, brake),
                # All GPU replicas are asked for at once: Ray Data adds them one by one, and with real machines that is minutes each.
                # It adds any only where more tasks are in flight than are worked on.
                pool={
                    "min_size": hi if gpus else lo, "max_size": hi,
                    "max_tasks_in_flight_per_actor": 2 * IN_FLIGHT, "max_concurrent_calls_per_actor": IN_FLIGHT,
                },
                num_cpus=spec.runtime.cpus,
                num_gpus=gpus,
                max_restarts=LIVES,
                max_task_retries=LIVES,
            )  # fmt: skip
            for batch in batches:
                parts.take(batch)
                done = tally["rows_in"] + tally["deferred"]
                progress(done, total, tally["rejects"])
                if purse is not None and (word := purse.look(tally["rows_in"], total, hi)):
                    store.write(brake, word)
                watch.rows(done, total)
                watch.usd(purse.spent - before if purse is not None else 0.0)
    if tally["rows_in"] + tally["deferred"] != total:
        raise ConservationError(f"{target.prefix}: {total} rows planned, {tally['rows_in']} accounted for. Nothing is published; please report this.")
    for name in store.files(f"{target.prefix}/attempts"):
        store.delete(f"{target.prefix}/attempts/{name}")
    parts.drop_strays()
    return tally


def _purse(spec: EngineSpec) -> Pace | None:
    """Adds up what a run without limits costs. None: the price table does not know its machines."""
    found = Pace()
    return found if spec.runtime.accelerator in found.prices.accelerators else None


def _apart(store: Store, chosen: Selection) -> int:
    """How many rows of the split are left to their representatives."""
    if chosen.apart is None:
        return 0
    count = 0
    for name in chosen.apart.parts():
        rows = pq.read_table(store.path(f"duplicates/{chosen.apart.name}/{name}"), columns=["split", "label", "rep_label"], filesystem=store.fs)
        count += sum(r["label"] == r["rep_label"] and chosen.split in (None, r["split"]) for r in rows.to_pylist())
    return count


def runtime_replicas(spec: EngineSpec, chunks: int) -> tuple[int, int]:
    """From–to. A range gives an engine to every 2 × IN_FLIGHT chunks at most: fewer would not be worth its start."""
    r = spec.runtime.replicas
    lo, hi = (r, r) if isinstance(r, int) else r
    lo = max(1, min(lo, chunks))
    return lo, max(lo, min(hi, chunks // (2 * IN_FLIGHT)) if lo < hi else lo)
