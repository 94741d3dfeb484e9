"""Finds the samples and the parameters by which a step was not finite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.networks.contrast import ContrastiveObjective
from pipeline.train.accumulation import Place, make_runner

_MOST_SAMPLES = 8
_MOST_NAMES = 3

T = TypeVar("T")
_Sample = tuple[Batch, SampleRandom]


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
            culprits.uids.extend(batch.uids[part])
            culprits.parameters.extend(name for name in names if name not in culprits.parameters)
            return
        middle = (part.start + part.stop) // 2
        search(slice(part.start, middle))
        search(slice(middle, part.stop))

    for part in parts:
        search(part)
    objective.zero_grad(set_to_none=True)
    return culprits


def find_culprits_together(
    objective: nn.Module, batch: Batch, random: SampleRandom, place: Place, share: Share
) -> Culprits:
    """The same of a divided network, which all workers run together: each brings one sample at a time.

    Where something is not finite, the workers are searched in halves of halves. Those that are not looked at run the
    sample of the first that is: weighted by zero, their own could still bring gradients that are not finite.
    """
    if isinstance(objective, ContrastiveObjective):
        objective.share = None
        batch = objective.prepare(batch, random)
    run, culprits, num_bad = make_runner(objective), Culprits(), 0

    def find_bad(sample: _Sample) -> list[str] | None:
        """The names of the parameters with a gradient that is not finite, the same on all workers; None: all is."""
        loss = run(objective, *sample, place)
        loss.backward()
        own = [name for name, parameter in objective.named_parameters() if not _is_finite(parameter.grad)]
        objective.zero_grad(set_to_none=True)
        is_finite = not own and bool(torch.isfinite(loss.detach()))
        of_workers = _gathered(None if is_finite else own)
        return None if all(names is None for names in of_workers) else _joined(names or [] for names in of_workers)

    def search(workers: range, row: int) -> None:
        nonlocal num_bad
        if num_bad >= _MOST_SAMPLES:
            return
        part = slice(row, row + 1)
        own = (batch.rows(part), random.rows(part))
        sample = own if len(workers) == share.world_size else _of_worker(workers[0], own)
        names = find_bad(own if share.rank in workers else sample)
        if names is None:
            return
        if len(workers) == 1:
            num_bad += 1
            if share.rank in workers:
                culprits.uids.append(batch.uids[row])
                culprits.parameters.extend(name for name in names if name not in culprits.parameters)
            return
        middle = len(workers) // 2
        search(workers[:middle], row)
        search(workers[middle:], row)

    for number in range(share.largest):
        search(range(share.world_size), min(number, len(share) - 1))
    return Culprits(_joined([culprits.uids]), culprits.parameters)


def _of_worker(worker: int, sample: _Sample) -> _Sample:
    """The sample of one worker, on all of them."""
    batch, random = sample
    values = [(replace(batch, uids=tuple(batch.uids)), random)]
    torch.distributed.broadcast_object_list(values, src=worker)
    return values[0]


def of_all_workers(culprits: Culprits) -> Culprits:
    """The findings of all workers together."""
    if not torch.distributed.is_initialized():
        return culprits
    parts = _gathered(culprits)
    return Culprits([uid for part in parts for uid in part.uids], _joined(part.parameters for part in parts))


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


def _is_finite(gradient: Tensor | None) -> bool:
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return own is None or bool(torch.isfinite(own).all())


def _gathered(value: T) -> list[T]:
    """The values of all workers."""
    values = [value] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _joined(parts: Iterable[Sequence[str]]) -> list[str]:
    """What is in any of them, once."""
    return list(dict.fromkeys(name for part in parts for name in part))
