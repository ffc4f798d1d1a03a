"""The cluster as KubeRay reads it: a RayJob that brings its cluster, runs one sweep, and goes."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import version
from typing import Any

from kdscale.sweep.cluster import Cluster, Group, Node, resources_of

CODE = "/kdscale"
KEPT_AFTERWARDS_S = 600
SPOT = {"karpenter.sh/capacity-type": "spot"}
GRACE_S = 120  # of a spot pod; in all but the last seconds Ray drains it
GPU_TAINT = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # Ray's object store


def rayjob(cluster: Cluster, entrypoint: str) -> dict[str, Any]:
    """Returns a RayJob's manifest.

    Args:
        cluster: The cluster.
        entrypoint: What the job runs in the image's copy of this repository.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": cluster.name, "namespace": cluster.kubernetes.namespace},
        "spec": {
            "entrypoint": f"sh -c {shlex.quote(f'cd {CODE} && {entrypoint}')}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_AFTERWARDS_S,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "enableInTreeAutoscaling": True,
                "autoscalerOptions": {
                    "version": "v2",
                    "idleTimeoutSeconds": round(60 * cluster.idle_timeout_minutes),
                },
                "headGroupSpec": {
                    "serviceType": "ClusterIP",
                    "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                    "template": _pod(cluster, "ray-head", cluster.head),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": role,
                        "replicas": group.min_nodes,
                        "minReplicas": group.min_nodes,
                        "maxReplicas": group.max_nodes,
                        "rayStartParams": _start(resources_of(role, group)),
                        "template": _pod(cluster, "ray-worker", group),
                    }
                    for role, group in cluster.groups.items()
                ],
            },
        },
    }


def _start(resources: dict[str, int]) -> dict[str, str]:
    """Returns parameters of `ray start`; the resources are JSON in quotes, for its shell."""
    own = {name: amount for name, amount in resources.items() if name not in ("CPU", "GPU")}
    named = {"num-cpus": str(resources["CPU"])}
    if "GPU" in resources:
        named["num-gpus"] = str(resources["GPU"])
    return named | ({"resources": json.dumps(json.dumps(own))} if own else {})


def _pod(cluster: Cluster, name: str, node: Node | Group) -> dict[str, Any]:
    """Returns a pod that has a machine of its kind to itself."""
    gpus = node.gpus if isinstance(node, Group) else 0
    amounts = {"cpu": str(node.cpus), "memory": f"{node.memory_gib}Gi"}
    amounts |= {"nvidia.com/gpu": str(gpus)} if gpus else {}
    selector = {"node.kubernetes.io/instance-type": node.instance_type}
    variables = cluster.environment()
    is_spot = isinstance(node, Group) and node.spot
    if is_spot:
        selector |= SPOT
        variables |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": str(GRACE_S - 20)}
    container = {
        "name": name,
        "image": cluster.kubernetes.gpu_image if gpus else cluster.kubernetes.image,
        "env": [{"name": key, "value": value} for key, value in variables.items()],
        "resources": {"requests": amounts, "limits": amounts},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    spec: dict[str, Any] = {
        "serviceAccountName": cluster.kubernetes.service_account,
        "nodeSelector": selector,
        "containers": [container],
        "volumes": [SHARED_MEMORY],
    }
    if is_spot:
        spec["terminationGracePeriodSeconds"] = GRACE_S
    if gpus:
        spec["tolerations"] = [GPU_TAINT]
    return {"spec": spec}
