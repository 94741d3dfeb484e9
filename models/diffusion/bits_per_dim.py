"""The variational bound of a trained network in bits per dimension, term by term.

Legend: B batch, T diffusion steps, K terms that are computed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.limits import Limit
from models.diffusion.noise import NoiseSource
from models.diffusion.process import PIXEL_BIN, Denoise, Diffusion
from models.diffusion.steps import predict


class Bound(NamedTuple):
    """The bound on -log2 p(x0) per dimension."""

    total: Tensor
    """(B,), the sum of all terms, or an unbiased estimate of it."""
    prior: Tensor
    """(B,), divergence of the noisiest step from the standard normal that sampling starts from."""
    terms: Tensor
    """(B, K), the estimated sum of the terms of each group, in order of t; entry 0 is the decoder term."""


def bits_per_dim(
    denoise: Denoise,
    x0: Tensor,
    diffusion: Diffusion,
    noise: NoiseSource,
    *,
    num_terms: int = 0,
    limit: Limit | None = None,
    bin_width: float = PIXEL_BIN,
) -> Bound:
    """Estimate the bound with one sample of noise for each term: K network calls (arXiv:2006.11239, equation 5).

    Args:
        denoise: The network.
        x0: Clean samples, (B, C, ...); pixels in [-1, 1] on a grid of ``bin_width``.
        diffusion: The process.
        noise: Noise of each item.
        num_terms: K; below T, one random term of each of ``timestep_groups`` stands for its group. 0: all T terms.
        limit: Limit on the predicted x0; clipping to the range of pixels can only improve it.
        bin_width: Distance between two values that x0 may take, in units of x0.
    """
    groups = timestep_groups(diffusion.num_timesteps, num_terms or diffusion.num_timesteps)
    places = torch.zeros(x0.shape[0], len(groups), device=x0.device)
    if len(groups) < diffusion.num_timesteps:
        places = noise.uniform(len(groups), device=x0.device)
    terms: list[Tensor] = []
    with torch.no_grad():
        for group, place in zip(groups, places.unbind(1), strict=True):
            t = (group.start + place * len(group)).long().clamp(max=group.stop - 1)
            x_t = diffusion.q_sample(x0, t, noise.normal_like(x0))
            prediction = predict(denoise, x_t, t, t - 1, diffusion, limit)
            terms.append(len(group) * diffusion.vlb_terms(prediction, x0, x_t, t, bin_width=bin_width))
        prior = diffusion.prior_bpd(x0)
    stacked = torch.stack(terms, dim=1)
    return Bound(prior + stacked.sum(dim=1), prior, stacked)


def timestep_groups(num_timesteps: int, num_groups: int) -> list[range]:
    """Cut 0 .. T - 1 into consecutive groups: single timesteps at first, where the terms are large, then longer ones.

    Args:
        num_timesteps: T.
        num_groups: Number of groups; at most T are made.
    """
    count, stop = min(num_groups, num_timesteps), 0
    groups: list[range] = []
    for number in range(1, count + 1):
        start, stop = stop, max(stop + 1, round(num_timesteps ** (number / count)))
        groups.append(range(start, stop))
    return groups
