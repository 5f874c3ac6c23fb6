"""What is counted while work goes on: Prometheus metrics by way of Ray, whose agent on each node shows them at its metrics port.

Every metric is defined here, once; docs/observing.md has the same table, and a test compares them. Ray puts `ray_` before the names and adds labels
of its own (SessionName, NodeAddress, WorkerId, …), so queries sum over what they do not ask for.

Counters say what was *done*: rows that a death makes somebody do again count again. What came of it is in the manifests. Gauges go with the process
that sets them, some 20 seconds after its end. In a process that is in no Ray session nothing is counted.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from typing import Any, Literal

from mulcot_ray.records import Reason

TELL_S = 1.0  # between two tellings of a chunk's counts; Ray sends them to its agent every 10 s (RAY_metrics_report_interval_ms)
# The smallest number that is more than nothing: Ray takes no other for a counter, and a series whose first value is 3 has, to Prometheus, not grown.
NOTHING = 5e-324
SECONDS = (1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
OUTCOMES = ("kept", "rejected", "deferred")
ANSWERS = ("asked", "reused", "scored")
DIRECTIONS = ("in", "out")
REASONS = tuple(map(str, list(Reason)[list(Reason).index(Reason.IMAGE_MISSING) :]))  # those before are of the import, which asks no engine
TERMS = {"loss": "total", "ce_cls": "ce_cls", "ce_rea": "ce_rea", "kl_cls": "kl_cls", "kl_rea": "kl_rea"}  # columns of a run's table


@dataclass(frozen=True)
class Metric:
    """`name` as we give it to Ray; `labels` ours; `values`: all values of a label, where they are known before."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    text: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)


ROLE = ("stage", "role")
POSTS = Metric(
    "counter", "mulcot_posts_total", "Posts that workers are done with, by what became of them.", (*ROLE, "outcome"), {"outcome": OUTCOMES}
)
REJECTS = Metric("counter", "mulcot_rejects_total", "Posts rejected, by reason.", (*ROLE, "reason"), {"reason": REASONS})
ASKED = Metric("counter", "mulcot_answers_total", "Questions: written by the engine (asked), found kept (reused), label words weighed (scored).", (*ROLE, "kind"), {"kind": ANSWERS})  # fmt: skip
TOKENS = Metric("counter", "mulcot_tokens_total", "Tokens that engines read (in) and wrote (out).", (*ROLE, "direction"), {"direction": DIRECTIONS})
RESTARTS = Metric("counter", "mulcot_engine_restarts_total", "Engines that died and were opened again.", ROLE)
CHUNKS = Metric("histogram", "mulcot_chunk_seconds", "From a chunk's start to its commit.", ROLE)
USD = Metric("counter", "mulcot_usd_total", "US dollars for the engines' machines, by the price table.", ROLE)
ROWS = Metric("gauge", "mulcot_rows", "Rows of a run that are done, and those left.", ("run", *ROLE, "state"))
STEP = Metric("gauge", "mulcot_step", "Optimizer steps that a training run has made.", ("run",))
STEPS = Metric("gauge", "mulcot_steps_planned", "Optimizer steps that it will make.", ("run",))
LOSS = Metric(
    "gauge", "mulcot_loss", "Loss of the last step: `total`, and cross-entropy (ce) and KL to the soft labels (kl) of the tasks.", ("run", "term")
)
SPEED = Metric("gauge", "mulcot_tokens_per_second", "Tokens of the last step, of all workers, by its time.", ("run",))
MFU = Metric("gauge", "mulcot_mfu", "Share of the GPUs' peak that the last step used.", ("run",))
VALIDATION = Metric("gauge", "mulcot_validation", "The last validation: accuracy, macro_f1.", ("run", "figure"))
METRICS = (POSTS, REJECTS, ASKED, TOKENS, RESTARTS, CHUNKS, USD, ROWS, STEP, STEPS, LOSS, SPEED, MFU, VALIDATION)


