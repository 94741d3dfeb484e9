"""Finds the samples and the parameters by which a step was not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed
from torch import nn

from models.sample_random import SampleRandom
from pipeline.data.batches import Batch
from pipeline.networks.contrast import ContrastiveObjective
from pipeline.train.accumulation import Place, make_runner

_MOST_SAMPLES = 8
_MOST_NAMES = 3


@dataclass(frozen=True)
class Culprits:
    """Samples and parameters that were not finite."""

    uids: list[str] = field(default_factory=list[str])
    """Samples whose loss or gradient alone is not finite; at most 8 of a worker."""
    parameters: list[str] = field(default_factory=list[str])
    """Names of the parameters whose gradient was not finite for one of them."""


def find_culprits(
    objective: nn.Module, batch: Batch, random: SampleRandom, place: Place, parts: Sequence[slice]
) -> Culprits:
    """Compute the samples of a step again, in halves of halves, until those that are not finite stand alone.

    No weight was changed since, and the random numbers belong to the samples, so they give what they gave. Loss-aware
    timesteps are the exception: their distribution has moved on by a step.

    Args:
        objective: Not wrapped for data parallelism.
        batch: This worker's samples of the step.
        random: Their random numbers.
        place: Where to compute.
        parts: The parts of the batch that fit into the memory.
    """
    if isinstance(objective, ContrastiveObjective):
        objective.share = None  # the others compute other halves
        batch = objective.prepare(batch, random)
    run, culprits = make_runner(objective), Culprits()

    def search(part: slice) -> None:
        if len(culprits.uids) >= _MOST_SAMPLES:
            return
        objective.zero_grad(set_to_none=True)
        loss = run(objective, batch.rows(part), random.rows(part), place)
        loss.backward()
        names = [name for name, parameter in objective.named_parameters() if not _is_finite(parameter.grad)]
        if not names and bool(torch.isfinite(loss.detach())):
            return
        if part.stop - part.start == 1:
            culprits.uids.append(batch.uids[part.start])
            culprits.parameters.extend(name for name in names if name not in culprits.parameters)
            return
        middle = (part.start + part.stop) // 2
        search(slice(part.start, middle))
        search(slice(middle, part.stop))

    for part in parts:
        search(part)
    objective.zero_grad(set_to_none=True)
    return culprits


def of_all_workers(culprits: Culprits) -> Culprits:
    """The findings of all workers together."""
    if not torch.distributed.is_initialized():
        return culprits
    parts: list[Culprits] = [culprits] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, culprits)
    return Culprits(
        [uid for part in parts for uid in part.uids],
        list(dict.fromkeys(name for part in parts for name in part.parameters)),
    )


def describe(culprits: Culprits) -> str:
    """The findings in words, as the end of a sentence."""
    if not culprits.uids:
        return "; each of its samples alone is finite"
    uids = ", ".join(culprits.uids[:_MOST_SAMPLES])
    text = f"; not finite alone: {'sample' if len(culprits.uids) == 1 else 'samples'} {uids}"
    names = [name.removeprefix("network.") for name in culprits.parameters]
    if names:
        more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
        text += f", in the gradients of {', '.join(names[:_MOST_NAMES])}{more}"
    return text


def _is_finite(gradient: torch.Tensor | None) -> bool:
    return gradient is None or bool(torch.isfinite(gradient).all())
