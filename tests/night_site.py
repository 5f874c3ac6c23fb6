"""A place where nights are killed: a real S3 server behind a proxy that sees every request, a Ray head, and drivers that are started again.

Before or after the server hears of a chosen PUT, SIGKILL goes to the driver, to the process that wrote (a task, or the actor that scores), to
the engine, or to the server, which is started again two seconds later. The scripted engine is a process of its own. Used by
test_nightly_kills.py and benchmarks/nightly_kills.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nights
import psutil
from ray_nodes import Head, ray_head
from s3_proxy import Request, Rule, S3Proxy, s3_proxy
from seaweed import Seaweed, seaweed

from mulcot_ray.artifacts import Manifest, need
from mulcot_ray.errors import EngineError, MulcotError
from mulcot_ray.labeling.ledger import Ledger
from mulcot_ray.labeling.night import night_rows
from mulcot_ray.labeling.publishing import read_pointer
from mulcot_ray.storage import Store

DATE = "2026-11-22"
FILES = 4  # of the dump: units of the intake
CHUNK, IN_FLIGHT = 32, 3
BLOCK = CHUNK * IN_FLIGHT  # rows that an actor has in flight
DOWN_S = 2.0  # of the server, and the 4 to 9 s that it takes to start
MARK = "MULCOT_KILL_MARK"

# What a night writes, in the order in which it does: by whom (d: the driver, w: a task, a: the actor that scores), and its key under the root.
# The last but five is no PUT but the first DELETE of what a finished night no longer needs.
KINDS = {
    "identity": ("d", r"nights/[^/]+/identity\.json"),
    "lease": ("d", r"nights/[^/]+/lease\.json"),
    "intake posts": ("w", r".*/work/posts/.*"),
    "intake ids": ("w", r".*/work/ids/.*"),
    "intake rejects": ("w", r".*/work/rejects/.*"),
    "intake commit": ("w", r".*/work/intake/.*"),
    "ledger view": ("d", r".*/work/ledger\.json"),
    "clashes": ("w", r".*/work/clashes/.*"),
    "todo": ("w", r".*/work/todo/.*"),
    "found": ("w", r".*/work/found/.*"),
    "attempt": ("a", r".*/work/student/attempts/.*"),
    "answers' rejects": ("a", r".*/work/student/rejects/.*"),
    "answers": ("a", r".*/work/student/part-.*"),
    "scored": ("d", r".*/work/scored\.json"),
    "labels": ("w", r"labels/.*"),
    "rejects": ("w", r"rejects/[^/]+/[^/]+/part-.*"),
    "repeated": ("w", r"repeated/.*"),
    "ledger part": ("w", r"ledger/.*\.parquet"),
    "bucket": ("w", r".*/work/assembled/.*"),
    "rejects of intake": ("d", r"rejects/[^/]+/[^/]+/intake-.*"),
    "manifest": ("d", r"nights/[^/]+/manifest\.json"),
    "ledger index": ("d", r"ledger/[^/]+/index\.json"),
    "clearing": ("d", r".*/work/posts/.*"),
    "gates": ("d", r"nights/[^/]+/gates\.json"),
    "pointer": ("d", r"published\.json"),
    "list": ("d", r"published/.*"),
    "report": ("d", r"nights/[^/]+/report\.html"),
}
ORDER = list(KINDS)


@dataclass(frozen=True)
class Point:
    """SIGKILL to `victim` before or after the `nth` PUT of a kind in a run."""

    kind: str
    victim: str
    when: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.victim} {self.when} {self.kind} {self.nth}"

    @property
    def scoring(self) -> bool:
        return KINDS[self.kind][0] == "a" and self.victim != "server"


# ------------------------------------------------------------------ the driver and its scripted student


class Student:
    """A script whose engine is a process of its own. It writes down what it is asked, a line a post, for all attempts together."""

    def __init__(self, asked: str) -> None:
        self.asked = asked
        self.engine: subprocess.Popen[str] | None = None

    def __call__(self, messages: Any, sampling: Any) -> str:
        text = messages[-1]["content"][-1]["text"]
        with open(self.asked, "a") as f:
            f.write(json.dumps(text) + "\n")
        if self.engine is None:
            code = "import sys\nfor line in sys.stdin: print(('negative', 'neutral', 'positive')[sum(map(ord, line)) % 3], flush=True)"
            command = [sys.executable, "-c", code, "scripted-engine"]
            self.engine = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.engine.stdin is not None and self.engine.stdout is not None
        try:
            print(json.dumps(text), file=self.engine.stdin, flush=True)
            label = self.engine.stdout.readline().strip()
        except BrokenPipeError:
            label = ""
        if not label:
            self.engine = None
            raise EngineError("the scripted engine has died")
        return nights.FULL.format(label)


def drive(root: str, path: str, asked: str, lease: float) -> int:
    """What `mulcot nightly` does, with the scripted student, and buckets so small that a small dump has several."""
    from ray import cloudpickle

    from mulcot_ray import artifacts
    from mulcot_ray.cluster import session
    from mulcot_ray.labeling import intake
    from mulcot_ray.labeling.gates import Gates
    from mulcot_ray.labeling.nightly import nightly
    from mulcot_ray.labeling.version import NightSettings
    from mulcot_ray.recipe import load_runtime

    cloudpickle.register_pickle_by_value(nights)
    intake.BUCKET_BYTES, artifacts.LEASE_SECONDS = 1 << 15, lease
    store, runtime = Store(root), load_runtime("laptop").model_copy(update={"rows_per_chunk": CHUNK})
    settings = NightSettings(name="kills", gates=Gates(reject_rate_max=0.5))
    version = nights.version(store, settings, {"student": nights.scripted(script=Student(asked))})
    try:
        with session(runtime):
            nightly(store, path, version=version, settings=settings, runtime=runtime, steps=nights.quiet)
    except MulcotError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


# ------------------------------------------------------------------ the site


@dataclass
class Site:
    """Server, proxy, Ray, and what is to be killed next."""

    server: Seaweed
    proxy: S3Proxy
    head: Head
    folder: Path
    dump: str
    driver: subprocess.Popen[bytes] | None = None
    due: list[Point] = field(default_factory=list)
    met: list[Point] = field(default_factory=list)
    armed: list[Point] = field(default_factory=list)
    firing: threading.Lock = field(default_factory=threading.Lock)
    up: threading.Event = field(default_factory=threading.Event)
    said: Path = Path()
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def asked(self, root: str) -> Path:
        return self.folder / f"{root.rpartition('/')[2]}.asked"

    def command(self, root: str, lease: float = 60.0) -> list[str]:
        return [sys.executable, __file__, root, self.dump, str(self.asked(root)), str(lease)]

    def start(self, command: list[str], joined: bool = True) -> subprocess.Popen[bytes]:
        """A driver. `joined`: on our Ray head; else it starts a Ray of its own. What it says at its end is in `said`."""
        env = os.environ | self.server.env(self.proxy.url) | ({**self.head.environment, "RAY_ADDRESS": self.head.gcs} if joined else {})
        self.said = self.folder / f"{uuid.uuid4().hex}.said"
        with self.said.open("wb") as out:
            return subprocess.Popen(command, env=env | {MARK: self.mark}, stdout=out, stderr=out, start_new_session=True)

    def run(self, command: list[str], joined: bool = True) -> int:
        """A driver from start to end, with the next points due. Its exit code."""
        self._arm()
        self.driver = self.start(command, joined)
        code = self.driver.wait(900)
        self.armed.clear()
        self.proxy.rules.clear()
        self.up.wait()
        return code

    def _arm(self) -> None:
        """All that are due, in their order: what a run no longer comes to, because other tasks were faster, must not keep back the rest."""
        self.armed = [*self.due]
        self.proxy.rules[:] = [
            Rule("DELETE" if p.kind == "clearing" else "PUT", f"[^/]+/{KINDS[p.kind][1]}", nth=p.nth, **{p.when: partial(self._fire, p)})
            for p in self.due
        ]

    def _fire(self, p: Point, r: Request) -> bool | None:
        """In a thread of the proxy's. False: the connection is closed, as by the writer's end or the server's."""
        with self.firing:
            if p not in self.armed:  # at the same moment another one was met
                return None
            self.armed.clear()
            self.proxy.rules.clear()
        self.due.remove(p)
        if p.victim == "server":
            self.met.append(p)
            self.up.clear()
            self.server.kill()
            threading.Thread(target=self._revive, daemon=True).start()
            return False
        assert self.driver is not None
        pid = {
            "driver": lambda _: self.driver.pid,
            "writer": partial(writer, self.mark, to=urlsplit(self.proxy.url).port),
            "engine": lambda _: engine(self.mark),
        }[p.victim](r.port)
        if pid is not None:
            self.met.append(p)
            os.kill(pid, signal.SIGKILL)
        if p.victim != "driver":
            self._arm()
        return None if p.victim == "engine" else False

    def _revive(self) -> None:
        time.sleep(DOWN_S)
        self.server.start()
        self._arm()
        self.up.set()


