"""Work on the machine that it was meant for: Ray's own autoscaler (v2) decides, on the node types of cluster.yaml."""

from collections import Counter
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import GangResourceRequest, ResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.sections import TaskResources
from pipeline.recipe.steps import STEPS
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.placement import (
    amounts_of,
    controller_options,
    describe,
    machine_has,
    packing,
    scaling_options,
    unoffered,
    worker_options,
)
from tests.tiny.cluster import cluster_without_cpus
from tests.tiny.command import ROOT

# What Ray reads from AWS for these machines at `ray up`.
_MACHINES = {
    "m7i.xlarge": {"CPU": 4, "memory": 11e9},
    "c7i.4xlarge": {"CPU": 16, "memory": 22e9},
    "g6.4xlarge": {"CPU": 16, "GPU": 1, "accelerator_type:L4": 1, "memory": 44e9},
    "p5.48xlarge": {"CPU": 192, "GPU": 8, "accelerator_type:H100": 1, "memory": 1400e9},
}


def _node_types() -> dict[str, NodeTypeConfig]:
    types: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())["available_node_types"]
    return {
        name: NodeTypeConfig(
            name,
            node["min_workers"],
            node["max_workers"],
            resources=_MACHINES[node["node_config"]["InstanceType"]] | node["resources"],
            labels=node["labels"],
        )
        for name, node in types.items()
    }


def _request(options: dict[str, Any]) -> ResourceRequest:
    amounts = amounts_of({"num_gpus": 0} | options)
    is_in = LabelSelectorOperator.LABEL_OPERATOR_IN
    labels = [(name, is_in, [value]) for name, value in options.get("label_selector", {}).items()]
    return ResourceRequestUtil.make(amounts, label_selectors=[labels] if labels else None)


def _schedule(workers: list[ResourceRequest], gangs: list[list[ResourceRequest]]) -> SchedulingReply:
    return ResourceDemandScheduler().schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=_node_types(),
            max_num_nodes=20,
            resource_requests=ResourceRequestUtil.group_by_count(workers),
            gang_resource_requests=[GangResourceRequest(requests=gang) for gang in gangs],
        )
    )


def _launched(reply: SchedulingReply) -> Counter[str]:
    assert not reply.infeasible_resource_requests
    assert not reply.infeasible_gang_resource_requests
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


def _launch(step: str, resources: TaskResources | TrainResources, *, has_roles: bool = True) -> Counter[str]:
    worker = [_request(worker_options(step, resources, has_roles=has_roles))] * resources.num_workers
    is_gang = isinstance(resources, TrainResources) and resources.num_workers > 1
    return _launched(_schedule([] if is_gang else worker, [worker] if is_gang else []))


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """A recipe for a cluster."""
    return load_recipe(ROOT / "configs" / "laion-vit-l14.toml")


def test_every_step_starts_the_machines_of_its_role_and_no_others(recipe: Recipe) -> None:
    roles = {"pairs": "download", "download": "download", "filter": "download"}
    roles |= dict.fromkeys(["embed", "filter_embeddings", "index", "evaluate"], "embed")
    for row in STEPS:
        section = getattr(recipe, row.name)
        if section is not None and hasattr(section, "resources"):
            assert set(_launch(row.name, section.resources)) == {roles.get(row.name, "train")}, row.name


def test_eight_embed_workers_start_no_machine_with_eight_gpus() -> None:
    resources = TaskResources(num_workers=8, cpus_per_worker=2, accelerator="cuda")
    assert _launch("embed", resources) == {"embed": 8}


def test_a_training_on_two_gpus_is_one_training_machine() -> None:
    resources = TrainResources(num_workers=2, cpus_per_worker=8, accelerator="cuda")
    assert _launch("decoder", resources) == {"train": 1}
    without = _launch("decoder", resources, has_roles=False)
    assert "train" not in without or sum(without.values()) > 1  # what the roles are there to prevent


def test_a_training_of_sixteen_gpus_fills_two_machines() -> None:
    assert _launch("decoder", TrainResources(num_workers=16, cpus_per_worker=8, accelerator="cuda")) == {"train": 2}


def test_memory_counts_where_a_recipe_names_it() -> None:
    def machines(memory_gb: float) -> int:
        return _launch("download", TaskResources(num_workers=4, memory_gb_per_worker=memory_gb))["download"]

    assert (machines(0), machines(10), machines(20)) == (1, 2, 4)


def test_disk_counts_where_a_recipe_names_it() -> None:
    def launched(disk_gb: float, *, has_roles: bool) -> Counter[str]:
        resources = TaskResources(num_workers=2, disk_gb_per_worker=disk_gb)
        return _launch("download", resources, has_roles=has_roles)

    assert [launched(gb, has_roles=True) for gb in (70, 100)] == [{"download": 1}, {"download": 2}]
    assert not {"head", "download", "train"} & launched(300, has_roles=False).keys()
    options = worker_options("download", TaskResources(disk_gb_per_worker=300), has_roles=True)
    assert len(_schedule([_request(options)], []).infeasible_resource_requests) == 1
    assert describe(options) == "1 CPU, 300 GB of disk on a machine with unclip-role=download"


