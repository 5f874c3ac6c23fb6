"""`mulcot doctor`: everything that can be known to be wrong before a model is started and money is spent.

Each check stands alone: what fails is reported, and the next one runs. What cannot be looked at from this machine is "not checked", with the
reason. Engines and clusters are only touched from child processes, so that this one stays clean.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rich.table import Table
from rich.text import Text

from mulcot_ray import machines
from mulcot_ray.artifacts import need
from mulcot_ray.engines import folder
from mulcot_ray.engines.base import ENDPOINT, EngineSpec, Role, spec
from mulcot_ray.engines.parity import compare
from mulcot_ray.engines.preview import Files, Preview, Question, model_files, tokenizer_of
from mulcot_ray.engines.sizing import GIB, Shape, known_shape, sequences, shape_of, spec_fit
from mulcot_ray.errors import ConfigError, MulcotError
from mulcot_ray.machines import Unchecked
from mulcot_ray.posts.sample import sample_posts
from mulcot_ray.posts.survey import spread, survey
from mulcot_ray.prices import Prices, load_prices
from mulcot_ray.prompts import Contract
from mulcot_ray.recipe import Recipe, Runtime
from mulcot_ray.records import LABELS, Post, Reason, Split, Task
from mulcot_ray.storage import Store

ROLES: tuple[Role, ...] = get_args(Role)
POST_CHARS = 280  # of the posts that stand for real ones where no table is named


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Literal["ok", "failed", "not checked"]
    detail: str


@dataclass(frozen=True)
class Model:
    """What is at hand of a role's model. `tokenizer` and `shape` are None where nothing tells them."""

    role: Role
    name: str
    files: Files
    tokenizer: Any
    shape: Shape | None

    @property
    def folder(self) -> Path:
        if self.files.folder is None:
            raise Unchecked(self.files.why)
        return self.files.folder

    @property
    def words(self) -> Any:
        """The tokenizer, where it loads."""
        if self.tokenizer is None:
            raise Unchecked(self.files.why or "its tokenizer does not load")
        return self.tokenizer


def doctor(
    store: Store, recipe: Recipe, runtime: Runtime, *, posts: str | None = None, parity: int = 8, roles: Sequence[Role] = ROLES, ask: bool = False,
    prices: Prices | None = None, say: Callable[[Check], None] = lambda check: None,
) -> list[Check]:  # fmt: skip
    """All checks, in order; `say` is told each as it ends.

    `posts` (a table under the root) stands in for the sample corpus wherever real posts matter. `parity` posts are scored by transformers
    and by vLLM; 0 leaves that out. `ask` allows one request of one token to each endpoint: nothing else here can cost anything.
    """
    checks: list[Check] = []

    def check(name: str, look: Callable[..., str], *args: Any) -> None:
        try:
            done = Check(name, "ok", look(*args))
        except Unchecked as e:
            done = Check(name, "not checked", f"because {e}")
        except MulcotError as e:
            done = Check(name, "failed", str(e))
        except Exception as e:  # whatever one check stumbles over must not hide the others
            done = Check(name, "failed", f"{type(e).__name__}: {e}")
        checks.append(done)
        say(done)

    prices = prices or load_prices()
    address = os.environ.get("RAY_ADDRESS") or runtime.address
    check("packages", machines.packages, runtime, address)
    check("storage", machines.storage, store)
    check("device", machines.device, runtime, address)
    nodes: dict[str, Any] = {}
    check("Ray cluster", machines.cluster, address, nodes)
    for role in roles:
        check(f"{role}: GPUs of a replica", machines.gpus, recipe, runtime, role, address, nodes)
    check("training workers", _workers, recipe, runtime)
    with contextlib.ExitStack() as stack:
        texts: list[Post] = []
        check("posts", _posts, store, recipe, posts, texts, max(8, parity))
        models: dict[Role, Model] = {}
        for role in roles:
            name = getattr(recipe.models, role)
            if name.startswith(ENDPOINT):
                check(f"{role}: key", machines.endpoint_key, runtime, role)
                check(f"{role}: endpoint", machines.endpoint_model, runtime, role, name)
                check(f"{role}: one token", machines.endpoint_token, runtime, role, name, ask)
                continue
            check(f"{role}: model", _model, stack, store, role, name, models)
            if role not in models:
                continue
            m = models[role]
            check(f"{role}: family", lambda m=m: folder.family(m.folder, recipe.contract))
            check(f"{role}: weights", _weights, m)
            check(f"{role}: memory", _memory, m, recipe, runtime, address, prices)
            check(f"{role}: tokenizer", _tokenizer, m, recipe.contract)
            check(f"{role}: label words", lambda m=m: folder.label_words(m.words, recipe.contract))
            check(f"{role}: picture", _picture, m, recipe.contract)
            check(f"{role}: length", _length, m, recipe, texts)
            check(f"{role}: contract", _contract, m, recipe.contract)
        if {"assistant", "student"} <= set(roles):
            check("vocabularies", _vocabularies, models)
        if "student" in roles:
            check("transformers and vLLM agree", _parity, models.get("student"), recipe, runtime, texts[:parity])
    return checks


