"""The gradients of one step: of a worker's share of the global batch, in parts of a bounded size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers.dropout import dropouts_of, set_dropout_random
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.order import Share
from pipeline.networks.contrast import ContrastiveObjective, Pairs, gradients_of, no_gradients
from pipeline.train.sharding import is_sharded


@dataclass(frozen=True)
class Place:
    """Where and how precisely a forward pass is computed."""

    device: torch.device
    precision: str
    """float32 or bfloat16."""


Accumulate = Callable[[Batch, SampleRandom, Place], Tensor]


def make_accumulate(objective: nn.Module, share: Share, micro_batch_size: int) -> Accumulate:
    """A function that adds up the gradients of the mean loss of the global batch.

    It takes this worker's samples, on the CPU, their random numbers, and where to compute; it returns this worker's
    summand of that loss, detached. Every sample has the same weight, however many of them a worker or a part has.

    Args:
        objective: (batch, random numbers) -> mean loss; wrapped for data parallelism where needed, which divides the
            sum of the workers' gradients by their number.
        share: This worker's share of the global batch.
        micro_batch_size: Most samples in one forward and backward pass; 0: no limit.
    """
    parts = share.parts(micro_batch_size)
    parallel = isinstance(objective, DistributedDataParallel)
    bare: nn.Module = objective.module if parallel else objective
    if isinstance(bare, ContrastiveObjective):
        bare.share = share
    weights = [(part.stop - part.start) / share.batch_size for part in parts]
    if is_sharded(objective):  # all workers take part in every pass: with nothing to add, of a part that has been
        num_idle = share.num_parts(micro_batch_size) - len(parts)
        parts, weights = parts + parts[:num_idle], weights + [0.0] * num_idle

    run = make_runner(bare)

    def split(batch: Batch, random: SampleRandom) -> list[tuple[Batch, SampleRandom]]:
        return [(batch.rows(part), random.rows(part)) for part in parts]

    def waits(number: int) -> contextlib.AbstractContextManager[None]:
        """Workers add up their gradients once a step, in the last backward pass; of a divided state in every one."""
        if isinstance(objective, DistributedDataParallel) and number < len(parts) - 1:
            return objective.no_sync()
        return contextlib.nullcontext()

    def accumulate(batch: Batch, random: SampleRandom, place: Place) -> Tensor:
        total = torch.zeros((), device=place.device)
        for number, (part, numbers) in enumerate(split(batch, random)):
            with waits(number):
                loss: Tensor = run(objective, part, numbers, place)
                (loss * (weights[number] * share.world_size)).backward()
            total += loss.detach() * weights[number]
        return total

    if not isinstance(bare, ContrastiveObjective):
        return accumulate
    contrast = bare

    def accumulate_contrast(batch: Batch, random: SampleRandom, place: Place) -> Tensor:
        batch = contrast.prepare(batch, random)
        if not 0 < micro_batch_size < share.largest:
            return accumulate(batch, random, place)
        pieces, weight = split(batch, random), len(batch) / share.batch_size
        with torch.no_grad():
            features: list[Pairs] = [run(contrast, *piece, place, encodes=True) for piece in pieces]
        num_own = sum(weight > 0 for weight in weights)
        loss, gradients = gradients_of(features[:num_own], share, weight * share.world_size)
        gradients += [no_gradients(pairs) for pairs in features[num_own:]]
        for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True)):
            with waits(number):
                run(objective, *piece, place, gradient).backward()
        return loss * weight

    return accumulate_contrast


def make_runner(objective: nn.Module) -> Callable[..., Any]:
    """A function that calls an objective on a part of a batch, with dropout by the part's numbers."""
    dropouts = dropouts_of(objective)

    def run(
        call: Callable[..., Any], batch: Batch, random: SampleRandom, place: Place, *more: Pairs, encodes: bool = False
    ) -> Any:
        set_dropout_random(dropouts, random, place.device)
        options = {"encodes": True} if encodes else {}
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.precision == "bfloat16"):
            return call(batch.to(place.device), random, *more, **options)

    return run
