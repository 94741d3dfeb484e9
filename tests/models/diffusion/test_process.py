"""The diffusion process: conversions, posterior and variances against formulas derived here by another way."""

import math

import pytest
import torch
from gaussian_data import make_diffusion
from torch import Tensor

from models.diffusion.process import Diffusion

ENDS_AND_MIDDLE = torch.tensor([0, 1, 499, 998, 999])
PREDICTIONS = ("eps", "x0", "v")


def column(values: Tensor) -> Tensor:
    return values[:, None]


def test_alpha_bar_of_the_previous_step_is_not_off_by_one() -> None:
    # public code was seen reading alphas_cumprod_prev[t] one entry away
    diffusion = make_diffusion()
    t = torch.arange(1000)
    assert diffusion.alpha_bar(torch.tensor([-1])).item() == 1.0
    ratio = diffusion.alpha_bar(t) / diffusion.alpha_bar(t - 1)

    def signal(i: int) -> float:
        return math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    for step in (0, 1, 500, 998):
        assert 1 - ratio[step].item() == pytest.approx(1 - signal(step + 1) / signal(step), rel=1e-9)


def test_q_sample_is_the_composition_of_single_steps() -> None:
    diffusion = make_diffusion(num_timesteps=20)
    mean, variance = 1.0, 0.0
    for step in range(20):
        alpha = (diffusion.alpha_bar(torch.tensor([step])) / diffusion.alpha_bar(torch.tensor([step - 1]))).item()
        mean, variance = mean * math.sqrt(alpha), variance * alpha + 1 - alpha
        t = torch.tensor([step])
        one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        assert diffusion.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-12)
        assert diffusion.q_sample(zero, t, one).item() == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_q_sample_takes_a_timestep_per_item() -> None:
    diffusion = make_diffusion()
    x0, noise = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    batched = diffusion.q_sample(x0, ENDS_AND_MIDDLE, noise)
    for i in range(5):
        alone = diffusion.q_sample(x0[i : i + 1], ENDS_AND_MIDDLE[i : i + 1], noise[i : i + 1])
        assert torch.equal(batched[i : i + 1], alone)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_predictions_convert_into_one_another_in_every_direction(schedule: str) -> None:
    diffusion = make_diffusion(schedule=schedule)
    t = ENDS_AND_MIDDLE
    x0, eps = torch.randn(2, 5, 7, dtype=torch.float64).unbind(0)
    x = diffusion.q_sample(x0, t, eps)
    v = diffusion.v_from_x0_eps(x0, eps, t)
    a, s = column(diffusion.alpha_bar(t).sqrt()), column((1 - diffusion.alpha_bar(t)).sqrt())
    torch.testing.assert_close(v, a * eps - s * x0)
    torch.testing.assert_close(diffusion.x0_from_eps(eps, x, t), x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.eps_from_x0(x0, x, t), eps, rtol=1e-9, atol=1e-9)
    back_x0, back_eps = diffusion.x0_eps_from_v(v, x, t)
    torch.testing.assert_close(back_x0, x0)
    torch.testing.assert_close(back_eps, eps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predict_reads_the_target_that_training_sets(prediction: str) -> None:
    diffusion = make_diffusion(prediction=prediction)
    t = ENDS_AND_MIDDLE
    x0, eps = torch.randn(2, 5, 3, 4, 4, dtype=torch.float64).unbind(0)
    x = diffusion.q_sample(x0, t, eps)
    actual = diffusion.predict(diffusion.target(x0, eps, t), x, t, t - 1)
    torch.testing.assert_close(actual.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(actual.eps, eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(diffusion.eps_from_x0(x0, x, t), eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_predict_is_exact_in_float32_at_both_ends(prediction: str) -> None:
    # eps cannot be: at t = 999 of the cosine chain x0 is the difference of two numbers, divided by 5e-5
    diffusion = make_diffusion(prediction=prediction)
    t = ENDS_AND_MIDDLE
    x0, eps = torch.randn(2, 5, 1000, dtype=torch.float64).unbind(0)
    x = diffusion.q_sample(x0, t, eps)
    target = diffusion.target(x0, eps, t)
    actual = diffusion.predict(target.float(), x.float(), t, t - 1)
    assert (actual.x0 - x0).abs().max() < 2e-6
    assert (actual.eps - eps).abs().max() < 1e-4


def test_output_shift_moves_the_meant_eps() -> None:
    t = torch.tensor([10, 500])
    x, shift = torch.randn(2, 2, 6, dtype=torch.float64).unbind(0)
    for prediction in PREDICTIONS:
        diffusion = make_diffusion(prediction=prediction)
        output = torch.randn(2, 6, dtype=torch.float64)
        before = diffusion.predict(output, x, t, t - 1)
        after = diffusion.predict(output + diffusion.output_shift(shift, t), x, t, t - 1)
        torch.testing.assert_close(after.eps, before.eps + shift)


@pytest.mark.parametrize(("t", "t_prev"), [(999, 998), (500, 499), (1, 0), (999, 961), (37, 0), (500, 100)])
def test_posterior_is_bayes_rule_for_any_stride(t: int, t_prev: int) -> None:
    diffusion = make_diffusion()
    alpha_bar = diffusion.alpha_bar(torch.tensor([t])).item()
    alpha_bar_prev = diffusion.alpha_bar(torch.tensor([t_prev])).item()
    alpha = alpha_bar / alpha_bar_prev
    x0, x_t = 0.7, -1.3
    # product of N(x_prev; a_prev x0, 1 - alpha_bar_prev) and N(x_t; sqrt(alpha) x_prev, 1 - alpha)
    precision = 1 / (1 - alpha_bar_prev) + alpha / (1 - alpha)
    mean = (math.sqrt(alpha_bar_prev) * x0 / (1 - alpha_bar_prev) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    steps = torch.tensor([t]), torch.tensor([t_prev])
    one = torch.ones(1, 1, dtype=torch.float64)
    assert diffusion.posterior_mean(x0 * one, x_t * one, *steps).item() == pytest.approx(mean, rel=1e-9)
    assert diffusion.posterior_coefficients(*steps)[2].item() == pytest.approx(1 / precision, rel=1e-9)


@pytest.mark.parametrize("t", [0, 37, 999])
def test_posterior_at_the_clean_end_is_x0_itself(t: int) -> None:
    of_x0, of_x_t, variance = make_diffusion().posterior_coefficients(torch.tensor([t]), torch.tensor([-1]))
    assert (of_x0.item(), of_x_t.item(), variance.item()) == (pytest.approx(1, abs=1e-15), 0, 0)


@pytest.mark.parametrize("t_prev", [998, 961])
def test_learned_variance_spans_beta_tilde_to_beta_of_the_stride(t_prev: int) -> None:
    diffusion = make_diffusion(variance="learned_range")
    t, previous = torch.tensor([999]), torch.tensor([t_prev])
    alpha_bar, alpha_bar_prev = diffusion.alpha_bar(t).item(), diffusion.alpha_bar(previous).item()
    beta = 1 - alpha_bar / alpha_bar_prev
    beta_tilde = (1 - alpha_bar_prev) / (1 - alpha_bar) * beta
    x = torch.zeros(1, 3, dtype=torch.float64)
    output = torch.tensor([[0, 0, 0, -1, 0, 1]], dtype=torch.float64)
    actual = diffusion.predict(output, x, t, previous).log_variance
    expected = [math.log(beta_tilde), 0.5 * (math.log(beta_tilde) + math.log(beta)), math.log(beta)]
    assert actual[0].tolist() == pytest.approx(expected, rel=1e-9)


def test_log_variance_at_the_clean_end_takes_that_of_the_step_above() -> None:
    diffusion = make_diffusion(variance="learned_range")
    first, second = torch.tensor([0]), torch.tensor([1])
    least, largest = diffusion.log_variance_range(first, first - 1)
    assert least.item() == pytest.approx(diffusion.posterior_coefficients(second, first)[2].log().item())
    assert largest.item() == pytest.approx(math.log(1 - diffusion.alpha_bar(first).item()), rel=1e-9)
    strided = diffusion.log_variance_range(torch.tensor([37]), torch.tensor([-1]))[0]
    assert strided.item() == pytest.approx(diffusion.log_variance_range(torch.tensor([37]), first)[0].item())


def test_fixed_variances_are_beta_tilde_and_beta() -> None:
    t, t_prev = torch.tensor([500, 0]), torch.tensor([480, -1])
    x = torch.zeros(2, 1, dtype=torch.float64)
    small, large = make_diffusion(), make_diffusion(variance="fixed_large")
    least, largest = small.log_variance_range(t, t_prev)
    assert small.predict(x, x, t, t_prev).log_variance.flatten().tolist() == least.tolist()
    assert large.predict(x, x, t, t_prev).log_variance.flatten().tolist() == [largest[0].item(), least[1].item()]


def test_a_chain_of_one_step_has_finite_variances() -> None:
    diffusion = make_diffusion(num_timesteps=1, variance="learned_range")
    x, t = torch.zeros(1, 2), torch.tensor([0])
    assert bool(diffusion.predict(torch.zeros(1, 4), x, t, t - 1).log_variance.isfinite().all())


def test_predict_refuses_half_states_and_wrong_channels() -> None:
    diffusion, t = make_diffusion(variance="learned_range"), torch.tensor([5])
    with pytest.raises(ValueError, match="float32"):
        diffusion.predict(torch.zeros(1, 6), torch.zeros(1, 3, dtype=torch.bfloat16), t, t - 1)
    with pytest.raises(ValueError, match="twice as many"):
        diffusion.predict(torch.zeros(1, 3), torch.zeros(1, 3), t, t - 1)
    with pytest.raises(ValueError, match="as many"):
        make_diffusion().predict(torch.zeros(1, 6), torch.zeros(1, 3), t, t - 1)


def test_predict_widens_a_bf16_output_before_any_arithmetic() -> None:
    x, output, t = torch.randn(1, 3), torch.randn(1, 3).bfloat16(), torch.tensor([3])
    for prediction in ("eps", "x0", "v"):
        diffusion = make_diffusion(prediction=prediction)
        actual, expected = (diffusion.predict(each, x, t, t - 1) for each in (output, output.float()))
        torch.testing.assert_close(actual.x0, expected.x0)  # types too
        torch.testing.assert_close(actual.eps, expected.eps)


def test_log_snr_is_half_the_log_of_signal_over_noise() -> None:
    diffusion: Diffusion = make_diffusion()
    alpha_bar = diffusion.alpha_bar(ENDS_AND_MIDDLE)
    torch.testing.assert_close(diffusion.log_snr(ENDS_AND_MIDDLE), (alpha_bar / (1 - alpha_bar)).sqrt().log())
    assert diffusion.log_snr(torch.tensor([-1])).item() == math.inf
