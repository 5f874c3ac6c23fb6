"""Machines for test_nodes.py, and the drivers that run on them, as jobs would.

A machine is a Ray node of `ray start` with a loopback address of its own (127.0.0.2, …) and a folder of its own for temporary files, in place of
a disk. When it dies, all its processes do, by SIGKILL, and the folder goes with them. The head has no CPU for work; drivers run beside it.

A driver does its job twice: undisturbed, and once more, held at chosen moments until a machine has died. Each piece of work writes down that it
is being done, and on which machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from ray_nodes import BIN, Head, free_ports, ray_head

HERE = Path(__file__)
# From which piece of work on it is held: so many rows, tasks of a kind, or steps of two workers (the second of the second epoch).
HELD_AT = {"row": 80, "_Intake": 6, "FindFates": 6, "_Bucket": 6, "step": 9, "export": 1}
# A machine that is gone is noticed after 3 s, not Ray's 15.
NOTICE = {"RAY_health_check_initial_delay_ms": "1000", "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3"}
START_S = 180.0


# --- machines --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    name: str
    disk: Path
    process: subprocess.Popen[bytes]

    def processes(self) -> list[psutil.Process]:
        """All that runs on it: what `ray start` has started, and what that has."""
        with contextlib.suppress(psutil.NoSuchProcess):
            node = psutil.Process(self.process.pid)
            return [node, *node.children(recursive=True)]
        return []


@dataclass
class Machines:
    """A cluster, and which of its machines live."""

    head: Head
    cpus: float
    alive: list[Machine] = field(default_factory=list)
    made: int = 0

    def want(self, count: int) -> None:
        """So many machines, new ones for those that are gone. Where this one is busy, some do not come up: others are tried."""
        deadline = time.monotonic() + START_S
        while len(self.alive) < count:
            new = [self._start() for _ in range(count - len(self.alive))]
            self.alive += new
            for m in new:
                while "Ray runtime started" not in (said := (m.disk / "log").read_text()):
                    if time.monotonic() > deadline:
                        raise RuntimeError(said[-3000:])
                    if m.process.poll() is not None:
                        self.alive.remove(m)
                        break
                    time.sleep(0.1)

    def _start(self) -> Machine:
        self.made += 1
        name = f"127.0.0.{self.made + 1}"
        disk = self.head.folder / name
        disk.mkdir()
        agent, grpc, metrics = free_ports(3)
        command = [
            str(BIN / "ray"), "start", "--block", f"--address={self.head.gcs}", f"--node-ip-address={name}", f"--num-cpus={self.cpus:g}", f"--temp-dir={disk}",
            f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={grpc}", f"--metrics-export-port={metrics}",
            "--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=100000000", "--include-log-monitor=false",
        ]  # fmt: skip
        with (disk / "log").open("wb") as log:
            env = self.head.environment | {"TMPDIR": str(disk), "MULCOT_CACHE": str(disk / "cache")}
            return Machine(name, disk, subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))

    def lose(self, name: str) -> None:
        """Everything on it ends at once, and its disk is gone."""
        machine = next(m for m in self.alive if m.name == name)
        self.alive.remove(machine)
        found = machine.processes()
        for p in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                p.kill()
        machine.process.wait()
        psutil.wait_procs(found, timeout=10)
        shutil.rmtree(machine.disk)


@contextmanager
def machines(cpus: float) -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="mcn", dir="/tmp"))
    paths = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    settings = {**NOTICE, "PYTHONPATH": paths, "RAY_enable_worker_prestart": "0", "RAY_raylet_start_wait_time_s": "90"}
    try:
        with ray_head(folder, "--node-ip-address=127.0.0.1", cpus=0, environment=settings) as head:
            cluster = Machines(head, cpus)
            yield cluster
            for m in list(cluster.alive):
                cluster.lose(m.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drive(
    machines: Machines, job: str, roots: tuple[str, str], *whats: str, spare: bool = True, victim: Callable[[str, list[dict[str, Any]]], str | None],
    timeout_s: float = 400,
) -> tuple[dict[str, Any], dict[str, Any], list[tuple[str, str]]]:  # fmt: skip
    """Run a job. While it is held at each of `whats`, the machine that `victim` finds in what was written down is lost, and, with `spare`, replaced.

    Returns what the job says of its two runs, and which machines were lost, during what.
    """
    head, lost = machines.head, list[tuple[str, str]]()
    (head.folder / "journal.jsonl").unlink(missing_ok=True)
    for what in whats:
        (head.folder / f"{what}.hold").touch()

    def lose() -> None:
        what = whats[len(lost)]
        lines = noted(head.folder, what)
        name = victim(what, lines) if len(lines) >= HELD_AT[what] else None
        if name is not None:
            count = len(machines.alive)
            machines.lose(name)
            lost.append((what, name))
            (head.folder / f"{what}.hold").unlink()
            machines.want(count if spare else 0)

    with (head.folder / "driver.log").open("w+") as log:
        command = [sys.executable, str(HERE), job, *roots]
        driver = subprocess.Popen(command, env=head.environment | {"RAY_ADDRESS": head.gcs}, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + timeout_s
            while driver.poll() is None and time.monotonic() < deadline:
                if len(lost) < len(whats):
                    lose()
                time.sleep(0.05)
        finally:
            driver.kill()
            driver.wait()
        log.seek(0)
        text = log.read()
    line = next((x for x in text.splitlines() if x.startswith("RESULT ")), None)
    assert line is not None, f"{lost} were lost, and the driver says:\n{text[-5000:]}"
    assert len(lost) == len(whats)
    calm, disturbed, seconds = json.loads(line.removeprefix("RESULT "))
    print(f"{job}: {seconds[0]} s undisturbed, {seconds[1]} s with {lost} lost")
    return calm, disturbed, lost


# --- what is written down --------------------------------------------------------------------------------------------


def folder() -> Path:
    return Path(os.environ["RAY_TMPDIR"])


@dataclass(frozen=True)
class Hold:
    """Called when a piece of work begins. Writes it down, and waits, if enough of its kind have begun, until the test has taken a machine away."""

    what: str
    disturbed: bool

    def __call__(self, **facts: Any) -> None:
        with (folder() / "journal.jsonl").open("a") as f:
            f.write(json.dumps({"what": self.what, "machine": Path(os.environ.get("TMPDIR", "")).name, **facts}) + "\n")
        while self.disturbed and (folder() / f"{self.what}.hold").exists() and len(noted(folder(), self.what)) >= HELD_AT[self.what]:
            time.sleep(0.05)


def noted(where: Path, what: str) -> list[dict[str, Any]]:
    """The pieces of work of a kind, since the disturbed run began."""
    path = where / "journal.jsonl"
    lines = [json.loads(x) for x in path.read_text().splitlines() if x.endswith("}")] if path.exists() else []
    start = max((i for i, x in enumerate(lines) if x["what"] == "disturbed"), default=len(lines))
    return [x for x in lines[start:] if x["what"] == what]


# --- jobs ------------------------------------------------------------------------------------------------------------


class Script:
    """The scripted model: decided by the post's words. With the label given it agrees, but for some posts; some first answers are no answers."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold

    def __call__(self, messages: Any, sampling: Any) -> str:
        from nights import FULL

        text = messages[-1]["content"][-1]["text"]
        self.hold(of=text, temperature=sampling.temperature)
        given, n = re.search(r"Label: (\w+)", text), sum(map(ord, text))
        if given is not None and n % 4 == 0 and sampling.temperature < 0.7:
            return "no sections at all"
        return str(FULL.format(given[1] if given is not None and n % 5 else ("negative", "neutral", "positive")[n % 3]))


