"""The files for a cluster are what Ray wants to read. That a cluster starts from them is not tested here."""

from pathlib import Path

import yaml

from mulcot_ray.recipe import load_runtime

ROOT = Path(__file__).parents[1]


def test_cluster_yaml_passes_rays_own_schema(tmp_path, monkeypatch):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["gpu"]["min_workers"] == 0


def test_cluster_yaml_is_safe_by_default():
    text = (ROOT / "cluster.yaml").read_text()
    assert "RAY_AUTH_MODE=token" in text and "--dashboard-host=127.0.0.1" in text and "use_internal_ips: true" in text
    assert not any(word in text for word in ("AWS_SECRET", "aws_access_key", "0.0.0.0"))


def test_the_cluster_is_large_enough_for_its_runtime():
    groups = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    runtime = load_runtime("cluster")
    assert groups["teacher"]["max_workers"] >= runtime.teacher.replicas[1]  # one 8-GPU node a replica
    assert groups["gpu"]["max_workers"] >= max(runtime.student.replicas[1], runtime.assistant.replicas[1] + runtime.train_workers)
