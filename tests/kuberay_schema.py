"""The fields of KubeRay's resources that our manifests may use, as JSON Schema; everything of Kubernetes itself by its own published schemas.

KubeRay's CRDs are in no package. What stands here was written down from its Go types (ray-operator/apis/ray/v1, KubeRay 1.6; statuses and what we
do not use left out): which fields there are, of what kind, and which must be there ("!"). Unknown fields are errors, as they are for `kubectl apply`.
Rules that only the operator checks (a RayJob with a clusterSelector cannot be tried again, for instance) are not here.
"""

from __future__ import annotations

import importlib.resources
import json
from functools import lru_cache
from typing import Any

import jsonschema

KUBERNETES = "1.34"
TEXT, WHOLE, NUMBER, YES = {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": {"type": "string"}}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


def core(name: str) -> dict[str, Any]:
    return {"$ref": f"#/$defs/io.k8s.{name}"}


def many(of: Any) -> dict[str, Any]:
    return {"type": "array", "items": {"$ref": f"#/$defs/{of}"} if isinstance(of, str) else of}


POD, RESOURCES, ENV = core("api.core.v1.PodTemplateSpec"), core("api.core.v1.ResourceRequirements"), many(core("api.core.v1.EnvVar"))
TYPES: dict[str, dict[str, Any]] = {
    "AuthOptions": {"mode": one_of("disabled", "token"), "secretName": TEXT, "enableK8sTokenAuth": YES},
    "AutoscalerOptions": {
        "resources": RESOURCES, "image": TEXT, "imagePullPolicy": one_of("Always", "Never", "IfNotPresent"),
        "securityContext": core("api.core.v1.SecurityContext"), "idleTimeoutSeconds": WHOLE, "upscalingMode": one_of("Default", "Aggressive", "Conservative"),
        "version": one_of("v1", "v2"), "env": ENV, "envFrom": many(core("api.core.v1.EnvFromSource")), "volumeMounts": many(core("api.core.v1.VolumeMount")),
    },
    "HeadGroupSpec": {
        "template!": POD, "headService": core("api.core.v1.Service"), "enableIngress": YES, "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS,
        "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    },
    "WorkerGroupSpec": {
        "groupName!": TEXT, "replicas": WHOLE, "minReplicas!": WHOLE, "maxReplicas!": WHOLE, "numOfHosts": WHOLE, "idleTimeoutSeconds": WHOLE,
        "rayStartParams": TEXTS, "resources": TEXTS, "labels": TEXTS, "template!": POD,
    },
    "RayClusterSpec": {
        "authOptions": "AuthOptions", "suspend": YES, "managedBy": TEXT, "autoscalerOptions": "AutoscalerOptions", "headServiceAnnotations": TEXTS,
        "enableInTreeAutoscaling": YES, "headGroupSpec!": "HeadGroupSpec", "rayVersion": TEXT, "workerGroupSpecs": many("WorkerGroupSpec"),
    },
    "RayJobSpec": {
        "entrypoint": TEXT, "runtimeEnvYAML": TEXT, "metadata": TEXTS, "jobId": TEXT, "activeDeadlineSeconds": WHOLE, "backoffLimit": WHOLE,
        "rayClusterSpec": "RayClusterSpec", "clusterSelector": TEXTS, "submitterPodTemplate": POD, "managedBy": TEXT, "suspend": YES,
        "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode"), "entrypointResources": TEXT, "entrypointNumCpus": NUMBER,
        "entrypointNumGpus": NUMBER, "ttlSecondsAfterFinished": WHOLE, "shutdownAfterJobFinishes": YES,
    },
    "RayServiceSpec": {
        "rayClusterConfig!": "RayClusterSpec", "serveConfigV2": TEXT, "serveService": core("api.core.v1.Service"), "excludeHeadPodFromServeSvc": YES,
        "upgradeStrategy": {"type": "object", "properties": {"type": one_of("NewCluster", "None")}, "additionalProperties": False},
    },
}  # fmt: skip
KINDS = {"RayCluster": "RayClusterSpec", "RayJob": "RayJobSpec", "RayService": "RayServiceSpec"}


@lru_cache(maxsize=1)
def kubernetes() -> dict[str, Any]:
    """Kubernetes' own definitions, strict: no unknown fields."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{KUBERNETES}.0-local-strict"
    return json.loads((folder / "_definitions.json").read_text())["$defs"]


def _object(fields: dict[str, Any]) -> dict[str, Any]:
    properties = {k.rstrip("!"): {"$ref": f"#/$defs/{v}"} if isinstance(v, str) else v for k, v in fields.items()}
    return {"type": "object", "properties": properties, "required": [k.rstrip("!") for k in fields if k.endswith("!")], "additionalProperties": False}


def validate(document: dict[str, Any]) -> None:
    """Raises jsonschema.ValidationError. Kinds of ray.io/v1 by the fields above, all others by Kubernetes' schemas."""
    if document.get("apiVersion") != "ray.io/v1":
        import kubernetes_validate

        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    schema = _object(
        {
            "apiVersion!": one_of("ray.io/v1"), "kind!": one_of(*KINDS), "metadata!": core("apimachinery.pkg.apis.meta.v1.ObjectMeta"),
            "spec!": KINDS[document["kind"]],
        }
    ) | {"$defs": kubernetes() | {name: _object(fields) for name, fields in TYPES.items()}}  # fmt: skip
    jsonschema.Draft202012Validator(schema).validate(document)
