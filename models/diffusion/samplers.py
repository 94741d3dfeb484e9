"""Samplers: from noise to a sample along a list of timesteps, by one step or another.

Legend: B batch, T diffusion steps. ``x_T`` is (B, C, H, W) or (B, D), standard normal; ``denoise(x, t)`` is a
conditioned network (models/diffusion/guidance.py wraps guidance around it); ``timesteps`` falls strictly, from T - 1
for pure noise (models/diffusion/schedules.py makes lists), and the step after its last one goes to the clean sample.

    sample                            the sampler that a SamplerConfig names
    sample_along, iterate_steps       any step of models/diffusion/steps.py: ddpm, analytic, ddim, dpmpp_2m, heun

The steps themselves take one timestep per item, for a server that batches requests at different steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from models.diffusion.config import SamplerConfig
from models.diffusion.limits import ClipRange, DynamicThreshold, Limit
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.schedules import sampling_timesteps
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


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """One sampling method of a recipe."""

    step: Callable[..., SamplerState]
    """One step of it, of models/diffusion/steps.py."""
    needs: tuple[str, ...] = ()
    """Options that the step requires: ``noise``, ``x0_variance``."""
    takes: tuple[str, ...] = ()
    """Options of the step that may be left out."""
    respacing: str = ""
    """``respacing`` if the recipe's is empty."""
    calls_per_step: int = 1
    """Calls of the network in each step but the last, which has one."""


SAMPLERS = {
    "ddpm": Sampler(step=ddpm_step, needs=("noise",)),
    "ddim": Sampler(step=ddim_step, takes=("noise", "eta")),
    "analytic": Sampler(step=analytic_step, needs=("noise", "x0_variance")),
    "dpmpp_2m": Sampler(step=dpmpp_2m_step, respacing="trailing"),
    "heun": Sampler(step=heun_step, respacing="trailing", calls_per_step=2),
}
"""Every method of ``SamplerConfig.method``."""


def iterate_steps(
    step: Step, denoise: Denoise, x: Tensor, diffusion: Diffusion, timesteps: Sequence[int]
) -> Iterator[SamplerState]:
    """Take ``step`` along ``timesteps`` and yield the state after each; ``x0`` is a preview, the last ``x`` the sample.

    Args:
        step: A step of models/diffusion/steps.py with its options bound.
        denoise: The network.
        x: Noised samples at timesteps[0], (B, C, ...).
        diffusion: The process.
        timesteps: Timesteps to visit, strictly decreasing.

    Raises:
        ValueError: If the timesteps are not strictly decreasing within the chain.
    """
    _require_decreasing(timesteps, diffusion)
    state = initial_state(x, diffusion)
    for t, t_prev in zip(timesteps, (*timesteps[1:], -1), strict=True):
        with torch.no_grad():
            state = step(denoise, state, _filled(t, x), _filled(t_prev, x), diffusion)
        yield state


def sample_along(step: Step, denoise: Denoise, x_T: Tensor, diffusion: Diffusion, timesteps: Sequence[int]) -> Tensor:
    """The sample at the end of ``iterate_steps``, (B, C, ...)."""
    *_, last = iterate_steps(step, denoise, x_T, diffusion, timesteps)
    return last.x


def sample(
    denoise: Denoise,
    x_T: Tensor,
    diffusion: Diffusion,
    config: SamplerConfig,
    noise: NoiseSource | None = None,
    *,
    x0_variance: Tensor | None = None,
) -> Tensor:
    """Sample as ``config`` says, (B, C, ...).

    Args:
        denoise: The network with its guidance; ``config.guidance_scale`` is not applied here.
        x_T: Standard normal noise, (B, C, ...).
        diffusion: The process.
        config: Method, timesteps and limits.
        noise: Noise source with B items; methods without noise need none.
        x0_variance: (T,), for the analytic method alone.

    Raises:
        ValueError: If the method needs noise or x0_variance and has none, or the timesteps do not fit the chain.
    """
    step = make_step(config, noise, x0_variance=x0_variance)
    return sample_along(step, denoise, x_T, diffusion, config_timesteps(config, diffusion))


def config_timesteps(config: SamplerConfig, diffusion: Diffusion) -> tuple[int, ...]:
    """The timesteps that ``config`` visits on the chain of ``diffusion``, strictly decreasing.

    An even stride visits both ends of the chain. The second-order solvers, DPM-Solver++(2M) and Heun, leave out t = 0:
    in half log-SNR the step to it is several times longer than the one before, so that an extrapolated slope
    overshoots. Final std of analytic Gaussian data by DPM-Solver++ (true std 0.5, cosine, 15 steps): 1.16 with
    t = 0, 0.99 without. Wasserstein distance of Heun's sample to four sharp grey levels at 5, 8 and 10 steps: 0.31,
    0.20, 0.08 with t = 0; 0.13, 0.05, 0.02 without. ``respacing`` overrides either.
    """
    respacing = config.respacing or SAMPLERS[config.method].respacing
    return sampling_timesteps(diffusion.num_timesteps, config.num_steps, respacing)


def num_network_calls(config: SamplerConfig, diffusion: Diffusion) -> int:
    """Calls of the network for one sample; a method with more than one call a step takes one in its last step."""
    return 1 + SAMPLERS[config.method].calls_per_step * (len(config_timesteps(config, diffusion)) - 1)


def make_step(config: SamplerConfig, noise: NoiseSource | None = None, *, x0_variance: Tensor | None = None) -> Step:
    """The step of the method that ``config`` names, with its options bound.

    Raises:
        ValueError: If the method needs noise or x0_variance and has none.
    """
    sampler = SAMPLERS[config.method]
    options = {"noise": noise, "x0_variance": x0_variance, "eta": config.eta}
    if "noise" in sampler.needs and noise is None:
        raise ValueError(f"method = {config.method!r} samples noise at each step: give a NoiseSource")
    if "x0_variance" in sampler.needs and x0_variance is None:
        raise ValueError(f"method = {config.method!r} needs x0_variance: estimate it on training samples")
    bound = {name: options[name] for name in (*sampler.needs, *sampler.takes)}
    return partial(sampler.step, limit=make_limit(config), **bound)


def make_limit(config: SamplerConfig) -> Limit | None:
    """The limit on x0 that ``config`` describes: dynamic thresholding before clipping, None for neither."""
    if config.dynamic_threshold_prob > 0:
        return DynamicThreshold(config.dynamic_threshold_prob, config.clip_range)
    return ClipRange(-config.clip_range, config.clip_range) if config.clip_x0 else None


def _filled(t: int, like: Tensor) -> Tensor:
    return torch.full((like.shape[0],), t, device=like.device)


def _require_decreasing(timesteps: Sequence[int], diffusion: Diffusion) -> None:
    falls = all(later < earlier for earlier, later in pairwise(timesteps))
    if not timesteps or not falls or timesteps[-1] < 0 or timesteps[0] >= diffusion.num_timesteps:
        raise ValueError(
            f"timesteps {list(timesteps)}: must fall strictly and lie in 0 .. {diffusion.num_timesteps - 1}"
        )
