"""The Ray Serve application: replicas that each hold one engine and the HTTP interface of serving/api.py.

    serve deploy serve_config.yaml
    serve run mulcot_ray.serving.app:build model=builtin:student

Tokens are read where the application is built (MULCOT_TOKENS_FILE, MULCOT_TOKENS); replicas are given their digests.
"""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from PIL import Image
from pydantic import ValidationError

from mulcot_ray.artifacts import need
from mulcot_ray.cluster import ENVIRONMENT
from mulcot_ray.engines.base import Engine, EngineSpec, engine_spec, open_engine, spec
from mulcot_ray.engines.sizing import sequences
from mulcot_ray.engines.work import LabelWork
from mulcot_ray.errors import ConfigError, EngineError, RowFault
from mulcot_ray.prompts import Frozen
from mulcot_ray.recipe import Recipe, Runtime, load_recipe, load_runtime, model_folder
from mulcot_ray.records import Post
from mulcot_ray.serving.api import TIMEOUT_S, log, make_api
from mulcot_ray.serving.guards import configured_tokens, token_digest
from mulcot_ray.storage import Store

if TYPE_CHECKING:
    from ray.serve import Application

WATCH_S = 0.5


class Options(Frozen):
    """Arguments of `build`: what serve_config.yaml gives under `args`, or `serve run` as NAME=VALUE."""

    model: str
    root: str = "runs"
    recipe: str = "tiny"
    runtime: str = "laptop"
    auth: bool = True  # False: no tokens, and connections over loopback only
    timeout_s: float = TIMEOUT_S


def build(args: dict[str, Any]) -> Application:
    """The application for `serve deploy` and `serve run`. Raises ConfigError, also when auth is on and no token is configured."""
    try:
        o = Options.model_validate(args)
    except ValidationError as e:
        raise ConfigError("serve: " + "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())) from e
    tokens = configured_tokens(os.environ) if o.auth else None
    if tokens == []:
        raise ConfigError("no token: set MULCOT_TOKENS_FILE or MULCOT_TOKENS where the application is built, or auth: false for loopback alone")
    return application(Store(o.root), o.model, load_recipe(o.recipe), load_runtime(o.runtime), tokens, timeout_s=o.timeout_s)


def application(
    store: Store, model: str, recipe: Recipe, runtime: Runtime, tokens: list[str] | None, *, timeout_s: float = TIMEOUT_S,
    engine: EngineSpec | None = None,
) -> Application:  # fmt: skip
    """Bind the deployment. `tokens` None: without tokens, on loopback only. `engine` stands in for the one of recipe and runtime."""
    # Imported here: cluster.session sets Ray's authentication mode, which Ray reads when it is imported.
    from ray import serve

    if model_folder(model) is None:
        need(store, "models", model)  # fail here, with the reason, and not in a replica
    r = runtime.student
    places = sequences(engine or spec(recipe, runtime, "student", model))
    resources: dict[str, Any] = {"num_cpus": r.cpus, "runtime_env": {"env_vars": ENVIRONMENT}}
    if runtime.device == "cuda":
        resources["num_gpus"] = r.tensor_parallel * r.pipeline_parallel
    scale: dict[str, Any] = {"num_replicas": r.replicas}
    if not isinstance(r.replicas, int):
        lo, hi = r.replicas
        scale = {"autoscaling_config": {"min_replicas": lo, "max_replicas": hi, "target_ongoing_requests": max(1, places // 2)}}
    deployment = serve.deployment(
        name="sentiment",
        ray_actor_options=resources,
        # One batch of the engine in work and one waiting; what comes beyond is refused, not queued without end.
        max_ongoing_requests=places,
        max_queued_requests=places,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        health_check_period_s=5,
        graceful_shutdown_timeout_s=timeout_s,
        graceful_shutdown_wait_loop_s=0.5,
        **scale,
    )
    digests = None if tokens is None else [token_digest(t) for t in tokens]
    return deployment(serve.ingress()(Replica)).bind(store, model, recipe, runtime, digests, timeout_s, engine)


class Replica:
    """One engine behind the HTTP interface. Serve runs the constructor, then asks for the application."""

    def __init__(
        self, store: Store, model: str, recipe: Recipe, runtime: Runtime, digests: list[str] | None, timeout_s: float, engine: EngineSpec | None
    ) -> None:
        opened = engine or engine_spec(store, recipe, runtime, "student", model)
        self.fingerprint = opened.fingerprint
        self.digests, self.timeout_s = digests, timeout_s
        self.work = LabelWork(recipe.contract, "score", recipe.explain_tokens, recipe.seed, model)
        self.engine = open_engine(opened)
        self.stopping = threading.Event()
        threading.Thread(target=self._watch, name="engine watchdog", daemon=True).start()

    async def __serve_build_asgi_app__(self) -> FastAPI:
        await warm_up(self.engine, self.work)
        return make_api(self.engine, self.work, self.fingerprint, self.digests, self.timeout_s)

    async def check_health(self) -> None:
        self.engine.check()

    def _watch(self) -> None:
        """End the process when its engine has died: Serve replaces a lost actor at once, but an unhealthy one only after three checks,
        while its quick 503s draw requests to it (measured: 516 failed requests against 6)."""
        while not self.stopping.wait(WATCH_S):
            try:
                self.engine.check()
            except EngineError as e:
                log.error("%s", e)
                os._exit(1)

    def __del__(self) -> None:
        if hasattr(self, "stopping"):  # not if the engine did not open
            self.stopping.set()
            self.engine.close()


async def warm_up(engine: Engine, work: LabelWork) -> None:
    """One post with a picture and one without, scored and a few tokens explained: pays the costs of a first request, and shows that
    the model and the contract fit. Raises EngineError."""
    side = work.contract.image.side
    short = replace(work, mode="explain", max_tokens=2)
    try:
        await short(engine, Post("warm-up", "-", "warm up", image_bytes=b"-"), Image.new("RGB", (side, side)))
        if work.contract.image.missing == "note":
            await short(engine, Post("warm-up", "-", "warm up"), None)
    except RowFault as f:
        raise EngineError(f"model {work.model!r} and contract {work.contract.name!r} do not fit: a two-word post fails, {f}") from f
