"""The dashboard and the alerts: every query against a real Prometheus that scrapes a working cluster, an endpoint and a night's figures."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from finished_nights import canary, manifest
from ray_nodes import free_ports, ray_head
from serving_parts import AUTH, TOKEN, app, served

from mulcot_ray.labeling.gates import Gates, judge
from mulcot_ray.labeling.report import metrics as night_metrics
from mulcot_ray.observing import METRICS
from mulcot_ray.serving.metrics import Meters

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "deploy/grafana/mulcot.json").read_text())
RULES = ROOT / "deploy/prometheus/rules.yml"
PROMETHEUS, PROMTOOL, EXPORTER = (shutil.which(n) for n in ("prometheus", "promtool", "prometheus-node-exporter"))
NEEDS = "is not installed (Debian: apt-get install --no-install-recommends prometheus prometheus-node-exporter)"
# Panels whose queries cannot have data here, and why.
WITHOUT = {"Share of the GPUs' peak": "a GPU", "GPU": "a GPU", "GPU memory": "a GPU"}
RAYS = {  # what Ray itself shows
    "ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total", "ray_node_disk_usage", "ray_node_disk_free", "ray_node_gpus_utilization",
    "ray_node_gram_used", "ray_node_gram_available", "ray_actors", "ray_object_store_memory", "autoscaler_active_nodes", "autoscaler_pending_nodes",
}  # fmt: skip
OTHERS = {"up", "node_textfile_mtime_seconds", "ALERTS"}
PANELS = [p for p in DASHBOARD["panels"] if p["type"] != "row"]
ANNOTATION = DASHBOARD["annotations"]["list"][0]["expr"]


def queries() -> list[tuple[str, str]]:
    return [(p["title"], t["expr"]) for p in PANELS for t in p["targets"]]


def filled_in(query: str, range_s: int) -> str:
    """As Grafana would, with everything chosen."""
    for name, value in {"$__rate_interval": "10s", "$__range": f"{range_s}s", "$stage": ".*", "$run": ".*"}.items():
        query = query.replace(name, value)
    return query


def names_in(query: str) -> set[str]:
    """Names of metrics in PromQL: what stands before a selector or a bracket, and no function or keyword."""
    bare = re.sub(r'"[^"]*"|\b(?:by|on|ignoring|without|group_left|group_right)\s*\([^)]*\)|\{[^}]*\}|\[[^\]]*\]', " ", query)
    return {n for n in re.findall(r"[a-zA-Z_][\w]*(?!\w*\s*\()", bare) if "_" in n and n not in ("group_left", "group_right")} | (
        set(re.findall(r"\b(?:up|ALERTS)\b", bare))
    )


def ours() -> set[str]:
    """Names of all series that mulcot-ray shows anywhere."""
    work = {f"ray_{m.name}{suffix}" for m in METRICS for suffix in (("_bucket", "_sum", "_count") if m.kind == "histogram" else ("",))}
    night = judged()
    text = [*Meters("r").collect()]
    endpoint = {f"{m.name}{s}" for m in text for s in {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(m.type, ("",))}
    return work | endpoint | set(re.findall(r"^# TYPE (\w+)", night, re.M))


def judged() -> str:
    """The figures of a night that a gate holds back."""
    made = manifest(rejects=100, reasons={"bad_line": 100}, canary=canary(0.5), answered_by={"student": 900, "assistant": 100})
    before = [manifest(f"2026-11-{d}", canary=canary(0.9)) for d in range(15, 22)]
    return night_metrics(made, judge(made, before, Gates()))


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_dashboard_is_one_that_grafana_takes():
    d = DASHBOARD
    assert d["schemaVersion"] == 41 and d["uid"] == "mulcot" and d["title"] and "id" not in d
    variables = {v["name"]: v for v in d["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    ids = [p["id"] for p in d["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for p in d["panels"]:
        g = p["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert g["x"] + g["w"] <= 24 and not cells & taken, f"{p['title']} lies over another panel"
        taken |= cells
    for p in PANELS:
        assert p["type"] in ("timeseries", "stat", "bargauge") and p["title"] and p["targets"] and p["fieldConfig"]["defaults"]["unit"]
        assert {t["datasource"]["uid"] for t in p["targets"]} | {p["datasource"]["uid"]} == {"${datasource}"}
        assert len({t["refId"] for t in p["targets"]}) == len(p["targets"])
    used = set(re.findall(r"\$(\w+)", json.dumps([t["expr"] for p in PANELS for t in p["targets"]])))
    assert used == {"stage", "run", "__range", "__rate_interval"}


def test_queries_and_alerts_are_promql_over_metrics_that_exist():
    parser = pytest.importorskip("promql_parser")
    alerts = [r["expr"] for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]]
    shown: set[str] = set()
    for title, query in [*queries(), ("annotation", ANNOTATION), *(("alert", a) for a in alerts)]:
        parser.parse(filled_in(query, 600))
        names = names_in(filled_in(query, 600))
        assert names and names <= ours() | RAYS | OTHERS, f"{title}: {names - ours() - RAYS - OTHERS}"
        shown |= names if title != "alert" else set()
    hidden = {f"ray_{m.name}" for m in METRICS} - {re.sub(r"_(bucket|sum|count)$", "", n) for n in shown}
    assert not hidden, f"no panel shows {hidden}"


def test_the_docs_say_what_to_do_about_each_alert():
    said = re.findall(r"^\| `(Mulcot\w+)` \|", (ROOT / "docs/observing.md").read_text(), re.M)
    assert said == [r["alert"] for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"]]


RULE_TESTS = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'ray_mulcot_posts_total{{stage="label", outcome="kept", WorkerId="a"}}', values: '0+90x30 2700x60'}}
      - {{series: 'ray_mulcot_posts_total{{stage="label", outcome="rejected", WorkerId="a"}}', values: '0+10x30 300x60'}}
      - {{series: 'ray_mulcot_posts_total{{stage="teach", outcome="kept", WorkerId="b"}}', values: '0+100x90'}}
      - {{series: 'ray_mulcot_posts_total{{stage="teach", outcome="rejected", WorkerId="b"}}', values: '0+1x90'}}
      - {{series: 'ray_mulcot_rows{{run="predictions/x", stage="label", state="left"}}', values: '7000x90'}}
      - {{series: 'ray_mulcot_rows{{run="rationales/y", stage="teach", state="left"}}', values: '9000x90'}}
      - {{series: 'ray_mulcot_engine_restarts_total{{stage="label", WorkerId="a"}}', values: '0x10 1 2 3 4 5 5x74'}}
      - {{series: 'ray_mulcot_step{{run="models/m"}}', values: '1+1x20 21x70'}}
      - {{series: 'ray_mulcot_steps_planned{{run="models/m"}}', values: '100x90'}}
      - {{series: 'mulcot_requests_total{{status="200", replica="a"}}', values: '0+60x90'}}
      - {{series: 'mulcot_requests_total{{status="500", replica="a"}}', values: '0x40 0+3x50'}}
      - {{series: 'up{{job="mulcot-endpoint", instance="e"}}', values: '1x50 0x40'}}
      - {{series: 'mulcot_night_fit{{version="v"}}', values: '1x60 0x30'}}
    alert_rule_test:
      - {{eval_time: 25m, alertname: MulcotManyRejects, exp_alerts: [{many}]}}
      - {{eval_time: 80m, alertname: MulcotManyRejects, exp_alerts: []}}
      - {{eval_time: 30m, alertname: MulcotNoProgress, exp_alerts: []}}
      - {{eval_time: 80m, alertname: MulcotNoProgress, exp_alerts: [{none}]}}
      - {{eval_time: 8m, alertname: MulcotEnginesDie, exp_alerts: []}}
      - {{eval_time: 20m, alertname: MulcotEnginesDie, exp_alerts: [{die}]}}
      - {{eval_time: 30m, alertname: MulcotTrainingStopped, exp_alerts: []}}
      - {{eval_time: 60m, alertname: MulcotTrainingStopped, exp_alerts: [{stopped}]}}
      - {{eval_time: 40m, alertname: MulcotEndpointFails, exp_alerts: []}}
      - {{eval_time: 60m, alertname: MulcotEndpointFails, exp_alerts: [{fails}]}}
      - {{eval_time: 55m, alertname: MulcotEndpointDown, exp_alerts: [{down}]}}
      - {{eval_time: 70m, alertname: MulcotNightHeld, exp_alerts: [{held}]}}
"""


