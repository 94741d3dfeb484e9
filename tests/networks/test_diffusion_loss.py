"""The loss of a diffusion at drawn timesteps."""

import torch
from torch import Tensor

from models.diffusion.config import DiffusionConfig
from models.diffusion.process import Denoise
from models.sample_random import SampleRandom
from pipeline.data.order import Share
from pipeline.networks.diffusion_loss import DiffusionLoss, draws_of

CONFIG = DiffusionConfig(num_timesteps=3, timestep_draws="loss_aware")
X0 = torch.zeros(3000, 2)


def _worse_later(timesteps: list[Tensor]) -> DiffusionLoss:
    """A loss whose history is full, of a network (below) that is the further off the later it is."""
    loss = DiffusionLoss(CONFIG)
    loss(_network(timesteps), X0[:300], SampleRandom.of_samples(0, range(300)))
    loss.end_step(Share(300))
    timesteps.clear()
    return loss


def _network(timesteps: list[Tensor]) -> Denoise:
    def denoise(x: Tensor, t: Tensor) -> Tensor:
        timesteps.append(t)
        return (3.0 * t)[:, None].expand_as(x)

    return denoise


def test_loss_aware_timesteps_favour_large_losses_and_estimate_the_same_loss() -> None:
    timesteps: list[Tensor] = []
    loss = _worse_later(timesteps)
    actual = loss(_network(timesteps), X0, SampleRandom.of_samples(1, range(3000)))
    counts = torch.bincount(timesteps[0], minlength=3)
    assert counts[0] < counts[1] < counts[2]
    assert counts[2] > 2000  # 37 of 48, less what ten losses stray
    torch.testing.assert_close(actual, torch.tensor((1 + 10 + 37) / 3), rtol=0.05, atol=0)


def test_validation_samples_timesteps_uniformly_and_keeps_no_losses() -> None:
    timesteps: list[Tensor] = []
    loss = _worse_later(timesteps).eval()
    before = loss.draws.state_dict()
    loss(_network(timesteps), X0, SampleRandom.of_samples(1, range(3000)))
    loss.end_step(Share(3000))
    assert torch.bincount(timesteps[0]).min() > 900
    assert all(torch.equal(value, before[name]) for name, value in loss.draws.state_dict().items())
    assert draws_of(torch.nn.Sequential(loss)) is loss.draws
