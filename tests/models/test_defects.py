"""Defects seen in public unCLIP and diffusion code, by name: ours has none of them. The pipeline's are beside it."""

from functools import partial

import pytest
import torch
from gaussian_data import GaussianData, make_diffusion, output_from_x0
from tiny_models import DIMS, make_text, randomise
from torch import Tensor

from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import config_timesteps, iterate_steps, sample
from models.diffusion.steps import ddim_step
from models.pixels import resize
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.sample_random import SampleRandom
from models.upsampler.degradation import random_blur


def gaussian_denoiser(diffusion: Diffusion, visits: list[int]) -> object:
    denoise = GaussianData(0.5).denoiser(diffusion)

    def spy(x: Tensor, t: Tensor) -> Tensor:
        visits.append(int(t[0]))
        return denoise(x, t)

    return spy


@pytest.mark.parametrize("num_steps", [7, 27, 50])
def test_ddim_does_not_start_below_the_last_timestep_from_pure_noise(num_steps: int) -> None:
    diffusion, visits = make_diffusion(), list[int]()
    config = SamplerConfig(method="ddim", num_steps=num_steps, clip_x0=False)
    sample(gaussian_denoiser(diffusion, visits), torch.randn(1, 8), diffusion, config)  # type: ignore[arg-type]
    assert visits[0] == 999
    assert visits == list(config_timesteps(config, diffusion))


def test_ddim_previous_step_is_the_next_of_its_own_list() -> None:
    # a denoiser that always says x0 = 0: after a step to t_prev, x is sqrt(1 - alpha_bar_prev) eps, whatever the stride
    diffusion = make_diffusion(prediction="x0")
    timesteps = (999, 700, 650, 13)
    x = torch.randn(1, 16)
    states = iterate_steps(partial(ddim_step), lambda x, _: torch.zeros_like(x), x, diffusion, timesteps)
    eps = x / diffusion.signal_noise(x, torch.tensor([999]))[1]
    for state, t_prev in zip(states, (*timesteps[1:], -1), strict=True):
        torch.testing.assert_close(state.x, diffusion.signal_noise(x, torch.tensor([t_prev]))[1] * eps)


def test_alpha_bar_of_the_previous_step_is_not_off_by_one() -> None:
    diffusion = make_diffusion()
    for t in (0, 1, 500, 999):
        now, before = diffusion.alpha_bar(torch.tensor([t])), diffusion.alpha_bar(torch.tensor([t - 1]))
        assert before > now
        of_x0, of_x_t, variance = diffusion.posterior_coefficients(torch.tensor([t]), torch.tensor([t - 1]))
        if t == 0:
            assert (before.item(), of_x0.item(), of_x_t.item(), variance.item()) == (1.0, 1.0, 0.0, 0.0)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_vlb_term_does_not_ignore_what_the_network_predicts(prediction: str) -> None:
    # the same x0 said in three ways has the same bound, and a wrong one a larger bound
    diffusion = make_diffusion(prediction=prediction)
    x0, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64).clamp(-1, 1).unbind(0)
    t = torch.tensor([1, 100, 500, 900])
    x_t = diffusion.q_sample(x0, t, noise)

    def bound(x0_hat: Tensor) -> Tensor:
        output = output_from_x0(diffusion, x0_hat, x_t, t)
        return diffusion.vlb_terms(diffusion.predict(output, x_t, t, t - 1), x0, x_t, t)

    reference = make_diffusion(prediction="x0")
    x0_hat = x0 + 0.1
    expected = reference.vlb_terms(reference.predict(x0_hat, x_t, t, t - 1), x0, x_t, t)
    torch.testing.assert_close(bound(x0_hat), expected)
    assert bool((bound(x0) < expected).all())


def test_low_resolution_conditioning_is_not_resized_by_nearest_neighbour() -> None:
    ramp = torch.linspace(-0.5, 0.5, 8).expand(1, 3, 8, 8)
    large = resize(ramp, 32)
    assert large[0, 0, 0].diff()[4:-4].min() > 0  # nearest neighbour has steps of width 4


def test_blur_is_not_sampled_once_for_a_batch() -> None:
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    blurred = random_blur(picture.repeat(8, 1, 1, 1), SampleRandom.of_samples(0, range(8)))
    assert len({round(float(one.std()), 6) for one in blurred}) == 2  # blurred ones and plain ones, in one batch


def test_text_mask_is_not_inferred_from_encodings_that_are_not_zero() -> None:
    # a token whose state is exactly zero is still a token; padding with states that are not zero is still padding
    torch.manual_seed(0)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2), DIMS).eval()
    randomise(prior)
    text = make_text((4,), 7)
    text.hidden[:, 2] = 0
    x, t = torch.randn(1, DIMS.embed_dim), torch.tensor([500])
    with_token = prior(x, t, prior.encode_condition(text))
    assert bool(prior.encode_condition(text).valid[0, 2])
    text.mask[:, 2] = False
    assert (prior(x, t, prior.encode_condition(text)) - with_token).abs().max() > 1e-4
    text.mask[:, 2] = True
    text.hidden[:, 5] = 1e3
    torch.testing.assert_close(prior(x, t, prior.encode_condition(text)), with_token)


def test_picture_does_not_change_with_the_rest_of_its_batch() -> None:
    diffusion = make_diffusion()
    denoise = GaussianData(0.5).denoiser(diffusion)
    config = SamplerConfig(method="ddpm", num_steps=5)

    def draw(seeds: list[int]) -> Tensor:
        noise = NoiseSource.from_seeds(seeds)
        return sample(denoise, noise.normal((8,)), diffusion, config, noise)

    assert torch.equal(draw([4, 7])[1:], draw([7]))
