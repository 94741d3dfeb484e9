"""The Gaussian diffusion process: noising, what a network's output means, the reverse step, and the losses.

Legend: B batch, C channels (or features), T diffusion steps; ``x`` is (B, C, H, W) or (B, D), any float shape
with the batch first. ``t`` and ``t_prev`` are int64 vectors (B,), one timestep per item, 0-based; ``t_prev =
-1`` is the clean sample. a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t), so x_t = a x0 + s eps and v = a
eps - s x0.

A respaced chain needs no tables of its own: one step from t to any t_prev < t has alpha = alpha_bar_t /
alpha_bar_t_prev, and every other coefficient follows. All coefficients are computed per item in float64 and
rounded once, to the type of x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from models.diffusion.config import DiffusionConfig
from models.diffusion.likelihood import discretised_normal_log_prob, normal_kl
from models.diffusion.schedules import alpha_bar_table

Denoise = Callable[[Tensor, Tensor], Tensor]
"""A conditioned network: (x, t) -> output (B, C, ...), or (B, 2C, ...) where the variance is learned."""

PIXEL_BIN = 2 / 255
"""Width of one of 256 grey levels when pixels span [-1, 1]."""


class Prediction(NamedTuple):
    """The meaning of a network's output for one item at one step."""

    x0: Tensor
    """Clean sample, (B, C, ...)."""
    eps: Tensor
    """Noise, (B, C, ...), consistent with x0: x_t = a x0 + s eps."""
    log_variance: Tensor
    """Log variance of the reverse step from t to t_prev, broadcastable to x0."""


class LossTerms(NamedTuple):
    """Losses of one item, each (B,)."""

    loss: Tensor
    """The loss that training minimises: weighted, hybrid if the variance is learned; or the bound, in bits per dim."""
    mse: Tensor
    """Unweighted mean squared error of the predicted quantity."""
    vlb: Tensor | None
    """Term t of the variational bound, in bits per dimension; None where the loss has no such term."""


