"""The Ray session of a command: started on this machine, or joined where there is one."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mulcot_ray import errors
from mulcot_ray.errors import ConfigError, EngineError, MulcotError
from mulcot_ray.recipe import Runtime

TASKS = 2048  # Ray Data blocks at most: more of them cost the driver more than they bring
# For every process of a session: no model hub, no usage reports, and the CPU thread count that our engines are measured with.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_TRAIN_V2_ENABLED": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CONFIGURE_LOGGING": "0",
    "DO_NOT_TRACK": "1",
}


@contextmanager
def session(runtime: Runtime) -> Iterator[None]:
    """Ray for the duration of a stage. Nested sessions (the demo around its stages) share the outer one.

    Inside a job, or with RAY_ADDRESS set, or where the runtime names an address, that cluster is joined; otherwise a private one is
    started on loopback with token authentication, and stopped at the end.
    """
    address = os.environ.get("RAY_ADDRESS") or runtime.address
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the default hides GPUs from 0-GPU tasks, and warns of it
    if not address and "ray" not in sys.modules:  # Ray reads its authentication mode once, when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    with _stderr_in_log():
        yield from _session(runtime, address)


def _session(runtime: Runtime, address: str | None) -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    quiet = dict(log_to_driver=False, logging_level=logging.ERROR, configure_logging=False, runtime_env={"env_vars": ENVIRONMENT})
    if address:
        try:
            ray.init(address=address, **quiet)
        except ConnectionError as e:
            raise ConfigError(f"no Ray cluster at address {address!r} (runtime {runtime.name!r}): {e}. Start one, or use --runtime laptop") from e
    else:
        _start_here(runtime, quiet)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _stderr_in_log() -> Iterator[None]:
    """Send file descriptor 2 to the log file, if there is one: Ray's C++ side writes there past Python's logging."""
    path = next((h.baseFilename for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)), None)
    if path is None:
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    with open(path, "ab") as log:
        os.dup2(log.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
        os.close(saved)


def _start_here(runtime: Runtime, options: dict[str, object]) -> None:
    import ray

    cpus = runtime.local_cpus or max(4, os.cpu_count() or 1)
    for attempt in range(3):
        try:
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, object_store_memory=1 << 30, _node_ip_address="127.0.0.1", **options)  # type: ignore[arg-type]
            return
        except Exception as e:  # Ray gives up where its agents need more than some seconds, on a busy machine, with several types
            ray.shutdown()
            if attempt == 2:
                raise EngineError(f"Ray did not start on this machine: {e}") from e
            time.sleep(2**attempt)


def tasks(runtime: Runtime, kind: type, args: tuple[Any, ...], rows: Sequence[dict[str, Any]], cpus: float = 1) -> Iterator[dict[str, Any]]:
    """`kind(*args)(row)` for each row, as Ray Data tasks on as many machines as there are; the results as they come, in no order.

    For work on the CPU that is committed by the tasks themselves; rows and results are small. Raises our own errors as they were raised.
    """
    if not rows:
        return
    with session(runtime):
        batches = mapped([{"row": json.dumps(r)} for r in rows], _each, blocks=min(len(rows), TASKS), fn_args=(kind, args), num_cpus=cpus)
        for batch in batches:
            yield from map(json.loads, batch["result"])


def mapped(
    rows: Sequence[dict[str, Any]], function: Callable[..., Any], *, blocks: int | None = None, pool: dict[str, int] | None = None, **options: Any
) -> Iterator[dict[str, Any]]:
    """Ray Data's `map_batches` of `function`, a row at a time, in the current session: its batches as they come, in no order.

    `blocks`: tasks, if not one for each row. `pool`: settings of an ActorPoolStrategy, where `function` is the class of an actor.
    Raises our own errors as they were raised, and others as EngineError.
    """
    import ray.data

    if pool is not None:
        options["compute"] = ray.data.ActorPoolStrategy(**pool)
    yield from stream(ray.data.from_items(list(rows), override_num_blocks=blocks or len(rows)).map_batches(function, batch_size=1, **options))


def stream(dataset: Any, **options: Any) -> Iterator[Any]:
    """The batches of a Ray Data dataset as they come, without its own progress bars; its errors as `mapped` has them."""
    dataset.context.enable_progress_bars = False  # its own: it was copied when the dataset was made
    dataset.context.print_on_execution_start = False
    try:
        yield from dataset.iter_batches(batch_size=None, prefetch_batches=0, **options)
    except Exception as e:
        raised = re.findall(r"^(?!ray\.)\w[\w.]*: .+", str(e), re.MULTILINE)  # Ray's text is tracebacks, the cause first and its own wrapper last
        what = raised[-1] if raised else f"{type(e).__name__}: {e}"
        raise own_error(e) or EngineError(f"the workers failed: {what[:300]}. Logs: {log_folder()}") from e


def _each(batch: dict[str, Any], kind: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    return {"result": [json.dumps(kind(*args)(json.loads(str(r)))) for r in batch["row"]]}


def log_folder() -> str:
    """Where the logs of Ray, vLLM and the workers of the current session are."""
    import ray

    node = ray._private.worker._global_node
    return str(node.get_logs_dir_path()) if node is not None else "the cluster's log folder"


def own_error(e: BaseException) -> MulcotError | None:
    """Our own error behind Ray's wrappers, which keep it as text only: the last "mulcot_ray.errors.NAME: message" in the chain."""
    found: list[tuple[str, str]] = []
    seen: set[int] = set()
    at: BaseException | None = e
    while at is not None and id(at) not in seen:
        if isinstance(at, MulcotError):
            return at
        seen.add(id(at))
        texts = [str(at), *(str(x) for x in getattr(at, "worker_failures", {}).values())]
        found += [m for t in texts for m in re.findall(r"mulcot_ray\.errors\.(\w+): (.+)", t)]
        at = getattr(at, "cause", None) or at.__cause__
    if not found:
        return None
    kind = getattr(errors, found[-1][0], EngineError)
    return kind(found[-1][1]) if issubclass(kind, MulcotError) else None
