"""Samplers on data whose perfect denoiser is known, and against solvers written out here."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import get_args, get_type_hints

import pytest
import torch
from gaussian_data import PUBLISHED_STD, Denoise, GaussianData, make_diffusion, output_from_x0
from torch import Tensor

from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import (
    SAMPLERS,
    config_timesteps,
    iterate_steps,
    make_step,
    num_network_calls,
    sample,
    sample_along,
)
from models.diffusion.schedules import strided_timesteps
from models.diffusion.steps import (
    SamplerState,
    Step,
    analytic_step,
    ddim_step,
    ddpm_step,
    dpmpp_2m_step,
    heun_step,
    initial_state,
)
from models.rows import concat_rows, take_rows

METHODS = tuple(SAMPLERS)
DATA = GaussianData(std=0.5)


def final_scale(step: Step, diffusion: Diffusion, steps: Sequence[int], data: GaussianData) -> float:
    """A deterministic sampler on centred Gaussian data multiplies x_T: by the data's std where it is right."""
    x = torch.ones(1, 1, dtype=torch.float64)
    return sample_along(step, data.denoiser(diffusion), x, diffusion, steps).item() / data.std


# ---- analytic Gaussian data ----------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
@pytest.mark.parametrize(
    ("method", "num_steps", "tolerance"),
    [("ddpm", 1000, 0.02), ("ddim", 250, 0.015), ("analytic", 15, 0.015), ("dpmpp_2m", 27, 0.03), ("heun", 27, 0.03)],
)
def test_sampler_ends_in_the_data_distribution(
    method: str, num_steps: int, tolerance: float, prediction: str, schedule: str
) -> None:
    diffusion = make_diffusion(prediction=prediction, schedule=schedule)
    data = GaussianData(std=0.5, mean=0.3)
    config = SamplerConfig(method=method, num_steps=num_steps, clip_x0=False)  # type: ignore[arg-type]
    x = NoiseSource.from_seeds([0, 1]).normal((10_000,))
    noise = NoiseSource.from_seeds([0, 1], "steps")
    actual = sample(
        data.denoiser(diffusion), x, diffusion, config, noise, x0_variance=data.posterior_variance(diffusion)
    )
    assert actual.dtype == torch.float32
    assert actual.mean().item() == pytest.approx(0.3, abs=0.02)
    assert actual.std().item() / 0.5 == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize(("num_steps", "published"), [(27, 0.945), (15, 0.900)])
def test_ddim_at_few_steps_loses_the_spread_that_theory_says(num_steps: int, published: float) -> None:
    # an aligned DDIM: with less, the list of steps is misread somewhere
    actual = final_scale(ddim_step, make_diffusion(), strided_timesteps(1000, num_steps), GaussianData(PUBLISHED_STD))
    assert actual == pytest.approx(published, abs=0.0006)


@pytest.mark.parametrize(("num_steps", "published"), [(27, 1.001), (15, 0.989)])
def test_dpmpp_2m_keeps_the_spread_at_few_steps(num_steps: int, published: float) -> None:
    diffusion, config = make_diffusion(), SamplerConfig(method="dpmpp_2m", num_steps=num_steps)
    steps = config_timesteps(config, diffusion)
    actual = final_scale(dpmpp_2m_step, diffusion, steps, GaussianData(PUBLISHED_STD))
    assert actual == pytest.approx(published, abs=0.0006)


def test_heun_keeps_the_spread_at_few_steps() -> None:
    assert final_scale(heun_step, make_diffusion(), strided_timesteps(1000, 15), DATA) == pytest.approx(1, abs=0.006)


