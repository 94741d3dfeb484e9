"""The largest part of a batch that fits into a worker's memory, where a recipe leaves it open."""

import json
from dataclasses import replace
from typing import Any

from pipeline.errors import StepError
from pipeline.machine import memory_bytes, num_cpus
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.calls import call_again
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import cluster_has_roles, worker_options
from pipeline.runtime.restarts import with_micro_batch
from pipeline.workspace.progress import Progress
from pipeline.workspace.store import LIVE

Json = dict[str, Any]

_PART = f"{LIVE}micro_batch.json"
_DECIDE = (
    "num_workers",
    "num_shards",
    "cpus_per_worker",
    "accelerator",
    "gpu_memory_gb",
    "validation",
    "label_selector",
    "memory_gb_per_worker",
    "disk_gb_per_worker",
    "checkpointing",
    "compiled",
)
"""Those of the resources that say how much memory a worker takes, how much it has, or on which machine."""
_PROCESS_GB = 1.5
"""Of a worker on CPUs, beside its tensors: the libraries, and the rows that are read ahead."""
_LEAST_SHARE = 0.5
"""Of a worker's share of its machine, for its tensors: where shares are small, many workers have the same libraries in
memory once."""


def with_counted_part(context: StepContext) -> StepContext:
    """A training with a number in place of ``micro_batch_size = "auto"``; one that has a number is returned as it is.

    It is counted on a machine on which a worker can run, and kept for later starts with the same memory, of which they
    take as much; see ``keep_halved_part`` for one that was counted too large.

    Raises:
        ConfigError: If the shape of a pretrained CLIP is not known there.
        StepError: If not even the smallest part fits, or there is no room at all; says what would make it fit.
    """
    name, resources = context.step.name, context.recipe.trained()[context.step.name].resources
    if resources.micro_batch_size != "auto":
        return context
    of = {field: getattr(resources, field) for field in _DECIDE}
    of = json.loads(json.dumps(of))
    part: Json = context.output.find_json(_PART) or {"of": {}}
    if any(part["of"].get(field) != value for field, value in of.items()):
        Progress(context.output, waits=True).update(0, 1, "", "waiting for a worker that counts its memory", force=True)
        options = worker_options(name, resources, has_roles=cluster_has_roles()) | {"name": f"{name}: count memory"}
        part = call_again(_count, name, context, options=options, max_retries=resources.max_failures) | {"of": of}
        context.output.write_json(_PART, part)
    samples = part["samples"]
    recipe = with_micro_batch(context.recipe, name, samples)
    return replace(context, recipe=recipe, notice=f"micro_batch_size = {samples}: {part['words']}")


def keep_halved_part(context: StepContext, largest_pass: int) -> None:
    """Let later starts of a training whose part was counted begin with the part of this one.

    Args:
        context: The step, with half of the part.
        largest_pass: Samples in one pass for which the memory did not suffice, whatever was counted.
    """
    size = context.recipe.trained()[context.step.name].resources.micro_batch_size
    words = f"memory did not suffice for {largest_pass} at a time"
    context.output.write_json(_PART, context.output.read_json(_PART) | {"samples": size, "words": words})


def _count(name: str, context: StepContext) -> Json:
    """The part that fits here; runs in a process of its own."""
    Progress(context.output).update(0, 1, "networks", "counting its memory", force=True)
    import torch

    from pipeline.networks.costs import build_clip
    from pipeline.train.fitting import advice, memory_of

    recipe = context.recipe
    section = recipe.trained()[name]
    room_gb = _room_gb(name, section.resources)
    section = replace(section, resources=replace(section.resources, gpu_memory_gb=room_gb))
    with torch.device("meta"):
        frozen = build_clip(recipe)
    memory = memory_of(name, section, recipe, frozen)
    words = f"a worker needs {memory.total / 1e9:.3g} GB of {room_gb:.3g} GB"
    if not memory.fits:
        raise StepError(
            f"{name}: not even {memory.samples} samples at a time fit: {words}; what would make it fit: "
            f"{advice(memory, recipe)}"
        )
    return {"samples": memory.samples, "words": words}


def _room_gb(name: str, resources: TrainResources) -> float:
    """Memory of a worker's tensors, in 10^9 bytes.

    Raises:
        StepError: If what Ray sets aside for a worker on CPUs is not enough for its process alone.
    """
    if resources.accelerator == "cuda":
        import torch

        return resources.gpu_memory_gb or torch.cuda.get_device_properties(0).total_memory / 1e9
    if resources.memory_gb_per_worker:
        room_gb = resources.memory_gb_per_worker - _PROCESS_GB
        if room_gb <= 0:
            raise StepError(
                f"{name}: resources.memory_gb_per_worker is {resources.memory_gb_per_worker:g}, and a worker takes "
                f"{_PROCESS_GB} GB beside its tensors; set more, or 0 for its share of the machine, or a number as "
                "micro_batch_size"
            )
        return room_gb
    share_gb = memory_bytes() / 1e9 * min(1.0, resources.cpus_per_worker / num_cpus())
    return max(share_gb - _PROCESS_GB, _LEAST_SHARE * share_gb)
