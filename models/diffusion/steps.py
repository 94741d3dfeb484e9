"""One step of each sampler, for a batch whose items may be at different timesteps.

Legend: B batch. Each step takes the state at ``t`` to ``t_prev`` (int64 vectors (B,), t_prev < t, -1 the
clean sample). A step depends only on its arguments, and computes every item separately: requests at
different steps can share a batch without a change to their results.

alpha_bar and the factors a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar) are those of models/diffusion/process.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.diffusion.limits import Limit
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion, Prediction, spread


class SamplerState(NamedTuple):
    """The state of a chain; the rows of several can be concatenated and separated again (models/rows.py)."""

    x: Tensor
    """Noised sample at the timestep reached, (B, C, ...), float32 or float64; at -1 it is the result."""
    x0: Tensor
    """Latest prediction of the clean sample, (B, C, ...): a preview, and what a multistep solver remembers."""
    t_last: Tensor
    """Timestep at which x0 was predicted, (B,) int64; T where nothing has been predicted yet."""


Step = Callable[[Denoise, SamplerState, Tensor, Tensor, Diffusion], SamplerState]
"""A sampler with its options bound: (denoise, state, t, t_prev, diffusion) -> state at t_prev."""


def initial_state(x: Tensor, diffusion: Diffusion) -> SamplerState:
    """The state of a chain that has not made a step, from its noised sample (B, C, ...)."""
    t_last = torch.full((x.shape[0],), diffusion.num_timesteps, device=x.device)
    return SamplerState(x, torch.zeros_like(x), t_last)


def predict(
    denoise: Denoise, x: Tensor, t: Tensor, t_prev: Tensor, diffusion: Diffusion, limit: Limit | None = None
) -> Prediction:
    """Call the network once and read its output; a limited x0 comes with the noise that agrees with it."""
    prediction = diffusion.predict(denoise(x, t), x, t, t_prev)
    if limit is None:
        return prediction
    x0 = limit(prediction.x0)
    return prediction._replace(x0=x0, eps=diffusion.eps_from_x0(x0, x, t))


def ddpm_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_prev: Tensor,
    diffusion: Diffusion,
    *,
    noise: NoiseSource,
    limit: Limit | None = None,
) -> SamplerState:
    """Ancestral step: arXiv:2006.11239, algorithm 2, with the variance that ``diffusion`` is configured for."""
    prediction = predict(denoise, state.x, t, t_prev, diffusion, limit)
    mean = diffusion.posterior_mean(prediction.x0, state.x, t, t_prev)
    std = torch.exp(0.5 * prediction.log_variance) * spread(t_prev >= 0, state.x)
    return SamplerState(mean + std * noise.normal_like(state.x), prediction.x0, t)


def analytic_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_prev: Tensor,
    diffusion: Diffusion,
    *,
    noise: NoiseSource,
    x0_variance: Tensor,
    limit: Limit | None = None,
) -> SamplerState:
    """Ancestral step with the optimal isotropic variance: Analytic-DPM, arXiv:2201.06503, theorem 1.

    Args:
        denoise: The network.
        state: State of the chain at t.
        t: Timestep per item.
        t_prev: Timestep to go to, per item.
        diffusion: The process.
        noise: Noise of each item.
        x0_variance: (T,) float64, mean variance of x0 given x_t per dimension: see ``analytic.estimate_x0_variance``.
        limit: Limit on the predicted x0.
    """
    prediction = predict(denoise, state.x, t, t_prev, diffusion, limit)
    mean = diffusion.posterior_mean(prediction.x0, state.x, t, t_prev)
    variance = analytic_variance(diffusion, t, t_prev, x0_variance)
    return SamplerState(mean + spread(variance.sqrt(), state.x) * noise.normal_like(state.x), prediction.x0, t)


def analytic_variance(diffusion: Diffusion, t: Tensor, t_prev: Tensor, x0_variance: Tensor) -> Tensor:
    """Optimal variance of a reverse step, (B,) float64; 0 at t_prev = -1, where the mean is the sample.

    By the law of total variance: the posterior's own variance, plus that of x0 given x_t carried through the factor of
    x0 in the posterior mean. Equal to theorem 1 of arXiv:2201.06503 (Gamma there is (1 - x0_variance a^2 / s^2) / s^2),
    without its cancellation at the noisy end of a cosine schedule.
    """
    of_x0, _, variance = diffusion.posterior_coefficients(t, t_prev)
    spread_of_x0 = of_x0**2 * x0_variance.to(t.device, torch.float64)[t]
    return torch.where(t_prev < 0, torch.zeros_like(variance), variance + spread_of_x0)


def ddim_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_prev: Tensor,
    diffusion: Diffusion,
    *,
    noise: NoiseSource | None = None,
    eta: float | Tensor = 0.0,
    limit: Limit | None = None,
) -> SamplerState:
    """DDIM step: arXiv:2010.02502, equations 12 and 16.

    Args:
        denoise: The network.
        state: State of the chain at t.
        t: Timestep per item.
        t_prev: Timestep to go to, per item: the next of the sampler's own list, not t - T / n.
        diffusion: The process.
        noise: Noise of each item; needed where eta > 0.
        eta: 0 is deterministic, 1 as noisy as the ancestral step; a number for all items, or one for each, (B,).
        limit: Limit on the predicted x0.

    Raises:
        ValueError: If eta > 0 and there is no noise.
    """
    prediction = predict(denoise, state.x, t, t_prev, diffusion, limit)
    variance = eta**2 * diffusion.posterior_coefficients(t, t_prev)[2]
    alpha_bar_prev = diffusion.alpha_bar(t_prev)
    # (1 - alpha_bar_prev) - variance can end a rounding error below 0 where eta = 1 and t_prev = 0.
    direction = (1 - alpha_bar_prev - variance).clamp(min=0).sqrt()
    x = spread(alpha_bar_prev.sqrt(), state.x) * prediction.x0 + spread(direction, state.x) * prediction.eps
    if torch.as_tensor(eta > 0).any():
        if noise is None:
            raise ValueError(f"eta = {eta} adds noise: give a NoiseSource")
        x = x + spread(variance.sqrt(), state.x) * noise.normal_like(state.x)
    return SamplerState(x, prediction.x0, t)


def dpmpp_2m_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_prev: Tensor,
    diffusion: Diffusion,
    *,
    limit: Limit | None = None,
) -> SamplerState:
    """DPM-Solver++(2M) step: arXiv:2211.01095, algorithm 2.

    It is of first order on the first step and on the one to t_prev = -1: the half log-SNR is infinite at t_prev = -1,
    so that the last step is x = x0.
    """
    prediction = predict(denoise, state.x, t, t_prev, diffusion, limit)
    no_history = (state.t_last >= diffusion.num_timesteps) | (t_prev < 0)
    lambda_t = diffusion.log_snr(t)
    lambda_last = diffusion.log_snr(state.t_last.clamp(max=diffusion.num_timesteps - 1))
    lambda_prev = diffusion.log_snr(t_prev.clamp(min=0))
    # 1 / (2 r) of the paper, with r = (last step) / (this step) in half log-SNR.
    weight = torch.where(no_history, 0.0, 0.5 * (lambda_prev - lambda_t) / (lambda_t - lambda_last))
    x0 = prediction.x0 + spread(weight, state.x) * (prediction.x0 - state.x0)

    alpha_bar, alpha_bar_prev = diffusion.alpha_bar(t), diffusion.alpha_bar(t_prev)
    shrink = ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt()
    # -alpha (exp(-h) - 1) of the paper: alpha_prev - alpha shrink.
    gain = alpha_bar_prev.sqrt() - alpha_bar.sqrt() * shrink
    x = spread(shrink, state.x) * state.x + spread(gain, state.x) * x0
    return SamplerState(x, prediction.x0, t)


def heun_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_prev: Tensor,
    diffusion: Diffusion,
    *,
    limit: Limit | None = None,
) -> SamplerState:
    """Heun: a second-order step with two network calls, one if all go to t_prev = -1 (arXiv:2206.00364, algorithm 1).

    The probability flow is integrated along the angle phi, tan(phi) = s / a, in which dx / dphi = v (arXiv:2202.00512,
    appendix D). A step with constant x0 and eps is the rotation x cos + v sin (DDIM); the corrector averages v at both
    ends, the second expressed in the frame of the first. Heun in sigma = s / a, which is 2e4 at the end of the cosine
    schedule, would let the second slope of one step there outweigh everything.
    """
    prediction = predict(denoise, state.x, t, t_prev, diffusion, limit)
    a, s = diffusion.signal_noise(state.x, t)
    a_prev, s_prev = diffusion.signal_noise(state.x, t_prev)
    x_euler = a_prev * prediction.x0 + s_prev * prediction.eps
    if bool((t_prev < 0).all()):
        return SamplerState(x_euler, prediction.x0, t)
    second_t = t_prev.clamp(min=0)
    second = predict(denoise, x_euler, second_t, second_t - 1, diffusion, limit)
    cosine = a * a_prev + s * s_prev
    sine = s_prev * a - a_prev * s
    v = a * prediction.eps - s * prediction.x0
    v_second = a * second.eps - s * second.x0
    corrected = cosine * state.x + sine * 0.5 * (v + v_second)
    x = torch.where(spread(t_prev, state.x) < 0, x_euler, corrected)
    return SamplerState(x, prediction.x0, t)


def ddim_invert_step(
    denoise: Denoise,
    state: SamplerState,
    t: Tensor,
    t_next: Tensor,
    diffusion: Diffusion,
    *,
    num_refinements: int = 0,
    limit: Limit | None = None,
) -> SamplerState:
    """DDIM backwards, from t (-1 the clean sample) to a noisier t_next: arXiv:2105.05233, appendix F.

    The plain step takes the prediction at its start; DDIM forwards takes it at the other end. Each refinement repeats
    the step with the prediction at the point reached, and so converges to the exact inverse. Both steps are the
    rotation by the angle between the two levels of noise (see ``heun_step``). Each refinement shrinks the error by the
    sine of that angle, which is small for one step; solved for eps instead, the iteration would stall at the noisy end.

    Args:
        denoise: The network.
        state: State of the chain at t.
        t: Timestep per item, -1 for a clean sample (the network then sees timestep 0).
        t_next: Timestep to go to, per item; above t.
        diffusion: The process.
        num_refinements: Further network calls per step.
        limit: Limit on the predicted x0: the same as in sampling, or the trajectories differ.
    """
    a, s = diffusion.signal_noise(state.x, t)
    a_next, s_next = diffusion.signal_noise(state.x, t_next)
    cosine, sine = a * a_next + s * s_next, s_next * a - a_next * s
    input_t = t.clamp(min=0)
    first = predict(denoise, state.x, input_t, input_t - 1, diffusion, limit)
    x = cosine * state.x + sine * (a * first.eps - s * first.x0)
    for _ in range(num_refinements):
        refined = predict(denoise, x, t_next, t_next - 1, diffusion, limit)
        x = cosine * state.x + sine * (a * refined.eps - s * refined.x0)
    return SamplerState(x, first.x0, input_t)