@pytest.mark.skipif(PROMTOOL is None, reason=f"promtool {NEEDS}")
def test_alerts_fire_when_they_should_and_not_before(tmp_path):
    groups = yaml.safe_load(RULES.read_text())["groups"]
    rules = {r["alert"]: r for g in groups for r in g["rules"]}
    for r in rules.values():  # what they say is not what is tested
        r.pop("annotations")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))

    def fires(alert: str, **labels: str) -> str:
        return json.dumps({"exp_labels": {**labels, **rules[alert]["labels"]}})

    text = RULE_TESTS.format(
        rules=tmp_path / "rules.yml", many=fires("MulcotManyRejects", stage="label"),
        none=fires("MulcotNoProgress", run="predictions/x", stage="label"), die=fires("MulcotEnginesDie", stage="label"),
        stopped=fires("MulcotTrainingStopped", run="models/m"), fails=fires("MulcotEndpointFails"),
        down=fires("MulcotEndpointDown", job="mulcot-endpoint", instance="e"), held=fires("MulcotNightHeld", version="v"),
    )  # fmt: skip
    (tmp_path / "tests.yml").write_text(text)
    assert PROMTOOL is not None
    subprocess.run([PROMTOOL, "check", "rules", str(RULES)], check=True, capture_output=True)
    done = subprocess.run([PROMTOOL, "test", "rules", str(tmp_path / "tests.yml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- a real Prometheus -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """The Prometheus, when the work began, and what the manifests say of it."""

    url: str
    begun: float
    result: dict[str, Any]
    logs: Path

    def over_time(self, query: str) -> list[dict[str, Any]]:
        now = time.time()
        params: dict[str, Any] = {"query": filled_in(query, int(now - self.begun)), "start": self.begun, "end": now, "step": 1}
        answer = httpx.get(f"{self.url}/api/v1/query_range", params=params, trust_env=False).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def now(self, query: str) -> dict[str, float]:
        """Values of an instant query, by their one label."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": query}, trust_env=False).json()
        return {next(iter(r["metric"].values()), ""): float(r["value"][1]) for r in answer["data"]["result"]}


@pytest.fixture(scope="module")
def watched() -> Iterator[Watched]:
    if PROMETHEUS is None or EXPORTER is None:
        pytest.skip(f"Prometheus {NEEDS}")
    folder = Path(tempfile.mkdtemp(prefix="mw"))  # a short path: Ray puts sockets under it
    try:
        with watching(folder) as found:
            yield found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watching(folder: Path) -> Iterator[Watched]:
    port, node = free_ports(2)
    assert PROMETHEUS is not None and EXPORTER is not None
    (folder / "text").mkdir()
    (folder / "text" / "mulcot.prom").write_text(judged())
    (folder / "token").write_text(f"{TOKEN}\n")
    tests = str(Path(__file__).parent)
    paths = {"PYTHONPATH": os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])}
    exporter = [EXPORTER, f"--web.listen-address=127.0.0.1:{node}", "--collector.disable-defaults", "--collector.textfile", f"--collector.textfile.directory={folder}/text"]  # fmt: skip
    with ray_head(folder, cpus=4, environment={"RAY_metrics_report_interval_ms": "1000", **paths}) as head, served(app(shadows=[Echo()])) as endpoint:
        (folder / "ray-token").write_text(head.token)
        config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(RULES)]
        jobs = {j["job_name"]: j for j in config["scrape_configs"]}
        assert set(jobs) == {"ray", "mulcot-endpoint", "node"}
        found = jobs["ray"]["http_sd_configs"][0]
        found |= {"url": found["url"].replace("http://127.0.0.1:8265", head.url), "refresh_interval": "1s"}
        found["authorization"]["credentials_file"] = str(folder / "ray-token")
        jobs["mulcot-endpoint"]["authorization"]["credentials_file"] = str(folder / "token")
        jobs["mulcot-endpoint"]["static_configs"][0]["targets"] = [endpoint.removeprefix("http://")]
        jobs["node"]["static_configs"][0]["targets"] = [f"127.0.0.1:{node}"]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        prometheus = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]  # fmt: skip
        begun, stop = time.time(), threading.Event()
        with process(exporter, folder / "exporter.log"), process(prometheus, folder / "prometheus.log"):
            asking = threading.Thread(target=ask, args=(endpoint, stop))
            asking.start()
            try:
                done = subprocess.run(
                    [sys.executable, f"{tests}/observed_work.py", str(folder / "root")],
                    env=head.environment | {"RAY_ADDRESS": head.gcs}, capture_output=True, text=True, timeout=240,
                )  # fmt: skip
                assert done.returncode == 0, done.stdout + done.stderr[-4000:]
            finally:
                stop.set()
                asking.join()
            time.sleep(2)
            said = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
            assert httpx.get(found["url"], trust_env=False).status_code == 401  # the list of nodes is for those with the token
            yield Watched(f"http://127.0.0.1:{port}", begun, json.loads(said.removeprefix("RESULT ")), folder / "ray" / "session_latest" / "logs")