@pytest.mark.parametrize(("num_steps", "bound"), [(5, 0.16), (8, 0.08), (10, 0.05)])
@pytest.mark.parametrize("method", ["dpmpp_2m", "heun"])
def test_solvers_of_second_order_reach_sharp_data_in_few_steps(method: str, num_steps: int, bound: float) -> None:
    # Four grey levels with the exact score: a walk that ends at t = 0 leaves Heun at 0.31, 0.20 and 0.08.
    diffusion, levels = make_diffusion(), torch.linspace(-1, 1, 4, dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        signal, noise = (part[..., None] for part in diffusion.signal_noise(x, t))
        weights = torch.softmax(-((x[..., None] - signal * levels) ** 2) / (2 * noise**2), dim=-1)
        return output_from_x0(diffusion, (weights * levels).sum(-1), x, t)

    num_values = 8000
    x_T = torch.distributions.Normal(0, 1).icdf((torch.arange(num_values, dtype=torch.float64) + 0.5) / num_values)
    config = SamplerConfig(method=method, num_steps=num_steps, clip_x0=False)  # type: ignore[arg-type]
    sampled = sample(denoise, x_T[None], diffusion, config)[0].sort().values
    wasserstein = (sampled - levels.repeat_interleave(num_values // 4)).abs().mean().item()
    assert wasserstein < bound


@pytest.mark.parametrize(("step", "least_order"), [(ddim_step, 0.9), (dpmpp_2m_step, 1.8), (heun_step, 1.8)])
def test_solver_has_its_order(step: Callable[..., SamplerState], least_order: float) -> None:
    # the flow of Gaussian data keeps x_t / std(x_t): the error between two levels must fall as (number of steps)^-order
    diffusion, denoise = make_diffusion(num_timesteps=4000), DATA.denoiser(make_diffusion(num_timesteps=4000))

    def spread_at(t: int) -> float:
        alpha_bar = diffusion.alpha_bar(torch.tensor([t])).item()
        return math.sqrt(alpha_bar * DATA.std**2 + 1 - alpha_bar)

    errors = []
    for stride in (100, 50):
        steps = range(3600, 799, -stride)
        x = torch.full((1, 1), spread_at(3600), dtype=torch.float64)
        at_800 = list(iterate_steps(step, denoise, x, diffusion, steps))[-2].x.item()
        errors.append(abs(at_800 / spread_at(800) - 1))
    assert math.log2(errors[0] / errors[1]) > least_order


# ---- timesteps -----------------------------------------------------------------------------


def perfect_for(x0: Tensor, diffusion: Diffusion) -> Denoise:
    """The network for data that are a single sample: it always means ``x0``."""
    return lambda x, t: output_from_x0(diffusion, x0.to(x.dtype), x, t)


@pytest.mark.parametrize("num_steps", [7, 27, 64])
@pytest.mark.parametrize("step", [ddim_step, dpmpp_2m_step, heun_step])
def test_deterministic_step_goes_to_the_next_timestep_of_its_own_list(step: Step, num_steps: int) -> None:
    # public DDIMs step to t - T // n, which leaves the list wherever n does not divide T
    diffusion = make_diffusion(prediction="v")
    x0, eps = torch.randn(2, 3, 6, dtype=torch.float64).unbind(0)
    steps = strided_timesteps(1000, num_steps)
    x_T = diffusion.q_sample(x0, torch.full((3,), steps[0]), eps)
    states = list(iterate_steps(step, perfect_for(x0, diffusion), x_T, diffusion, steps))
    for state, t_prev in zip(states, (*steps[1:], -1), strict=True):
        torch.testing.assert_close(state.x, diffusion.q_sample(x0, torch.full((3,), t_prev), eps))
    assert torch.equal(states[-1].x, sample_along(step, perfect_for(x0, diffusion), x_T, diffusion, steps))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_steps", [7, 30])
def test_sampling_from_pure_noise_starts_at_the_noisiest_timestep(method: str, num_steps: int) -> None:
    # public DDIMs start at T - T // n, where a part of the signal is expected in x_T
    diffusion, visits = make_diffusion(), []

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        visits.append(t.tolist())
        return torch.zeros_like(x)

    config = SamplerConfig(method=method, num_steps=num_steps)  # type: ignore[arg-type]
    noise = NoiseSource.from_seeds([0, 1])
    sample(denoise, noise.normal((4,)), diffusion, config, noise, x0_variance=torch.zeros(1000))
    assert visits[0] == [999, 999]
    calls = 2 * num_steps - 1 if method == "heun" else num_steps
    assert len(visits) == calls


def test_fast27_of_a_config_is_visited() -> None:
    config = SamplerConfig(method="ddim", num_steps=27, respacing="fast27")
    steps = config_timesteps(config, make_diffusion())
    assert (steps[0], steps[-1], len(steps)) == (997, 0, 27)


@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_sections_and_spacing_of_a_config_are_visited(method: str) -> None:
    steps = config_timesteps(SamplerConfig(method=method, num_steps=6, respacing="4,2"), make_diffusion())  # type: ignore[arg-type]
    assert steps == (999, 500, 499, 333, 166, 0)
    trailing = SamplerConfig(method=method, num_steps=4, respacing="trailing")  # type: ignore[arg-type]
    assert config_timesteps(trailing, make_diffusion()) == (999, 749, 499, 249)


@pytest.mark.parametrize("steps", [(), (3, 3), (3, 5), (1000, 0), (5, -1)])
def test_samplers_refuse_lists_that_do_not_fall(steps: tuple[int, ...]) -> None:
    diffusion, x = make_diffusion(), torch.zeros(1, 2)
    with pytest.raises(ValueError, match="timesteps"):
        sample_along(ddim_step, DATA.denoiser(diffusion), x, diffusion, steps)


# ---- one step ------------------------------------------------------------------------------


def steps_of_every_kind(noise: NoiseSource, diffusion: Diffusion) -> dict[str, Callable[..., SamplerState]]:
    return {
        "ddpm": partial(ddpm_step, noise=noise),
        "ddim": partial(ddim_step, noise=noise, eta=0.7),
        "analytic": partial(analytic_step, noise=noise, x0_variance=DATA.posterior_variance(diffusion)),
        "dpmpp_2m": dpmpp_2m_step,
        "heun": heun_step,
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5,), (3, 4, 4)])
def test_step_on_items_at_different_timesteps_equals_one_by_one(method: str, shape: tuple[int, ...]) -> None:
    diffusion = make_diffusion(prediction="x0")
    denoise = DATA.denoiser(diffusion)
    t = torch.tensor([999, 500, 37, 0, 80])
    t_prev = torch.tensor([960, 480, 0, -1, -1])
    state = SamplerState(torch.randn(5, *shape), torch.randn(5, *shape), torch.tensor([1000, 520, 70, 37, 120]))
    noise = NoiseSource.from_seeds(range(5))
    batched = steps_of_every_kind(noise, diffusion)[method](denoise, state, t, t_prev, diffusion)
    for i in range(5):
        one = slice(i, i + 1)
        step = steps_of_every_kind(NoiseSource.from_seeds([i]), diffusion)[method]
        alone = step(denoise, SamplerState(*(part[one] for part in state)), t[one], t_prev[one], diffusion)
        for part, part_alone in zip(batched, alone, strict=True):
            assert torch.equal(part[one], part_alone)


@pytest.mark.parametrize("method", METHODS)
def test_requests_that_share_a_batch_for_some_steps_get_what_they_get_alone(method: str) -> None:
    diffusion = make_diffusion()
    denoise = DATA.denoiser(diffusion)
    lists = {1: strided_timesteps(1000, 6), 2: strided_timesteps(1000, 4)}
    alone, sources, states = {}, {}, {}
    for seed, steps in lists.items():
        x_T = NoiseSource.from_seeds([seed], "start").normal((3, 2, 2))
        step = steps_of_every_kind(NoiseSource.from_seeds([seed]), diffusion)[method]
        alone[seed] = list(iterate_steps(step, denoise, x_T, diffusion, steps))[-1].x
        sources[seed], states[seed] = NoiseSource.from_seeds([seed]), initial_state(x_T, diffusion)

    # the second request joins after two steps of the first, and both end together
    left = {seed: list(pairwise((*steps, -1))) for seed, steps in lists.items()}
    for members in ([1], [1], [1, 2], [1, 2], [1, 2], [1, 2]):
        now = [left[seed].pop(0) for seed in members]
        noise = sum((sources[seed] for seed in members), NoiseSource([]))
        t, t_prev = torch.tensor(now).unbind(dim=1)
        joined = concat_rows([states[seed] for seed in members])
        after = steps_of_every_kind(noise, diffusion)[method](denoise, joined, t, t_prev, diffusion)
        states.update({seed: take_rows(after, slice(row, row + 1)) for row, seed in enumerate(members)})
    for seed in lists:
        assert torch.equal(states[seed].x, alone[seed])


@pytest.mark.parametrize("method", METHODS)
def test_step_to_the_clean_end_is_the_predicted_x0_without_noise(method: str) -> None:
    diffusion = make_diffusion(prediction="x0")
    x = torch.randn(2, 6)
    state = SamplerState(x, torch.randn(2, 6), torch.tensor([90, 90]))
    step = steps_of_every_kind(NoiseSource.from_seeds([0, 1]), diffusion)[method]
    x0 = torch.randn(2, 6)
    after = step(lambda _x, _t: x0, state, torch.tensor([40, 0]), torch.tensor([-1, -1]), diffusion)
    torch.testing.assert_close(after.x, x0, rtol=1e-5, atol=1e-5)
    assert torch.equal(after.x0, x0)


@pytest.mark.parametrize("output", [-1.0, 0.0, 1.0])
def test_ddpm_step_samples_with_the_learned_variance(output: float) -> None:
    diffusion = make_diffusion(variance="learned_range")
    t, t_prev = torch.tensor([500]), torch.tensor([460])
    least, largest = diffusion.log_variance_range(t, t_prev)
    x = torch.zeros(1, 1, 200, 200)
    state = SamplerState(x, x, torch.tensor([1000]))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), torch.full_like(x, output)], dim=1)

    after = ddpm_step(denoise, state, t, t_prev, diffusion, noise=NoiseSource.from_seeds([3]))
    expected = math.exp(0.25 * ((1 + output) * largest.item() + (1 - output) * least.item()))
    assert after.x.std().item() == pytest.approx(expected, rel=0.01)


