"""The Ray Serve application: replicas that each hold one engine, and the HTTP interface of serving/api.py in those of the first version.

    serve deploy serve_config.yaml
    serve run mulcot_ray.serving.app:build model=builtin:student

Tokens are read where the application is built (MULCOT_TOKENS_FILE, MULCOT_TOKENS); replicas get their digests, and go on reading the file
where they see it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, ValidationError, model_validator

from mulcot_ray.artifacts import need
from mulcot_ray.cluster import ENVIRONMENT
from mulcot_ray.engines.base import EngineSpec, spec
from mulcot_ray.engines.sizing import sequences
from mulcot_ray.errors import ConfigError
from mulcot_ray.prompts import Frozen
from mulcot_ray.recipe import Recipe, Runtime, load_recipe, load_runtime, model_folder
from mulcot_ray.serving import haproxy
from mulcot_ray.serving.api import BATCHES, TIMEOUT_S
from mulcot_ray.serving.replica import Beside, EngineReplica, Replica, Settings
from mulcot_ray.serving.tokens import Tokens, known_tokens
from mulcot_ray.storage import Store

if TYPE_CHECKING:
    from ray.serve import Application

# The application in the event loop that Serve's own part of a replica has: handing each request to another thread and back costs 1 ms of
# processor time. What blocks (pictures, buckets) is in threads of its own.
ONE_LOOP = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
DRAIN_S = 600.0  # at most, for a replica that is replaced to end what it has begun: batches take minutes
SPARE = 16  # requests beside those with a place: health, metrics, and those that are about to be refused


class Share(Frozen):
    model: str
    share: float = Field(gt=0, le=1)


class Options(Frozen):
    """Arguments of `build`: what serve_config.yaml gives under `args`, or `serve run` as NAME=VALUE."""

    model: str | None = None
    versions: tuple[Share, ...] = ()  # in place of `model`: several, whose shares sum to 1; the first one's replicas take all requests
    shadow: Share | None = None  # asked for a share of the posts; its answers are compared and counted, never given
    root: str = "runs"
    recipe: str = "tiny"
    runtime: str = "laptop"
    auth: bool = True  # False: no tokens, and connections over loopback only
    timeout_s: float = Field(TIMEOUT_S, gt=0)
    image_prefixes: tuple[str, ...] = ()  # s3://bucket or s3://bucket/prefix: where an image_key may point
    metrics_open: bool = False  # /metrics without a token

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.model is None) == (not self.versions):
            raise ValueError("either `model` or `versions` is wanted")
        if self.versions and abs(sum(v.share for v in self.versions) - 1) > 1e-6:
            raise ValueError(f"the shares of `versions` sum to {sum(v.share for v in self.versions):g}, not to 1")
        names = [v.model for v in self.shares] + ([self.shadow.model] if self.shadow else [])
        if twice := {n for n in names if names.count(n) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))}: named twice among `versions` and `shadow`")
        if bad := [p for p in self.image_prefixes if not re.fullmatch(r"s3://[a-z0-9.-]{3,63}(/.+)?", p)]:
            raise ValueError(f"image_prefixes: {bad[0]!r} is not s3://bucket or s3://bucket/prefix")
        return self

    @property
    def shares(self) -> tuple[Share, ...]:
        return self.versions or (Share(model=self.model or "", share=1.0),)


def build(args: dict[str, Any]) -> Application:
    """The application for `serve deploy` and `serve run`. Raises ConfigError, also when auth is on and no token is configured."""
    try:
        o = Options.model_validate(args)
    except ValidationError as e:
        raise ConfigError("serve: " + "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}".removeprefix(": ") for x in e.errors())) from e
    tokens = known_tokens(os.environ) if o.auth else None
    if tokens is not None and not tokens:
        raise ConfigError("no token: set MULCOT_TOKENS_FILE or MULCOT_TOKENS where the application is built, or auth: false for loopback alone")
    if tokens is None and os.environ.get(haproxy.SWITCH) == "1":
        raise ConfigError("auth: false does not go with HAProxy, behind which every connection seems to come from loopback")
    return application(Store(o.root), o, load_recipe(o.recipe), load_runtime(o.runtime), tokens)


def application(
    store: Store, o: Options, recipe: Recipe, runtime: Runtime, tokens: Tokens | None, *, environment: Mapping[str, str] | None = None,
    engine: EngineSpec | None = None,
) -> Application:  # fmt: skip
    """Bind the deployments. `tokens` None: without tokens, on loopback only. `environment` is given to the replicas; `engine` stands in for
    those of recipe and runtime."""
    # Imported here: cluster.session sets Ray's authentication mode, which Ray reads when it is imported.
    from ray import serve

    for name in (*(s.model for s in o.shares), *([o.shadow.model] if o.shadow else [])):
        if engine is None and model_folder(name) is None:
            need(store, "models", name)  # fail here, with the reason, and not in a replica

    def deployment(name: str, kind: Any) -> Any:
        r = runtime.student
        resources: dict[str, Any] = {"num_cpus": r.cpus, "runtime_env": {"env_vars": ENVIRONMENT | ONE_LOOP | dict(environment or {})}}
        if runtime.device == "cuda":
            resources["num_gpus"] = r.devices
        scale: dict[str, Any] = {"num_replicas": r.replicas}
        if not isinstance(r.replicas, int):
            lo, hi = r.replicas
            scale = {"autoscaling_config": {"min_replicas": lo, "max_replicas": hi, "target_ongoing_requests": max(1, places // 2)}}
        return serve.deployment(
            kind,
            name=name,
            ray_actor_options=resources,
            # The replica itself refuses what has no place (serving/answering.py) and says so in JSON. Serve's own limits stand behind that, and
            # hold back what comes while no replica is there.
            max_ongoing_requests=2 * places + BATCHES + SPARE,
            max_queued_requests=2 * places,
            backpressure_config={"status_code": 503, "retry_after_s": 1},
            health_check_period_s=5,
            graceful_shutdown_timeout_s=max(o.timeout_s, DRAIN_S),
            graceful_shutdown_wait_loop_s=0.5,
            max_surge_percent=100,  # the new replica first: by default one replica is stopped before its successor starts (42 s without any)
            **scale,
        )

    first = o.shares[0]
    places = sequences(engine or spec(recipe, runtime, "student", first.model))

    def beside(s: Share) -> Beside:
        return Beside(s.model, s.share, deployment(_slug(s.model), EngineReplica).bind(store, s.model, recipe, runtime, engine))

    others, shadow = [beside(s) for s in o.shares[1:]], beside(o.shadow) if o.shadow else None
    settings = Settings(tokens, first.share, places, o.timeout_s, o.image_prefixes, o.metrics_open)
    return deployment("sentiment", serve.ingress()(Replica)).bind(store, first.model, recipe, runtime, engine, settings, others, shadow)


def _slug(model: str) -> str:
    """A deployment's name, which may not hold everything that a model's may."""
    return "sentiment-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")