def engine(disturbed: bool) -> Any:
    """An actor a machine."""
    from nights import scripted

    return scripted(script=Script(Hold("row", disturbed)), replicas=2, cpus=2.0, max_num_seqs=4)


def ask(stage: str, root: str, disturbed: bool) -> dict[str, Any]:
    """Label or teach the posts of the root."""
    from nights import RECIPE

    from mulcot_ray.artifacts import read_rows
    from mulcot_ray.labeling.label import label
    from mulcot_ray.recipe import load_runtime
    from mulcot_ray.storage import Store
    from mulcot_ray.teaching.teach import teach

    store, told = Store(root), list[tuple[int, int, int]]()
    runtime = load_runtime("laptop").model_copy(update={"rows_per_chunk": 8})
    options: dict[str, Any] = dict(posts="sample", recipe=RECIPE, runtime=runtime, engine=engine(disturbed), progress=lambda *a: told.append(a))
    m, _ = teach(store, "t", **options) if stage == "teach" else label(store, "t", model="builtin:student", **options)
    rows, rejects = (list(read_rows(store, m, rejects=r)) for r in (False, True))
    return {"rows_in": m.rows_in, "rows": rows, "rejects": rejects, "files": sorted(m.files), "labels": m.stats["labels"], "told": told[-1]}


