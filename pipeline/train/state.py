"""The state of one training: network, average, optimizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.diffusion.timesteps import TimestepDraws
from models.layers.ema import create_average
from pipeline.recipe.sections import TrainConfig
from pipeline.train.muon import Muon, kernels_of


@dataclass
class TrainState:
    """Everything that changes during a training."""

    network: nn.Module
    """The network in training, float32."""
    ema: nn.Module
    """Its moving average: what is saved and sampled from."""
    optimizer: Muon
    """AdamW, or Muon for the kernels and AdamW for the rest."""
    step: int = 0
    """Optimizer steps done."""
    loss_sum: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))
    """Sum and number of the losses since the last log line, on the device."""
    bad_step: Tensor = field(default_factory=lambda: torch.full((), -1, dtype=torch.int64))
    """First step (1-based) that was not finite beyond the budget, -1 if none, on the device: no update after it."""
    num_bad: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """Steps so far whose loss or gradient was not finite, on the device; they changed nothing."""
    grad_norm: Tensor = field(default_factory=lambda: torch.zeros(()))
    """Norm of the last gradient before clipping, on the device."""
    draws: TimestepDraws | None = None
    """The distribution of a diffusion objective's timesteps; None for other objectives."""


def create_state(network: nn.Module, config: TrainConfig, device: torch.device) -> TrainState:
    """A state at step 0."""
    network.to(device)
    state = TrainState(network, create_average(network), create_optimizer(network, config))
    state.loss_sum, state.bad_step = state.loss_sum.to(device), state.bad_step.to(device)
    state.num_bad = state.num_bad.to(device)
    return state


def create_optimizer(network: nn.Module, config: TrainConfig) -> Muon:
    """The optimizer; weight decay is for matrices and kernels, not for biases, norms and single vectors."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kernels = kernels_of(network) if config.optimizer == "muon" else []
    of_muon = set(kernels)
    others = [parameter for parameter in parameters if parameter not in of_muon]
    groups = [
        {"params": kernels, "weight_decay": config.weight_decay, "muon": True},
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": config.weight_decay, "muon": False},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0, "muon": False},
    ]
    return Muon(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
