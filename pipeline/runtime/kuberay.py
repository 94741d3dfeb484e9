"""A recipe as KubeRay's RayJob: the recipe in a ConfigMap, and a cluster that starts and ends with the job."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe, to_dict
from pipeline.runtime.jobs import entrypoint, job_environment, job_name

CLUSTER_FILE = "deploy/kuberay/raycluster.yaml"
_MOST_NAME = 47  # KubeRay's names of pods have no room for more
_RETRIES = 3


def ray_job(recipe: Recipe, image: str, until: str = "") -> str:
    """The manifests of a run, in YAML.

    Args:
        recipe: A checked recipe; its workspace is a URI.
        image: Images of the Dockerfile without their tags: ``image:cpu`` and ``image:gpu`` are used.
        until: Last step; empty: all.

    Raises:
        ConfigError: If the recipe names files of this machine, or the tree's ``deploy/`` is missing.
    """
    if "://" not in recipe.workspace:
        raise ConfigError(f"--manifest: workspace {recipe.workspace} is on this machine; name a bucket, as s3://...")
    file = Path(__file__).parents[2] / CLUSTER_FILE
    if not file.exists():
        raise ConfigError(f"--manifest: no {CLUSTER_FILE} beside the package; run it from a checkout of the project")
    cluster = yaml.safe_load(file.read_text(encoding="utf-8").replace("IMAGE", image))["spec"]
    name = re.sub(r"[^a-z0-9]+", "-", job_name(recipe, until).lower())[-_MOST_NAME:].lstrip("-0123456789")
    [volume] = [one for one in cluster["headGroupSpec"]["template"]["spec"]["volumes"] if one["name"] == "recipes"]
    volume["configMap"] = {"name": name}
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
            "backoffLimit": _RETRIES,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": job_environment()}),
            "rayClusterSpec": cluster,
        },
    }
    return yaml.safe_dump_all([config, job], sort_keys=False)
