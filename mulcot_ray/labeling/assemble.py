"""The end of a night: answers are joined to the rows that wait for them, bucket by bucket, and every row of the dump is accounted for.

    ROOT/labels/dt=DATE/version=VERSION.REVISION/part-BBB.parquet     Labelled
    ROOT/rejects/dt=…/version=…/part-BBB.parquet, intake-UUUUU-SSSS   Reject
    ROOT/repeated/dt=…/version=…/…   ROOT/deferred/dt=…/version=…/…   Left: rows that have no label, and need none or not yet
    ROOT/ledger/VERSION/NIGHT/part-BBB.parquet                        what the next nights need not ask

Every object is a pure function of what was committed before it (the rows found, the answers listed in scored.json), so whoever writes it
writes the same. A bucket is done when `work/assembled/BBB.json` says so, with counts and checksums. A bucket holds some 200,000 rows, of
about 500 bytes each without rationales.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mulcot_ray.artifacts import Run, parquet_bytes
from mulcot_ray.cluster import tasks
from mulcot_ray.engines.work import NOT_ASKED
from mulcot_ray.errors import ConservationError
from mulcot_ray.labeling.ledger import ENTRY, PAYLOAD, Ledger
from mulcot_ray.labeling.scoring import Scored, confidence
from mulcot_ray.labeling.version import Version
from mulcot_ray.parts import read_commits
from mulcot_ray.recipe import Runtime
from mulcot_ray.records import Fate, Labelled, Prediction, Reason, Reject
from mulcot_ray.storage import Store

GROUP = 8192  # rows of a row group of what stays
HISTOGRAM = 20  # bins of confidence in the manifest
LEFT = pa.schema([("post_id", pa.string()), ("aspect", pa.string()), ("content", pa.string()), ("of", pa.string())])
ANSWER = [n for n in PAYLOAD.names if n in Prediction.schema.names]  # what an answer has of them


def assemble(run: Run, date: str, folder: str, version: Version, buckets: int, scored: Scored, runtime: Runtime) -> list[dict[str, Any]]:
    """Write the night's objects; returns what each bucket's marker says. `folder` is dt=…/version=…."""
    store = run.store
    marks = [f"{run.prefix}/work/assembled/{b:03d}.json" for b in range(buckets)]
    with ThreadPoolExecutor(16) as pool:
        there = list(pool.map(store.read, marks))
        todo = [{"bucket": b, "parts": {role: scored.of_bucket(role, b) for role in scored.parts}} for b, done in enumerate(there) if done is None]
        contract = version.chain[0].work.contract_hash
        for _ in tasks(runtime, _Bucket, (store, run.prefix, run.name, date, folder, version.name, contract, scored.hurried), todo):
            pass
        return [json.loads(m or b"{}") for m in pool.map(store.read, marks)]


def intake_rejects(store: Store, prefix: str, folder: str, slices: list[str]) -> dict[str, dict[str, Any]]:
    """The rejects of the intake, slice by slice, as they are; returns their files."""

    def copy(part: str) -> tuple[str, dict[str, Any]]:
        data = store.read(f"{prefix}/work/rejects/part-{part}.parquet") or b""
        key = f"rejects/{folder}/intake-{part}.parquet"
        store.create(key, data)
        return key, {"bytes": len(data), "rows": pq.read_metadata(pa.BufferReader(data)).num_rows, "sha256": hashlib.sha256(data).hexdigest()}

    with ThreadPoolExecutor(16) as pool:
        return dict(pool.map(copy, slices))


class _Bucket:
    """A Ray Data task: one bucket, from rows and answers to the objects that stay."""

    def __init__(self, store: Store, prefix: str, night: str, date: str, folder: str, version: str, contract: str, hurried: bool) -> None:
        self.store, self.prefix, self.night, self.date, self.folder = store, prefix, night, date, folder
        self.version, self.contract, self.hurried = version, contract, hurried

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        bucket = int(row["bucket"])
        found = self._read(f"{self.prefix}/work/found/part-{bucket:03d}.parquet")
        answers, rejected, unfinished = self._answers(bucket, row["parts"])
        fates = found["fate"].to_pylist()
        keys = [k.hex() for k in found["key"].to_pylist()]
        groups: dict[str, list[int]] = {k: [] for k in ("answered", "carried", "rejected", "clash", "repeated", "deferred")}
        for i, (fate, key) in enumerate(zip(fates, keys, strict=True)):
            if fate in (Fate.SCORED, Fate.COPIED):
                fate = "answered" if key in answers else "rejected" if key in rejected else "deferred"
            elif fate == Fate.REJECTED:
                fate = "clash"
            groups[fate].append(i)
        files: dict[str, dict[str, Any]] = {}
        labels = self._labels(found, keys, groups, answers)
        rejects = self._rejects(found, keys, groups, rejected)
        entries = self._entries(found, fates, keys, groups["answered"], answers, unfinished)
        left = {k: self._left(found, keys, groups[k]) for k in ("repeated", "deferred")}
        for kind, table in (("labels", labels), ("rejects", rejects), *left.items()):
            self._write(files, f"{kind}/{self.folder}/part-{bucket:03d}.parquet", table)
        ledger = Ledger(self.store, self.version).put(self.night, bucket, entries)
        out = labels.num_rows, rejects.num_rows, left["repeated"].num_rows, left["deferred"].num_rows
        if sum(out) != found.num_rows:
            raise ConservationError(f"{self.night}, bucket {bucket}: {found.num_rows} rows, of which {out} are accounted for; please report this")
        mark = {
            "rows": found.num_rows, "labels": out[0], "rejects": out[1], "repeated": out[2], "deferred": out[3], "files": files, "ledger": ledger,
            "fates": dict(Counter(labels["fate"].to_pylist())), "by_label": dict(Counter(labels["label"].to_pylist())),
            "answered_by": dict(Counter(labels["answered_by"].to_pylist())), "reasons": dict(Counter(rejects["reason"].to_pylist())),
            "confidence": _histogram(labels), "images": int(pc.sum(found["has_image"]).as_py() or 0),
            "explained": labels.num_rows - labels["text_analysis"].null_count, "not_explained": labels["rationale_fault"].to_pylist().count(NOT_ASKED),
        }  # fmt: skip
        self.store.create(f"{self.prefix}/work/assembled/{bucket:03d}.json", json.dumps(mark).encode())
        return {"bucket": bucket}

    def _answers(self, bucket: int, parts: dict[str, list[str]]) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], set[str]]:
        """By content: the last answer, with who gave it; rejects of those who have none; and whose answer may get better another night."""
        answers: dict[str, dict[str, Any]] = {}
        rejected: dict[str, dict[str, Any]] = {}
        unfinished = set[str]()
        for i, (role, names) in enumerate(parts.items()):
            keys = [f"{self.prefix}/work/{role}/{n}" for n in names]
            for key, commit in zip(keys, read_commits(self.store, keys), strict=True):
                for r in self._read(key).to_pylist():
                    answers[r["post_id"]] = {**{n: r[n] for n in ANSWER}, "answered_by": role, "scored_on": self.date}
                if commit.rejects and not i:  # who comes later in the chain and fails leaves the student's answer as it is
                    for r in self._read(f"{self.prefix}/work/{role}/rejects/{commit.rejects}").to_pylist():
                        rejected[r["post_id"]] = r
            if i and self.hurried:
                unfinished |= {k for k in self._asked(role, bucket) if answers[k]["answered_by"] != role}
        if self.hurried:
            unfinished |= {k for k, a in answers.items() if a["rationale_fault"] == NOT_ASKED}
        return answers, rejected, unfinished

    def _asked(self, role: str, bucket: int) -> list[str]:
        """Contents that were to be asked of a later role."""
        folder = f"{self.prefix}/work/todo-{role}"
        names = json.loads(self.store.read(f"{folder}/{bucket:03d}.json") or b"{}")
        return [
            k
            for n in names
            for k in pq.read_table(self.store.path(f"{folder}/{n}"), columns=["post_id"], filesystem=self.store.fs)["post_id"].to_pylist()
        ]

    def _labels(self, found: pa.Table, keys: list[str], groups: dict[str, list[int]], answers: dict[str, dict[str, Any]]) -> pa.Table:
        """Answered and carried rows, in the order of the dump."""
        answered, carried = groups["answered"], groups["carried"]
        fresh = pa.Table.from_pylist([answers[keys[i]] for i in answered], schema=PAYLOAD)
        rows = pa.concat_tables([fresh, found.take(pa.array(carried, pa.int64())).select(PAYLOAD.names).cast(PAYLOAD)])
        at = pa.array([*answered, *carried], pa.int64())
        base, n = found.take(at), len(at)
        fate = base["fate"]
        columns = {
            "post_id": base["post_id"], "aspect": base["aspect"], "fate": fate, "content": pa.array([keys[i] for i in at.to_pylist()], pa.string()),
            "copied_of": pc.if_else(pc.equal(fate, Fate.COPIED.value), base["of"], pa.scalar(None, pa.string())),
            "model": pa.array([self.version] * n, pa.string()), "contract": pa.array([self.contract] * n, pa.string()),
            **{name: rows[name] for name in PAYLOAD.names},
        }  # fmt: skip
        table = pa.table([columns[f.name] for f in Labelled.schema], schema=Labelled.schema)
        return table.take(pc.sort_indices(at))

    def _rejects(self, found: pa.Table, keys: list[str], groups: dict[str, list[int]], rejected: dict[str, dict[str, Any]]) -> pa.Table:
        rows, base = [], found.select(["post_id", "fate", "of"])
        for i, post_id, fate, of in _at(base, groups["rejected"]):
            r = rejected[keys[i]]
            said = r["detail"] if fate == Fate.SCORED else f"as {of}, whose words it has: {r['detail']}"
            rows.append({**r, "post_id": post_id, "detail": said})
        for _, post_id, _, of in _at(base, groups["clash"]):
            why = f"the same id{'' if of == post_id else f' ({of})'} stands earlier in the dump with other content; that one is labelled"
            rows.append(Reject(post_id, "match", Reason.DUPLICATE_ID, why).row())
        return pa.Table.from_pylist(rows, schema=Reject.schema)

    def _entries(
        self, found: pa.Table, fates: list[str], keys: list[str], answered: list[int], answers: dict[str, dict[str, Any]], unfinished: set[str]
    ) -> pa.Table:
        """What the ledger gets: each content that was answered, and for good."""
        fresh = [keys[i] for i in answered if fates[i] == Fate.SCORED and keys[i] not in unfinished]
        return pa.Table.from_pylist([{"key": bytes.fromhex(k), **answers[k]} for k in fresh], schema=ENTRY)

    def _left(self, found: pa.Table, keys: list[str], rows: list[int]) -> pa.Table:
        base = found.take(pa.array(rows, pa.int64()))
        return pa.table([base["post_id"], base["aspect"], pa.array([keys[i] for i in rows], pa.string()), base["of"]], schema=LEFT)

    def _read(self, key: str) -> pa.Table:
        return pq.read_table(self.store.path(key), filesystem=self.store.fs)

    def _write(self, files: dict[str, dict[str, Any]], key: str, table: pa.Table) -> None:
        """Create the object unless the table is empty. One that is there must hold the same rows."""
        if not table.num_rows:
            return
        data = parquet_bytes(table, GROUP)
        if not self.store.create(key, data):
            data = self.store.read(key) or b""
            if not pq.read_table(pa.BufferReader(data)).equals(table):
                raise ConservationError(f"{self.store.root}/{key} holds other rows than this night's; nothing is published, please report this")
        files[key] = {"bytes": len(data), "rows": table.num_rows, "sha256": hashlib.sha256(data).hexdigest()}


def _at(table: pa.Table, rows: list[int]) -> list[tuple[Any, ...]]:
    """(row number, values …) of some rows."""
    some = table.take(pa.array(rows, pa.int64()))
    return list(zip(rows, *(c.to_pylist() for c in some.columns), strict=True))


def _histogram(labels: pa.Table) -> list[int]:
    bins = Counter(min(HISTOGRAM - 1, int(c * HISTOGRAM)) for c in confidence(labels).to_pylist() if c is not None)
    return [bins[i] for i in range(HISTOGRAM)]