def test_ddim_with_eta_1_is_the_ancestral_step() -> None:
    # arXiv:2010.02502, section 4.1
    diffusion = make_diffusion()
    steps, x = strided_timesteps(1000, 25), torch.randn(2, 9, dtype=torch.float64)
    ddpm = partial(ddpm_step, noise=NoiseSource.from_seeds([1, 2]))
    ancestral = sample_along(ddpm, DATA.denoiser(diffusion), x, diffusion, steps)
    eta_1 = partial(ddim_step, noise=NoiseSource.from_seeds([1, 2]), eta=1.0)
    ddim = sample_along(eta_1, DATA.denoiser(diffusion), x, diffusion, steps)
    torch.testing.assert_close(ddim, ancestral)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_step_adds_noise_of_eta_times_the_posterior_std(eta: float) -> None:
    # arXiv:2010.02502, equations 12 and 16, with plain floats
    diffusion, noise = make_diffusion(), NoiseSource.from_seeds([4])
    t, t_prev = torch.tensor([500]), torch.tensor([461])
    alpha_bar, alpha_bar_prev = diffusion.alpha_bar(t).item(), diffusion.alpha_bar(t_prev).item()
    sigma = eta * math.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * math.sqrt(1 - alpha_bar / alpha_bar_prev)
    x, eps = torch.randn(2, 1, 8, dtype=torch.float64).unbind(0)
    x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
    numbers = NoiseSource.from_seeds([4]).normal((8,), dtype=torch.float64)
    expected = math.sqrt(alpha_bar_prev) * x0 + math.sqrt(1 - alpha_bar_prev - sigma**2) * eps + sigma * numbers
    after = ddim_step(lambda _x, _t: eps, initial_state(x, diffusion), t, t_prev, diffusion, noise=noise, eta=eta)
    torch.testing.assert_close(after.x, expected)