class Echo:
    """A version in the shadow that gives the same answers, but for a little."""

    def consider(self, post: Any, image: Any, prediction: Any, meters: Meters) -> None:
        meters.compared("shadow", prediction, replace(prediction, negative=(prediction.negative or 0.0) + 0.01))


def ask(endpoint: str, stop: threading.Event) -> None:
    with httpx.Client(base_url=endpoint, headers=AUTH, trust_env=False, timeout=10) as client:
        while not stop.wait(0.2):
            client.post("/v1/sentiment", json={"text": f"what a {secrets.choice(['nice', 'awful'])} day", "explain": True})
            client.post("/v1/sentiment", json={"text": ""})


@contextmanager
def process(command: list[str], log: Path) -> Iterator[None]:
    with log.open("wb") as out:
        running = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        yield
        assert running.poll() is None, log.read_text()[-3000:]
    finally:
        running.terminate()
        with suppress(subprocess.TimeoutExpired):
            running.wait(10)
        running.kill()
        running.wait(10)


@pytest.mark.ray
def test_every_panel_has_data(watched):
    empty = []
    for title, query in [*queries(), ("annotation", ANNOTATION)]:
        values = [float(v) for series in watched.over_time(query) for _, v in series["values"]]
        if title not in WITHOUT and not any(map(math.isfinite, values)):
            empty.append(f"{title}: {query} ({len(values)} values)")
    assert not empty, "\n".join(empty)
    for v in DASHBOARD["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", v["query"]["query"]).groups()
        found = httpx.get(f"{watched.url}/api/v1/label/{label}/values", params={"match[]": metric, "start": watched.begun}, trust_env=False).json()
        assert found["data"], v["name"]


