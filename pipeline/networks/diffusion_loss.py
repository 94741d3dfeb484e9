"""The diffusion loss of a batch, and the distribution of its timesteps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.diffusion.config import DiffusionConfig
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.timesteps import LossAwareTimesteps, TimestepDraws, UniformTimesteps, create_timestep_draws
from models.sample_random import SampleRandom
from pipeline.data.order import Share
from pipeline.networks.exchange import rows_of_all


class DiffusionLoss(nn.Module):
    """The loss of clean samples, each at a timestep and with noise of its own.

    Validation samples timesteps uniformly, so it does not depend on the losses that a training has had.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.draws = create_timestep_draws(config)
        self._diffusion = Diffusion(config)
        self._losses: list[Tensor] = []
        """Timesteps and losses of the parts of this step, (rows, 2) float64 each."""

    def forward(self, denoise: Denoise, x0: Tensor, random: SampleRandom) -> Tensor:
        """Mean loss of x0 (B, C, ...)."""
        draws = self.draws if self.training else UniformTimesteps(self._diffusion.num_timesteps)
        t, weights = (part.to(x0.device, non_blocking=True) for part in draws.draw(random))
        losses = self._diffusion.training_losses(denoise, x0, t, random.normal_like("noise", x0)).loss
        if isinstance(draws, LossAwareTimesteps):
            self._losses.append(torch.stack([t.double(), losses.detach().double()], dim=1))
        return (weights * losses).mean()

    def end_step(self, share: Share) -> None:
        """Let loss-aware timesteps remember the losses of a whole global batch, in its order."""
        if self._losses and isinstance(self.draws, LossAwareTimesteps):
            losses = torch.cat(self._losses)[: len(share)]  # those of parts that were computed again come last
            pairs = rows_of_all(losses, share).cpu()
            self.draws.update(pairs[:, 0].long(), pairs[:, 1])
        self.forget_step()

    def forget_step(self) -> None:
        """Let go of the losses of this step so far."""
        self._losses.clear()


def diffusion_losses_of(objective: nn.Module) -> list[DiffusionLoss]:
    """The diffusion losses that an objective is made of: one or none."""
    return [module for module in objective.modules() if isinstance(module, DiffusionLoss)]


def draws_of(objective: nn.Module) -> TimestepDraws | None:
    """The distribution of the objective's timesteps; None if it is not of a diffusion."""
    return next((module.draws for module in diffusion_losses_of(objective)), None)
