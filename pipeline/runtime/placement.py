"""Which machines a step's workers ask for.

A cluster may label its machines by role (``unclip-role``: download, embed, train, serve, and head for the one that
stays; `cluster.yaml` does). There every worker asks for the role of its step, so that no download starts a machine with
eight GPUs, and every controller for the head, which no spot market takes away. A recipe's ``label_selector`` comes
first; where no machine has a role, only it counts.
"""

from collections.abc import Collection, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as ray_state
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.recipe.sections import TaskResources
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.train_sections import TrainResources

ROLE = "unclip-role"
"""Label of a machine that says what it is there for."""
DISK = "disk_gb"
"""Resource of a machine that says what its disk has room for, in GB."""
_MACHINE = "ray.io/node-id"
"""Label of every machine with its id, by Ray."""

_FIELDS = {
    "CPU": "cpus_per_worker",
    "GPU": "accelerator",
    "memory": "memory_gb_per_worker",
    DISK: "disk_gb_per_worker",
}
"""The field of a step's resources that asks for an amount, by Ray's name of it."""


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
    if resources.disk_gb_per_worker:
        options["resources"] = {DISK: resources.disk_gb_per_worker}
    return options


def on_machines(options: dict[str, Any], machines: Collection[str]) -> dict[str, Any]:
    """The same options for a worker that is on one of these machines, by Ray's ids; a recipe's choice comes first."""
    return _with_machines(options, f"in({','.join(sorted(machines))})")


def not_on_machines(options: dict[str, Any], machines: Collection[str]) -> dict[str, Any]:
    """The same options for a worker that is on none of these machines; a recipe's choice comes first."""
    return _with_machines(options, f"!in({','.join(sorted(machines))})") if machines else options


def _with_machines(options: dict[str, Any], selector: str) -> dict[str, Any]:
    return options | {"label_selector": {_MACHINE: selector, **options.get("label_selector", {})}}


def scaling_options(options: dict[str, Any]) -> dict[str, Any]:
    """The same options of a worker as Ray Train's ScalingConfig takes them."""
    return {"resources_per_worker": amounts_of(options), "label_selector": options.get("label_selector")}


def amounts_of(options: dict[str, Any]) -> dict[str, float]:
    """What a worker with these options takes of a machine, in Ray's words."""
    amounts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options.get("memory", 0)}
    return {name: amount for name, amount in (amounts | options.get("resources", {})).items() if amount}


def packing(options: dict[str, Any], num_workers: int) -> str:
    """How Ray places the workers of a training: on one machine, if one that is there is large enough for all of them.

    They wait for that machine then, also where there is room for them on several, between which a training is slower.
    One that Ray takes away counts no more.
    Of a larger training PACK fills the machines one after the other as far as they are free: Ray has no stricter word
    for workers on several whole machines.
    """
    needs = {name: amount * num_workers for name, amount in amounts_of(options).items()}
    return "STRICT_PACK" if any(machine_has(node, needs, options) for node in machines_that_stay()) else "PACK"


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


def machines_that_stay() -> list[dict[str, Any]]:
    """The machines to which Ray sends work: on one that is drained it places nothing."""
    leaving = ray_state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def describe(options: dict[str, Any]) -> str:
    """What a worker with these options asks for, for people."""
    words = f"{options['num_cpus']:g} CPU" + (" and 1 GPU" if options["num_gpus"] else "")
    if "memory" in options:
        words += f", {options['memory'] / 1e9:g} GB"
    if DISK in options.get("resources", {}):
        words += f", {options['resources'][DISK]:g} GB of disk"
    selector = options.get("label_selector", {})
    labels = ", ".join(f"{name}={value}" for name, value in selector.items() if name != _MACHINE)
    return f"{words} on a machine with {labels}" if labels else words


def needed(num_workers: int, options: dict[str, Any]) -> str:
    """What so many workers wait for, for people, and whether no machine that is there now has it."""
    return f"{num_workers} x {describe(options)}{unoffered(options)}"


def unoffered(options: dict[str, Any]) -> str:
    """The end of a sentence about a worker that waits, if no machine has what it asks for, free or not; else empty."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if any(machine_has(node, amounts_of(options), options) for node in nodes):
        return ""
    if DISK in options.get("resources", {}) and not any(DISK in node["Resources"] for node in nodes):
        return (
            f"; no machine that is there now says what disk it has: start Ray there with the resource {DISK}, as "
            "cluster.yaml does"
        )
    return "; no machine that is there now has that"


def room_for(options: dict[str, Any]) -> int:
    """Workers for which the machines that are there have room, if nothing else ran on them.

    Counted as Ray counts, in ten-thousandths: ten workers of a tenth of a CPU fit on one.
    """
    nodes = [node for node in ray.nodes() if node["Alive"] and machine_has(node, {}, options)]
    return _num_fitting([node["Resources"] for node in nodes], options)


def free_room(options: dict[str, Any]) -> int:
    """Workers for which Ray has room at this moment, beside all that runs; known a second late."""
    free = available_resources_per_node()
    nodes = [node for node in machines_that_stay() if machine_has(node, {}, options)]
    return _num_fitting([free.get(node["NodeID"], {}) for node in nodes], options)


def _num_fitting(rooms: Sequence[dict[str, float]], options: dict[str, Any]) -> int:
    """Workers with these options that fit into machines of which so much is there."""
    needs = {name: max(1, _ray_units(amount)) for name, amount in amounts_of(options).items()}
    return sum(min(_ray_units(room.get(name, 0)) // units for name, units in needs.items()) for room in rooms)


def _ray_units(amount: float) -> int:
    return int(amount * 10_000 + 0.5)


def too_large(options: dict[str, Any]) -> list[str]:
    """The fields of a step's resources that ask for more than any machine that is there has, free or not."""
    nodes, amounts = [node for node in ray.nodes() if node["Alive"]], amounts_of(options)
    fields = [
        field
        for name, field in _FIELDS.items()
        if name in amounts and not any(machine_has(node, {name: amounts[name]}, {}) for node in nodes)
    ]
    has_labels = any(machine_has(node, {}, options) for node in nodes)
    return fields if has_labels else [*fields, "label_selector"]


def machine_has(node: dict[str, Any], amounts: dict[str, float], options: dict[str, Any]) -> bool:
    """Whether a machine has these amounts, free or not, and the labels of the options."""
    has_amounts = all(node["Resources"].get(name, 0) >= amount for name, amount in amounts.items())
    labels, selector = node["Labels"], options.get("label_selector", {})
    return has_amounts and all(_selects(value, labels.get(name)) for name, value in selector.items())


def _selects(value: str, label: str | None) -> bool:
    """Whether Ray's selector takes a label, or none: ``a``, ``in(a,b)``, and their negations ``!a`` and ``!in(a,b)``.

    For Ray (2.60), too, a space after the comma is a part of the label.
    """
    is_negated, terms = value.startswith("!"), value.removeprefix("!")
    if terms.startswith("in(") and terms.endswith(")"):
        terms = terms[3:-1]
    return (label in terms.split(",")) != is_negated