@pytest.mark.ray
def test_workers_stay_together_on_a_machine_that_has_room_for_all_of_them() -> None:
    options = worker_options("prior", TrainResources(), has_roles=False)
    with cluster_without_cpus() as cluster:
        small = [cluster.add_node(num_cpus=1, resources={"disk_gb": 50}) for _ in range(2)]
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            assert (packing(options, 1), packing(options, 2)) == ("STRICT_PACK", "PACK")
            large = cluster.add_node(num_cpus=2)
            assert (packing(options, 2), packing(options, 4)) == ("STRICT_PACK", "PACK")
            group = placement_group([amounts_of(options)] * 2, strategy=packing(options, 2))
            assert group.wait(30)
            assert set(placement_group_table(group)["bundles_to_node_id"].values()) == {large.node_id}
            remove_placement_group(group)
            wants_disk = {"num_cpus": 1, "num_gpus": 0, "resources": {"disk_gb": 60.0}}
            assert unoffered(wants_disk) == "; no machine that is there now has that"
            for node in small:
                cluster.remove_node(node)
            assert "says what disk it has: start Ray there with the resource disk_gb" in unoffered(wants_disk)
        finally:
            ray.shutdown()


@pytest.mark.parametrize("selector", ["p4d.24xlarge", "with_underscore", "spot", "in(spot,p4d.24xlarge)", "in(inside)"])
def test_a_machine_without_a_label_is_not_the_one_that_is_asked_for(selector: str) -> None:
    options = {"label_selector": {"type": selector}}
    for labels in ({}, {"type": "other"}):
        assert not machine_has({"Resources": {}, "Labels": labels}, {}, options)
        assert machine_has({"Resources": {}, "Labels": labels}, {}, {"label_selector": {"type": f"!{selector}"}})
    label = selector.removeprefix("in(").removesuffix(")").split(",")[-1]
    assert machine_has({"Resources": {}, "Labels": {"type": label}}, {}, options)
    assert not machine_has(
        {"Resources": {}, "Labels": {"type": label}}, {}, {"label_selector": {"type": f"!{selector}"}}
    )


@pytest.mark.ray
def test_selectors_are_read_as_ray_reads_them() -> None:
    with cluster_without_cpus() as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            added = [cluster.add_node(num_cpus=1, labels={"type": "p4d.24xlarge"}), cluster.add_node(num_cpus=1)]
            machines = {machine["NodeID"]: machine for machine in ray.nodes()}
            for selector in ("p4d.24xlarge", "!p4d.24xlarge", "in(a,p4d.24xlarge)", "!in(a,p4d.24xlarge)"):
                options: dict[str, Any] = {"num_cpus": 1, "label_selector": {"type": selector}}
                place = ray.get(_where.options(**options).remote(), timeout=60)
                has = [machine_has(machines[node.node_id], {"CPU": 1}, options) for node in added]
                assert has == [node.node_id == place for node in added], selector
        finally:
            ray.shutdown()


@ray.remote
def _where() -> str:
    return ray.get_runtime_context().get_node_id()


def test_a_label_of_the_recipe_comes_before_the_role() -> None:
    resources = TaskResources(label_selector={"unclip-role": "serve"})
    assert _launch("embed", resources) == {"serve": 1}
    reply = _schedule(
        [_request(worker_options("embed", TaskResources(label_selector={"zone": "b"}), has_roles=True))], []
    )
    assert len(reply.infeasible_resource_requests) == 1


def test_serving_starts_serving_machines(recipe: Recipe) -> None:
    replica = {"num_cpus": 4, "num_gpus": 1, "label_selector": {"unclip-role": "serve"}}
    assert _launched(_schedule([_request(replica)] * 2, [])) == {"serve": 2}


def test_controllers_stand_on_the_head_and_work_does_not() -> None:
    assert controller_options(has_roles=True) == {"num_cpus": 0, "label_selector": {"unclip-role": "head"}}
    assert _node_types()["head"].resources["CPU"] == 0


def test_ray_train_asks_for_the_same_as_a_task() -> None:
    resources = TrainResources(num_workers=2, cpus_per_worker=3, accelerator="cuda", memory_gb_per_worker=5)
    options = worker_options("prior", resources, has_roles=True)
    assert scaling_options(options) == {
        "resources_per_worker": {"CPU": 3, "GPU": 1, "memory": 5_000_000_000},
        "label_selector": {"unclip-role": "train"},
    }
    assert describe(options) == "3 CPU and 1 GPU, 5 GB on a machine with unclip-role=train"
    plain = worker_options("prior", TrainResources(), has_roles=False)
    assert scaling_options(plain) == {"resources_per_worker": {"CPU": 1.0}, "label_selector": None}
