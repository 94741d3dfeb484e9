"""Dropout whose masks belong to samples, so that they depend neither on the worker nor on the size of its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.sample_random import SampleRandom, keep_mask


class SampleDropout(nn.Module):
    """Zeroes values of x (B, ...) with probability ``drop_prob`` in training, and enlarges the others.

    ``set_dropout_random`` gives it the random numbers of the batch before each forward pass; without them it is torch's
    dropout.
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = round(drop_prob * 2**16) / 2**16  # a mask has 16 bits for each value
        self.keys: Tensor | None = None
        """Of the masks of the batch, int32 (B, 2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop, in training alone."""
        if not self.training or not self.drop_prob:
            return x
        if self.keys is None:  # outside of a training of ours
            return F.dropout(x, self.drop_prob)
        keep = keep_mask(self.keys, self.drop_prob, x[0].numel())
        if x.ndim == 4 and not x.is_contiguous():  # channels last: a mask in the other order would slow the product
            batch, channels, height, width = x.shape
            keep = keep.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return x * keep.view_as(x) * (1 / (1 - self.drop_prob))


def dropouts_of(network: nn.Module) -> list[SampleDropout]:
    """The modules of a network that drop anything, in their order."""
    return [module for module in network.modules() if isinstance(module, SampleDropout) and module.drop_prob]


def set_dropout_random(dropouts: Sequence[SampleDropout], random: SampleRandom, device: torch.device) -> None:
    """Give each module the numbers of a batch; its place in ``dropouts`` names its stream."""
    if dropouts:
        keys = random.keys_of([f"dropout/{number}" for number in range(len(dropouts))], device)
        for module, of_module in zip(dropouts, keys, strict=True):
            module.keys = of_module