def add(metric: Metric, value: float, **labels: str) -> None:
    """Of a counter: more by `value`; of a gauge: its value; of a histogram: one more observation. A counter's 0 only makes the series known."""
    if not _in_session():
        return
    made = _made(metric)
    if metric.kind == "counter":
        made.inc(value or NOTHING, labels)
    elif metric.kind == "gauge":
        made.set(value, labels)
    else:
        made.observe(value, labels)


class Meter:
    """What becomes of the rows of one chunk. `tally` is that of its engine (engines/answers.py), which is looked at when there is something to tell.

    A row costs 0.4 µs, and a telling some 30 µs (measured); so it is told at most every TELL_S, and by `done`.
    """

    def __init__(self, stage: str, role: str, tally: Counter[str]) -> None:
        self.labels, self.tally = {"stage": stage, "role": role}, tally
        self.rows: Counter[str] = Counter()  # "kept", "deferred" or a reason
        self._told: Counter[str] = Counter()
        self._at = time.monotonic()
        if _in_session():
            _begin(stage, role)

    def row(self, what: str = "kept", count: int = 1) -> None:
        """So many rows were kept, `deferred`, or rejected for this reason."""
        self.rows[what] += count
        if time.monotonic() - self._at >= TELL_S:
            self.tell()

    def done(self, seconds: float) -> None:
        """The chunk is committed."""
        self.tell()
        add(CHUNKS, seconds, **self.labels)

    def tell(self) -> None:
        self._at = time.monotonic()
        now = Counter({f"row {k}": n for k, n in self.rows.items()}) + self.tally
        for what, more in (now - self._told).items():
            kind, _, name = what.partition(" ")
            if name in OUTCOMES:
                add(POSTS, more, outcome=name, **self.labels)
            elif kind == "row":
                add(POSTS, more, outcome="rejected", **self.labels)
                add(REJECTS, more, reason=name, **self.labels)
            elif what in ANSWERS:
                add(ASKED, more, kind=what, **self.labels)
            elif what in ("tokens_in", "tokens_out"):
                add(TOKENS, more, direction=what.removeprefix("tokens_"), **self.labels)
        self._told = now


class Watch:
    """The driver's side of a run: rows done and left, and what its machines have cost."""

    def __init__(self, run: str, stage: str, role: str) -> None:
        self.run, self.labels, self.spent = run, {"stage": stage, "role": role}, 0.0
        add(USD, 0, **self.labels)

    def rows(self, done: int, total: int) -> None:
        add(ROWS, done, run=self.run, state="done", **self.labels)
        add(ROWS, max(0, total - done), run=self.run, state="left", **self.labels)

    def usd(self, spent: float) -> None:
        """`spent` since this run began."""
        if spent > self.spent:
            add(USD, spent - self.spent, **self.labels)
            self.spent = spent


def trained(run: str, step: int, planned: int, row: Mapping[str, float]) -> None:
    """A step of training, or a validation; `row` as in the run's table (training/metrics.py). What it has not is left as it was."""
    add(STEP, step, run=run)
    add(STEPS, planned, run=run)
    for column, term in TERMS.items():
        if column in row:
            add(LOSS, row[column], run=run, term=term)
    for metric, column in ((SPEED, "tokens_s"), (MFU, "mfu")):
        if column in row:
            add(metric, row[column], run=run)
    for figure in ("accuracy", "macro_f1"):
        if figure in row:
            add(VALIDATION, row[figure], run=run, figure=figure)


def _in_session() -> bool:
    ray: Any = sys.modules.get("ray")
    return ray is not None and hasattr(ray, "is_initialized") and ray.is_initialized()


@cache
def _made(metric: Metric) -> Any:
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.text, boundaries=list(SECONDS), tag_keys=metric.labels)
    return (metrics.Counter if metric.kind == "counter" else metrics.Gauge)(metric.name, metric.text, tag_keys=metric.labels)


@cache
def _begin(stage: str, role: str) -> None:
    """Every series that this process may count into begins at nothing, before the first row (see NOTHING)."""
    for metric in (POSTS, REJECTS, ASKED, TOKENS, RESTARTS):
        for found in product(*metric.values.values()):
            add(metric, 0, stage=stage, role=role, **dict(zip(metric.values, found, strict=True)))
