"""The groups of our cluster files on Ray's own autoscaler (v2, what `ray up` and KubeRay run), with fake machines: up from zero, the job, down again.

What is real: the autoscaler, the groups and their resources, mulcot_ray/spot.py, the labeling job. What is not: the machines (Ray nodes on this
one) and what refuses them. On EC2 itself the same provider is tested in test_deploy.py, against a mocked EC2.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray_nodes import Head, free_ports, processes_of, ray_head

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


@contextmanager
def autoscaling(groups: dict[str, Any], provider: str, **environment: str) -> Iterator[Head]:
    """cluster.yaml on fake machines. As ray.cluster_utils.AutoscalingCluster does it; that class itself needs a file that Ray's wheel does not have,
    and starts and stops by `ray stop`, which ends every Ray on the machine."""
    import ray
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
    from ray.autoscaler._private.util import prepare_config

    (port,) = free_ports(1)
    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    config["provider"] = {
        "type": "external", "module": f"fake_nodes.{provider}", "gcs_address": f"{ray.util.get_node_ip_address()}:{port}",
        "head_node_id": FAKE_HEAD_NODE_ID, "launch_multiple": True, "disable_node_updaters": True,
    }  # fmt: skip
    head_type = config["available_node_types"][config["head_node_type"]] | {"node_config": {}}
    config |= {
        "available_node_types": {**groups, FAKE_HEAD_NODE_TYPE: head_type},
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "idle_timeout_minutes": 0.05,
    }
    config |= {"file_mounts": {}, "setup_commands": []}
    folder = Path(tempfile.mkdtemp(prefix="mca", dir="/tmp"))
    (folder / "cluster.json").write_text(json.dumps(config))
    settings = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))),
        "RAY_enable_worker_prestart": "0", "RAY_prestart_worker_first_driver": "0",  # a fake machine with 192 CPUs would start 192 workers
        **environment,
    }  # fmt: skip
    try:
        with ray_head(folder, f"--autoscaling-config={folder}/cluster.json", cpus=0, port=port, environment=settings) as head:
            yield head
        assert not processes_of(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def drive(head: Head, *arguments: str, meanwhile: Any = None) -> dict[str, Any]:
    """Run a driver of fake_nodes.py on the cluster. `meanwhile` is called now and again until it says that it is done."""
    env = {k: v for k, v in head.environment.items() if not k.startswith(("RAY_OVERRIDE", "RAY_CLOUD"))} | {"RAY_ADDRESS": head.gcs}
    with (head.folder / "driver.log").open("w+") as log:
        driver = subprocess.Popen([sys.executable, str(ROOT / "tests" / "fake_nodes.py"), *arguments], env=env, stdout=log, stderr=log)
        deadline = time.monotonic() + 200
        while driver.poll() is None and time.monotonic() < deadline:
            if meanwhile is not None and meanwhile():
                meanwhile = None
            time.sleep(0.25)
        driver.kill()
        log.seek(0)
        text = log.read()
    line = next((x for x in text.splitlines() if x.startswith("RESULT ")), None)
    assert line is not None, f"{text[-3000:]}\n{launches(head)}"
    return json.loads(line.removeprefix("RESULT "))


def launches(head: Head) -> list[dict[str, Any]]:
    path = head.folder / "launches.jsonl"
    return [json.loads(x) for x in path.read_text().splitlines()] if path.exists() else []


def test_the_gpu_group_grows_from_zero_runs_the_job_and_shrinks_and_does_without_spot(sample_store: Any) -> None:
    groups = {k: v for k, v in yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"].items() if k != "head"}
    assert set(groups) == {"cpu", "teacher", "gpu"} and all(g["min_workers"] == 0 for g in groups.values())
    with autoscaling(groups, "Spot") as head:
        # Demand for single GPUs: the single-GPU group on spot, not the teacher's 8-GPU machines.
        first = drive(head, "label", sample_store.base, "spot")
        assert first["rows"] == first["rows_in"] == 168 and first["labels"] == {"positive": 168}
        assert first["gpus"][0] == 0 and first["gpus"][-1] == 0 and max(first["gpus"]) == 2  # from zero, as many as replicas, to zero
        assert {(x["group"], x["market"]) for x in launches(head)} == {("gpu", "spot")}
        before = len(launches(head))

        # The spot group is lost in the middle of a job: its machines die, and EC2 has no others.
        def lose_spot() -> bool:
            parts = list(Path(sample_store.base, "predictions", "lost").glob("part-*.parquet"))
            if not parts:
                return False
            (head.folder / "no-spot").touch()
            workers = [p for p in processes_of(head.folder) if "raylet/raylet" in " ".join(p.cmdline()) and "--head" not in p.cmdline()]
            for p in workers:
                p.kill()
            return bool(workers)

        lost = drive(head, "label", sample_store.base, "lost", meanwhile=lose_spot)
        assert lost["rows"] == lost["rows_in"] == 168 and lost["labels"] == {"positive": 168} and lost["gpus"][-1] == 0
        after = launches(head)[before:]
        assert any(x["refused"] and x["market"] == "spot" for x in after)
        assert any(not x["refused"] and x["market"] == "on-demand" and not x["spot"] and x["group"] == "gpu" for x in after)
        assert (head.folder / "no-spot").exists()

        # Work without a model starts no GPU. Eight GPUs at once: only the teacher's group has them.
        for gpus, group in ((0, "cpu"), (8, "teacher")):
            at = len(launches(head))
            assert drive(head, "tasks", str(gpus))["had"] == [gpus]
            assert {x["group"] for x in launches(head)[at:]} == {group}


def test_on_kubernetes_a_spot_group_that_stays_pending_gives_way_to_the_next() -> None:
    groups = kuberay_groups()
    assert list(groups) == ["gpu-spot", "gpu", "cpu"]  # the first of equals is taken first
    fast = {"RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": "20"}  # the head has to be up within it, too
    with autoscaling(groups, "Pods", **fast) as head:
        (head.folder / "no-spot").touch()
        assert drive(head, "tasks", "1")["had"] == [1]
        asked = launches(head)
        assert asked[0] == {"group": "gpu-spot", "pending": True} and asked[-1]["group"] == "gpu" and not asked[-1]["refused"]


def kuberay_groups() -> dict[str, Any]:
    """The worker groups of the night's RayJob, as Ray's autoscaler reads them from a RayCluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    documents = yaml.safe_load_all((ROOT / "deploy" / "kuberay" / "nightly.yaml").read_text())
    job = next(yaml.safe_load(d["data"]["rayjob.yaml"]) for d in documents if d["kind"] == "ConfigMap")
    cluster = {"metadata": {"name": "night", "namespace": "mulcot"}, "spec": job["spec"]["rayClusterSpec"]}
    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    return {
        k: {**v, "resources": {r: int(n) for r, n in v["resources"].items() if r in ("CPU", "GPU")}} for k, v in types.items() if k != "headgroup"
    }
