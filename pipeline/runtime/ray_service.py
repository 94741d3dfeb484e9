"""A RayService for KubeRay (1.5.1 or newer) that serves a recipe on Kubernetes.

Other networks in the file are swapped in place; another image, or other machines, come up beside the old ones, which
hand over their traffic in steps (``NewClusterWithIncrementalUpgrade``: needs the Gateway API and that feature's gate).
"""

import math
import re
from typing import Any

import ray
import yaml

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.front import server_name
from pipeline.runtime.replicas import parts_of, place_of
from pipeline.runtime.serve_file import serve_file
from pipeline.serve.http_server import is_loopback

_UPGRADE = {"gatewayClassName": "istio", "maxSurgePercent": 25, "stepSizePercent": 5, "intervalSeconds": 10}
_GB_PER_CPU = 4
"""Memory of a machine whose part says nothing of memory, in GB a CPU."""
_RAY_CPUS = 1
"""CPUs of the head, and of each machine beside those of its replica: for Ray's own processes."""


def ray_service(recipe: Recipe, image: str) -> str:
    """The manifest, in YAML: one kind of machine for each part of the networks, started as replicas need them.

    Args:
        recipe: A checked recipe whose networks are finished, in a workspace that all machines read.
        image: Container with the project and Ray, of this version.

    Raises:
        ConfigError: As ``serve_file``, or if the server would listen on its own machine alone.
    """
    config = recipe.serve
    if is_loopback(config.host):
        raise ConfigError(
            f"serve.host: {config.host} is seen by its own machine alone; on Kubernetes it is 0.0.0.0, with serve.keys"
        )
    pod = {"image": image, "ports": [{"containerPort": config.port, "name": "serve"}]}
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": re.sub(r"[^a-z0-9]+", "-", f"unclip-{server_name(recipe)}".lower()).strip("-")},
        "spec": {
            "upgradeStrategy": {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": _UPGRADE},
            "serveConfigV2": serve_file(recipe),
            "rayClusterConfig": {
                "rayVersion": ray.__version__,
                "enableInTreeAutoscaling": True,
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0"},
                    "template": _template("ray-head", pod, {"cpu": _RAY_CPUS, "memory": f"{_GB_PER_CPU}G"}),
                },
                "workerGroupSpecs": [_group(recipe, part, pod) for part in parts_of(recipe)],
            },
        },
    }
    return yaml.safe_dump(manifest, sort_keys=False)


def _group(recipe: Recipe, part: str, pod: dict[str, Any]) -> dict[str, Any]:
    """Machines of which each takes one replica of a part."""
    place = place_of(recipe.serve, part)
    fewest, most = place.replicas
    cpus = math.ceil(place.cpus_per_replica) + _RAY_CPUS
    own_gb = math.ceil(place.memory_gb_per_replica)
    memory_gb = own_gb + _GB_PER_CPU if own_gb else _GB_PER_CPU * cpus
    limits: dict[str, Any] = {"cpu": cpus, "memory": f"{memory_gb}G"}
    if recipe.serve.accelerator == "cuda":
        limits["nvidia.com/gpu"] = math.ceil(place.gpus_per_replica)
    return {
        "groupName": part.replace("_", "-"),
        "replicas": fewest,
        "minReplicas": 0,
        "maxReplicas": most,
        "labels": place.label_selector,
        "rayStartParams": {},
        "template": _template("ray-worker", pod, limits),
    }


def _template(name: str, pod: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": name, **pod, "resources": {"limits": limits, "requests": limits}}]}}
