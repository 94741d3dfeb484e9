"""Writes kuberay.json: the schemas of KubeRay's three resources, from a checkout of ray-project/kuberay (Apache-2.0).

    python tests/deploy/reduce_schemas.py CHECKOUT > tests/deploy/kuberay.json

Descriptions go, equal parts are written once, and of a pod's template stays what the project's files use. Where KubeRay
lists the fields of an object, others are refused, as `kubectl apply` does.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

Json = dict[str, Any]

_POD = ("containers", "serviceAccountName", "terminationGracePeriodSeconds", "volumes", "nodeSelector", "tolerations")
_CONTAINER = ("name", "image", "command", "args", "env", "resources", "ports", "volumeMounts", "lifecycle")
_VOLUME = ("name", "emptyDir", "configMap", "persistentVolumeClaim", "secret")


def main() -> None:
    """Print the schemas."""
    schemas = {kind: _schema(Path(sys.argv[1]), kind) for kind in ("RayCluster", "RayJob", "RayService")}
    cluster = schemas["RayCluster"]["properties"]["spec"]
    pod = cluster["properties"]["headGroupSpec"]["properties"]["template"]
    spec = _only(pod["properties"]["spec"], _POD)
    _only(spec["properties"]["containers"]["items"], _CONTAINER)
    _only(spec["properties"]["volumes"]["items"], _VOLUME)
    definitions = {"cluster": cluster, "pod": pod}
    cluster["properties"]["headGroupSpec"]["properties"]["template"] = {"$ref": "#/$defs/pod"}
    cluster["properties"]["workerGroupSpecs"]["items"]["properties"]["template"] = {"$ref": "#/$defs/pod"}
    schemas["RayCluster"]["properties"]["spec"] = {"$ref": "#/$defs/cluster"}
    job, service = (schemas[kind]["properties"]["spec"]["properties"] for kind in ("RayJob", "RayService"))
    job["rayClusterSpec"] = service["rayClusterConfig"] = {"$ref": "#/$defs/cluster"}
    job["submitterPodTemplate"] = {"$ref": "#/$defs/pod"}
    service.pop("serveService")
    sys.stdout.write(json.dumps({"$defs": definitions | schemas}, sort_keys=True, separators=(",", ":")) + "\n")


def _schema(checkout: Path, kind: str) -> Json:
    file = checkout / f"helm-chart/kuberay-operator/crds/ray.io_{kind.lower()}s.yaml"
    versions = yaml.safe_load(file.read_text())["spec"]["versions"]
    schema = next(version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1")
    schema["properties"].pop("status", None)
    schema["properties"]["metadata"] = {"type": "object"}
    return _closed(schema)


def _closed(schema: Any) -> Any:
    """A schema without descriptions, whose objects with fields take no others."""
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {}
    for name, value in schema.items():
        if name == "properties":
            closed[name] = {field: _closed(one) for field, one in value.items()}
        elif name not in {"description", "default"} and not name.startswith("x-kubernetes-"):
            closed[name] = _closed(value)
    if "properties" in closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed["additionalProperties"] = False
    return closed


def _only(schema: Json, fields: tuple[str, ...]) -> Json:
    schema["properties"] = {name: value for name, value in schema["properties"].items() if name in fields}
    schema["required"] = [name for name in schema.get("required", []) if name in fields]
    return schema


if __name__ == "__main__":
    main()
