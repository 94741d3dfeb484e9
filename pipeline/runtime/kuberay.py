"""A recipe as KubeRay's resources: a RayJob that runs it, and a RayService that serves it.

A job has the recipe in a ConfigMap, and a cluster that starts and ends with it. Other networks in a service are swapped
in place; another image or other machines come up beside the old ones, and take over their traffic in steps.
"""

import copy
import json
import math
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.serve_sections import ServeConfig, ServeGatewayConfig, ServeStageConfig
from pipeline.recipe.tables import to_dict
from pipeline.runtime.draining import Announce
from pipeline.runtime.environment import runtime_environment
from pipeline.runtime.jobs import entrypoint, job_name
from pipeline.runtime.parts import NETWORKS, needs_of_replica, parts_of, place_of
from pipeline.runtime.placement import ROLE
from pipeline.runtime.serve_file import HTTP, serve_file
from pipeline.runtime.served import server_name
from pipeline.serve.http_server import is_loopback

CLUSTER_FILE, _SERVICE_FILE = "deploy/kuberay/raycluster.yaml", "deploy/kuberay/rayservice.yaml"
PART = "unclip-part"
"""Label of a machine that says which part of a server it is for."""
SECRET = "unclip-job"
"""Kubernetes' secret with the values of ``job.secrets``, by the names of the variables."""
_MOST_NAME = 47  # KubeRay's names of pods have no room for more
_UPGRADE = {"gatewayClassName": "istio", "maxSurgePercent": 25, "stepSizePercent": 5, "intervalSeconds": 10}
_RAY_CPUS = 1
_GB_PER_CPU = 4
"""Memory of a machine, in GB a CPU, unless its part names it."""


def ray_job(recipe: Recipe, image: str, until: str = "") -> str:
    """The manifests of a run, in YAML.

    Args:
        recipe: A checked recipe; its workspace is a URI.
        image: Images of the Dockerfile without their tags: ``image:cpu`` and ``image:gpu`` are used.
        until: Last step; empty: all.

    Raises:
        ConfigError: If the recipe names files of this machine, or the tree's ``deploy/`` is missing.
    """
    _require_bucket(recipe)
    cluster = _template(CLUSTER_FILE, image)["spec"]
    name = _name(job_name(recipe, until))
    [volume] = [one for one in cluster["headGroupSpec"]["template"]["spec"]["volumes"] if one["name"] == "recipes"]
    volume["configMap"] = {"name": name}
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            container["env"] = [*container.get("env", []), *map(_from_secret, recipe.job.secrets)]
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"recipe.json": json.dumps(to_dict(recipe), indent=1, sort_keys=True)},
    }
    job: dict[str, Any] = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": entrypoint("/recipes/recipe.json", until),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": recipe.job.max_resubmissions,
            "runtimeEnvYAML": yaml.safe_dump(runtime_environment(recipe.job)),
            "rayClusterSpec": cluster,
        },
    }
    return yaml.safe_dump_all([config, job], sort_keys=False)


