"""DPM-Solver++(2M) against diffusers and k-diffusion, on analytic data."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from gaussian_data import GaussianData, make_diffusion
from torch import Tensor

from models.diffusion.samplers import sample_along
from models.diffusion.schedules import strided_timesteps
from models.diffusion.steps import dpmpp_2m_step

PINNED = Path(sys.prefix) / "oracles"
"""Where `make test` puts k-diffusion, without the packages that its other modules ask for."""


def k_diffusion_sampling() -> ModuleType:
    """``k_diffusion.sampling`` alone: the package's own ``__init__`` imports everything it has."""
    assert (PINNED / "k_diffusion").is_dir(), f"{PINNED} holds no k_diffusion: make test puts it there"
    package = ModuleType("k_diffusion")
    package.__path__ = [str(PINNED / "k_diffusion")]
    sys.modules.setdefault("k_diffusion", package)
    return importlib.import_module("k_diffusion.sampling")


def noise() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("schedule", "theirs"), [("cosine", "squaredcos_cap_v2"), ("linear", "linear")])
@pytest.mark.parametrize("num_steps", [10, 25])
def test_dpmpp_2m_is_that_of_diffusers(schedule: str, theirs: str, num_steps: int) -> None:
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=theirs,
        timestep_spacing="trailing",
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=False,
        euler_at_final=True,
        final_sigmas_type="zero",
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(num_steps)
    timesteps = strided_timesteps(1000, num_steps, "trailing")
    assert scheduler.timesteps.tolist() == list(timesteps)
    diffusion = make_diffusion(prediction="v", schedule=schedule)
    denoise = GaussianData(0.5).denoiser(diffusion)
    x = noise()
    state = x
    for t in scheduler.timesteps:
        state = scheduler.step(denoise(state, t.expand(2)), t, state).prev_sample
    ours = sample_along(dpmpp_2m_step, denoise, x, diffusion, timesteps)
    torch.testing.assert_close(ours, state, rtol=0, atol=TOLERANCE[schedule])


# diffusers takes sigma from float32 alpha_bar, of which 2e-9 is left at the end of the cosine chain
TOLERANCE = {"cosine": 2e-3, "linear": 2e-5}


@pytest.mark.parametrize("num_steps", [10, 25])
def test_dpmpp_2m_is_that_of_k_diffusion(num_steps: int) -> None:
    # k-diffusion works on y = x / a at noise sigma = s / a; in float64 the two differ by rounding alone
    sampling = k_diffusion_sampling()
    diffusion = make_diffusion(prediction="x0")
    data = GaussianData(0.5)
    timesteps = strided_timesteps(1000, num_steps, "trailing")
    t = torch.tensor(timesteps)
    alpha_bar = diffusion.alpha_bar(t)
    sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1, dtype=torch.float64)])

    def denoised(y: Tensor, sigma: Tensor) -> Tensor:
        step = t[(sigmas[:-1] - sigma[0]).abs().argmin()].expand(len(y))
        return data.posterior_mean(diffusion, y * diffusion.alpha_bar(step[:1]).sqrt(), step)

    x = noise().double()
    theirs = sampling.sample_dpmpp_2m(denoised, x / alpha_bar[0].sqrt(), sigmas, disable=True)
    ours = sample_along(dpmpp_2m_step, data.denoiser(diffusion), x, diffusion, timesteps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
