"""The diffusion loss, and the random draws of one training step, all from one seed."""

from __future__ import annotations

import torch
import torch.distributed
from torch import Tensor, nn

from models.diffusion.config import DiffusionConfig
from models.diffusion.noise import derive_seed
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.timesteps import LossAwareTimesteps, TimestepDraws, UniformTimesteps, create_timestep_draws


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of everything random that one worker does in one step; a resumed run repeats it."""
    return derive_seed(seed, f"train/{step}/{rank}")


def draw_keep(size: int, drop_prob: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """False with probability ``drop_prob``, per sample, bool, (size,)."""
    return (torch.rand(size, generator=generator) >= drop_prob).to(device, non_blocking=True)


def draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise in the shape, type and place of ``like``; on a GPU it is sampled there."""
    if like.device.type != "cpu":
        seed = int(torch.randint(2**62, (1,), generator=generator))
        generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


class DiffusionLoss(nn.Module):
    """The loss of clean samples, each at a timestep and with noise of its own.

    Validation samples timesteps uniformly, so it does not depend on the losses that a training has had.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.draws = create_timestep_draws(config)
        self._diffusion = Diffusion(config)

    def forward(self, denoise: Denoise, x0: Tensor, generator: torch.Generator) -> Tensor:
        """Mean loss of x0 (B, C, ...)."""
        draws = self.draws if self.training else UniformTimesteps(self._diffusion.num_timesteps)
        t, weights = (part.to(x0.device, non_blocking=True) for part in draws.draw(len(x0), generator))
        losses = self._diffusion.training_losses(denoise, x0, t, draw_normal(x0, generator)).loss
        if isinstance(draws, LossAwareTimesteps):
            pairs = _of_all_workers(torch.stack([t.double(), losses.detach().double()], dim=1)).cpu()
            draws.update(pairs[:, 0].long(), pairs[:, 1])
        return (weights * losses).mean()


def draws_of(objective: nn.Module) -> TimestepDraws | None:
    """The distribution of the objective's timesteps; None if it is not of a diffusion."""
    return next((module.draws for module in objective.modules() if isinstance(module, DiffusionLoss)), None)


def _of_all_workers(rows: Tensor) -> Tensor:
    """The rows of all workers in the order of their ranks, as many of each."""
    if not torch.distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)
