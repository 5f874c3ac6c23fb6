"""Spot instances where there are some, on demand where there are none: a node provider for Ray's cluster launcher, named in cluster.yaml.

Ray 2.60 does not fall back by itself on AWS. Of two node types with the same resources its autoscaler (v2, the default) takes the first, or the
one with the higher `priority`; a launch that fails for want of capacity is forgotten, and the same type is asked for again, without end. Only a
machine that was granted and then never joined counts against its type. (On Kubernetes that is just how a missing spot node shows: there two
worker groups do, see deploy/kuberay.) So the decision is made here, launch by launch: a spot type is asked for on spot, and at once on demand
when EC2 says that it has none. The next launch tries spot again.

A spot machine that is taken away later is a lost node: Ray sees the demand again and launches another, which comes this way too. Imported by
the autoscaler alone, on the machine of `ray up` and on the head node: therefore Ray stands at the top.
"""

from __future__ import annotations

import logging
from typing import Any

from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler.node_launch_exception import NodeLaunchException

logger = logging.getLogger(__name__)

SPOT = "InstanceMarketOptions"  # the key of a node_config that asks EC2 for spot
MARKET = "mulcot-market"  # an EC2 tag: what a machine was launched as, for the bill
# EC2's words for "none to be had", and for a spot quota that is used up. Anything else (a wrong image, no permission) is an error either way.
NO_CAPACITY = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientCapacity",
        "MaxSpotInstanceCountExceeded",
        "SpotMaxPriceTooLow",
        "UnfulfillableCapacity",
        "Unsupported",
    }
)


class SpotFirst:
    """What is put in front of a node provider. `provider.on_demand_max` in the cluster's file limits the machines that stand in for spot at a time."""

    provider_config: dict[str, Any]

    def create_node_with_resources_and_labels(
        self, node_config: dict[str, Any], tags: dict[str, str], count: int, resources: dict[str, float], labels: dict[str, str]
    ) -> dict[str, Any] | None:
        """Raises what the provider raises: NodeLaunchException when there is neither spot nor on-demand capacity, or the limit is reached."""
        launch: Any = super().create_node_with_resources_and_labels  # type: ignore[misc]
        if SPOT not in node_config:
            return launch(node_config, tags, count, resources, labels)
        try:
            return launch(node_config, {**tags, MARKET: "spot"}, count, resources, labels)
        except NodeLaunchException as e:
            if e.category not in NO_CAPACITY:
                raise
            count = min(count, self._allowed(count))
            if count < 1:
                raise
            logger.warning("no spot capacity (%s): launching %d on demand", e.category, count)
        on_demand = {k: v for k, v in node_config.items() if k != SPOT}
        return launch(on_demand, {**tags, MARKET: "on-demand"}, count, resources, labels)

    def _allowed(self, count: int) -> int:
        limit = self.provider_config.get("on_demand_max")
        return count if limit is None else int(limit) - len(self.non_terminated_nodes({MARKET: "on-demand"}))  # type: ignore[attr-defined]


class SpotFirstAWS(SpotFirst, AWSNodeProvider):
    """`provider: {type: external, module: mulcot_ray.spot.SpotFirstAWS, …}`, else as `type: aws`."""