def test_dpmpp_2m_equals_its_recursion_in_sigma() -> None:
    # the recursion of k-diffusion's sample_dpmpp_2m on y = x / a, sigma = s / a, written with plain floats
    diffusion, data = make_diffusion(), GaussianData(std=0.5, mean=0.2)
    steps = strided_timesteps(1000, 12, "trailing")
    sigmas = [math.sqrt(1 / diffusion.alpha_bar(torch.tensor([t])).item() - 1) for t in steps] + [0.0]
    x_T, old = 0.8, None
    y = x_T * math.sqrt(1 + sigmas[0] ** 2)
    for i in range(12):
        sigma, sigma_next = sigmas[i], sigmas[i + 1]
        denoised = data.mean + data.std**2 / (data.std**2 + sigma**2) * (y - data.mean)
        if sigma_next == 0:
            y = denoised
            break
        h = math.log(sigma) - math.log(sigma_next)
        used = denoised
        if old is not None:
            r = (math.log(sigmas[i - 1]) - math.log(sigma)) / h
            used = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * old
        y = sigma_next / sigma * y - math.expm1(-h) * used
        old = denoised
    x = torch.full((1, 1), x_T, dtype=torch.float64)
    actual = sample_along(dpmpp_2m_step, data.denoiser(diffusion), x, diffusion, steps)
    assert actual.item() == pytest.approx(y, rel=1e-6)


