"""Limits on the predicted clean sample, applied at each step of a sampler.

Legend: B batch. A limit maps x0 (B, ...) to x0 (B, ...), item by item.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Limit = Callable[[Tensor], Tensor]
"""A map from predicted clean samples to admissible ones, item by item."""


@dataclass(frozen=True)
class ClipRange:
    """Clip every value into [low, high]."""

    low: float = -1.0
    high: float = 1.0

    def __call__(self, x0: Tensor) -> Tensor:
        """Clip ``x0``, (B, ...)."""
        return x0.clamp(self.low, self.high)


@dataclass(frozen=True)
class DynamicThreshold:
    """Dynamic thresholding: clip to a quantile of |x0| per item, then rescale (arXiv:2205.11487, section 2.3).

    Keeps strong guidance from saturating a picture; only clips if the quantile is below ``bound``.
    """

    quantile: float = 0.995
    """Share of the values of an item that stays below its threshold."""
    bound: float = 1.0
    """Half width of the range that x0 is rescaled to, in units of x0."""

    def __call__(self, x0: Tensor) -> Tensor:
        """Threshold ``x0``, (B, ...)."""
        sizes = x0.abs().flatten(1)
        # Item by item: torch.quantile refuses more than 2^24 values, which a batch of 1024 px pictures has.
        thresholds = torch.stack([torch.quantile(item, self.quantile) for item in sizes])
        thresholds = thresholds.clamp(min=self.bound).reshape(-1, *([1] * (x0.ndim - 1)))
        return x0.clamp(-thresholds, thresholds) * (self.bound / thresholds)
