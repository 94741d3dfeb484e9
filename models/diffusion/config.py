"""The noising process and how it is sampled, as data.

The configurations of every network are frozen dataclasses that import neither torch nor pydantic.

Each class carries ``__pydantic_config__``, so that ``pipeline.recipe.sections`` can check a recipe against it: unknown
keys and wrong types are refused there. Values that do not fit together are refused here by a ValueError. Defaults
follow table 3 of arXiv:2204.06125 (appendix C), scaled down to one GPU.
"""

from __future__ import annotations

from typing import Literal

from models.configclass import configclass, require, require_prob

FAST27_SECTIONS = (10, 10, 3, 2, 2)
"""Steps in each fifth of the chain, from the clean end to the noisy one (GLIDE's fast27)."""


@configclass
class DiffusionConfig:
    """The noising process and what the network predicts: arXiv:2102.09672."""

    num_timesteps: int = 1000
    """Length T of the noising chain, in steps (table 3: 1000)."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """Noise schedule (table 3: linear for 256 -> 1024, cosine elsewhere)."""
    prediction: Literal["eps", "x0", "v"] = "eps"
    """What the network predicts: the noise, the clean sample (the prior), or v (arXiv:2202.00512)."""
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    """Variance of a reverse step; learned_range doubles the output channels (arXiv:2102.09672, eq. 15)."""
    loss: Literal["simple", "vlb"] = "simple"
    """simple: squared error, hybrid where the variance is learned; vlb: the variational bound alone, in bits per
    dimension (section 3.3; of pixels only). With a fixed variance it teaches the mean, as in arXiv:2006.11239."""
    timestep_draws: Literal["uniform", "loss_aware"] = "uniform"
    """Timesteps of a training batch: uniform, or in proportion to the root mean square of their last 10 losses, where
    each loss is weighted so that the mean stays the same (section 3.3: for vlb, whose terms differ most). Validation
    samples timesteps uniformly, so it does not depend on what training has seen."""
    loss_weighting: Literal["none", "min_snr"] = "none"
    """Weight of each timestep in the loss; min_snr is arXiv:2303.09556."""
    min_snr_gamma: float = 5.0
    """Most that the signal-to-noise ratio counts in min_snr, dimensionless (arXiv:2303.09556: 5)."""
    min_snr_floor: float = 0.0
    """Least that it counts (arXiv:2202.00512, section 4, "truncated SNR": 1; min_snr itself: 0). The noisy steps decide
    where things stand, and by min_snr alone they hardly count; with a floor, shapes need more steps (docs/lab.md)."""
    vlb_weight: float = 0.001
    """Weight lambda of the variational term of the hybrid loss (arXiv:2102.09672, section 3.1: 0.001)."""

    def __post_init__(self) -> None:
        require(self.num_timesteps >= 1, f"num_timesteps = {self.num_timesteps}: at least 1")
        require(self.min_snr_gamma > 0, f"min_snr_gamma = {self.min_snr_gamma}: must be positive")
        require(
            0 <= self.min_snr_floor <= self.min_snr_gamma,
            f"min_snr_floor = {self.min_snr_floor}: from 0 to min_snr_gamma = {self.min_snr_gamma}",
        )
        require(self.vlb_weight >= 0, f"vlb_weight = {self.vlb_weight}: must not be negative")
        require(
            self.loss == "simple" or self.loss_weighting == "none",
            f"loss_weighting = {self.loss_weighting!r} weighs a squared error, and loss = 'vlb' has none; set 'none'",
        )


@configclass
class SamplerConfig:
    """How a trained network is sampled. It changes no weight, so it can be changed at any time.

    One exception: the variance for the prior's analytic sampler is measured at the end of the training, at the
    timesteps that the sampler visits.
    """

    method: Literal["ddpm", "ddim", "analytic", "dpmpp_2m", "heun"] = "ddpm"
    """Ancestral, DDIM (arXiv:2010.02502), Analytic-DPM (2201.06503), DPM-Solver++(2M) (2211.01095), Heun."""
    num_steps: int = 250
    """Steps taken, evenly strided over the chain: from T - 1 to 0, or to above 0 by dpmpp_2m and heun ("trailing")."""
    respacing: str = ""
    """Timesteps in place of the even stride: "trailing" (even, ends above t = 0: arXiv:2305.08891), "fast27" (GLIDE's),
    or steps in each equal section of the chain, clean end first, as in "10,10,3,2,2"; they add up to ``num_steps``."""
    eta: float = 0.0
    """Noise of DDIM, dimensionless: 0 is deterministic, 1 is as noisy as the ancestral sampler."""
    guidance_scale: float = 1.0
    """Classifier-free guidance s in uncond + s (cond - uncond), dimensionless; 1 costs no second forward."""
    clip_guidance_scale: float = 0.0
    """Strength of the gradient of a noise-aware CLIP, dimensionless, for the decoder alone (arXiv:2112.10741, equation
    9); needs ``[noisy_clip]``. 0 turns it off. It guides prompts, and edits of pictures that have a prompt."""
    clip_x0: bool = True
    """Clip the predicted clean sample to [-clip_range, clip_range] at each step."""
    clip_range: float = 1.0
    """Half width of that range: 1 for pixels; for scaled embeddings Karlo's 5, which bounds outliers alone."""
    dynamic_threshold_prob: float = 0.0
    """Quantile of |x0| for dynamic thresholding (arXiv:2205.11487, section 2.3: 0.995); 0 turns it off."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, f"num_steps = {self.num_steps}: at least 1")
        steps = sum(self.sections)
        require(
            not steps or self.num_steps == steps,
            f"respacing = {self.respacing!r} takes {steps} steps: set num_steps = {steps}, not {self.num_steps}",
        )
        require(self.clip_range > 0, f"clip_range = {self.clip_range}: must be positive")
        require_prob("eta", self.eta)
        require(self.guidance_scale >= 0, f"guidance_scale = {self.guidance_scale}: must not be negative")
        require(self.clip_guidance_scale >= 0, f"clip_guidance_scale = {self.clip_guidance_scale}: not negative")
        require_prob("dynamic_threshold_prob", self.dynamic_threshold_prob)

    @property
    def sections(self) -> tuple[int, ...]:
        """Steps in each section of the chain where ``respacing`` gives them; ValueError if it gives nonsense."""
        if self.respacing in {"", "trailing"}:
            return ()
        if self.respacing == "fast27":
            return FAST27_SECTIONS
        parts = [part.strip() for part in self.respacing.split(",")]
        require(
            all(part.isdecimal() and int(part) >= 1 for part in parts),
            f"respacing = {self.respacing!r}: '', 'trailing', 'fast27', or sections such as '10,10,3,2,2'",
        )
        return tuple(int(part) for part in parts)


def require_steps(sampler: SamplerConfig, diffusion: DiffusionConfig) -> None:
    """Raise ValueError unless the sampler's timesteps exist in the chain."""
    require(
        sampler.num_steps <= diffusion.num_timesteps,
        f"sampler.num_steps = {sampler.num_steps} is above num_timesteps = {diffusion.num_timesteps}",
    )
    lengths = section_lengths(diffusion.num_timesteps, max(1, len(sampler.sections)))
    require(
        all(count <= length for count, length in zip(sampler.sections, lengths, strict=False)),
        f"sampler.respacing = {sampler.respacing!r}: the sections of {diffusion.num_timesteps} timesteps hold only "
        f"{', '.join(map(str, lengths))}",
    )


def section_lengths(num_timesteps: int, num_sections: int) -> tuple[int, ...]:
    """Timesteps in each of the equal sections of a chain, clean end first; the first ones take the remainder."""
    size, extra = divmod(num_timesteps, num_sections)
    return tuple(size + (1 if place < extra else 0) for place in range(num_sections))


def require_measured(sampler: SamplerConfig) -> None:
    """Raise ValueError if the sampler needs a variance that no training of this network measures."""
    require(
        sampler.method != "analytic",
        "sampler.method = 'analytic': its variance is measured for the prior alone; use ddpm, ddim or dpmpp_2m",
    )
