"""Data for which the perfect denoiser is known in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from models.diffusion.config import DiffusionConfig
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.steps import ddim_invert_step, initial_state

PUBLISHED_STD = 0.5375
"""Spread of the data on which few-step errors of the samplers were published, to three places: the only one that gives all
seven of them (DDIM, DPM-Solver++ and DDIM inversion). It is the paper's scale of z_image (arXiv:2204.06125, section 2)."""


def make_diffusion(**changes: object) -> Diffusion:
    return Diffusion(DiffusionConfig(**changes))  # type: ignore[arg-type]  (tests pass literals)


def output_from_x0(diffusion: Diffusion, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The output (without variance channels) that a network must give at (x, t) to mean ``x0``."""
    return diffusion.target(x0, diffusion.eps_from_x0(x0, x, t), t)


def invert_ddim(denoise: Denoise, x0: Tensor, diffusion: Diffusion, timesteps: Sequence[int], **options: Any) -> Tensor:
    """The x_T from which DDIM with the same timesteps samples ``x0``."""
    state = initial_state(x0, diffusion)
    for ends in pairwise((-1, *reversed(timesteps))):
        t, t_next = (torch.full((len(x0),), end) for end in ends)
        with torch.no_grad():
            state = ddim_invert_step(denoise, state, t, t_next, diffusion, **options)
    return state.x


@dataclass(frozen=True)
class GaussianData:
    """x0 ~ N(mean, std^2), every element apart: E[x0 | x_t] is linear in x_t."""

    std: float = 0.5
    mean: float = 0.0

    def posterior_mean(self, diffusion: Diffusion, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = diffusion.alpha_bar(t).reshape(-1, *([1] * (x.ndim - 1)))
        gain = alpha_bar.sqrt() * self.std**2 / (alpha_bar * self.std**2 + 1 - alpha_bar)
        return self.mean + gain * (x.double() - alpha_bar.sqrt() * self.mean)

    def posterior_variance(self, diffusion: Diffusion) -> Tensor:
        alpha_bar = diffusion.alpha_bar(torch.arange(diffusion.num_timesteps))
        return self.std**2 * (1 - alpha_bar) / (alpha_bar * self.std**2 + 1 - alpha_bar)

    def denoiser(self, diffusion: Diffusion) -> Denoise:
        """The network that a perfect training would end in, for any kind of prediction."""

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            x0 = self.posterior_mean(diffusion, x, t)
            return output_from_x0(diffusion, x0, x.double(), t).to(x.dtype)

        return denoise
