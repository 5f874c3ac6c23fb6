"""Keeping to a deadline and a budget: what is left out, and when the rest is put off.

Looked at after every chunk. Where rationales may be left out (`late: label_only`) they are as soon as the rest would not be done in time at
the pace so far. At the deadline, or when the money is spent, what has not begun is deferred: a chunk in flight is still finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mulcot_ray.engines.base import EngineSpec
from mulcot_ray.html import duration
from mulcot_ray.prices import Prices, load_prices

PLAIN, DEFER = b"plain", b"defer"  # what workers are told
LEAST_S = 2.0  # of work, before its pace tells anything

Late = Literal["defer", "label_only"]


@dataclass
class Pace:
    """`deadline`: seconds since the epoch, or None; `budget`: US dollars, or None.

    `spent` (USD of machines, by the price table) and `said` (what was decided, for people) grow over all steps that share the pace.
    """

    deadline: float | None = None
    budget: float | None = None
    late: Late = "defer"
    prices: Prices = field(default_factory=load_prices)
    spent: float = 0.0
    said: list[str] = field(default_factory=list)
    plain: bool = False
    deferring: bool = False
    clock: Callable[[], float] = time.time
    usd_per_hour: float = 0.0  # of one replica of the step at work
    _seen: float = 0.0
    _at: tuple[float, int] = (0.0, 0)  # time and rows when the present pace began

    def begin(self, spec: EngineSpec, done: int, total: int) -> bytes | None:
        """A step begins, with so many of its rows done already. Returns what its workers are to be told, or None."""
        now = self.clock()
        machine = 0.0 if spec.backend == "endpoint" else self.prices.accelerator(spec.runtime.accelerator).usd_per_hour
        self.usd_per_hour, self._seen, self._at = machine * max(1, spec.runtime.devices), now, (now, done)
        return self.look(done, total, 0) or (DEFER if self.deferring else PLAIN if self.plain else None)

    def look(self, done: int, total: int, replicas: int) -> bytes | None:
        """What the workers are to be told now, or None: as before. `done` of `total` rows of this step."""
        now = self.clock()
        self.spent += (now - self._seen) * replicas * self.usd_per_hour / 3600
        self._seen = now
        if self.deferring:
            return None
        left = total - done
        if left and (why := self._over(now)):
            self.deferring = True
            self.said.append(f"{why}: {left} rows deferred, but for those in flight")
            return DEFER
        since, rows = self._at
        if self.late == "label_only" and not self.plain and now - since >= LEAST_S and done > rows:
            seconds = left * (now - since) / (done - rows)
            late = self.deadline is not None and now + seconds > self.deadline
            dear = self.budget is not None and self.spent + seconds * replicas * self.usd_per_hour / 3600 > self.budget
            if late or dear:
                self.plain, self._at = True, (now, done)
                what = "end after the deadline" if late else f"cost more than {self.budget:.2f} USD"
                self.said.append(f"{left} rows at this pace would take {duration(seconds)} more and {what}: no rationales from here on")
                return PLAIN
        return None

    def _over(self, now: float) -> str | None:
        if self.deadline is not None and now >= self.deadline:
            return "the deadline is reached"
        if self.budget is not None and self.spent >= self.budget:
            return f"the budget of {self.budget:.2f} USD is spent"
        return None
