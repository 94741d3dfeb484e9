import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture
def cluster() -> dict[str, Any]:
    return prepared(yaml.safe_load(CLUSTER.read_text()))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    config = prepare_config(config)
    config.setdefault("cluster_synced_files", [])
    return config


def test_cluster_yaml_is_what_ray_up_takes(cluster: dict[str, Any]) -> None:
    validate_config(cluster)  # raises where it is not
    assert cluster["head_node_type"] in cluster["available_node_types"]


def test_validation_would_notice_a_misspelt_key() -> None:
    config = yaml.safe_load(CLUSTER.read_text())
    config["head_nodetype"] = config.pop("head_node_type")
    with pytest.raises(jsonschema.ValidationError, match="head_nodetype"):
        validate_config(prepared(config))


def test_cluster_yaml_has_a_node_type_for_each_role_and_no_work_on_the_head(cluster: dict[str, Any]) -> None:
    types = cluster["available_node_types"]
    assert set(types) == {"head", "download", "embed", "train", "serve"}
    assert {name: node["labels"] for name, node in types.items()} == {name: {"unclip-role": name} for name in types}
    assert types["head"]["resources"]["CPU"] == 0
    assert types["head"]["max_workers"] == 0
    assert all(types[name]["max_workers"] > 0 for name in set(types) - {"head"})
    spot = {name for name, node in types.items() if "InstanceMarketOptions" in node["node_config"]}
    assert spot == {"download", "embed", "train"}


def test_every_ray_of_the_cluster_asks_for_the_token_and_the_dashboard_stays_at_home(cluster: dict[str, Any]) -> None:
    head, workers = cluster["head_start_ray_commands"], cluster["worker_start_ray_commands"]
    starts = [line for line in head + workers if re.search(r"\bray start\b", line)]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in CLUSTER.read_text()
    assert cluster["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"


def test_gpu_roles_install_the_gpu_build_and_all_of_them_under_the_pins(cluster: dict[str, Any]) -> None:
    def setup(name: str) -> str:
        own = cluster["available_node_types"][name].get("worker_setup_commands")
        return "\n".join(own or cluster["worker_setup_commands"])

    installs = {name: setup(name) for name in ("download", "embed", "train", "serve")}
    installs["head"] = "\n".join(cluster["head_setup_commands"])
    assert all("-c ~/unclip/constraints.txt" in text for text in installs.values())
    assert {name for name, text in installs.items() if "[gpu,s3]" in text} == {"embed", "train", "serve"}
