"""The random draws of one training step, all from one seed."""

from __future__ import annotations

import torch
from torch import Tensor

from models.diffusion import Denoise, Diffusion
from models.noise import derive_seed


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of all draws that one worker makes in one step; a resumed run draws what it would have drawn."""
    return derive_seed(seed, f"train/{step}/{rank}")


def draw_timesteps(size: int, num_timesteps: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Uniform timesteps 0 .. T - 1, int64, (size,)."""
    return torch.randint(num_timesteps, (size,), generator=generator).to(device, non_blocking=True)


def draw_keep(size: int, drop_prob: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """False with probability ``drop_prob``, per sample, bool, (size,)."""
    return (torch.rand(size, generator=generator) >= drop_prob).to(device, non_blocking=True)


def draw_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise in the shape, type and place of ``like``; on a GPU drawn there, from the same seed."""
    if like.device.type != "cpu":
        seed = int(torch.randint(2**62, (1,), generator=generator))
        generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def diffusion_loss(diffusion: Diffusion, denoise: Denoise, x0: Tensor, generator: torch.Generator) -> Tensor:
    """Mean loss of clean samples (B, C, ...), each at a timestep and with noise of its own."""
    t = draw_timesteps(len(x0), diffusion.num_timesteps, generator, x0.device)
    return diffusion.training_losses(denoise, x0, t, draw_normal(x0, generator)).loss.mean()
