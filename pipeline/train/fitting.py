"""Whether trainings fit into their GPUs: the largest part of a batch that does, and what would make the others fit."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import replace

import torch

from pipeline.clip.model import OpenClip
from pipeline.networks.costs import build_clip
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.train_sections import TrainResources
from pipeline.train.memory import USABLE, WorkerMemory, count_memory
from pipeline.workspace.progress import byte_size


def recipe_memory(recipe: Recipe, names: Container[str] | None = None) -> list[WorkerMemory]:
    """Memory of a worker of every training of a recipe.

    Args:
        recipe: The recipe.
        names: Of these steps alone; None: of all.

    Raises:
        ConfigError: If the shape of the recipe's pretrained CLIP is not known on this machine.
    """
    with torch.device("meta"):
        frozen = build_clip(recipe)
    trained = {
        name: section
        for name, section in recipe.trained().items()
        if section.train.total_steps and not (section is recipe.clip and recipe.clip.source == "pretrained")
        if names is None or name in names
    }
    return [memory_of(name, section, recipe, frozen) for name, section in trained.items()]


def memory_of(name: str, section: TrainedSection, recipe: Recipe, frozen: OpenClip) -> WorkerMemory:
    """Memory of a worker of one training; see ``count_memory``.

    With ``micro_batch_size = "auto"`` it is that of the largest part that fits into ``gpu_memory_gb``, all of the share
    or a power of two; of the smallest, which does not fit, if none does.
    """
    resources = section.resources
    if resources.micro_batch_size != "auto":
        return count_memory(name, section, recipe, frozen)

    def count(size: int) -> WorkerMemory:
        sized = replace(section, resources=replace(resources, micro_batch_size=size))
        return count_memory(name, sized, recipe, frozen)

    memory = count(0)
    for size in _smaller_parts(memory, section):
        if memory.fits:
            break
        memory = count(size)
    return memory


def advice(memory: WorkerMemory, recipe: Recipe) -> str:
    """What would make a training fit that does not; each proposal is counted before it is made."""
    section = recipe.trained()[memory.name]
    with torch.device("meta"):
        frozen = build_clip(recipe)

    def count(resources: TrainResources) -> WorkerMemory:
        resources = replace(resources, gpu_memory_gb=memory.gpu / 1e9)
        return memory_of(memory.name, replace(section, resources=resources), recipe, frozen)

    for proposed, changes in _proposals(memory, section):
        if count(proposed).fits:
            return "resources: " + " and ".join(changes)
    if memory.state > USABLE * memory.gpu:
        least = byte_size(memory.state / USABLE)
        return f"its state alone is larger; a GPU of {least} and more, or more workers that divide it"
    if memory.state + memory.contrast > USABLE * memory.gpu:
        return f"more workers, or a smaller batch_size: its contrastive loss takes {byte_size(memory.contrast)} anyhow"
    return "a larger GPU: not even one sample has room" if _can_divide(section) else "more workers or a smaller batch"


def _proposals(memory: WorkerMemory, section: TrainedSection) -> Iterator[tuple[TrainResources, list[str]]]:
    """Resources that need less memory, with the fields that change, the cheapest first."""
    resources, room = section.resources, USABLE * memory.gpu
    sizes = [resources.micro_batch_size, *_smaller_parts(memory, section)]
    undivided = [resources.num_shards] if memory.state <= room else []
    for num_shards in undivided + _divisions(memory, resources):
        for checkpointing in (False, True) if not resources.checkpointing else (True,):
            for size in sizes:
                changes = {"num_shards": num_shards, "checkpointing": checkpointing, "micro_batch_size": size}
                changes = {name: value for name, value in changes.items() if value != getattr(resources, name)}
                if changes:
                    yield (
                        replace(resources, **changes),
                        [f"{name} = {str(value).lower()}" for name, value in changes.items()],
                    )


def _divisions(memory: WorkerMemory, resources: TrainResources) -> list[int]:
    """Values of ``num_shards`` for a state that every worker has whole; none if there is nobody to divide it with."""
    if resources.shards > 1 or resources.fewest_workers == 1:
        return []
    if resources.is_elastic:
        return [0]  # a changing number of workers has no other divisor
    own = memory.state - memory.clip - memory.gathered
    most = resources.most_workers
    divisors = [number for number in range(2, most + 1) if most % number == 0]
    enough = [number for number in divisors if memory.clip + own / number < USABLE * memory.gpu / 2]
    return enough[:1] or divisors[-1:]


def _smaller_parts(memory: WorkerMemory, section: TrainedSection) -> list[int]:
    """Sizes of parts below those that were counted, the largest first."""
    powers = reversed(range((memory.samples - 1).bit_length()))
    return [2**power for power in powers] if _can_divide(section) else []


def _can_divide(section: TrainedSection) -> bool:
    """Whether a batch may be worked off in parts."""
    return getattr(section.model, "vision", "") != "resnet"


def format_memory(memories: list[WorkerMemory], recipe: Recipe) -> str:
    """A table for a terminal, with a sentence about each training that does not fit."""
    names = ("network", "samples", "weights", "gradients", "moments", "average", "gathered", "work", "in all", "GPU")
    widths = (11, 9, 10, 10, 10, 10, 10, 10, 10, 10)
    rows = [names, *(_cells(memory) for memory in memories)]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        "memory of a worker at its peak; samples: in one pass; gradients: with buckets; gathered: the frozen CLIP, and",
        "what is gathered of a divided state; work: activations, copies in half precision, temporaries.",
        f"A training fits into {USABLE:.0%} of its GPU (resources.gpu_memory_gb).",
    ]
    for memory in memories:
        if not memory.fits:
            lines.append(
                f"{memory.name} does not fit: {byte_size(memory.total)} of {byte_size(USABLE * memory.gpu)}; "
                f"what would make it fit: {advice(memory, recipe)}"
            )
    return "\n".join(lines)


def _cells(memory: WorkerMemory) -> tuple[str, ...]:
    gradients = memory.gradients + memory.buckets
    frozen = memory.gathered + memory.clip
    parts = (memory.weights, gradients, memory.optimizer, memory.average, frozen, memory.work, memory.total)
    gpu = byte_size(memory.gpu) if memory.gpu else "not named"
    return (memory.name, str(memory.samples), *map(byte_size, parts), gpu)
