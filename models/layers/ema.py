"""Exponential moving average of a network's weights: what a diffusion model is sampled with."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

Network = TypeVar("Network", bound=nn.Module)


def create_average(network: Network) -> Network:
    """A frozen copy in evaluation mode, to be moved towards ``network`` after each optimizer step."""
    return copy.deepcopy(network).eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def update_average(
    average: nn.Module, network: nn.Module, decay: float, num_updates: int, skips: Tensor | None = None
) -> None:
    """Move the average towards the network: average = d average + (1 - d) network.

    Early on d is (1 + n) / (10 + n), so that the first weights do not linger: after 1,200 steps at 0.9999 the
    average would otherwise still be 89 % its random start.

    Args:
        average: What ``create_average`` made.
        network: The network in training.
        decay: Largest d, in [0, 1) (arXiv:2204.06125, table 3: 0.9999).
        num_updates: n, this update included. Whole-number buffers are copied.
        skips: A bool of shape () on the device: whether the average stays as it is, which the host need not know. The
            network is finite also then.
    """
    decay = min(decay, (1 + num_updates) / (10 + num_updates))
    averages, sources = average.state_dict(), network.state_dict()
    floats = [name for name, tensor in sources.items() if tensor.is_floating_point()]
    if skips is None:
        lerp: Any = get_ema_multi_avg_fn(decay)  # one fused call for all tensors
        lerp([averages[name] for name in floats], [sources[name] for name in floats], 0)
    else:  # the fused call takes no number of the device, and a choice between whole tensors would be a copy of all
        weight = (~skips).double() * (1 - decay)
        for name in floats:
            averages[name].lerp_(sources[name], weight.to(averages[name].dtype))
    for name in sources.keys() - set(floats):
        averages[name].copy_(sources[name])
