"""Limits on the predicted x0: what they keep, rescale and agree with."""

from dataclasses import replace

import pytest
import torch
from gaussian_data import GaussianData, make_diffusion, output_from_x0

from models.diffusion.config import SamplerConfig
from models.diffusion.limits import ClipRange, DynamicThreshold
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise
from models.diffusion.samplers import config_timesteps, iterate_steps, make_step, sample
from models.diffusion.steps import SamplerState, ddim_step


def test_limited_x0_comes_with_the_eps_that_agrees_with_it() -> None:
    diffusion = make_diffusion()
    t, t_prev = torch.tensor([700]), torch.tensor([600])
    x = torch.randn(1, 5, dtype=torch.float64)
    state = SamplerState(x, x, torch.tensor([1000]))
    after = ddim_step(lambda x, _t: torch.zeros_like(x) - 2, state, t, t_prev, diffusion, limit=ClipRange(-0.5, 0.5))
    a, s = (diffusion.alpha_bar(t) ** 0.5).item(), ((1 - diffusion.alpha_bar(t)) ** 0.5).item()
    x0 = ((x + 2 * s) / a).clamp(-0.5, 0.5)
    torch.testing.assert_close(after.x0, x0)
    torch.testing.assert_close(after.x, diffusion.q_sample(x0, t_prev, (x - a * x0) / s))


def test_dynamic_threshold_rescales_each_item_by_its_own_quantile() -> None:
    x0 = torch.stack([torch.linspace(-4, 4, 201), torch.linspace(-0.5, 0.5, 201)])
    actual = DynamicThreshold(0.9)(x0)
    threshold = torch.quantile(x0[0].abs(), 0.9)
    torch.testing.assert_close(actual[0], x0[0].clamp(-threshold, threshold) / threshold)
    assert actual[0].abs().max() == 1
    assert torch.equal(actual[1], x0[1])  # a quantile below 1 leaves a picture alone


@pytest.mark.parametrize("method", ["ddpm", "analytic", "ddim", "dpmpp_2m", "heun"])
def test_every_method_limits_every_prediction(method: str) -> None:
    data, diffusion = GaussianData(), make_diffusion()
    config = SamplerConfig(method=method, num_steps=9, eta=0.5, clip_range=0.3)  # type: ignore[arg-type]
    x_T = torch.randn(2, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    measured = data.posterior_variance(diffusion)

    def eager(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output_from_x0(diffusion, 2 * data.posterior_mean(diffusion, x, t), x, t)

    def limited(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output_from_x0(diffusion, (2 * data.posterior_mean(diffusion, x, t)).clamp(-0.3, 0.3), x, t)

    def walk(denoise: Denoise, config: SamplerConfig) -> torch.Tensor:
        step = make_step(config, NoiseSource.from_seeds([1, 2]), x0_variance=measured)
        states = iterate_steps(step, denoise, x_T, diffusion, config_timesteps(config, diffusion))
        return torch.stack([state.x for state in states])

    free_config = replace(config, clip_x0=False)
    actual, expected, free = walk(eager, config), walk(limited, free_config), walk(eager, free_config)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    assert (actual - free).abs().max() > 0.1


@pytest.mark.parametrize(
    ("settings", "largest"),
    [({"clip_x0": True}, 1), ({"clip_x0": False, "dynamic_threshold_prob": 0.9, "clip_range": 0.5}, 0.5)],
)
def test_config_limits_the_predicted_x0(settings: dict[str, object], largest: float) -> None:
    config = SamplerConfig(method="ddim", num_steps=3, **settings)  # type: ignore[arg-type]
    diffusion = make_diffusion(prediction="x0")
    actual = sample(lambda x, _t: 5 * x, torch.randn(2, 50), diffusion, config)
    assert actual.abs().max().item() == pytest.approx(largest)
