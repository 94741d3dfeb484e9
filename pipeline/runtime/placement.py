"""Which machines a step's workers ask for.

A cluster may label its machines by role (``unclip-role``: download, embed, train, serve, and head for the one that
stays; `cluster.yaml` does). There every worker asks for the role of its step, so that no download starts a machine with
eight GPUs, and every controller for the head, which no spot market takes away. A recipe's ``label_selector`` comes
first; where no machine has a role, only it counts.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.recipe.sections import TaskResources
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.train_sections import TrainResources

ROLE = "unclip-role"
"""Label of a machine that says what it is there for."""


def worker_options(step: str, resources: TaskResources | TrainResources, *, has_roles: bool) -> dict[str, Any]:
    """Ray's options for each worker of a step, a task or an actor.

    Args:
        step: Name of the step; one that no recipe has, such as a search, is work for an embed machine.
        resources: What the recipe says.
        has_roles: Whether the cluster's machines are labelled by role.
    """
    role = STEP_ROWS[step].role if step in STEP_ROWS else "embed"
    labels = dict(resources.label_selector) or ({ROLE: role} if has_roles else {})
    options: dict[str, Any] = {
        "num_cpus": resources.cpus_per_worker,
        "num_gpus": 1 if resources.accelerator == "cuda" else 0,
    }
    if labels:
        options["label_selector"] = labels
    if resources.memory_gb_per_worker:
        options["memory"] = int(resources.memory_gb_per_worker * 1e9)
    return options


def scaling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same options of a worker as Ray Train's ScalingConfig takes them."""
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    resources = {name: amount for name, amount in amounts.items() if amount}
    return {"resources_per_worker": resources, "label_selector": options.get("label_selector")}


def controller_options(*, has_roles: bool) -> dict[str, Any]:
    """Ray's options for what only waits for workers: it takes no CPU, and stands on a machine that stays.

    Where no machine has a role, that is the one of this process: if it goes, the run ends anyway.
    """
    if has_roles:
        return {"num_cpus": 0, "label_selector": {ROLE: "head"}}
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "scheduling_strategy": here}


def cluster_has_roles() -> bool:
    """Whether a machine of the connected cluster has a role."""
    return any(node["Alive"] and ROLE in node["Labels"] for node in ray.nodes())


def living_machines() -> set[str]:
    """Ids of the connected cluster's machines."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def describe(options: dict[str, Any]) -> str:
    """What a worker with these options asks for, for people."""
    words = f"{options['num_cpus']:g} CPU" + (" and 1 GPU" if options["num_gpus"] else "")
    if "memory" in options:
        words += f", {options['memory'] / 1e9:g} GB"
    labels = ", ".join(f"{name}={value}" for name, value in options.get("label_selector", {}).items())
    return f"{words} on a machine with {labels}" if labels else words


def unoffered(options: dict[str, Any]) -> str:
    """The end of a sentence about a worker that waits, if no machine has what it asks for, free or not; else empty."""
    if any(node["Alive"] and _offers(node, options) for node in ray.nodes()):
        return ""
    return "; no machine that is there now has that"


def _offers(node: dict[str, Any], options: dict[str, Any]) -> bool:
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    has_amounts = all(node["Resources"].get(name, 0) >= amount for name, amount in amounts.items())
    return has_amounts and all(
        node["Labels"].get(name) == value or not value.replace("-", "").isalnum()  # Ray reads "!a" and "in(a, b)", too
        for name, value in options.get("label_selector", {}).items()
    )
