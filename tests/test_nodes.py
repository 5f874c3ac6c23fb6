"""A machine dies in the middle of each stage: the job goes on, and its outputs are those of an undisturbed run."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nights import dump, posts, spoilt
from several_nodes import Machines, drive, machines, noted

pytestmark = [pytest.mark.ray, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def cluster(s3_bucket: str) -> Iterator[Machines]:
    """Machines know the S3 server by the environment."""
    with machines(cpus=2) as m:
        yield m


@pytest.fixture
def roots(sample_store: Any, tmp_path: Path) -> tuple[str, str]:
    """Two folders that all machines see, with the same posts."""
    for name in ("calm", "disturbed"):
        shutil.copytree(Path(sample_store.base, "posts", "sample"), tmp_path / name / "posts" / "sample")
    return str(tmp_path / "calm"), str(tmp_path / "disturbed")


def last(_: str, lines: list[dict[str, Any]]) -> str | None:
    """The machine that began something last, as soon as two are at work."""
    return str(lines[-1]["machine"]) if len({x["machine"] for x in lines}) == 2 else None


@pytest.mark.parametrize("stage, spare, twice", [("label", False, 24), ("teach", True, 8)])
def test_rows_that_a_machine_was_asked_are_asked_elsewhere(cluster: Machines, roots: tuple[str, str], stage: str, spare: bool, twice: int) -> None:
    """Without a spare, the other machine does it all. Asked twice is at most what the dead one had in flight: three chunks; of
    answers that are kept, eight rows."""
    cluster.want(2)
    calm, disturbed, ((_, gone),) = drive(cluster, stage, roots, "row", spare=spare, victim=last)
    assert disturbed == calm and calm["rows_in"] == len(calm["rows"]) + len(calm["rejects"])
    rows = noted(cluster.head.folder, "row")
    asked = Counter((r["of"], r["temperature"]) for r in rows)
    assert 0 < len(rows) - len(asked) <= twice
    assert {r["machine"] for r in rows} >= {gone} and len(rows) > 80


def test_a_night_loses_a_machine_in_each_of_its_steps(cluster: Machines, s3_bucket: str) -> None:
    """On S3: intake, match, score, assemble."""
    cluster.want(2)
    rows, there = spoilt(posts(200, 41), 41, 0.03, 0.1)
    dump(cluster.head.folder / "dump", "2026-11-22", rows, files=12)
    roots = (f"s3://{s3_bucket}/nodes/calm", f"s3://{s3_bucket}/nodes/disturbed")
    steps = ("_Intake", "FindFates", "row", "_Bucket")
    calm, disturbed, lost = drive(cluster, "night", roots, *steps, victim=last)
    assert disturbed == calm
    assert calm["state"] == "published" and calm["rows_in"] == there["rows"] and not calm["left"]
    for step, gone in lost:
        begun = [(x["machine"], x["of"]) for x in noted(cluster.head.folder, step)]
        again = [of for machine, of in begun if machine != gone and (gone, of) in begun]
        assert again, f"{step}: what {gone} had begun is begun again by others: {begun}"


def test_training_goes_on_from_the_checkpoint_on_another_machine(cluster: Machines, roots: tuple[str, str]) -> None:
    """The machine of worker 0 dies in the second epoch."""
    from training_parts import corpus

    from mulcot_ray.storage import Store

    for root in roots:
        corpus(Store(root))

    def first(_: str, lines: list[dict[str, Any]]) -> str | None:
        record = next(Path(roots[1], "training").glob("*/checkpoint_manager_snapshot.json"), None)
        if record is None or not json.loads(record.read_text())["latest_checkpoint_result"]:
            return None  # the first epoch's checkpoint is on its way
        return next(str(x["machine"]) for x in reversed(lines) if x["rank"] == 0)

    cluster.want(2)
    calm, disturbed, ((_, gone),) = drive(cluster, "train", roots, "step", victim=first)
    assert [s["step"] for s in disturbed["steps"]] == [1, 2, 3, 4, 5, 6] and disturbed["files"] == calm["files"] and not disturbed["left"]
    for a, b in zip(calm["steps"], disturbed["steps"], strict=True):
        assert {k: a[k] for k in CURVE} == pytest.approx({k: b[k] for k in CURVE}, rel=2e-5)
    steps = noted(cluster.head.folder, "step")
    assert [x["step"] for x in steps[10:]] == [3, 3, 4, 4, 5, 5] and gone not in {x["machine"] for x in steps[10:]}


CURVE = ("step", "loss", "lr", "ce_rea", "ce_cls", "kl_rea", "kl_cls", "grad_norm")
