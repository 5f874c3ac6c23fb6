"""What is counted and logged while work goes on. Against a real Prometheus: test_dashboard.py."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mulcot_ray import observing
from mulcot_ray.console import JsonLines, about, log_to
from mulcot_ray.observing import METRICS, Meter, Watch, trained
from mulcot_ray.records import Reason

DOCS = (Path(__file__).parent.parent / "docs" / "observing.md").read_text(encoding="utf-8")
IMPORT = {"bad_line", "bad_encoding", "missing_field", "bad_label", "bad_value", "empty_text", "duplicate_id", "no_majority", "opposed_modalities"}


class Told(list[tuple[str, float, dict[str, str]]]):
    """What `add` was called with, as it would be counted."""

    def __call__(self, metric: observing.Metric, value: float, **labels: str) -> None:
        assert set(labels) == set(metric.labels)
        assert all(labels[k] in v for k, v in metric.values.items())
        self.append((metric.name, value, labels))

    def sums(self, name: str, label: str) -> dict[str, float]:
        found: Counter[str] = Counter()
        for n, value, labels in self:
            if n == name:
                found[labels[label]] += value
        return dict(found)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    found = Told()
    monkeypatch.setattr(observing, "add", found)
    monkeypatch.setattr(observing, "_in_session", lambda: True)
    observing._begin.cache_clear()
    return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(observing.time, "monotonic", lambda: now[0])
    return now


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_keep_to_the_conventions() -> None:
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    for m in METRICS:
        assert re.fullmatch(r"mulcot_[a-z_]+", m.name) and m.text.endswith(".") and set(m.values) <= set(m.labels)
        assert m.name.endswith("_total") == (m.kind == "counter")
        assert m.kind != "histogram" or m.name.endswith("_seconds")
        assert not set(m.labels) & {"instance", "job", "le"} and all(x.islower() for x in m.labels)
        if m.kind != "gauge":  # every worker process leaves its counters in its node's agent: nothing in them may be named by a user
            assert set(m.labels) <= {"stage", "role", *m.values}
    assert {str(r) for r in Reason} - set(observing.REASONS) == IMPORT


def test_the_table_in_the_docs_is_the_modules() -> None:
    table = re.search(r"<!-- metrics -->\n(.+?)\n<!-- end -->", DOCS, re.DOTALL)
    assert table is not None
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table[1].splitlines()[2:]]
    want = [[f"`ray_{m.name}`", m.kind, ", ".join(f"`{x}`" for x in m.labels), m.text.rstrip(".")] for m in METRICS]
    assert rows == want, "\n".join(f"| {' | '.join(r)} |" for r in want)


def test_without_ray_nothing_happens() -> None:
    code = """
import sys
from collections import Counter
from mulcot_ray.observing import POSTS, Meter, Watch, add, trained
add(POSTS, 1, stage="label", role="", outcome="kept")
m = Meter("label", "", Counter(asked=3)); m.row(); m.done(1.0)
w = Watch("predictions/x", "label", ""); w.rows(1, 2); w.usd(1.0)
trained("models/x", 1, 2, {"loss": 1.0})
assert "ray" not in sys.modules
import ray
assert not ray.is_initialized()
add(POSTS, 1, stage="label", role="", outcome="kept")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_chunks_counts_are_told_now_and_then_and_whole(told: Told, clock: list[float]) -> None:
    tally: Counter[str] = Counter()
    meter = Meter("label", "student", tally)
    assert {v for _, v, _ in told} == {0} and told.sums("mulcot_posts_total", "outcome") == {"kept": 0, "rejected": 0, "deferred": 0}
    assert set(told.sums("mulcot_rejects_total", "reason")) == set(observing.REASONS)
    told.clear()
    for _ in range(50):
        tally.update({"scored": 1, "tokens_in": 300})
        meter.row()
    assert not told  # a second has not passed
    clock[0] += 1.5
    meter.row(Reason.IMAGE_MISSING)
    assert told.sums("mulcot_posts_total", "outcome") == {"kept": 50, "rejected": 1}
    assert told.sums("mulcot_rejects_total", "reason") == {"image_missing": 1}
    tally.update({"asked": 2, "reused": 1, "spared_tokens_in": 9, "tokens_in": 20, "tokens_out": 7})
    meter.row()
    meter.done(12.5)
    assert told.sums("mulcot_posts_total", "outcome") == {"kept": 51, "rejected": 1}
    assert told.sums("mulcot_answers_total", "kind") == {"scored": 50, "asked": 2, "reused": 1}
    assert told.sums("mulcot_tokens_total", "direction") == {"in": 15020, "out": 7}
    assert [x for x in told if x[0] == "mulcot_chunk_seconds"] == [("mulcot_chunk_seconds", 12.5, {"stage": "label", "role": "student"})]
    before = len(told)
    meter.tell()
    assert len(told) == before  # nothing twice
    Meter("label", "student", Counter())
    assert len(told) == before  # series begin once in a process


def test_rows_that_are_put_off_are_no_rejects(told: Told, clock: list[float]) -> None:
    meter = Meter("label", "", Counter())
    meter.row("deferred", 40)
    meter.tell()
    assert told.sums("mulcot_posts_total", "outcome") == {"kept": 0, "rejected": 0, "deferred": 40}
    assert not any(told.sums("mulcot_rejects_total", "reason").values())