@pytest.mark.ray
def test_what_was_counted_is_what_the_manifests_say(watched):
    first, again = watched.result["label"]
    night = watched.result["night"]["stats"]
    kept, rejected = first["rows"] + again["rows"], first["rejects"] + again["rejects"]
    assert rejected > 0 and first["stats"]["answers"]["asked"] > 0 and again["stats"]["answers"]["reused"] == again["rows_in"]
    counted = watched.now('sum by (outcome) (ray_mulcot_posts_total{stage="label", role=""})')
    assert counted == pytest.approx({"kept": kept, "rejected": rejected, "deferred": 0}, abs=1e-6)
    reasons = {r: first["rejects_by_reason"][r] + again["rejects_by_reason"][r] for r in first["rejects_by_reason"]}
    assert watched.now('sum by (reason) (ray_mulcot_rejects_total{role=""}) > 0.5') == pytest.approx(reasons)
    for kind in ("asked", "reused", "scored"):
        want = first["stats"]["answers"][kind] + again["stats"]["answers"][kind]
        assert watched.now(f'sum(ray_mulcot_answers_total{{role="", kind="{kind}"}})')[""] == pytest.approx(want, abs=1e-6)
    for direction in ("in", "out"):
        want = first["stats"]["tokens"][direction] + again["stats"]["tokens"][direction]
        assert watched.now(f'sum(ray_mulcot_tokens_total{{role="", direction="{direction}"}})')[""] == pytest.approx(want, abs=1e-6)
    roles = {role: n["rows_in"] for role, n in night["engine"].items()}
    assert set(roles) == {"student", "assistant"}
    assert watched.now('sum by (role) (ray_mulcot_posts_total{role!=""})') == pytest.approx(roles)
    assert watched.now('sum(ray_mulcot_usd_total{role!=""})')[""] == pytest.approx(night["usd"], abs=6e-5)  # rounded there


@pytest.mark.ray
def test_series_have_our_labels_and_few_of_them(watched):
    for m in METRICS:
        name = f"ray_{m.name}" + ("_count" if m.kind == "histogram" else "")
        series = [r["metric"] for r in watched.over_time(name)]
        if m.name == "mulcot_mfu":
            continue
        own = {k for s in series for k in s if k[0].islower()} - {"instance", "job", "le"}
        assert series and own == set(m.labels) | ({"role"} & own), f"{m.name}: {own}"
        assert not any(k.startswith("otel") for k in own)
    workers = watched.now("count(count by (WorkerId) (ray_mulcot_posts_total))")[""]
    series = watched.now('count({__name__=~"ray_mulcot_.+_total|ray_mulcot_chunk.+"})')[""]
    assert series / workers < 60  # what each process that ever worked on a node leaves in its agent


@pytest.mark.ray
def test_workers_say_in_json_what_they_are_at(watched):
    lines = [json.loads(x) for f in watched.logs.glob("worker-*.err") for x in f.read_text().splitlines() if x.startswith('{"time"')]
    done = [x for x in lines if x["logger"] == "mulcot_ray.engines.worker"]
    by_run = {(x["run"], x.get("role")): x for x in done}
    night = f"nights/{watched.result['night']['name']}"
    assert {("predictions/first", None), ("predictions/again", None), (night, "student"), (night, "assistant")} <= set(by_run)
    for x in done:
        assert x["stage"] == "label" and x["chunk"].startswith("part-") and x["node"] and x["actor"] and x["level"] == "INFO"