def writer(mark: str, port: int, to: int) -> int | None:
    """The process of this run that has this end of a connection to the proxy. (Another may have the same port for its end of another one.)"""
    ours = {p.pid for p in of_mark(mark)}
    found = (c for c in psutil.net_connections("tcp") if c.pid in ours and c.laddr and c.raddr)
    return next((c.pid for c in found if (c.laddr.port, c.raddr.port) == (port, to)), None)


def engine(mark: str) -> int | None:
    """The process that runs the engine."""
    names = ("scripted-engine", "EngineCore")
    return next((p.pid for p in of_mark(mark) if any(n in " ".join([p.info["name"] or "", *(p.info["cmdline"] or ())]) for n in names)), None)


def of_mark(mark: str) -> list[psutil.Process]:
    """Processes whose environment says that they are of this run, with name and command line as they were when they were looked at."""
    return [p for p in psutil.process_iter(["name", "cmdline", "environ"]) if (p.info["environ"] or {}).get(MARK) == mark]


@contextmanager
def site(posts: int, seed: int) -> Iterator[Site]:
    """A server with a dump on it, a proxy before it, a Ray head that knows only the proxy. Paths are short: Ray puts sockets under them."""
    with tempfile.TemporaryDirectory(prefix="nk") as name, seaweed(Path(name) / "s3") as server, s3_proxy(server.url) as proxy:
        folder, mark = Path(name), uuid.uuid4().hex
        (folder / "ray").mkdir()
        with ray_head(folder / "ray", cpus=2, environment=server.env(proxy.url) | {MARK: mark}) as head:
            there = Site(server, proxy, head, folder, f"s3://{server.bucket}/dump", mark=mark)
            there.up.set()
            lines = rows_of(posts, seed)
            for i in range(FILES):
                part = b"".join(line + b"\n" for line in lines[i * len(lines) // FILES : (i + 1) * len(lines) // FILES])
                Store(there.dump).write(f"dt={DATE}/posts-{i}.jsonl", part)
            yield there


def rows_of(posts: int, seed: int) -> list[bytes]:
    """Lines of a dump: with 1 % of broken ones, 5 % of duplicates, an id that comes with two texts, and posts that are too long to be asked."""
    rows, _ = nights.spoilt(nights.posts(posts, seed), seed, 0.01, 0.05)
    first = next(r for r in rows if isinstance(r, dict))
    rows += [
        {**first, "text": "the same id says something else"},
        *({"id": f"long-{i}", "text": f"{i} " + "word " * 1100} for i in range(posts // 50)),
    ]
    random.Random(seed).shuffle(rows)
    return [r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows]


# ------------------------------------------------------------------ nights, and what must be true of them


@dataclass(frozen=True)
class Night:
    """A night that has ended: the kills it saw, how often it was started, and the rows that were asked more than once, of at most `allowed`."""

    root: str
    met: list[Point]
    runs: int
    seconds: float
    twice: int
    allowed: int


def hunted(at: Site, root: str, chain: list[Point]) -> Night:
    """One night with these kills, in the order of its steps. What it did not come to stays due."""
    at.due, at.met, started = sorted(chain, key=lambda p: (ORDER.index(p.kind), p.when == "after")), [], time.monotonic()
    for runs in range(1, len(chain) + 2):
        code = at.run(at.command(root))
        if code == 0:
            break
        assert code == -signal.SIGKILL, f"{root}: run {runs} ended with {code}:\n{at.said.read_text()[-3000:]}"
    else:
        raise AssertionError(f"{root}: no end")
    asked = Counter(at.asked(root).read_text().splitlines())
    return Night(root, at.met, runs, time.monotonic() - started, asked.total() - len(asked), BLOCK * sum(p.scoring for p in at.met))


def same(calm: str, other: str, lines: list[bytes]) -> Manifest:
    """Nothing lost, nothing double, nothing changed, nothing left over, published once. Returns the other's manifest."""
    (a, one), (b, two) = ((s, need(s, "nights", s.names("nights")[0])) for s in (Store(calm), Store(other)))
    assert b.names("nights") == [two.name] and b.folders("nights") == [two.name], f"{other}: {b.folders('nights')}"
    for what in ("name", "fingerprint", "files", "rows_in", "rows", "rejects", "rejects_by_reason"):
        assert getattr(one, what) == getattr(two, what), f"{other}: {what}: {getattr(one, what)} → {getattr(two, what)}"
    for what in ("fates", "labels", "answered_by", "confidence", "images", "ledger"):
        assert one.stats[what] == two.stats[what], f"{other}: {what}: {one.stats[what]} → {two.stats[what]}"
    for folder in ("labels", "rejects", "repeated", "deferred", "ledger", "published"):
        assert a.files(folder).keys() == b.files(folder).keys(), f"{other}: {folder}: {a.files(folder).keys() ^ b.files(folder).keys()}"
    for key, about in two.files.items():
        assert hashlib.sha256(b.read(key) or b"").hexdigest() == about["sha256"], f"{other}: {key} is not what its manifest says"
    assert not b.files(f"nights/{two.name}/work"), f"{other}: {list(b.files(f'nights/{two.name}/work'))[:3]} were not cleared"

    kept = {kind: list(night_rows(b, two, kind)) for kind in ("labels", "rejects", "repeated")}
    ids = Counter(r["post_id"] for rows in kept.values() for r in rows if r.get("stage") != "intake")
    assert ids == Counter(i for i in map(known, lines) if i is not None), f"{other}: rows lost or double"
    assert sum(map(len, kept.values())) == two.rows_in == len(lines)
    labelled = [(r["post_id"], r["aspect"]) for r in kept["labels"]]
    assert len(labelled) == len(set(labelled)) == two.rows, f"{other}: a post has two labels"

    view = Ledger(b, two.stats["version"]).view()
    assert [g["name"] for g in view] == [two.name] and view[0]["files"] == two.stats["ledger"], f"{other}: the ledger's index is {view}"
    pointer, _ = read_pointer(b)
    assert [m.to for m in pointer.moves] == [two.name] == [p.night for p in pointer.nights.values()], f"{other}: published {pointer.moves}"
    listed = (b.read(f"published/dt={DATE}/files.txt") or b"").decode().split()
    assert listed == [f"s3://{b.path(k)}" for k in two.files if k.startswith("labels/")], f"{other}: the list of files is {listed}"
    return two


def known(line: bytes) -> str | None:
    """The id of a row that the intake takes."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row["id"] if "text" in row else None


def two_at_once(at: Site, root: str) -> str:
    """Two drivers of one night: one does it, the other says who has it. Returns what it says."""
    drivers, said = [], []
    for _ in range(2):
        drivers.append(at.start(at.command(root)))
        said.append(at.said)
    codes = [d.wait(300) for d in drivers]
    assert sorted(codes) == [0, 1], f"two at once ended with {codes}"
    return said[codes.index(1)].read_text().strip().splitlines()[-1]


if __name__ == "__main__":
    sys.exit(drive(*sys.argv[1:4], float(sys.argv[4])))