def _from_secret(name: str) -> dict[str, Any]:
    """An environment variable whose value is in the Kubernetes secret of the job."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": SECRET, "key": name}}}


def ray_service(recipe: Recipe, image: str, announce: Announce) -> str:
    """The manifest of a server, in YAML: a kind of machine for each part of the networks, and for HTTP if it needs one.

    Args:
        recipe: A checked recipe whose networks are finished, in a workspace that is a URI.
        image: As for ``ray_job``.
        announce: As for ``serve_file``.

    Raises:
        ConfigError: As ``ray_job`` and ``serve_file``, if the server would listen on its own machine alone, if a part
            may run on machines of several labels, or if the HTTP processes ask for more of the head than a place.
    """
    _require_bucket(recipe)
    if is_loopback(recipe.serve.host):
        raise ConfigError(
            f"serve.host: {recipe.serve.host} is seen by its own machine alone; on Kubernetes it is 0.0.0.0, with "
            "serve.keys"
        )
    manifest = _template(_SERVICE_FILE, image)
    manifest["metadata"]["name"] = _name(f"unclip-{server_name(recipe)}")
    spec = manifest["spec"]
    spec["upgradeStrategy"] = {"type": "NewClusterWithIncrementalUpgrade", "clusterUpgradeOptions": _UPGRADE}
    cluster = spec["rayClusterConfig"]
    gateway, head = recipe.serve.gateway, cluster["headGroupSpec"]["labels"]
    has_own = gateway.cpus_per_replica or gateway.memory_gb_per_replica or gateway.label_selector.items() - head.items()
    if has_own:  # by a label, because Ray counts the head's memory as free
        if gateway.label_selector.get(ROLE) == head[ROLE]:
            raise ConfigError(
                f"--manifest: serve.gateway.label_selector has {ROLE} = {head[ROLE]}, whose size the recipe does not "
                "say; leave this label out, and there is a machine for what serve.gateway asks for"
            )
        gateway = replace(gateway, label_selector={ROLE: HTTP, **gateway.label_selector})
    recipe = replace(recipe, serve=_apart(replace(recipe.serve, gateway=gateway), parts_of(recipe)))
    spec["serveConfigV2"] = serve_file(recipe, announce)
    [group] = cluster["workerGroupSpecs"]
    gpus = {part: needs_of_replica(recipe.serve, part).get("GPU", 0.0) for part in parts_of(recipe)}
    for part, number in gpus.items():
        if number % 1:
            announce(f"{part}: {number:g} GPU a copy; on Kubernetes each copy has a machine with {math.ceil(number)}")
    cluster["workerGroupSpecs"] = [
        _group(part, place_of(recipe.serve, part), group, image, number) for part, number in gpus.items()
    ]
    if has_own:
        cluster["workerGroupSpecs"].append(_group(HTTP, gateway, {**group, "labels": {}}, image))
    return yaml.safe_dump(manifest, sort_keys=False)


def _apart(config: ServeConfig, parts: Iterable[str]) -> ServeConfig:
    """Each part with a label of its own: by CPUs and memory alone, it may fit another part's machine as well."""
    if config.mode != "chain":
        return replace(config, label_selector={PART: NETWORKS, **config.label_selector})
    places: dict[str, ServeStageConfig] = {part: getattr(config, part) for part in parts}
    for part, place in places.items():
        config = replace(config, **{part: replace(place, label_selector={PART: part, **place.label_selector})})
    return config


def _name(text: str) -> str:
    """A name that Kubernetes takes: the end of ``text``, in which two names are most likely to differ."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).rstrip("-")[-_MOST_NAME:].lstrip("-0123456789")


def _group(
    part: str,
    place: ServeStageConfig | ServeGatewayConfig,
    group: dict[str, Any],
    image: str,
    gpus_per_replica: float = 0.0,
) -> dict[str, Any]:
    """Machines of which each has room for one replica of a part."""
    for name, value in place.label_selector.items():
        if value.startswith(("!", "in(")):
            raise ConfigError(
                f"--manifest: the label_selector of {part} has {name} = {value}, but there is one kind of machine for "
                "each part; name its label"
            )
    own_gb, own_cpus = math.ceil(place.memory_gb_per_replica), math.ceil(place.cpus_per_replica)
    cpus = own_cpus + _RAY_CPUS
    memory = f"{own_gb + _GB_PER_CPU if own_gb else _GB_PER_CPU * cpus}G"
    gpus = {"nvidia.com/gpu": str(math.ceil(gpus_per_replica))} if gpus_per_replica else {}
    group = copy.deepcopy(group)
    [container] = group["template"]["spec"]["containers"]
    container["image"] = f"{image}:{'gpu' if gpus_per_replica else 'cpu'}"
    container["resources"] = {
        "requests": {"cpu": str(cpus), "memory": memory},
        "limits": {"memory": memory, **gpus},
    }
    if own_cpus:  # Ray would count its own as free, and place two replicas of one CPU
        group["rayStartParams"]["num-cpus"] = str(own_cpus)
    return {
        **group,
        "groupName": part.replace("_", "-"),
        "labels": {**group["labels"], **place.label_selector},
        "maxReplicas": place.replicas[1],
    }


def _require_bucket(recipe: Recipe) -> None:
    if "://" not in recipe.workspace:
        raise ConfigError(f"--manifest: workspace {recipe.workspace} is on this machine; name a bucket, as s3://...")


def _template(name: str, image: str) -> dict[str, Any]:
    file = Path(__file__).parents[2] / name
    if not file.exists():
        raise ConfigError(f"--manifest: no {name} beside the package; run it from a checkout of the project")
    return yaml.safe_load(file.read_text(encoding="utf-8").replace("IMAGE", image))
