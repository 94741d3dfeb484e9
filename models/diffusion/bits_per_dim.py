"""The variational bound of a trained network in bits per dimension, term by term.

Legend: B batch, T diffusion steps.
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
    """(B,), the sum of all terms."""
    prior: Tensor
    """(B,), divergence of the noisiest step from the standard normal that sampling starts from."""
    terms: Tensor
    """(B, T), term t of the bound, in order of t; entry 0 is the decoder's."""


def bits_per_dim(
    denoise: Denoise,
    x0: Tensor,
    diffusion: Diffusion,
    noise: NoiseSource,
    *,
    limit: Limit | None = None,
    bin_width: float = PIXEL_BIN,
) -> Bound:
    """Estimate the bound with one draw of noise per term: T network calls (arXiv:2006.11239, equation 5).

    Args:
        denoise: The network.
        x0: Clean samples, (B, C, ...); pixels in [-1, 1] on a grid of ``bin_width``.
        diffusion: The process.
        noise: Draws per item.
        limit: Limit on the predicted x0; clipping to the range of pixels can only improve it.
        bin_width: Distance between two values that x0 may take, in units of x0.
    """
    terms: list[Tensor] = []
    with torch.no_grad():
        for step in range(diffusion.num_timesteps):
            t = torch.full((x0.shape[0],), step, device=x0.device)
            x_t = diffusion.q_sample(x0, t, noise.normal_like(x0))
            prediction = predict(denoise, x_t, t, t - 1, diffusion, limit)
            terms.append(diffusion.vlb_terms(prediction, x0, x_t, t, bin_width=bin_width))
        prior = diffusion.prior_bpd(x0)
    stacked = torch.stack(terms, dim=1)
    return Bound(prior + stacked.sum(dim=1), prior, stacked)
