"""Fake machines for test_autoscaling.py: node providers, loaded by the autoscaler by name, and the drivers, run as jobs would be.

The providers start real Ray nodes on this machine, with the resources that a group says it has. What a cloud would refuse is refused while a file
of that name stands in the session's folder. Every launch is written down.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

from mulcot_ray.spot import MARKET, SPOT, SpotFirst


def folder() -> Path:
    return Path(os.environ["RAY_TMPDIR"])


class Machines(FakeMultiNodeProvider):
    """EC2 as far as it matters here: "no-spot" refuses spot."""

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, Any], labels: dict[str, str]
    ) -> None:
        kind = tags["ray-user-node-type"]
        refused = SPOT in node_config and (folder() / "no-spot").exists()
        with (folder() / "launches.jsonl").open("a") as f:
            f.write(json.dumps({"group": kind, "market": tags.get(MARKET), "spot": SPOT in node_config, "count": count, "refused": refused}) + "\n")
        if refused:
            raise NodeLaunchException("InsufficientInstanceCapacity", "no spot capacity", None)
        super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)


class Spot(SpotFirst, Machines):
    """What cluster.yaml names, over fake machines."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self.provider_config = provider_config


class Pods(Machines):
    """Kubernetes as far as it matters here: a pod of a group whose name has "spot" is accepted, and stays pending while there is "no-spot"."""

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, Any], labels: dict[str, str]
    ) -> None:
        if "spot" not in tags["ray-user-node-type"] or not (folder() / "no-spot").exists():
            return super().create_node_with_resources_and_labels(node_config, tags, count, resources, labels)
        with (folder() / "launches.jsonl").open("a") as f:
            f.write(json.dumps({"group": tags["ray-user-node-type"], "pending": True}) + "\n")
        for _ in range(count):
            self._nodes[self._next_hex_node_id()] = {"tags": {**tags, "ray-node-name": "pending"}}
        return None

    def is_running(self, node_id: str) -> bool:
        return node_id in self._nodes and self._nodes[node_id]["tags"]["ray-node-name"] != "pending"

    def _terminate_node(self, node: dict[str, Any]) -> None:
        if "node" in node:
            super()._terminate_node(node)


def watch(seen: list[float], stop: threading.Event) -> None:
    """The cluster's GPUs, as they change."""
    import ray

    while not stop.wait(0.25):
        gpus = ray.cluster_resources().get("GPU", 0.0)
        if not seen or seen[-1] != gpus:
            seen.append(gpus)


def run(work: Any, to_zero: bool) -> dict[str, Any]:
    """Do the work on the cluster of RAY_ADDRESS, then perhaps wait until all its GPUs have gone. The GPUs seen, and what the work says."""
    import ray

    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    seen: list[float] = []
    stop = threading.Event()
    watcher = threading.Thread(target=watch, args=(seen, stop))
    watcher.start()
    result = work()
    deadline = time.monotonic() + 45
    while to_zero and ray.cluster_resources().get("GPU", 0.0) > 0 and time.monotonic() < deadline:
        time.sleep(0.25)
    time.sleep(0.5)
    stop.set()
    watcher.join()
    return {"gpus": seen, **result}


def tasks(*gpus: int) -> dict[str, Any]:
    """Bare tasks that want so many GPUs each, all at once."""
    import ray

    @ray.remote(num_cpus=1)
    def where() -> int:
        return len(ray.get_gpu_ids())

    return {"had": ray.get([where.options(num_gpus=n).remote() for n in gpus], timeout=90)}


def label(root: str, name: str) -> dict[str, Any]:
    """A labeling job with the scripted engine, sized as the cluster runtime sizes it: one GPU a replica, a few replicas."""
    from mulcot_ray.engines.base import EngineSpec, Messages, Sampling
    from mulcot_ray.labeling.label import label as run_label
    from mulcot_ray.recipe import load_recipe, load_runtime
    from mulcot_ray.storage import Store

    def script(messages: Messages, sampling: Sampling) -> str:
        import time as clock

        clock.sleep(0.12)  # so that machines come and go while there is work
        return '"Prediction": "positive"'

    recipe = load_recipe("tiny")
    runtime = load_runtime("cluster").model_copy(update={"rows_per_chunk": 8, "answer_cache": False})
    engine = runtime.student.model_copy(update={"replicas": (1, 2), "cpus": 2.0, "max_num_seqs": 4})
    spec = EngineSpec("fake", "fake", recipe.contract, "float32", 1024, 42, runtime.device, engine, "scripted", script=script)
    done: list[tuple[int, int, int]] = []
    manifest, _ = run_label(
        Store(root), name, posts="sample", model="builtin:student", recipe=recipe, runtime=runtime, engine=spec, progress=lambda *a: done.append(a)
    )
    return {"rows": manifest.rows, "rejects": manifest.rejects, "rows_in": manifest.rows_in, "labels": manifest.stats["labels"]}


if __name__ == "__main__":
    what, *options = sys.argv[1:]
    found = run(lambda: label(*options), True) if what == "label" else run(lambda: tasks(*map(int, options)), False)
    print("RESULT " + json.dumps(found))
