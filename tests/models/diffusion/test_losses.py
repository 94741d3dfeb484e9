"""Training losses and the variational bound, against integrals and densities computed here."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from gaussian_data import GaussianData, make_diffusion, output_from_x0
from torch import Tensor

from models.diffusion.bits_per_dim import Bound, bits_per_dim, timestep_groups
from models.diffusion.likelihood import discretised_normal_log_prob, normal_kl
from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.process import PIXEL_BIN, Diffusion

PREDICTIONS = ("eps", "x0", "v")


def noised(diffusion: Diffusion, t: Tensor, shape: tuple[int, ...] = (3, 4, 4)) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(len(t), *shape, generator=generator, dtype=torch.float64) * 2 - 1
    noise = torch.randn(len(t), *shape, generator=generator, dtype=torch.float64)
    return x0, noise, diffusion.q_sample(x0, t, noise)


def normal_density(x: Tensor, mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_simple_loss_is_zero_for_a_perfect_output_and_the_mean_square_otherwise(prediction: str) -> None:
    diffusion = make_diffusion(prediction=prediction)
    t = torch.tensor([0, 400, 999])
    x0, noise, x_t = noised(diffusion, t)
    target = diffusion.target(x0, noise, t)
    assert diffusion.losses_from_output(target, x0, x_t, t, noise).loss.tolist() == [0, 0, 0]
    off = target + torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)[:, None, None, None]
    actual = diffusion.losses_from_output(off, x0, x_t, t, noise)
    torch.testing.assert_close(actual.loss, torch.tensor([0.01, 0.04, 0.09], dtype=torch.float64))
    assert actual.vlb is None


def test_losses_are_per_item() -> None:
    diffusion = make_diffusion(variance="learned_range")
    t = torch.tensor([0, 7, 400, 999])
    x0, noise, x_t = noised(diffusion, t)
    output = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    batched = diffusion.losses_from_output(output, x0, x_t, t, noise)
    for i in range(4):
        one = slice(i, i + 1)
        alone = diffusion.losses_from_output(output[one], x0[one], x_t[one], t[one], noise[one])
        assert alone.loss.item() == pytest.approx(batched.loss[i].item(), rel=1e-12)


def test_hybrid_loss_adds_lambda_times_T_times_the_term_of_the_bound() -> None:
    diffusion = make_diffusion(variance="learned_range", num_timesteps=250, vlb_weight=0.01)
    t = torch.tensor([0, 100, 249])
    x0, noise, x_t = noised(diffusion, t)
    output = torch.randn(3, 6, 4, 4, dtype=torch.float64)
    actual = diffusion.losses_from_output(output, x0, x_t, t, noise)
    assert actual.vlb is not None
    vlb = diffusion.vlb_terms(diffusion.predict(output, x_t, t, t - 1), x0, x_t, t)
    torch.testing.assert_close(actual.vlb, vlb)
    torch.testing.assert_close(actual.loss, actual.mse + 0.01 * 250 * vlb)


def test_hybrid_loss_freezes_the_mean() -> None:
    diffusion = make_diffusion(variance="learned_range")
    t = torch.tensor([0, 3, 500])
    x0, noise, x_t = noised(diffusion, t)
    output = torch.randn(3, 6, 4, 4, dtype=torch.float64, requires_grad=True)
    actual = diffusion.losses_from_output(output, x0, x_t, t, noise)
    assert actual.vlb is not None
    of_vlb = torch.autograd.grad(actual.vlb.sum(), output, retain_graph=True)[0]
    of_mse = torch.autograd.grad(actual.mse.sum(), output)[0]
    assert of_vlb[:, :3].abs().max() == 0
    assert of_mse[:, 3:].abs().max() == 0
    assert bool((of_vlb[:, 3:].flatten(1).abs().amax(dim=1) > 0).all())
    assert of_mse[:, :3].abs().min() > 0


@pytest.mark.parametrize(("variance", "channels"), [("learned_range", 6), ("fixed_small", 3), ("fixed_large", 3)])
def test_vlb_loss_is_the_term_of_the_bound_and_teaches_all_of_the_output(variance: str, channels: int) -> None:
    diffusion = make_diffusion(variance=variance, num_timesteps=250, loss="vlb")
    t = torch.tensor([0, 100, 249])
    x0, noise, x_t = noised(diffusion, t)
    output = torch.randn(3, channels, 4, 4, dtype=torch.float64, requires_grad=True)
    actual = diffusion.losses_from_output(output, x0, x_t, t, noise)
    torch.testing.assert_close(
        actual.loss, 250 * diffusion.vlb_terms(diffusion.predict(output, x_t, t, t - 1), x0, x_t, t)
    )
    assert torch.autograd.grad(actual.loss.sum(), output)[0].abs().min() > 0


@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_the_same_error_of_x0_alike_for_every_prediction(prediction: str, floor: float) -> None:
    diffusion = make_diffusion(prediction=prediction, loss_weighting="min_snr", min_snr_gamma=5.0, min_snr_floor=floor)
    t = torch.tensor([5, 300, 500, 800])
    x0, _, x_t = noised(diffusion, t)
    noise = diffusion.eps_from_x0(x0, x_t, t)
    wrong_x0 = x0 + 0.1
    actual = diffusion.losses_from_output(output_from_x0(diffusion, wrong_x0, x_t, t), x0, x_t, t, noise).loss
    alpha_bar = diffusion.alpha_bar(t)
    expected = (alpha_bar / (1 - alpha_bar)).clamp(floor, 5) * 0.1**2
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


def test_normal_kl_equals_the_integral() -> None:
    x = torch.linspace(-15, 15, 300_001, dtype=torch.float64)
    q, p = normal_density(x, 0.3, 0.7), normal_density(x, -0.4, 1.1)
    integral = torch.trapezoid(q * (q.log() - p.log()), x).item()
    gap, log_q, log_p = torch.tensor([0.7, math.log(0.49), math.log(1.21)], dtype=torch.float64)
    assert normal_kl(gap, log_q, log_p).item() == pytest.approx(integral, rel=1e-7)


@pytest.mark.parametrize("log_std", [-6.0, -3.0, -1.0, 0.5])
def test_discretised_log_prob_sums_to_one_and_equals_the_integral(log_std: float) -> None:
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    mean, log_variance = torch.tensor(0.2, dtype=torch.float64), torch.tensor(2 * log_std, dtype=torch.float64)
    log_prob = discretised_normal_log_prob(grid, mean, log_variance, PIXEL_BIN)
    assert log_prob.exp().sum().item() == pytest.approx(1, abs=1e-6)

    def cdf(x: float) -> float:
        return 0.5 * math.erfc(-(x - 0.2) / (math.exp(log_std) * math.sqrt(2)))

    for i in (0, 100, 153, 160, 255):
        low = 0.0 if i == 0 else cdf(grid[i].item() - PIXEL_BIN / 2)
        high = 1.0 if i == 255 else cdf(grid[i].item() + PIXEL_BIN / 2)
        if high - low > 1e-12:
            assert log_prob[i].exp().item() == pytest.approx(high - low, rel=2e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_variance", [-13.0, -9.0, 0.0, 8.0, 30.0])
def test_discretised_log_prob_and_its_gradient_are_finite_far_out(dtype: torch.dtype, log_variance: float) -> None:
    x = torch.tensor([-1.0, -0.5, 0.5, 1.0], dtype=dtype)
    mean = torch.tensor([1.0, 0.9, -0.9, -1.0], dtype=dtype, requires_grad=True)
    width = torch.full((4,), log_variance, dtype=dtype, requires_grad=True)
    actual = discretised_normal_log_prob(x, mean, width, PIXEL_BIN)
    actual.sum().backward()
    assert bool(actual.isfinite().all())
    assert mean.grad is not None
    assert width.grad is not None
    assert bool(mean.grad.isfinite().all())
    assert bool(width.grad.isfinite().all())
    assert mean.grad[0] < 0 < mean.grad[3]


def test_discretised_log_prob_in_float32_follows_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(5000, generator=generator, dtype=torch.float64) * 255).round() / 127.5 - 1
    mean = x + 0.2 * torch.randn(5000, generator=generator, dtype=torch.float64)
    log_variance = torch.rand(5000, generator=generator, dtype=torch.float64) * 12 - 11
    for sizes, bound in ((log_variance, 2e-5), (torch.full_like(x, 4.0), 1e-6)):
        exact = discretised_normal_log_prob(x, mean, sizes, PIXEL_BIN)
        actual = discretised_normal_log_prob(x.float(), mean.float(), sizes.float(), PIXEL_BIN)
        assert ((actual - exact).abs() / (1 + exact.abs())).max() < bound


def test_vlb_term_equals_a_numerical_integral_of_the_two_steps() -> None:
    diffusion = make_diffusion(variance="learned_range", num_timesteps=100)
    t = torch.tensor([60])
    x0, x_t, x0_hat, fraction = 0.4, -0.9, 0.1, 0.3
    one = torch.ones(1, 1, dtype=torch.float64)
    output = torch.cat([output_from_x0(diffusion, x0_hat * one, x_t * one, t), (2 * fraction - 1) * one], dim=1)
    actual = diffusion.vlb_terms(diffusion.predict(output, x_t * one, t, t - 1), x0 * one, x_t * one, t).item()

    alpha_bar, alpha_bar_prev = diffusion.alpha_bar(t).item(), diffusion.alpha_bar(t - 1).item()
    alpha, beta = alpha_bar / alpha_bar_prev, 1 - alpha_bar / alpha_bar_prev
    beta_tilde = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)

    def mean(clean: float) -> float:  # arXiv:2006.11239, equation 7
        of_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / (1 - alpha_bar)
        return math.sqrt(alpha_bar_prev) * beta / (1 - alpha_bar) * clean + of_x_t * x_t

    width = math.exp(0.5 * (fraction * math.log(beta) + (1 - fraction) * math.log(beta_tilde)))
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    q, p = normal_density(x, mean(x0), math.sqrt(beta_tilde)), normal_density(x, mean(x0_hat), width)
    integral = torch.trapezoid(torch.where(q > 1e-200, q * (q.log() - p.log()), 0.0), x).item()
    assert actual == pytest.approx(integral / math.log(2), rel=1e-6)


def test_vlb_terms_are_the_same_for_every_kind_of_prediction() -> None:
    # public code was seen feeding an x0 or v output into the bound as if it were eps
    t = torch.tensor([0, 1, 400, 999])
    actual = []
    for prediction in PREDICTIONS:
        diffusion = make_diffusion(prediction=prediction, variance="learned_range")
        x0, _, x_t = noised(diffusion, t)
        x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
        mean = output_from_x0(diffusion, 0.8 * x0, x_t, t)
        output = torch.cat([mean, torch.full_like(mean, 0.2)], dim=1)
        actual.append(diffusion.vlb_terms(diffusion.predict(output, x_t, t, t - 1), x0, x_t, t))
    torch.testing.assert_close(actual[1], actual[0], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(actual[2], actual[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_hybrid_loss_in_float32_follows_float64_at_both_ends(prediction: str) -> None:
    diffusion = make_diffusion(variance="learned_range", prediction=prediction)
    t = torch.tensor([0, 1, 500, 998, 999])
    x0, noise, x_t = noised(diffusion, t)
    x0 = ((x0 + 1) * 127.5).round() / 127.5 - 1
    x_t = diffusion.q_sample(x0, t, noise)
    target = diffusion.target(x0, noise, t)
    output = torch.cat([target + 0.05 * noise, torch.zeros_like(target)], dim=1)
    exact = diffusion.losses_from_output(output, x0, x_t, t, noise)
    actual = diffusion.losses_from_output(output.float(), x0.float(), x_t.float(), t, noise.float())
    assert exact.vlb is not None
    assert actual.vlb is not None
    torch.testing.assert_close(actual.vlb.double(), exact.vlb, rtol=1e-3, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hybrid_loss_is_the_same_on_a_gpu() -> None:
    # the decoder term is worked out for t = 0 alone on the CPU, for every item on a GPU
    diffusion = make_diffusion(variance="learned_range")
    t = torch.tensor([0, 5, 0, 999])
    x0, noise, x_t = noised(diffusion, t)
    output = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    here = diffusion.losses_from_output(output, x0, x_t, t, noise)
    there = diffusion.losses_from_output(*(part.cuda() for part in (output, x0, x_t, t, noise)))
    assert here.vlb is not None
    assert there.vlb is not None
    torch.testing.assert_close(there.vlb.cpu(), here.vlb)
    torch.testing.assert_close(there.loss.cpu(), here.loss)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_prior_bpd_equals_a_numerical_integral(schedule: str) -> None:
    diffusion = make_diffusion(schedule=schedule, num_timesteps=50)
    x0 = torch.tensor([[0.8]], dtype=torch.float64)
    alpha_bar = diffusion.alpha_bar(torch.tensor([49])).item()
    x = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    q = normal_density(x, math.sqrt(alpha_bar) * 0.8, math.sqrt(1 - alpha_bar))
    p = normal_density(x, 0, 1)
    integral = torch.trapezoid(torch.where(q > 1e-200, q * (q.log() - p.log()), 0.0), x).item()
    assert diffusion.prior_bpd(x0).item() == pytest.approx(integral / math.log(2), rel=1e-4, abs=1e-9)


def perfect_network_with_variance(data: GaussianData, diffusion: Diffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """The true posterior mean and the variance of the true reverse step, as a learned-range network gives them."""
    base, x0_variance = data.denoiser(diffusion), data.posterior_variance(diffusion)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        least, largest = diffusion.log_variance_range(t, t - 1)
        of_x0, _, variance = diffusion.posterior_coefficients(t, t - 1)
        target = (variance + of_x0**2 * x0_variance[t]).log()
        output = 2 * (target - least) / (largest - least) - 1
        mean = base(x, t)
        return torch.cat([mean, output[:, None, None].expand_as(mean)], dim=1)

    return denoise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bits_per_dim_of_a_perfect_network_is_the_entropy_of_its_data(prediction: str) -> None:
    # Gaussian data have Gaussian reverse steps: with the right mean and variance the bound is tight at any T
    data = GaussianData(std=0.3)
    diffusion = make_diffusion(num_timesteps=50, variance="learned_range", prediction=prediction)
    grid = torch.linspace(-1, 1, 256, dtype=torch.float64)
    log_prob = discretised_normal_log_prob(grid, torch.tensor(0.0), torch.tensor(2 * math.log(0.3)), PIXEL_BIN)
    entropy = -(log_prob.exp() * log_prob).sum().item() / math.log(2)
    generator = torch.Generator().manual_seed(1)
    draws = torch.multinomial(log_prob.exp(), 2 * 8000, replacement=True, generator=generator)
    x0, noise = grid[draws].reshape(2, 1, 8000), NoiseSource.from_seeds([0, 1])
    bound = bits_per_dim(perfect_network_with_variance(data, diffusion), x0, diffusion, noise)
    assert bound.terms.shape == (2, 50)
    torch.testing.assert_close(bound.total, bound.prior + bound.terms.sum(dim=1))
    assert bound.total.mean().item() == pytest.approx(entropy, abs=0.04)


def test_bits_per_dim_sums_every_term_and_heeds_limit_and_bin() -> None:
    data, diffusion, x0 = GaussianData(std=2.0), make_diffusion(num_timesteps=4), torch.ones(1, 1, 64).double()

    def limited(x: Tensor, t: Tensor) -> Tensor:
        return output_from_x0(diffusion, data.posterior_mean(diffusion, x, t).clamp(-0.5, 0.5), x, t)

    def bound(denoise: Callable[[Tensor, Tensor], Tensor], **options: Any) -> Bound:
        return bits_per_dim(denoise, x0, diffusion, NoiseSource.from_seeds([0]), **options)

    plain = bound(data.denoiser(diffusion))
    assert plain.prior.item() > 1e-5
    torch.testing.assert_close(plain.total, plain.prior + plain.terms.sum(dim=1))
    clipped = bound(data.denoiser(diffusion), limit=ClipRange(-0.5, 0.5))
    torch.testing.assert_close(clipped.terms, bound(limited).terms)
    assert (clipped.terms - plain.terms).abs().max() > 0.1
    coarse = bound(data.denoiser(diffusion), bin_width=2 / 15)
    assert coarse.terms[0, 0] < plain.terms[0, 0] - 0.01  # a wider bin is likelier
    torch.testing.assert_close(coarse.terms[:, 1:], plain.terms[:, 1:])


def test_bits_per_dim_is_larger_where_the_variance_is_not_the_best() -> None:
    data, x0 = GaussianData(std=0.3), 0.3 * torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    x0 = ((x0.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    learned = make_diffusion(num_timesteps=50, variance="learned_range")
    best = bits_per_dim(perfect_network_with_variance(data, learned), x0, learned, NoiseSource.from_seeds([0, 1]))
    for variance in ("fixed_small", "fixed_large"):
        fixed = make_diffusion(num_timesteps=50, variance=variance)
        bound = bits_per_dim(data.denoiser(fixed), x0, fixed, NoiseSource.from_seeds([0, 1]))
        assert bound.total.mean() > best.total.mean() + 0.02


@pytest.mark.parametrize(("num_timesteps", "num_groups"), [(1000, 64), (1000, 1), (50, 50), (50, 400), (7, 6)])
def test_timestep_groups_cover_the_chain_once_and_grow(num_timesteps: int, num_groups: int) -> None:
    groups = timestep_groups(num_timesteps, num_groups)
    assert [t for group in groups for t in group] == list(range(num_timesteps))
    assert len(groups) == min(num_groups, num_timesteps)
    sizes = [len(group) for group in groups]
    assert all(later >= 0.7 * earlier for earlier, later in pairwise(sizes))
    assert sizes[0] == 1 or num_groups == 1


def test_bits_per_dim_of_some_terms_estimates_that_of_all() -> None:
    """Of a network that is wrong everywhere, so that every term counts."""
    diffusion = make_diffusion(num_timesteps=200, variance="fixed_large")
    x0 = torch.rand(1, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = (x0 * 255).round() / 127.5 - 1

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return output_from_x0(diffusion, torch.full_like(x, 0.2), x, t)

    def total(num_items: int, **options: Any) -> Tensor:
        noise = NoiseSource.from_seeds(range(num_items))
        return bits_per_dim(denoise, x0.expand(num_items, -1, -1), diffusion, noise, **options).total

    whole, some = total(20), total(400, num_terms=20)
    error = some.std().item() / 20
    assert some.mean().item() == pytest.approx(whole.mean().item(), abs=4 * error)
    assert error < 0.02 * whole.mean().item()