class Diffusion:
    """One noising process and the meaning of the outputs of a network trained on it; immutable, without state."""

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self._tables = {torch.device("cpu"): alpha_bar_table(config.schedule, config.num_timesteps)}

    # ---- coefficients ------------------------------------------------------------------------

    def alpha_bar(self, t: Int64[Tensor, " B"]) -> Float64[Tensor, " B"]:
        """Share of signal power at ``t`` (1 at t = -1), float64 on the device of ``t``."""
        table = self._tables.get(t.device)
        if table is None:  # a cache of a constant, not state: the same numbers on every device
            table = self._tables.setdefault(t.device, self._tables[torch.device("cpu")].to(t.device))
        return table[t + 1]

    def signal_noise(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The factors a and s at ``t``, in the type of ``x`` and shaped to multiply it."""
        alpha_bar = self.alpha_bar(t)
        return spread(alpha_bar.sqrt(), x), spread((1 - alpha_bar).sqrt(), x)

    def log_snr(self, t: Int64[Tensor, " B"]) -> Float64[Tensor, " B"]:
        """log(a / s) at ``t``, float64 (the lambda of DPM-Solver); infinite at t = -1."""
        alpha_bar = self.alpha_bar(t)
        return 0.5 * (alpha_bar.log() - (1 - alpha_bar).log())

    # ---- noising -----------------------------------------------------------------------------

    def q_sample(
        self, x0: Float[Tensor, " B *dims"], t: Int64[Tensor, " B"], noise: Float[Tensor, " B *dims"]
    ) -> Float[Tensor, " B *dims"]:
        """x_t given x0 and standard normal noise: arXiv:2006.11239, equation 4."""
        a, s = self.signal_noise(x0, t)
        return a * x0 + s * noise

    def posterior_coefficients(
        self, t: Int64[Tensor, " B"], t_prev: Int64[Tensor, " B"]
    ) -> tuple[Float64[Tensor, " B"], Float64[Tensor, " B"], Float64[Tensor, " B"]]:
        """Factors of x0 and x_t in the mean of q(x_{t_prev} | x_t, x0), and its variance: arXiv:2006.11239, eq. 7.

        Returns:
            Three float64 vectors (B,): at t_prev = -1 they are 1, 0 and 0.
        """
        alpha_bar, alpha_bar_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        alpha = alpha_bar / alpha_bar_prev
        beta, remaining = 1 - alpha, 1 - alpha_bar
        of_x0 = alpha_bar_prev.sqrt() * beta / remaining
        of_x_t = alpha.sqrt() * (1 - alpha_bar_prev) / remaining
        return of_x0, of_x_t, beta * (1 - alpha_bar_prev) / remaining

    def posterior_mean(self, x0: Tensor, x_t: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
        """Mean of q(x_{t_prev} | x_t, x0), (B, C, ...)."""
        of_x0, of_x_t, _ = self.posterior_coefficients(t, t_prev)
        return spread(of_x0, x_t) * x0 + spread(of_x_t, x_t) * x_t

    def log_variance_range(
        self, t: Int64[Tensor, " B"], t_prev: Int64[Tensor, " B"]
    ) -> tuple[Float64[Tensor, " B"], Float64[Tensor, " B"]]:
        """Logarithms of the least and the largest sensible variance of a reverse step: beta tilde and beta.

        At t_prev = -1 the posterior variance is 0 and has no logarithm; that of the step above (t_prev = 0) stands in
        for it, as in arXiv:2102.09672's code. It enters the decoder term of the bound alone: no noise is added there.
        """
        above = t.clamp(min=min(1, self.num_timesteps - 1)), t_prev.clamp(min=0)
        least = self.posterior_coefficients(*above)[2].clamp(min=1e-20)
        largest = 1 - self.alpha_bar(t) / self.alpha_bar(t_prev)
        return least.log(), largest.log()

    # ---- what an output means ----------------------------------------------------------------

    def predict(
        self, output: Tensor, x: Float[Tensor, " B *dims"], t: Int64[Tensor, " B"], t_prev: Int64[Tensor, " B"]
    ) -> Prediction:
        """Read a network's output at (x, t) for a step to ``t_prev``.

        Args:
            output: (B, C, ...), or (B, 2C, ...) with the variance in the last C channels; any float type.
            x: Noised sample at t, (B, C, ...), float32 or float64; the result has its type.
            t: Timestep of x per item.
            t_prev: Timestep the step goes to, per item; below t.

        Raises:
            ValueError: If x is of a half type, or the output has the wrong number of channels.
        """
        mean_output, variance_output = self.split_output(output, x)
        if self.config.prediction == "x0":
            x0, eps = mean_output, self.eps_from_x0(mean_output, x, t)
        elif self.config.prediction == "v":
            x0, eps = self.x0_eps_from_v(mean_output, x, t)
        else:
            x0, eps = self.x0_from_eps(mean_output, x, t), mean_output
        return Prediction(x0, eps, self.log_variance(variance_output, x, t, t_prev))

    def split_output(self, output: Tensor, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prediction and, where it is learned, the variance channels of an output, in the type of ``x``.

        Raises:
            ValueError: If x is of a half type, or the output has the wrong number of channels.
        """
        if x.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"x is {x.dtype}: the state of a chain must be float32 or float64")
        channels = x.shape[1]
        learned = self.config.variance == "learned_range"
        if output.shape[1] != channels * (2 if learned else 1):
            raise ValueError(
                f"output has {output.shape[1]} channels and x has {channels}: variance = "
                f"{self.config.variance!r} needs {'twice as many' if learned else 'as many'}"
            )
        output = output.to(x.dtype)
        if learned:
            return output[:, :channels], output[:, channels:]
        return output, None

    def log_variance(self, variance_output: Tensor | None, x: Tensor, t: Tensor, t_prev: Tensor) -> Tensor:
        """Log variance of the reverse step, broadcastable to ``x``; learned: arXiv:2102.09672, equation 15.

        Args:
            variance_output: (B, C, ...) with -1 for the least and 1 for the largest variance; None where it is fixed.
            x: Gives type and number of axes.
            t: Timestep per item.
            t_prev: Timestep the step goes to, per item.
        """
        least, largest = self.log_variance_range(t, t_prev)
        if variance_output is not None:
            fraction = (variance_output + 1) / 2
            return fraction * spread(largest, x) + (1 - fraction) * spread(least, x)
        if self.config.variance == "fixed_large":
            # beta_0 is far too large for the decoder term; arXiv:2102.09672's code takes beta tilde instead.
            return spread(torch.where(t_prev < 0, least, largest), x)
        return spread(least, x)

    def x0_from_eps(self, eps: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Clean sample from the noise: (x - s eps) / a."""
        a, s = self.signal_noise(x, t)
        return (x - s * eps) / a

    def eps_from_x0(self, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Noise from the clean sample: (x - a x0) / s."""
        a, s = self.signal_noise(x, t)
        return (x - a * x0) / s

    def x0_eps_from_v(self, v: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Clean sample a x - s v and noise s x + a v: arXiv:2202.00512, appendix D. Well conditioned at both ends."""
        a, s = self.signal_noise(x, t)
        return a * x - s * v, s * x + a * v

    def v_from_x0_eps(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The target v = a eps - s x0: arXiv:2202.00512, section 4."""
        a, s = self.signal_noise(x0, t)
        return a * eps - s * x0

    def output_shift(self, eps_shift: Tensor, t: Tensor) -> Tensor:
        """How an output (without variance channels) changes when the eps it means moves by ``eps_shift`` at fixed x."""
        if self.config.prediction == "eps":
            return eps_shift
        a, s = self.signal_noise(eps_shift, t)
        return -s / a * eps_shift if self.config.prediction == "x0" else eps_shift / a

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The quantity that the network is trained to predict, (B, C, ...)."""
        if self.config.prediction == "x0":
            return x0
        return eps if self.config.prediction == "eps" else self.v_from_x0_eps(x0, eps, t)

    # ---- losses ------------------------------------------------------------------------------

    def training_losses(self, denoise: Denoise, x0: Tensor, t: Tensor, noise: Tensor) -> LossTerms:
        """Losses of one batch at random timesteps; see ``losses_from_output``."""
        x_t = self.q_sample(x0, t, noise)
        return self.losses_from_output(denoise(x_t, t), x0, x_t, t, noise)

    def losses_from_output(
        self,
        output: Tensor,
        x0: Float[Tensor, " B *dims"],
        x_t: Float[Tensor, " B *dims"],
        t: Int64[Tensor, " B"],
        noise: Float[Tensor, " B *dims"],
    ) -> LossTerms:
        """Losses per item of a network's output at x_t.

        The loss is the weighted squared error; where the variance is learned, vlb_weight * T * (term t of the bound) is
        added, with the predicted mean detached so that it teaches the variance alone (arXiv:2102.09672, section 3.1). T
        makes one term an estimate of the whole bound. With ``loss = "vlb"`` it is T * (term t), which teaches the mean
        too (section 3.3).

        Args:
            output: (B, C, ...) or (B, 2C, ...), any float type; the losses are computed in the type of x_t.
            x0: Clean samples; pixels in [-1, 1] where the loss has a term of the bound.
            x_t: ``q_sample(x0, t, noise)``.
            t: Timestep per item.
            noise: The noise in x_t.
        """
        prediction, variance_output = self.split_output(output, x_t)
        mse = per_item_mean((self.target(x0, noise, t) - prediction) ** 2)
        if self.config.loss == "vlb":
            vlb = self.vlb_terms(self.predict(output, x_t, t, t - 1), x0, x_t, t)
            return LossTerms(self.num_timesteps * vlb, mse, vlb)
        loss = self.loss_weight(t).to(mse.dtype) * mse
        if variance_output is None:
            return LossTerms(loss, mse, None)
        frozen = torch.cat([prediction.detach(), variance_output], dim=1)
        vlb = self.vlb_terms(self.predict(frozen, x_t, t, t - 1), x0, x_t, t)
        return LossTerms(loss + self.config.vlb_weight * self.num_timesteps * vlb, mse, vlb)

    def loss_weight(self, t: Int64[Tensor, " B"]) -> Float64[Tensor, " B"]:
        """Weight of the squared error at ``t``: 1, or min-SNR (arXiv:2303.09556, section 3.4), float64.

        Min-SNR weighs the error of x0 by min(SNR, gamma), and by no less than the floor. The error of eps is SNR times,
        that of v SNR + 1 times that of x0.
        """
        if self.config.loss_weighting == "none":
            return torch.ones(t.shape, dtype=torch.float64, device=t.device)
        alpha_bar = self.alpha_bar(t)
        snr = alpha_bar / (1 - alpha_bar)
        clamped = snr.clamp(self.config.min_snr_floor, self.config.min_snr_gamma)
        if self.config.prediction == "x0":
            return clamped
        return clamped / (snr if self.config.prediction == "eps" else snr + 1)

    def vlb_terms(
        self, prediction: Prediction, x0: Tensor, x_t: Tensor, t: Tensor, *, bin_width: float = PIXEL_BIN
    ) -> Float[Tensor, " B"]:
        """Term t of the variational bound per item, in bits per dimension: arXiv:2006.11239, equation 5.

        For t > 0 the divergence from q(x_{t-1} | x_t, x0) to the predicted step; at t = 0 the negative log likelihood
        of the quantised x0 under it. Works on the predicted x0, so on every kind of prediction.

        Args:
            prediction: Made with t_prev = t - 1.
            x0: Clean samples; pixels in [-1, 1] on a grid of ``bin_width``.
            x_t: Noised samples.
            t: Timestep per item.
            bin_width: Distance between two values that x0 may take, in units of x0.
        """
        of_x0, of_x_t, _ = self.posterior_coefficients(t, t - 1)
        least, _ = self.log_variance_range(t, t - 1)
        # Both means share the x_t term, which therefore cancels exactly here and not in float32.
        mean_gap = spread(of_x0, x_t) * (x0 - prediction.x0)
        divergence = normal_kl(mean_gap, spread(least, x_t), prediction.log_variance)
        divergence = per_item_mean(divergence)
        # Only items at t = 0 need the decoder term. On the CPU the other items are left out, as it would take 10 ms of
        # the 17 for 64 pictures of 16 px; on a GPU it is cheap, and picking items would wait for the device.
        items = (t == 0).nonzero().flatten() if t.device.type == "cpu" else torch.arange(len(t), device=t.device)
        mean = (spread(of_x0, x_t) * prediction.x0 + spread(of_x_t, x_t) * x_t)[items]
        log_variance = prediction.log_variance.expand_as(x_t)[items]
        decoder = per_item_mean(-discretised_normal_log_prob(x0[items], mean, log_variance, bin_width))
        nats = divergence.index_copy(0, items, torch.where(t[items] == 0, decoder, divergence[items]))
        return nats / math.log(2)

    def prior_bpd(self, x0: Float[Tensor, " B *dims"]) -> Float[Tensor, " B"]:
        """Divergence from q(x_{T-1} | x0) to a standard normal, in bits per dimension; nearly 0 for a good one."""
        t = torch.full((x0.shape[0],), self.num_timesteps - 1, device=x0.device)
        alpha_bar = self.alpha_bar(t)
        mean = spread(alpha_bar.sqrt(), x0) * x0
        kl = normal_kl(mean, spread((1 - alpha_bar).log(), x0), torch.zeros((), dtype=x0.dtype, device=x0.device))
        return per_item_mean(kl) / math.log(2)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """A vector (B,) in the type of ``like`` and with trailing axes of 1, so that it multiplies it item by item."""
    return values.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def per_item_mean(values: Float[Tensor, " B *dims"]) -> Float[Tensor, " B"]:
    """Mean over every axis but the first."""
    return values.flatten(1).mean(dim=1)
