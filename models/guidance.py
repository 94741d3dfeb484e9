"""Guidance as wrappers around a denoiser: the result is called like any other network.

Legend: B batch, C channels. ``denoise(x, t)`` -> (B, C, ...) or, with learned variance, (B, 2C, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from models.diffusion import Denoise, spread

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(x, t) -> log probability (B,) of what is wanted, differentiable in x."""


def classifier_free(denoise_both: Denoise, scale: float | Tensor) -> Denoise:
    """Classifier-free guidance in one doubled forward: arXiv:2207.12598, arXiv:2112.10741, equation 8.

    The output is uncond + s (cond - uncond); eps, x0 and v are affine in one another at fixed x, so that it
    is the same guidance for each. A learned variance is the conditional one. s = 1 is the conditional network
    (the retelling with 1 + w has w = s - 1).

    Args:
        denoise_both: Network on 2B items that carries its conditioning in the order [uncond, cond].
        scale: s, dimensionless; a number, or one per item (B,).
    """

    def guided(x: Tensor, t: Tensor) -> Tensor:
        channels = x.shape[1]
        uncond, cond = denoise_both(torch.cat([x, x]), torch.cat([t, t])).chunk(2)
        strength = spread(scale, cond) if isinstance(scale, Tensor) else scale
        mean = uncond[:, :channels] + strength * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([mean, cond[:, channels:]], dim=1)

    return guided