# ---- seeds, previews, limits ---------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_sample_depends_on_its_seed_and_not_on_its_batch(method: str) -> None:
    diffusion = make_diffusion()
    config = SamplerConfig(method=method, num_steps=9, eta=0.5)  # type: ignore[arg-type]

    def draw(seeds: list[int]) -> Tensor:
        x_T = NoiseSource.from_seeds(seeds, "start").normal((3, 8, 8))
        noise = NoiseSource.from_seeds(seeds, "steps")
        x0_variance = DATA.posterior_variance(diffusion)
        return sample(DATA.denoiser(diffusion), x_T, diffusion, config, noise, x0_variance=x0_variance)

    together = draw([5, 6, 7])
    assert torch.equal(together[2:], draw([7]))
    assert torch.equal(together.flip(0), draw([7, 6, 5]))
    assert not torch.allclose(together[0], together[1])


@pytest.mark.parametrize("method", METHODS)
def test_iterate_steps_yields_a_preview_per_step_and_ends_in_the_sample(method: str) -> None:
    diffusion = make_diffusion()
    config = SamplerConfig(method=method, num_steps=6)  # type: ignore[arg-type]
    x_T = NoiseSource.from_seeds([1]).normal((3, 4, 4))
    options = {"x0_variance": DATA.posterior_variance(diffusion)}
    step, steps = make_step(config, NoiseSource.from_seeds([2]), **options), config_timesteps(config, diffusion)
    states = list(iterate_steps(step, DATA.denoiser(diffusion), x_T, diffusion, steps))
    actual = sample(DATA.denoiser(diffusion), x_T, diffusion, config, NoiseSource.from_seeds([2]), **options)
    assert len(states) == 6
    assert torch.equal(states[-1].x, actual)
    assert [state.t_last.item() for state in states] == list(steps)
    assert all(state.x0.abs().max() <= 1 for state in states)  # clip_x0 holds for previews too
    assert not actual.requires_grad


@pytest.mark.parametrize("method", ["ddpm", "analytic"])
def test_stochastic_samplers_refuse_to_go_without_noise(method: str) -> None:
    config = SamplerConfig(method=method, num_steps=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NoiseSource"):
        sample(DATA.denoiser(make_diffusion()), torch.zeros(1, 2), make_diffusion(), config)
    with pytest.raises(ValueError, match="eta"):
        sample(
            DATA.denoiser(make_diffusion()), torch.zeros(1, 2), make_diffusion(), SamplerConfig(method="ddim", eta=0.1)
        )


def test_analytic_refuses_to_go_without_its_statistic() -> None:
    config, noise = SamplerConfig(method="analytic", num_steps=2), NoiseSource.from_seeds([0])
    with pytest.raises(ValueError, match="x0_variance"):
        sample(DATA.denoiser(make_diffusion()), torch.zeros(1, 2), make_diffusion(), config, noise)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
def test_sample_is_the_same_on_a_gpu(method: str) -> None:
    diffusion = make_diffusion()
    config = SamplerConfig(method=method, num_steps=9, eta=0.5)  # type: ignore[arg-type]
    actual = []
    for device in ("cpu", "cuda"):
        x_T = NoiseSource.from_seeds([1, 2]).normal((3, 8, 8), device=device)
        noise, x0_variance = NoiseSource.from_seeds([3, 4]), DATA.posterior_variance(diffusion)
        numbers = sample(DATA.denoiser(diffusion), x_T, diffusion, config, noise, x0_variance=x0_variance)
        actual.append(numbers.cpu())
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-4, atol=1e-4)


# ---- the table of methods ------------------------------------------------------------------


def test_every_method_that_a_recipe_may_name_has_its_row() -> None:
    assert list(get_args(get_type_hints(SamplerConfig)["method"])) == list(SAMPLERS)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_calls_the_network_as_often_as_its_row_says(method: str) -> None:
    diffusion, calls = make_diffusion(), list[int]()
    denoise = DATA.denoiser(diffusion)

    def counted(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(calls))
        return denoise(x, t)

    config = SamplerConfig(method=method, num_steps=7)  # type: ignore[arg-type]
    x = torch.ones(1, 1, dtype=torch.float64)
    noise = NoiseSource.from_seeds([0])
    sample(counted, x, diffusion, config, noise, x0_variance=DATA.posterior_variance(diffusion))
    assert len(calls) == num_network_calls(config, diffusion)
