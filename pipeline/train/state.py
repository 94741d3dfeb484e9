"""The state of one training: network, average, optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from models.diffusion.timesteps import TimestepDraws
from models.layers.ema import AveragePairs, create_average
from pipeline.recipe.train_sections import TrainConfig
from pipeline.train.muon import Muon, kernels_of

if TYPE_CHECKING:
    from pipeline.train.sharding import Sharding


@dataclass
class TrainState:
    """Everything that changes during a training."""

    network: nn.Module
    """The network in training, float32; this worker's part of it where the state is divided."""
    ema: nn.Module
    """Its moving average, or this worker's part of it: what is saved and sampled from."""
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
    ends: bool = False
    """Whether all workers have agreed to end after this step, with a checkpoint."""
    draws: TimestepDraws | None = None
    """The distribution of a diffusion objective's timesteps; None for other objectives."""
    sharding: Sharding | None = None
    """How the state is divided among the workers; None: each has all of it."""

    @property
    def average(self) -> nn.Module | None:
        """The whole average, on the first worker of a divided state; every worker asks for it."""
        return self.ema if self.sharding is None else self.sharding.gather_network(self.ema)

    @cached_property
    def average_pairs(self) -> AveragePairs:
        """What each step moves of the average, and towards what."""
        return AveragePairs.of(self.ema, self.network)

    def clip_gradients(self, largest: float) -> None:
        """Scale the gradients to a norm of at most ``largest`` (0: any), and note what it was."""
        if self.sharding is not None:
            self.grad_norm = self.sharding.clip_gradients(largest or math.inf)
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, largest or math.inf)


def create_state(
    network: nn.Module, config: TrainConfig, device: torch.device, sharding: Sharding | None = None
) -> TrainState:
    """A state at step 0: of a network, or of this worker's part of a divided one."""
    network.to(device)
    optimizer = create_optimizer(network, config, None if sharding is None else sharding.kernels)
    if sharding is not None:
        optimizer.shards = sharding.matrices
    state = TrainState(network, create_average(network), optimizer, sharding=sharding)
    state.loss_sum, state.bad_step = state.loss_sum.to(device), state.bad_step.to(device)
    state.num_bad = state.num_bad.to(device)
    return state


def create_optimizer(network: nn.Module, config: TrainConfig, kernels_by_name: list[str] | None = None) -> Muon:
    """The optimizer; weight decay is for matrices and kernels, not for biases, norms and single vectors.

    Args:
        network: The network, or this worker's part of it.
        config: Optimisation.
        kernels_by_name: What Muon moves; None: what ``kernels_of`` the network are.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kernels: list[Tensor] = []
    if config.optimizer == "muon":
        names = kernels_by_name
        kernels = kernels_of(network) if names is None else [network.get_parameter(name) for name in names]
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
