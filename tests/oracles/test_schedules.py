"""Schedules, timesteps and single steps against diffusers' schedulers: the first rows of docs/decisions.md's oracles."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler
from diffusers.schedulers.scheduling_unclip import betas_for_alpha_bar
from gaussian_data import GaussianData, make_diffusion
from torch import Tensor

from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.samplers import sample_along
from models.diffusion.schedules import alpha_bar_table, cosine_betas, strided_timesteps
from models.diffusion.steps import ddim_step, ddpm_step, initial_state

COSINE = "squaredcos_cap_v2"


class GivenNoise(NoiseSource):
    """Draws what it is given, so that both sides draw the same."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(())
        self.noise = noise

    def normal_like(self, x: Tensor) -> Tensor:
        assert x.shape == self.noise.shape
        return self.noise


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_cosine_schedule_is_that_of_unclip_scheduler() -> None:
    theirs = betas_for_alpha_bar(1000).double()
    torch.testing.assert_close(cosine_betas(1000), theirs, rtol=1e-7, atol=0)  # theirs are rounded to float32
    ratio = torch.cumprod(1 - theirs, 0) / alpha_bar_table("cosine", 1000)[1:]
    assert (ratio[:-1] - 1).abs().max() < 6e-7
    assert abs(ratio[-1] - 1) < 2e-5  # 1 - 0.999, of a float32 0.999


def test_linear_schedule_is_that_of_ddpm_scheduler() -> None:
    theirs = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear").betas.double()
    ratio = torch.cumprod(1 - theirs, 0) / alpha_bar_table("linear", 1000)[1:]
    assert (ratio - 1).abs().max() < 6e-7


@pytest.mark.parametrize("num_steps", [7, 25, 50, 250])
def test_strided_timesteps_are_those_of_diffusers(num_steps: int) -> None:
    ours = list(strided_timesteps(1000, num_steps))
    unclip, ddpm = UnCLIPScheduler(), DDPMScheduler(1000, timestep_spacing="linspace")
    for scheduler in (unclip, ddpm):
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == ours


def test_trailing_timesteps_are_those_of_diffusers() -> None:
    for num_steps in (10, 15, 50):
        scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
        scheduler.set_timesteps(num_steps)
        assert scheduler.timesteps.tolist() == list(strided_timesteps(1000, num_steps, "trailing"))


@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize(("t", "t_prev"), [(999, 959), (500, 460), (460, 420), (40, 0), (0, -1)])
def test_ancestral_step_is_that_of_ddpm_scheduler(variance: str, t: int, t_prev: int) -> None:
    diffusion = make_diffusion(variance=variance)
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    output = 0.5 * torch.randn(2, 6 if variance == "learned_range" else 3, 8, 8, generator=seeded(2))
    scheduler = DDPMScheduler(1000, beta_schedule=COSINE, variance_type=variance, clip_sample=True)
    scheduler.set_timesteps(timesteps=[t, t_prev] if t_prev >= 0 else [t])
    theirs = scheduler.step(output, t, x, generator=seeded(3)).prev_sample
    noise = GivenNoise(torch.randn(x.shape, generator=seeded(3)))
    ours = ddpm_step(
        lambda *_: output,
        initial_state(x, diffusion),
        torch.full((2,), t),
        torch.full((2,), t_prev),
        diffusion,
        noise=noise,
        limit=ClipRange(),
    ).x
    # float32 coefficients at the noisy end and float32 beta_0 are theirs, not ours
    torch.testing.assert_close(ours, theirs, rtol=0, atol=8e-5 if t > 0 else 6e-4)
    if variance == "learned_range" and t_prev >= 0:
        unclip = UnCLIPScheduler(variance_type="learned_range", clip_sample=True)
        theirs = unclip.step(output, t, x, prev_timestep=t_prev, generator=seeded(3)).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=0, atol=8e-5)


@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_is_that_of_diffusers_where_its_previous_step_is_right(num_steps: int) -> None:
    # trailing spacing with T % n == 0; elsewhere DDIMScheduler steps by T // n and not along its own list
    scheduler = DDIMScheduler(
        1000,
        beta_schedule=COSINE,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(num_steps)
    diffusion = make_diffusion(prediction="v")
    denoise = GaussianData(0.5).denoiser(diffusion)
    x = torch.randn(2, 3, 8, 8, generator=seeded())
    theirs = x
    for t in scheduler.timesteps:
        theirs = scheduler.step(denoise(theirs, t.expand(2)), t, theirs, eta=0.0).prev_sample
    ours = sample_along(ddim_step, denoise, x, diffusion, strided_timesteps(1000, num_steps, "trailing"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_v_and_noising_are_those_of_diffusers() -> None:
    scheduler, diffusion = DDPMScheduler(1000, beta_schedule=COSINE), make_diffusion(prediction="v")
    x0, noise = torch.randn(2, 64, 5, generator=seeded()).unbind(0)
    t = torch.cat([torch.tensor([0, 999]), torch.randint(1000, (62,), generator=seeded())])
    torch.testing.assert_close(diffusion.target(x0, noise, t), scheduler.get_velocity(x0, noise, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(diffusion.q_sample(x0, t, noise), scheduler.add_noise(x0, noise, t), rtol=0, atol=1e-5)