def failed(checks: Sequence[Check]) -> bool:
    return any(c.outcome == "failed" for c in checks)


def show(checks: Sequence[Check]) -> Table:
    """One line a check, and the sums below."""
    table = Table.grid(padding=(0, 2))
    for c in checks:
        table.add_row(line(c))
    counts = {o: sum(c.outcome == o for c in checks) for o in ("ok", "failed", "not checked")}
    table.add_row(Text(", ".join(f"{n} {o}" for o, n in counts.items() if n), style="bold"))
    return table


def line(c: Check) -> Text:
    mark, style = {"ok": ("✓", "green"), "failed": ("✗", "bold red"), "not checked": ("–", "dim")}[c.outcome]
    return Text.assemble(
        (f"{mark} {c.name}", style), "  ", ("" if c.outcome == "ok" else f"{c.outcome}, " if c.outcome[0] == "n" else "", style), c.detail
    )


# --- posts and training ----------------------------------------------------------------------------------------------


def _workers(recipe: Recipe, runtime: Runtime) -> str:
    lo, hi = runtime.workers
    for role in ("assistant", "student"):
        batch = getattr(recipe, role).global_batch
        for n in range(lo, hi + 1):
            if batch % n:
                raise ConfigError(f"global_batch {batch} of the {role} does not divide by train_workers {n}")
    return (
        f"{lo if lo == hi else f'{lo} to {hi}'} workers divide the batches of {recipe.assistant.global_batch} and {recipe.student.global_batch} posts"
    )


def _posts(store: Store, recipe: Recipe, name: str | None, found: list[Post], count: int) -> str:
    """Fills `found`: of the table, or else the sample corpus drawn out to the length of real posts."""
    if name is None:
        for p in sample_posts(count, Split.TEST, recipe.seed):
            found.append(replace(p, text=(f"{p.text} " * POST_CHARS)[:POST_CHARS]))
        raise Unchecked("no --posts is named; the sample corpus stands in, at 280 characters a post")
    source = need(store, "posts", name)
    seen = survey(store, source, None)
    found += spread(store, source, None, seen, max(count, 64))
    return f"posts/{name}: {seen.rows:,} rows, {source.rejects:,} rejected by the import"


# --- the models ------------------------------------------------------------------------------------------------------


def _model(stack: contextlib.ExitStack, store: Store, role: Role, name: str, models: dict[Role, Model]) -> str:
    files = stack.enter_context(model_files(store, name))
    models[role] = Model(role, name, files, None, known_shape(name))
    if files.folder is None:
        raise Unchecked(files.why)
    with contextlib.suppress(MulcotError):  # the check of the family says what is wrong
        models[role] = replace(models[role], shape=shape_of(files.folder))
    with contextlib.suppress(Exception):  # the check of the tokenizer says what is wrong
        models[role] = replace(models[role], tokenizer=tokenizer_of(files))
    return f"{name} ({files.fingerprint})"


def _weights(m: Model) -> str:
    if not m.files.whole:
        raise Unchecked(m.files.why)
    return folder.weights(m.folder)


def _tokenizer(m: Model, contract: Contract) -> str:
    # What kept it from loading is raised here.
    return folder.chat_template(m.tokenizer or tokenizer_of(Files(m.folder, None)), contract)


def _picture(m: Model, contract: Contract) -> str:
    return folder.picture(m.folder, m.words, contract)


