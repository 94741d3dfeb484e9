"""The gradients of one step: of a worker's share of the global batch, in parts of a bounded size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.layers.dropout import dropouts_of, set_dropout_random
from models.sample_random import SampleRandom
from pipeline.data.batches import Batch
from pipeline.data.order import Share
from pipeline.networks.contrast import ContrastiveObjective, Pairs, gradients_of

Accumulate = Callable[[Batch, SampleRandom, torch.device], Tensor]


def make_accumulate(objective: nn.Module, share: Share, micro_batch_size: int, precision: str) -> Accumulate:
    """A function that adds up the gradients of the mean loss of the global batch.

    It takes this worker's samples, on the CPU, their random numbers and the device; it returns this worker's summand of
    that loss, detached. Every sample has the same weight, however many of them a worker or a part has.

    Args:
        objective: (batch, random numbers) -> mean loss; wrapped for data parallelism where needed, which divides the
            sum of the workers' gradients by their number.
        share: This worker's share of the global batch.
        micro_batch_size: Most samples in one forward and backward pass; 0: no limit.
        precision: Of the forward pass.
    """
    parts = share.parts(micro_batch_size)
    parallel = isinstance(objective, DistributedDataParallel)
    bare: nn.Module = objective.module if parallel else objective
    dropouts = dropouts_of(bare)
    if isinstance(bare, ContrastiveObjective):
        bare.share = share

    def run(call: Callable[..., Any], batch: Batch, random: SampleRandom, device: torch.device, *more: Pairs) -> Any:
        set_dropout_random(dropouts, random, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return call(batch.to(device), random, *more)

    def split(batch: Batch, random: SampleRandom) -> list[tuple[Batch, SampleRandom]]:
        return [(batch.rows(part), random.rows(part)) for part in parts]

    def waits(number: int) -> contextlib.AbstractContextManager[None]:
        """Workers add up their gradients once a step, in the last backward pass."""
        if isinstance(objective, DistributedDataParallel) and number < len(parts) - 1:
            return objective.no_sync()
        return contextlib.nullcontext()

    def accumulate(batch: Batch, random: SampleRandom, device: torch.device) -> Tensor:
        total = torch.zeros((), device=device)
        for number, (part, numbers) in enumerate(split(batch, random)):
            weight = len(part) / share.batch_size
            with waits(number):
                loss: Tensor = run(objective, part, numbers, device)
                (loss * (weight * share.world_size)).backward()
            total += loss.detach() * weight
        return total

    if not isinstance(bare, ContrastiveObjective):
        return accumulate
    contrast = bare

    def accumulate_contrast(batch: Batch, random: SampleRandom, device: torch.device) -> Tensor:
        batch = contrast.prepare(batch, random)
        if not 0 < micro_batch_size < share.largest:
            return accumulate(batch, random, device)
        pieces, weight = split(batch, random), len(batch) / share.batch_size
        with torch.no_grad():
            features: list[Pairs] = [run(contrast.encode, *piece, device) for piece in pieces]
        loss, gradients = gradients_of(features, share, weight * share.world_size)
        for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True)):
            with waits(number):
                run(objective, *piece, device, gradient).backward()
        return loss * weight

    return accumulate_contrast
