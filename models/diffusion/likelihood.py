"""Divergences and likelihoods of Gaussians, element by element and in nats, for the variational bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def normal_kl(mean_gap: Tensor, log_variance_q: Tensor, log_variance_p: Tensor) -> Tensor:
    """KL(q || p) of two Gaussians whose means differ by ``mean_gap``, element by element, in nats."""
    ratio = torch.exp(log_variance_q - log_variance_p)
    return 0.5 * (log_variance_p - log_variance_q + ratio - 1 + mean_gap**2 * torch.exp(-log_variance_p))


def discretised_normal_log_prob(x: Tensor, mean: Tensor, log_variance: Tensor, bin_width: float) -> Tensor:
    """Log probability of the bin around ``x`` under a Gaussian: arXiv:2006.11239, equation 13, in nats.

    Args:
        x: Values on a grid of ``bin_width`` in [-1, 1]; the outermost bins reach to infinity.
        mean: Mean of the Gaussian, broadcastable to x.
        log_variance: Its log variance, broadcastable to x.
        bin_width: Width of a bin, in units of x.

    Returns:
        Log probability of each element's bin, in the shape of x. Far from the mean, where the mass of the bin
        underflows, it is the log density at the centre times the width: finite, with a gradient that points
        to the mean.
    """
    inverse_std = torch.exp(-0.5 * log_variance)
    centred = x - mean
    upper = inverse_std * (centred + bin_width / 2)
    lower = inverse_std * (centred - bin_width / 2)
    log_cdf = torch.special.log_ndtr(upper)
    log_survival = torch.special.log_ndtr(-lower)
    # The mass between lower and upper, taken in the tail where it does not cancel: both on the left of the
    # mean, or mirrored.
    mirrored = centred > 0
    outer = torch.where(mirrored, log_survival, log_cdf)
    inner = torch.where(mirrored, torch.special.log_ndtr(-upper), torch.special.log_ndtr(lower))
    gap = (inner - outer).clamp(max=-1e-7)
    inside = outer + torch.log(-torch.expm1(gap))
    density = -0.5 * (centred * inverse_std) ** 2 - 0.5 * log_variance - 0.5 * math.log(2 * math.pi)
    narrow = (inner - outer) > -1e-2  # a bin far narrower than the slope: the midpoint rule is off by 4e-6
    inside = torch.where(narrow, density + math.log(bin_width), inside)
    edge = 1 - bin_width / 4
    return torch.where(x < -edge, log_cdf, torch.where(x > edge, log_survival, inside))
