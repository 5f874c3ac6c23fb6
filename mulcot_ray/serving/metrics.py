"""What the endpoint counts, as Prometheus text. Each replica counts for itself: every series has its name as `replica`.

A scrape through Serve meets any one replica; with several, each is met in turn, and `sum without (replica)` of their last values is the
whole. Serve's own numbers of all replicas are at Ray's metrics port.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mulcot_ray.records import Prediction
from mulcot_ray.serving.guards import CODE_HEADER
from mulcot_ray.serving.schemas import Timings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DIFFERENCES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0)


class Watchable(Protocol):
    taken: int
    queued: int


class Meters:
    def __init__(self, replica: str) -> None:
        self.replica = replica
        r = self.registry = CollectorRegistry(auto_describe=False)
        self.requests = Counter("mulcot_requests", "Requests that were answered.", ["route", "status"], registry=r)
        self.seconds = Histogram("mulcot_request_seconds", "From the request to its answer's end.", ["route"], registry=r, buckets=SECONDS)
        self.open = Gauge("mulcot_requests_open", "Requests that are being answered.", registry=r)
        self.refused = Counter("mulcot_refusals", "Answers that are errors, lines of batches among them.", ["code"], registry=r)
        self.labels = Counter("mulcot_labels", "Posts that were labelled.", ["model", "label"], registry=r)
        self.tokens = Counter("mulcot_tokens", "Tokens read and written.", ["model", "direction"], registry=r)
        self.steps = Histogram("mulcot_step_seconds", "Parts of a post's time.", ["step"], registry=r, buckets=SECONDS)
        self.places = Gauge("mulcot_places", "Places in the engine: taken, and waited for.", ["state"], registry=r)
        self.shadow = Counter("mulcot_shadow", "Posts that the shadow was asked too.", ["model", "outcome"], registry=r)
        self.shift = Histogram("mulcot_shadow_difference", "Largest difference of a probability.", ["model"], registry=r, buckets=DIFFERENCES)

    def watch(self, places: Watchable) -> None:
        self.places.labels("taken").set_function(lambda: places.taken)
        self.places.labels("waited_for").set_function(lambda: places.queued)

    def answered(self, p: Prediction, model: str, t: Timings) -> None:
        self.labels.labels(model, p.label).inc()
        self.written(model, p.tokens_in, p.tokens_out)
        for step, ms in (("queue", t.queue), ("prepare", t.prepare), ("score", t.score), ("rationale", t.rationale)):
            if ms is not None:
                self.steps.labels(step).observe(ms / 1000)

    def written(self, model: str, tokens_in: int, tokens_out: int) -> None:
        self.tokens.labels(model, "in").inc(tokens_in)
        self.tokens.labels(model, "out").inc(tokens_out)

    def compared(self, model: str, shown: Prediction, shadow: Prediction) -> None:
        self.shadow.labels(model, "agrees" if shown.label == shadow.label else "differs").inc()
        pairs = ((shown.negative, shadow.negative), (shown.neutral, shadow.neutral), (shown.positive, shadow.positive))
        self.shift.labels(model).observe(max(abs((a or 0.0) - (b or 0.0)) for a, b in pairs))

    def text(self) -> bytes:
        return generate_latest(self)

    def collect(self) -> Iterator[Metric]:
        for metric in self.registry.collect():
            # Without the time at which each series began: half as many lines, and nobody reads them.
            kept = (s for s in metric.samples if not s.name.endswith("_created"))
            metric.samples = [s._replace(labels={**s.labels, "replica": self.replica}) for s in kept]
            yield metric


class Counted:
    """Counts each request by route and status, its time, and the code of an error."""

    def __init__(self, app: ASGIApp, meters: Meters) -> None:
        self.app, self.meters = app, meters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, code = "500", ""

        async def seen(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status = str(message["status"])
                code = next((v.decode("latin-1") for k, v in message.get("headers", ()) if k == CODE_HEADER.encode()), "")
            await send(message)

        started = time.perf_counter()
        self.meters.open.inc()
        try:
            await self.app(scope, receive, seen)
        except asyncio.CancelledError:  # by Serve: the client has left
            status = "499"
            raise
        finally:
            self.meters.open.dec()
            # Refused before it met a route, or met none: paths that anybody may make up are no labels.
            route = str(getattr(scope.get("route"), "path", "none"))
            self.meters.requests.labels(route, status).inc()
            self.meters.seconds.labels(route).observe(time.perf_counter() - started)
            if code:
                self.meters.refused.labels(code).inc()
