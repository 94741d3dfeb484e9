"""DDIM inversion on data whose perfect denoiser is known: how exactly it comes back, and where it ends."""

from functools import partial
from typing import Literal

import pytest
import torch
from gaussian_data import PUBLISHED_STD, GaussianData, invert_ddim, make_diffusion, output_from_x0

from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.samplers import sample_along
from models.diffusion.schedules import strided_timesteps
from models.diffusion.steps import SamplerState, ddim_invert_step, ddim_step

DATA = GaussianData(std=0.5)


def reconstruction_error(
    num_steps: int,
    data: GaussianData = DATA,
    *,
    num_refinements: int = 0,
    spacing: Literal["linspace", "trailing"] = "linspace",
    **of: str,
) -> float:
    """Largest error of x0 in [-std, std] that is walked to its noise and back, in units of std."""
    diffusion, steps = make_diffusion(**of), strided_timesteps(1000, num_steps, spacing)
    x0 = data.std * torch.linspace(-1, 1, 101, dtype=torch.float64)[None]
    denoise = data.denoiser(diffusion)
    x_T = invert_ddim(denoise, x0, diffusion, steps, num_refinements=num_refinements)
    return (sample_along(ddim_step, denoise, x_T, diffusion, steps) - x0).abs().max().item() / data.std


@pytest.mark.parametrize(("num_steps", "published"), [(27, 0.107), (50, 0.058), (250, 0.012)])
def test_ddim_inversion_reconstructs_within_the_published_bounds(num_steps: int, published: float) -> None:
    data = GaussianData(std=PUBLISHED_STD)
    plain = reconstruction_error(num_steps, data)
    assert round(plain, 3) == published  # on the timesteps of the edits: the very figure, which has three places
    assert reconstruction_error(num_steps, data, spacing="trailing") < published
    assert reconstruction_error(num_steps, data, num_refinements=1) < published / 20


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_ddim_inversion_is_the_same_for_every_prediction(prediction: str) -> None:
    assert reconstruction_error(27, prediction=prediction) == pytest.approx(reconstruction_error(27), abs=1e-9)


def test_ddim_inversion_with_refinements_converges_to_the_exact_inverse() -> None:
    errors = [reconstruction_error(27, num_refinements=number) for number in (0, 1, 2, 20)]
    assert errors[1] < 0.0045
    assert errors[2] < 2e-4
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-12


def test_ddim_inversion_limits_every_prediction_as_the_steps_forwards_do() -> None:
    diffusion, steps, limit = make_diffusion(), strided_timesteps(1000, 27), ClipRange(-0.3, 0.3)
    x0 = DATA.std * torch.linspace(-1, 1, 101, dtype=torch.float64)[None]

    def limited(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return output_from_x0(diffusion, limit(DATA.posterior_mean(diffusion, x, t)), x, t)

    for num_refinements in (0, 2):
        walk = partial(invert_ddim, x0=x0, diffusion=diffusion, timesteps=steps, num_refinements=num_refinements)
        actual = walk(DATA.denoiser(diffusion), limit=limit)
        torch.testing.assert_close(actual, walk(limited), rtol=0, atol=1e-9)
        assert (actual - walk(DATA.denoiser(diffusion))).abs().max() > 0.1


def test_ddim_inversion_ends_in_standard_noise() -> None:
    diffusion = make_diffusion()
    x0 = DATA.std * NoiseSource.from_seeds([0]).normal((20_000,))
    x_T = invert_ddim(DATA.denoiser(diffusion), x0, diffusion, strided_timesteps(1000, 250))
    assert x_T.std().item() == pytest.approx(1, abs=0.02)


def test_ddim_invert_step_takes_a_timestep_per_item() -> None:
    diffusion, visits = make_diffusion(), list[list[int]]()
    t, t_next = torch.tensor([-1, 0, 500]), torch.tensor([37, 40, 999])

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        visits.append(t.tolist())
        return DATA.denoiser(diffusion)(x, t)

    x = torch.randn(3, 4, dtype=torch.float64)
    state = SamplerState(x, x, t)
    batched = ddim_invert_step(denoise, state, t, t_next, diffusion, num_refinements=1)
    assert visits == [[0, 0, 500], [37, 40, 999]]  # where each stands, then where it arrives
    for i in range(3):
        one = slice(i, i + 1)
        alone = SamplerState(*(part[one] for part in state))
        actual = ddim_invert_step(denoise, alone, t[one], t_next[one], diffusion, num_refinements=1)
        assert torch.equal(actual.x, batched.x[one])
