"""Random timesteps to which a training batch is noised.

Legend: B batch, T diffusion steps. A draw gives t (B,), int64, and a weight for each item's loss, so that the weighted
mean estimates the same objective for every distribution of t.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from models.diffusion.config import DiffusionConfig
from models.sample_random import SampleRandom

_STREAM = "timestep"


class UniformTimesteps:
    """Every timestep with the same probability; weights are 1."""

    def __init__(self, num_timesteps: int) -> None:
        self.num_timesteps = num_timesteps

    def draw(self, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Timesteps and weights, (B,) each, on the CPU."""
        return random.integers(_STREAM, self.num_timesteps), torch.ones(len(random))

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is remembered."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing is remembered."""


class LossAwareTimesteps:
    """Timesteps in proportion to sqrt(E[loss^2]): arXiv:2102.09672, section 3.3, for training on the bound itself.

    Uniform until every timestep has ``history`` losses. Every worker must be given the losses of all workers, in the
    same order, so that all draw from the same distribution.
    """

    def __init__(self, num_timesteps: int, *, history: int = 10, uniform_prob: float = 0.001) -> None:
        """Remember ``history`` losses per timestep (paper: 10); draw uniformly with probability ``uniform_prob``."""
        self.num_timesteps = num_timesteps
        self.uniform_prob = uniform_prob
        self._losses = torch.zeros(num_timesteps, history, dtype=torch.float64)
        self._counts = torch.zeros(num_timesteps, dtype=torch.int64)

    def probabilities(self) -> Tensor:
        """Probability of each timestep, (T,) float64."""
        uniform = torch.full((self.num_timesteps,), 1 / self.num_timesteps, dtype=torch.float64)
        if bool((self._counts < self._losses.shape[1]).any()):
            return uniform
        size = self._losses.square().mean(dim=1).sqrt()
        return (1 - self.uniform_prob) * size / size.sum() + self.uniform_prob * uniform

    def draw(self, random: SampleRandom) -> tuple[Tensor, Tensor]:
        """Timesteps, and weights 1 / (T p), (B,) each, on the CPU."""
        probabilities = self.probabilities()
        units = random.seeds(_STREAM).double() * 2.0**-63
        sums = probabilities.cumsum(0)
        t = torch.searchsorted(sums, units * sums[-1], right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * probabilities[t])).to(torch.float32)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the unweighted loss of each item, (B,); the oldest of its timestep is forgotten.

        A loss that is not finite is ignored: the training must be able to draw until its next check stops it.
        """
        for step, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not math.isfinite(loss):
                continue
            self._losses[step] = torch.roll(self._losses[step], -1)
            self._losses[step, -1] = loss
            self._counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed run needs: losses (T, history) and counts (T,)."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of ``state_dict``.

        Raises:
            ValueError: If it was made for another number of timesteps or another history.
        """
        if state["losses"].shape != self._losses.shape:
            raise ValueError(f"losses {tuple(state['losses'].shape)}: expected {tuple(self._losses.shape)}")
        self._losses = state["losses"].clone()
        self._counts = state["counts"].clone()


TimestepDraws = UniformTimesteps | LossAwareTimesteps


def create_timestep_draws(config: DiffusionConfig) -> TimestepDraws:
    """The draws that ``timestep_draws`` names, without a history."""
    kind = LossAwareTimesteps if config.timestep_draws == "loss_aware" else UniformTimesteps
    return kind(config.num_timesteps)
