"""Exponential moving average of a network's weights: what a diffusion model is sampled with."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


def create_average(network: Network) -> Network:
    """A frozen copy in evaluation mode, to be moved towards ``network`` after each optimizer step."""
    return copy.deepcopy(network).eval().requires_grad_(requires_grad=False)


@dataclass(frozen=True)
class AveragePairs:
    """The tensors of an average and those of its network, in one order: made once, because each name costs a step time.

    They stay true while the two keep their tensors: a loaded checkpoint is copied into them.
    """

    averages: list[Tensor]
    sources: list[Tensor]
    counts: list[tuple[Tensor, Tensor]]
    """Whole-number buffers: of the average, of the network."""

    @classmethod
    def of(cls, average: nn.Module, network: nn.Module) -> AveragePairs:
        """The pairs of what ``create_average`` made and the network in training."""
        averages, sources = average.state_dict(), network.state_dict()
        floats = [name for name, tensor in sources.items() if tensor.is_floating_point()]
        counts = [(averages[name], sources[name]) for name in sources.keys() - set(floats)]
        return cls([averages[name] for name in floats], [sources[name] for name in floats], counts)


@torch.no_grad()
def update_average(pairs: AveragePairs, decay: float, num_updates: int, skips: Tensor | None = None) -> None:
    """Move the average towards the network: average = d average + (1 - d) network.

    Early on d is (1 + n) / (10 + n), so that the first weights do not linger: after 1,200 steps at 0.9999 the
    average would otherwise still be 89 % its random start.

    Args:
        pairs: Their tensors.
        decay: Largest d, in [0, 1) (arXiv:2204.06125, table 3: 0.9999).
        num_updates: n, this update included. Whole-number buffers are copied.
        skips: A bool of shape () on the device: whether the average stays as it is, which the host need not know. The
            network is finite also then.
    """
    decay = min(decay, (1 + num_updates) / (10 + num_updates))
    if skips is None:
        lerp: Any = get_ema_multi_avg_fn(decay)  # one fused call for all tensors
        lerp(pairs.averages, pairs.sources, 0)
    else:  # the fused call takes no number of the device, and a choice between whole tensors would be a copy of all
        weight = (~skips).double() * (1 - decay)
        for average, source in zip(pairs.averages, pairs.sources, strict=True):
            average.lerp_(source, weight.to(average.dtype))
    for count, source in pairs.counts:
        count.copy_(source)
