"""The optimal reverse variance against its definition, by Monte Carlo on data that are not Gaussian."""

import math

import pytest
import torch
from gaussian_data import GaussianData, make_diffusion
from torch import Tensor

from models.diffusion.analytic import X0Variance
from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.steps import analytic_variance


def two_points(diffusion: Diffusion, x: Tensor, t: Tensor) -> Tensor:
    """E[x0 | x_t] where x0 is 1 or -1 with equal probability."""
    alpha_bar = diffusion.alpha_bar(t)[:, None]
    return torch.tanh(x.double() * alpha_bar.sqrt() / (1 - alpha_bar))


def test_analytic_variance_is_the_mean_square_around_the_reverse_mean() -> None:
    # definition: the variance that makes N(mean(x_t), variance) closest to q(x_prev | x_t), over true pairs
    diffusion = make_diffusion(prediction="x0")
    generator = torch.Generator().manual_seed(0)
    x0 = torch.where(torch.rand(20, 10_000, generator=generator, dtype=torch.float64) < 0.5, 1.0, -1.0)
    for step, step_prev in ((600, 500), (900, 700), (500, 450)):
        t, t_prev = torch.full((20,), step), torch.full((20,), step_prev)
        first, second = torch.randn(2, *x0.shape, generator=generator, dtype=torch.float64).unbind(0)
        x_prev = diffusion.q_sample(x0, t_prev, first)
        alpha = (diffusion.alpha_bar(t) / diffusion.alpha_bar(t_prev))[:, None]
        x_t = alpha.sqrt() * x_prev + (1 - alpha).sqrt() * second
        mean = diffusion.posterior_mean(two_points(diffusion, x_t, t), x_t, t, t_prev)
        by_definition = ((x_prev - mean) ** 2).mean().item()

        measured = X0Variance(diffusion, [step])
        measured.update(lambda x, t: two_points(diffusion, x, t), x0, NoiseSource.from_seeds(range(20)))
        actual = analytic_variance(diffusion, t[:1], t_prev[:1], measured.table()).item()
        assert actual == pytest.approx(by_definition, rel=0.015)
        beta_tilde = diffusion.posterior_coefficients(t[:1], t_prev[:1])[2].item()
        assert actual > beta_tilde * 1.005  # the gain over the fixed variance is what this is for


def test_analytic_variance_equals_theorem_1() -> None:
    # arXiv:2201.06503, theorem 1, in its own letters, for ancestral sampling
    diffusion, data = make_diffusion(), GaussianData(std=0.5)
    table = data.posterior_variance(diffusion)
    for step, step_prev in ((600, 500), (37, 0), (300, 299)):
        t, t_prev = torch.tensor([step]), torch.tensor([step_prev])
        alpha_bar, alpha_bar_prev = diffusion.alpha_bar(t).item(), diffusion.alpha_bar(t_prev).item()
        alpha = alpha_bar / alpha_bar_prev
        beta_bar, beta_bar_prev = 1 - alpha_bar, 1 - alpha_bar_prev
        # score of N(0, alpha_bar std^2 + beta_bar): its mean square per dimension
        score_square = 1 / (alpha_bar * 0.25 + beta_bar)
        lambda_square = beta_bar_prev / beta_bar * (1 - alpha)
        factor = math.sqrt(beta_bar / alpha) - math.sqrt(beta_bar_prev - lambda_square)
        expected = lambda_square + factor**2 * (1 - beta_bar * score_square)
        assert analytic_variance(diffusion, t, t_prev, table).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_x0_variance_of_gaussian_data_is_its_closed_form(prediction: str) -> None:
    diffusion, data = make_diffusion(prediction=prediction), GaussianData(std=0.5)
    measured = X0Variance(diffusion, [900, 100, 500])
    x0 = 0.5 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured.update(data.denoiser(diffusion), x0, NoiseSource.from_seeds(range(4)))
    expected = data.posterior_variance(diffusion)
    actual = measured.table()
    for t in (100, 500, 900):
        assert actual[t].item() == pytest.approx(expected[t].item(), rel=0.03)
    assert actual[900] <= (x0**2).mean() + 1e-9


def test_x0_variance_does_not_depend_on_the_batches() -> None:
    diffusion, data = make_diffusion(), GaussianData()
    x0 = torch.randn(6, 10)
    whole, parts = (X0Variance(diffusion, [10, 600]) for _ in range(2))
    denoise = data.denoiser(diffusion)
    whole.update(denoise, x0, NoiseSource.from_seeds(range(6)))
    parts.update(denoise, x0[:2], NoiseSource.from_seeds([0, 1]))
    parts.update(denoise, x0[2:], NoiseSource.from_seeds([2, 3, 4, 5]))
    torch.testing.assert_close(parts.table(), whole.table())


def test_x0_variance_interpolates_between_timesteps_and_stays_constant_beyond() -> None:
    diffusion = make_diffusion(num_timesteps=10, prediction="x0")
    measured = X0Variance(diffusion, [8, 2, 4])
    size = torch.zeros(10, dtype=torch.float64)
    size[2], size[4], size[8] = 0.1, 0.3, 0.5
    x0 = torch.ones(1, 4, dtype=torch.float64)
    measured.update(lambda x, t: 1 - size[t].sqrt()[:, None].expand_as(x), x0, NoiseSource.from_seeds([0]))
    expected = [0.1, 0.1, 0.1, 0.2, 0.3, 0.35, 0.4, 0.45, 0.5, 0.5]
    assert measured.table().tolist() == pytest.approx(expected)


def test_x0_variance_measures_the_limited_prediction() -> None:
    diffusion = make_diffusion(prediction="x0")
    measured = X0Variance(diffusion, [5])
    measured.update(lambda x, _t: torch.full_like(x, 3.0), torch.ones(1, 4), NoiseSource.from_seeds([0]), ClipRange())
    assert measured.table().max() == 0
    with pytest.raises(ValueError, match="no batch"):
        X0Variance(diffusion, [5]).table()


def test_x0_variance_is_at_most_the_power_of_x0_for_any_prediction() -> None:
    diffusion, x0 = make_diffusion(prediction="x0"), torch.full((2, 4), 0.5)
    far = X0Variance(diffusion, [100, 900])
    far.update(lambda x, _t: torch.full_like(x, 3.0), x0, NoiseSource.from_seeds([0, 1]))
    assert far.table().tolist() == [0.25] * 1000
