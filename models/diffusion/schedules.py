"""Noise schedules and the timesteps that a sampler visits.

Legend: T steps of the chain, n steps of a sampler. A timestep t is 0-based: t = 0 is the least noisy step of
the chain and t = T - 1 the noisiest; t = -1 stands for the clean sample. alpha_bar_t is the share of signal
power that is left at step t, so that x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps.

Everything is float64 on the CPU: cosine betas span five decades, and 1 - alpha_bar loses them all in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from models.diffusion.config import FAST27_SECTIONS, section_lengths

Schedule = Literal["cosine", "linear"]
Spacing = Literal["linspace", "trailing"]


def cosine_betas(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.999) -> Float64[Tensor, " T"]:
    """Noise added by each step of the cosine schedule: arXiv:2102.09672, equation 17.

    Args:
        num_timesteps: Length T of the chain, in steps; at least 1.
        offset: The paper's s, dimensionless; keeps the first betas from vanishing.
        max_beta: Cap of each beta, dimensionless (section 3.2: 0.999), which only the last step meets.

    Returns:
        beta_0 .. beta_{T-1}, float64, each in (0, max_beta].

    Raises:
        ValueError: If ``num_timesteps`` is below 1.
    """
    _require_steps(num_timesteps)
    fractions = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    signal = torch.cos((fractions + offset) / (1 + offset) * math.pi / 2) ** 2
    return (1 - signal[1:] / signal[:-1]).clamp(max=max_beta)


def linear_betas(num_timesteps: int, *, first: float = 1e-4, last: float = 0.02) -> Float64[Tensor, " T"]:
    """Noise added by each step of the linear schedule: arXiv:2006.11239, section 4.

    Other lengths than 1000 are scaled by 1000 / T, so that the chain ends at the same noise; a chain so short
    that a beta would pass 0.999 is capped there.

    Args:
        num_timesteps: Length T of the chain, in steps; at least 1.
        first: beta_0 at T = 1000, dimensionless.
        last: beta_{T-1} at T = 1000, dimensionless.

    Returns:
        beta_0 .. beta_{T-1}, float64, increasing, each in (0, 0.999].

    Raises:
        ValueError: If ``num_timesteps`` is below 1.
    """
    _require_steps(num_timesteps)
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * first, scale * last, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=0.999)


def alpha_bar_table(schedule: Schedule, num_timesteps: int) -> Float64[Tensor, " T_plus_1"]:
    """Share of signal power at every level of noise, the clean one included.

    Args:
        schedule: "cosine" or "linear".
        num_timesteps: Length T of the chain, in steps; at least 1.

    Returns:
        alpha_bar_{-1} = 1, alpha_bar_0 .. alpha_bar_{T-1}: entry t + 1 belongs to timestep t. Float64,
        strictly decreasing, positive.

    Raises:
        ValueError: If ``num_timesteps`` is below 1 or the schedule is unknown.
    """
    if schedule == "cosine":
        betas = cosine_betas(num_timesteps)
    elif schedule == "linear":
        betas = linear_betas(num_timesteps)
    else:
        raise ValueError(f"schedule {schedule!r}: choose 'cosine' or 'linear'")
    return torch.cat([torch.ones(1, dtype=torch.float64), torch.cumprod(1 - betas, dim=0)])


def strided_timesteps(num_timesteps: int, num_steps: int, spacing: Spacing = "linspace") -> tuple[int, ...]:
    """Evenly spaced timesteps, noisiest first.

    "linspace" visits both ends, T - 1 and 0, which is what respacing in arXiv:2102.09672 (section 4) and
    diffusers' ``UnCLIPScheduler`` do; "trailing" (arXiv:2305.08891, table 2) visits T - 1 and then every T /
    n-th step. Both begin at T - 1: a sampler that starts lower from pure noise starts from the wrong
    distribution.

    Args:
        num_timesteps: Length T of the chain, in steps.
        num_steps: Number n of timesteps to visit; 1 <= n <= T.
        spacing: "linspace" or "trailing".

    Returns:
        n distinct timesteps, strictly decreasing from T - 1.

    Raises:
        ValueError: If n is out of range or the spacing is unknown.
    """
    _require_steps(num_timesteps)
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps = {num_steps}: from 1 to num_timesteps = {num_timesteps}")
    last = num_timesteps - 1
    if spacing == "linspace":
        if num_steps == 1:
            return (last,)
        stride = last / (num_steps - 1)  # rounded before the product, so that halves round as in diffusers
        return tuple(round(i * stride) for i in reversed(range(num_steps)))
    if spacing == "trailing":
        return tuple(round(num_timesteps - i * num_timesteps / num_steps) - 1 for i in range(num_steps))
    raise ValueError(f"spacing {spacing!r}: choose 'linspace' or 'trailing'")


def section_timesteps(num_timesteps: int, sections: Sequence[int]) -> tuple[int, ...]:
    """Timesteps with their own density in each equal section of the chain: arXiv:2102.09672's respacing.

    Args:
        num_timesteps: Length T of the chain, in steps.
        sections: Timesteps to visit in each section, the section at the clean end first. Each section spans T
            / len steps (the first ones take the remainder) and is visited from its first step to its last.

    Returns:
        sum(sections) distinct timesteps, strictly decreasing.

    Raises:
        ValueError: If a section is shorter than its number of timesteps to visit.
    """
    _require_steps(num_timesteps)
    ascending: list[int] = []
    start = 0
    for i, (count, length) in enumerate(zip(sections, section_lengths(num_timesteps, len(sections)), strict=True)):
        if not 1 <= count <= length:
            raise ValueError(f"section {i} spans {length} timesteps: it cannot be visited at {count} of them")
        stride = (length - 1) / (count - 1) if count > 1 else 1.0
        ascending += [start + round(j * stride) for j in range(count)]
        start += length
    return tuple(reversed(ascending))


def fast27_timesteps(num_timesteps: int) -> tuple[int, ...]:
    """GLIDE's 27 timesteps for upsamplers: sections 10,10,3,2,2 with T - 3 in place of T - 1.

    The paper's 27 steps for 64 -> 256 (arXiv:2204.06125, table 3) are most likely these. At T - 3 the cosine
    chain keeps under 1e-4 of the signal power, so starting there from pure noise is harmless; it avoids the
    worst-conditioned step.

    Args:
        num_timesteps: Length T of the chain, in steps; at least 47.

    Returns:
        27 distinct timesteps, strictly decreasing from T - 3.

    Raises:
        ValueError: If the chain is too short for the sections.
    """
    steps = section_timesteps(num_timesteps, FAST27_SECTIONS)
    return (num_timesteps - 3, *steps[1:])


def sampling_timesteps(num_timesteps: int, num_steps: int, respacing: str = "") -> tuple[int, ...]:
    """The timesteps that a sampler visits, noisiest first.

    Args:
        num_timesteps: Length T of the chain, in steps.
        num_steps: Number of timesteps for an even stride; a preset has its own.
        respacing: "" for an even stride from T - 1 to 0, "trailing" for one that ends above 0, "fast27", or
            comma-separated sections such as "10,10,3,2,2".

    Returns:
        Distinct timesteps, strictly decreasing.

    Raises:
        ValueError: If the preset is unknown or the numbers do not fit the chain.
    """
    if respacing == "":
        return strided_timesteps(num_timesteps, num_steps)
    if respacing == "trailing":
        return strided_timesteps(num_timesteps, num_steps, "trailing")
    if respacing == "fast27":
        return fast27_timesteps(num_timesteps)
    parts = respacing.split(",")
    if not all(part.strip().isdigit() for part in parts):
        raise ValueError(f"respacing {respacing!r}: '', 'trailing', 'fast27', or sections such as '10,10,3,2,2'")
    return section_timesteps(num_timesteps, [int(part) for part in parts])


def _require_steps(num_timesteps: int) -> None:
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps = {num_timesteps}: at least 1")