def test_a_run_says_what_is_left_and_what_it_has_cost(told: Told) -> None:
    watch = Watch("nights/2026-11-22.s.1", "label", "student")
    watch.rows(30, 100)
    watch.usd(1.5)
    watch.usd(1.5)
    watch.usd(2.0)
    assert told.sums("mulcot_rows", "state") == {"done": 30, "left": 70} and told.sums("mulcot_usd_total", "stage") == {"label": 2.0}


def test_training_tells_what_it_has(told: Told) -> None:
    trained("models/m", 3, 9, {"loss": 1.2, "ce_cls": 0.4, "kl_rea": 0.1, "tokens_s": 900.0, "lr": 1e-4, "seconds": 1.0})
    assert told.sums("mulcot_loss", "term") == {"total": 1.2, "ce_cls": 0.4, "kl_rea": 0.1}
    assert told.sums("mulcot_step", "run") == {"models/m": 3} and told.sums("mulcot_steps_planned", "run") == {"models/m": 9}
    assert told.sums("mulcot_tokens_per_second", "run") == {"models/m": 900.0} and not told.sums("mulcot_mfu", "run")
    told.clear()
    trained("models/m", 9, 9, {"accuracy": 0.8, "macro_f1": 0.7})
    assert told.sums("mulcot_validation", "figure") == {"accuracy": 0.8, "macro_f1": 0.7} and not told.sums("mulcot_loss", "term")


@pytest.mark.ray
def test_counting_costs_nothing_that_is_noticed(ray_session: None) -> None:
    """A row of the fastest engine (label words on a large GPU) takes a millisecond of its worker; a stage of one process, 100 µs."""
    import ray

    def cost() -> tuple[float, float]:
        tally: Counter[str] = Counter()
        meter = Meter("label", "student", tally)
        began = time.perf_counter()
        for _ in range(50_000):
            meter.row()
        row = (time.perf_counter() - began) / 50_000
        began = time.perf_counter()
        for _ in range(200):
            tally.update({"scored": 1, "asked": 1, "tokens_in": 300, "tokens_out": 9})
            meter.row(Reason.LABEL_MISMATCH)
            meter.tell()
        return row, (time.perf_counter() - began) / 200

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    row, telling = ray.get(ray.remote(num_cpus=0)(cost).remote())
    assert row < 2e-5 and telling < 2e-3  # measured: 0.4 µs and 35 µs, on a busy machine


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _own_logging() -> Iterator[None]:
    """pytest's handlers are put back. Warnings are not captured yet, whatever a command of an earlier test left behind."""
    logging.captureWarnings(False)
    root = logging.getLogger()
    handlers, level, filters = list(root.handlers), root.level, list(warnings.filters)
    yield
    for h in list(root.handlers):
        root.removeHandler(h)
        if h not in handlers:
            h.close()
    for h in handlers:
        root.addHandler(h)
    root.setLevel(level)
    logging.captureWarnings(False)
    warnings.filters[:] = filters  # type: ignore[index]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.usefixtures("_own_logging")
def test_the_log_is_there_for_people_and_for_machines(tmp_path: Path) -> None:
    path = log_to(tmp_path / "logs", "nightly")
    assert path == tmp_path / "logs" / "nightly.log"
    log = logging.getLogger("mulcot_ray.x")
    with about(run="nights/a", stage="label", role=""):
        log.info('%d rows\nand a "quote" and \ud800', 3)
        with about(chunk="part-1"):
            try:
                raise ValueError("of a row")
            except ValueError:
                log.exception("failed")
        log.warning("after")
    log.debug("not at this level")
    logging.getLogger("mulcot_ray.y").error("outside")
    warnings.warn("a warning", stacklevel=1)
    found = lines(path.with_suffix(".jsonl"))
    assert [x["level"] for x in found] == ["INFO", "ERROR", "WARNING", "ERROR", "WARNING"]
    first, failed, after, outside, warned = found
    assert first["message"].startswith('3 rows\nand a "quote"') and (first["run"], first["stage"]) == ("nights/a", "label")
    assert "role" not in first and "chunk" not in first and re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert failed["chunk"] == "part-1" and failed["run"] == "nights/a" and "ValueError: of a row" in failed["error"] and "chunk" not in after
    assert "run" not in outside and outside["logger"] == "mulcot_ray.y" and "a warning" in warned["message"]
    text = path.read_text(encoding="utf-8")
    assert "INFO mulcot_ray.x: 3 rows" in text and "ValueError: of a row" in text and '{"time"' not in text


@pytest.mark.usefixtures("_own_logging")
def test_chunks_that_are_worked_on_at_once_are_told_apart(tmp_path: Path) -> None:
    path = log_to(tmp_path, "x").with_suffix(".jsonl")
    log = logging.getLogger("mulcot_ray.x")

    async def chunk(name: str) -> None:
        with about(chunk=name):
            await asyncio.sleep(0)
            await asyncio.gather(row(name), asyncio.to_thread(log.info, "%s in a thread", name))

    async def row(name: str) -> None:
        await asyncio.sleep(0.001)
        log.info("%s in a task", name)

    async def both() -> None:
        await asyncio.gather(*(chunk(f"part-{i}") for i in range(5)))

    asyncio.run(both())
    found = lines(path)
    assert len(found) == 10 and all(x["message"].startswith(x["chunk"] + " ") for x in found)


def test_a_line_says_what_its_process_is_about() -> None:
    record = logging.LogRecord("l", logging.INFO, "f", 1, "m", None, None)
    with about(chunk="c"):
        found = json.loads(JsonLines(run="r", actor="").format(record))
    assert {k: found.get(k) for k in ("run", "chunk", "actor", "message")} == {"run": "r", "chunk": "c", "actor": None, "message": "m"}