class Held:
    """In place of a task of mulcot_ray.cluster.tasks: the same, held at its beginning."""

    def __init__(self, hold: Hold, kind: Callable[..., Any], *args: Any) -> None:
        self.hold, self.work = hold, kind(*args)

    def __call__(self, row: dict[str, Any]) -> Any:
        self.hold(of=row.get("bucket", row.get("number")))
        return self.work(row)


def label_night(_: str, root: str, disturbed: bool) -> dict[str, Any]:
    """A night over the dump that lies beside the roots, into some 16 buckets."""
    import nights

    from mulcot_ray.artifacts import need
    from mulcot_ray.cluster import tasks as plain
    from mulcot_ray.labeling import assemble, intake, match
    from mulcot_ray.labeling.gates import Gates
    from mulcot_ray.labeling.nightly import nightly
    from mulcot_ray.labeling.publishing import current
    from mulcot_ray.labeling.version import NightSettings
    from mulcot_ray.recipe import load_runtime
    from mulcot_ray.storage import Store

    def tasks(runtime: Any, kind: Any, args: Any, rows: Any) -> Any:
        return plain(runtime, partial(Held, Hold(kind.__name__, disturbed), kind), args, rows)  # type: ignore[arg-type]

    for module in (intake, match, assemble):
        module.tasks = tasks  # type: ignore[attr-defined]
    intake.BUCKET_BYTES = 2048
    store, runtime = Store(root), load_runtime("laptop").model_copy(update={"rows_per_chunk": 8})
    settings = NightSettings(name="t", gates=Gates(reject_rate_max=0.5))
    version = nights.version(store, settings, {"student": engine(disturbed)})
    (one,) = nightly(store, str(folder() / "dump"), version=version, settings=settings, runtime=runtime, steps=nights.quiet)
    m = need(store, "nights", one.manifest.name)
    keep = ("fates", "labels", "repeated", "deferred", "ledger", "folder")
    facts = {"state": one.state, "current": sorted(current(store)), "left": list(store.files(f"nights/{m.name}/work"))}
    return facts | {"rows_in": m.rows_in, "rows": m.rows, "rejects": m.rejects_by_reason, "files": m.files} | {k: m.stats[k] for k in keep}


def held_worker(disturbed: bool, job: Any) -> None:
    from mulcot_ray.training import loop

    plain, hold = loop.Trainer.step, Hold("step", disturbed)

    def step(self: Any, piece: Any) -> Any:
        hold(step=piece.step, rank=self.rank)
        return plain(self, piece)

    loop.Trainer.step = step  # type: ignore[method-assign]
    loop.worker(job)


def held_export(disturbed: bool, *args: Any) -> Any:
    from mulcot_ray.training.export import export

    Hold("export", disturbed)()
    return export(*args)


def train(_: str, root: str, disturbed: bool) -> dict[str, Any]:
    """The student, whole, on two workers, of which no two fit on one machine: two epochs of three steps."""
    from nights import RECIPE

    from mulcot_ray.recipe import load_runtime
    from mulcot_ray.storage import Store
    from mulcot_ray.training import fit, stages

    settings = RECIPE.student.model_copy(update={"method": "full", "lora": None, "epochs": 2, "global_batch": 32})
    runtime = load_runtime("laptop").model_copy(update={"train_workers": 2, "train_cpus": 1.5, "parity_posts": 0})
    fit.worker, fit.export = partial(held_worker, disturbed), partial(held_export, disturbed)
    store, told = Store(root), list[int]()
    m, _ = stages.student(
        store, "m", posts="sample", rationales=["rule"], assistant="builtin:assistant", recipe=RECIPE.model_copy(update={"student": settings}),
        runtime=runtime, progress=lambda step, *_: told.append(step),
    )  # fmt: skip
    history = json.loads(store.read("models/m/history.json") or b"{}")
    left = list(store.files("training"))
    return {"steps": history["steps"], "validation": history["validation"], "files": sorted(m.files), "told": max(told), "left": left}


JOBS: dict[str, Callable[[str, str, bool], dict[str, Any]]] = {"label": ask, "teach": ask, "night": label_night, "train": train}


def main(what: str, *roots: str) -> None:
    """The job under the first root, undisturbed, and under the second, with machines lost."""
    import ray

    from mulcot_ray.cluster import ENVIRONMENT

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, runtime_env={"env_vars": ENVIRONMENT})
    found: list[dict[str, Any]] = []
    seconds: list[float] = []
    for kind, root in zip(("calm", "disturbed"), roots, strict=True):
        Hold(kind, False)()
        began = time.monotonic()
        found.append(JOBS[what](what, root, kind == "disturbed"))
        seconds.append(round(time.monotonic() - began, 1))
    print("RESULT " + json.dumps([*found, seconds]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
