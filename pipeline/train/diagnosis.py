"""Finds the samples and the parameters by which a step was not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    Where every loss is finite and a gradient is not, each worker's sample is weighted by one in turn, the others' by
    zero.
    """
    if isinstance(objective, ContrastiveObjective):
        objective.share = None
        batch = objective.prepare(batch, random)
    run, culprits, num_bad = make_runner(objective), Culprits(), 0

    def names_by(part: slice, weight: float) -> tuple[Tensor, list[str]]:
        loss = run(objective, batch.rows(part), random.rows(part), place)
        (loss * weight).backward()
        names = [name for name, parameter in objective.named_parameters() if not _is_finite(parameter.grad)]
        objective.zero_grad(set_to_none=True)
        return loss.detach(), names

    for number in range(share.largest):
        row = min(number, len(share) - 1)
        part = slice(row, row + 1)
        loss, names = names_by(part, 1.0)
        is_bad = not bool(torch.isfinite(loss))
        has_bad_loss, has_bad_gradient = _any_worker(place, is_bad), _any_worker(place, bool(names))
        if has_bad_gradient and not has_bad_loss:
            for turn in range(share.world_size):
                _, of_turn = names_by(part, float(turn == share.rank))
                if _any_worker(place, bool(of_turn)) and turn == share.rank:
                    is_bad = True
        if is_bad:
            culprits.uids.append(batch.uids[row])
            culprits.parameters.extend(name for name in names if name not in culprits.parameters)
        num_bad += has_bad_loss or has_bad_gradient
        if num_bad >= _MOST_SAMPLES:
            break
    return Culprits(list(dict.fromkeys(culprits.uids)), culprits.parameters)


def _any_worker(place: Place, holds: bool) -> bool:
    flag = torch.tensor(float(holds), device=place.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


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


def _is_finite(gradient: Tensor | None) -> bool:
    own = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return own is None or bool(torch.isfinite(own).all())
