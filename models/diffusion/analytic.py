"""The data statistic that Analytic-DPM needs: how uncertain x0 is, given x_t.

Legend: B batch, T diffusion steps. Arrays over timesteps are float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.diffusion.limits import Limit
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion, per_item_mean
from models.diffusion.steps import predict


class X0Variance:
    """Mean variance of x0 given x_t per dimension, measured on training samples batch by batch.

    It is the mean squared error of the predicted x0: the optimal variance around the mean that the network predicts
    (arXiv:2206.07309). The estimator of arXiv:2201.06503, section 3, from the size of the predicted eps, agrees with it
    for the true posterior mean, but at the noisy end of a cosine schedule it is a difference of two numbers that agree
    to nine digits.
    """

    def __init__(self, diffusion: Diffusion, timesteps: Sequence[int]) -> None:
        """Measure at ``timesteps``: those of the sampler, in any order."""
        self.diffusion = diffusion
        self.timesteps = sorted(set(timesteps))
        self.sums = torch.zeros(len(self.timesteps), 2, dtype=torch.float64)
        self.num_items = 0

    def update(self, denoise: Denoise, x0: Tensor, noise: NoiseSource, limit: Limit | None = None) -> None:
        """Add one batch, with one network call per timestep.

        Args:
            denoise: The network, conditioned on what goes with ``x0``.
            x0: Clean samples, (B, C, ...).
            noise: Noise of each item.
            limit: Limit on the predicted x0, as in sampling.
        """
        for row, step in enumerate(self.timesteps):
            t = torch.full((x0.shape[0],), step, device=x0.device)
            eps = noise.normal_like(x0)
            with torch.no_grad():
                x_t = self.diffusion.q_sample(x0, t, eps)
                prediction = predict(denoise, x_t, t, t - 1, self.diffusion, limit)
            self.sums[row, 0] += per_item_mean(((prediction.x0 - x0) ** 2).double()).sum().cpu()
            self.sums[row, 1] += per_item_mean(x0.double() ** 2).sum().cpu()
        self.num_items += x0.shape[0]

    def table(self) -> Tensor:
        """The variance at every timestep, (T,) float64: linear between those measured, constant beyond.

        Raises:
            ValueError: If nothing has been measured.
        """
        if self.num_items == 0:
            raise ValueError("no batch has been measured")
        steps = torch.tensor(self.timesteps)
        error, power = (self.sums / self.num_items).unbind(dim=1)
        # Given x_t, x0 cannot vary more than its own second moment, which bounds a noisy estimate.
        values = error.minimum(power)
        every = torch.arange(self.diffusion.num_timesteps)
        right = torch.searchsorted(steps, every).clamp(max=len(steps) - 1)
        left = (right - 1).clamp(min=0)
        span = (steps[right] - steps[left]).clamp(min=1)
        share = ((every - steps[left]) / span).clamp(0, 1).double()
        return torch.lerp(values[left], values[right], share)