def _memory(m: Model, recipe: Recipe, runtime: Runtime, address: str | None, prices: Prices) -> str:
    if m.shape is None:
        raise Unchecked(f"{m.files.why}, and it is not one whose size is known" if m.files.folder is None else "its dimensions are not known")
    accelerator = getattr(runtime, m.role).accelerator
    if runtime.device == "cpu":
        if address:
            raise Unchecked("the memory of the nodes is not known here")
        memory: float = machines.ram()
    elif not address and machines.visible()[0]:
        memory = machines.visible()[2]
    elif accelerator == "cpu":
        raise Unchecked(f"the runtime names no accelerator for the {m.role}")
    else:
        memory = prices.accelerator(accelerator).memory_gib * GIB
    s = _spec(m, recipe, runtime)
    f = spec_fit(s, m.shape, memory)
    if not f.fits:
        raise ConfigError(f.why)
    return f"{f.why}; {sequences(s)} rows at once"


def _spec(m: Model, recipe: Recipe, runtime: Runtime) -> EngineSpec:
    return spec(recipe, runtime, m.role, str(m.files.folder or m.name), m.files.fingerprint or "")


def _length(m: Model, recipe: Recipe, posts: list[Post]) -> str:
    """The longest prompt (but for 1 % of them) and the longest answer fit the context."""
    if not posts:
        raise Unchecked("there are no posts to measure")
    if m.shape is not None and m.shape.positions < recipe.max_model_len:
        raise ConfigError(f"max_model_len is {recipe.max_model_len:,}, and the model has {m.shape.positions:,} positions")
    tasks = (Task.PREDICT, Task.EXPLAIN) if m.role == "teacher" else (Task.REASONING,)
    limit = {"teacher": recipe.teach.max_tokens, "assistant": recipe.augment.max_tokens, "student": recipe.explain_tokens}[m.role]
    labelled = [p if p.label is not None else replace(p, label=LABELS[0]) for p in posts]
    look = Preview(recipe, [Question(t, 1, limit=limit) for t in tasks], True, m.tokenizer, recipe.contract.image.tokens)
    found = look.at(labelled)
    long = look.faults(labelled, found).get(str(Reason.PROMPT_TOO_LONG))
    most = max(look.prompts(found), key=lambda p: p.p99)
    estimated = ", estimated" if m.tokenizer is None else ""
    said = f"{most.question.task} prompts of up to {most.p99} tokens{estimated}, and answers of up to {limit}"
    if long or most.p99 + limit > recipe.max_model_len:
        raise ConfigError(f"{long['example'] if long else said}: more than max_model_len {recipe.max_model_len:,}")
    return f"{said}, of {recipe.max_model_len:,}"


def _contract(m: Model, contract: Contract) -> str:
    trained = folder.contract_of(m.folder)
    if trained is None:
        raise Unchecked("it has no contract.json: it was not trained here")
    if trained.hash != contract.hash:
        raise ConfigError(f"it was trained with contract {trained.name!r} ({trained.hash}), and the recipe has {contract.name!r} ({contract.hash})")
    return f"{contract.name} ({contract.hash}), as it was trained with"


def _vocabularies(models: dict[Role, Model]) -> str:
    here = {r: m.tokenizer for r, m in models.items() if m.tokenizer is not None}
    if missing := [r for r in ("assistant", "student") if r not in here]:
        raise Unchecked(f"the tokenizer of the {' and of the '.join(missing)} is not here")
    from mulcot_ray.training.model import check_vocabularies

    check_vocabularies(here["student"], here["assistant"])
    return "each id that assistant and student both know is the same token"


def _parity(m: Model | None, recipe: Recipe, runtime: Runtime, posts: list[Post]) -> str:
    if m is None or not posts:
        raise Unchecked("there is no student to ask" if m is None else "there are no posts to score (--parity 0, or no table)")
    if not m.files.whole:
        raise Unchecked(m.files.why)
    s = _spec(replace(m, files=replace(m.files, folder=m.folder)), recipe, runtime)
    wanted = s.runtime.devices
    if s.device == "cuda" and machines.visible()[0] < wanted:
        raise Unchecked(f"the engine takes {wanted} GPU{'s' if wanted > 1 else ''}, and {machines.visible()[0]} are here")
    return compare(s, posts)
