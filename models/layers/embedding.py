"""Timesteps as features. Legend: B batch, F features."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def timestep_features(t: Int[Tensor, " B"], num_features: int) -> Float[Tensor, "B F"]:
    """Cosines, then sines, of ``t`` at F/2 frequencies from 1 to nearly 1/10000 (arXiv:2105.05233's code)."""
    half = num_features // 2
    exponents = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * exponents)[None]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Timestep features through a two-layer perceptron."""

    def __init__(self, num_features: int, width: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.expand = nn.Linear(num_features, width)
        self.project = nn.Linear(width, width)

    def forward(self, t: Int[Tensor, " B"]) -> Float[Tensor, "B width"]:
        """Embed 0-based steps ``t``."""
        features = timestep_features(t, self.num_features).to(self.expand.weight.dtype)
        return self.project(nn.functional.silu(self.expand(features)))
