"""cluster.yaml as `ray up` and the autoscaler would use it, on a mocked EC2 (moto). Run by test_deploy.py in a process of its own; prints JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import yaml
from botocore.exceptions import ClientError
from moto import mock_aws

CALLS: list[tuple[str, dict[str, Any]]] = []
MARKETS = {"spot": True, "on-demand": True}


def recorded(real: Any) -> Any:
    def call(self: Any, operation: str, arguments: dict[str, Any]) -> Any:
        CALLS.append((operation, arguments))
        if operation == "RunInstances" and not MARKETS["spot" if "InstanceMarketOptions" in arguments else "on-demand"]:
            raise ClientError({"Error": {"Code": "InsufficientInstanceCapacity", "Message": "none"}}, operation)
        return real(self, operation, arguments)

    return call


@mock_aws
def main(path: Path) -> dict[str, Any]:
    from ray.autoscaler._private.providers import _get_node_provider, _get_node_provider_cls
    from ray.autoscaler._private.util import prepare_config, validate_config
    from ray.autoscaler.node_launch_exception import NodeLaunchException
    from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_NODE_STATUS, TAG_RAY_USER_NODE_TYPE

    for name in ("mulcot-head", "mulcot-node"):
        boto3.client("iam").create_instance_profile(InstanceProfileName=name)
    ec2 = boto3.client("ec2", region_name="us-east-1")
    for subnet in ec2.describe_subnets()["Subnets"]:
        ec2.modify_subnet_attribute(SubnetId=subnet["SubnetId"], MapPublicIpOnLaunch={"Value": False})
    image = ec2.describe_images()["Images"][0]["ImageId"]
    config = prepare_config(yaml.safe_load(path.read_text().replace("ami-CHANGE-ME", image)))
    validate_config(config)
    config = _get_node_provider_cls(config["provider"]).bootstrap_config(config)
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    botocore.client.BaseClient._make_api_call = recorded(botocore.client.BaseClient._make_api_call)
    group = config["available_node_types"]["gpu"]

    def launch() -> str:
        tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: "gpu", TAG_RAY_NODE_NAME: "n", TAG_RAY_NODE_STATUS: "uninitialized"}
        try:
            made = provider.create_node_with_resources_and_labels(group["node_config"], tags, 1, group["resources"], {})
        except NodeLaunchException as e:
            return e.category
        provider.non_terminated_nodes({})  # fills the cache that node_tags reads
        return ",".join(provider.node_tags(i)["mulcot-market"] for i in made)

    found: dict[str, Any] = {"spot there": launch()}
    MARKETS["spot"] = False
    found["spot gone"] = launch()
    found["as many as allowed"] = [launch() for _ in range(config["provider"]["on_demand_max"] - 1)]
    found["one more"] = launch()
    MARKETS["spot"] = True
    found["spot back"] = launch()
    MARKETS.update({"spot": False, "on-demand": False})
    found["none at all"] = launch()
    nodes = provider.non_terminated_nodes({})
    provider.terminate_nodes(nodes[:2])
    found["nodes"] = len(nodes)
    found["calls"] = sorted({op for op, _ in CALLS})
    runs = [a for op, a in CALLS if op == "RunInstances"]
    found["subnets tried"] = len({a["SubnetId"] for a in runs})
    found["profiles"] = sorted({a["IamInstanceProfile"]["Name"] for a in runs})
    found["tokens"] = sorted({a["MetadataOptions"]["HttpTokens"] for a in runs})
    found["public"] = any(a.get("NetworkInterfaces", [{}])[0].get("AssociatePublicIpAddress", False) for a in runs)
    found["cluster tags"] = sorted({t["Value"] for a in runs for s in a["TagSpecifications"] for t in s["Tags"] if t["Key"] == "ray-cluster-name"})
    return found


if __name__ == "__main__":
    print("RESULT " + json.dumps(main(Path(sys.argv[1]))))
