"""Shape and choices of an upsampler, as data: arXiv:2204.06125, section 2.1."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from models.configclass import configclass, require
from models.diffusion.config import DiffusionConfig, SamplerConfig, require_measured, require_steps
from models.layers.config import UNetConfig


@configclass
class UpsamplerConfig:
    """P(image | smaller image), convolution only and unguided: arXiv:2204.06125, section 2.1."""

    image_px: int = 256
    """Side of the generated picture, in pixels (table 3: 256, 1024)."""
    low_res_px: int = 64
    """Side of the picture it starts from, in pixels (table 3: 64, 256)."""
    crop_px: int = 64
    """Side of the training crops of the large picture, in pixels (table 3: a quarter of ``image_px``)."""
    unet: UNetConfig = field(default_factory=lambda: UNetConfig(channels=96, attention_resolutions=()))
    """Shape of the UNet; no attention."""
    rounded: bool = True
    """Whether the small picture is rounded to 256 levels, and its enlargement clipped to [-1, 1], as if it came from
    a file (GLIDE's sampling does the former). Off: as diffusers' pipeline and Karlo have it; see ``unclip export``."""
    degradation: Literal["blur", "bsr", "none"] = "blur"
    """Corruption of the small picture in training (section 2.1: blur for 64 -> 256, BSR for 256 -> 1024)."""
    noise_level_max: float = 0.0
    """Largest share of noise in the enlarged small picture in training, uniform from 0 per sample; the network reads it
    in an extra input channel (arXiv:2106.15282, section 3). 0 is the paper's upsampler, without noise and channel."""
    noise_level: float = 0.0
    """Share of noise in the enlarged small picture in sampling; at most ``noise_level_max``."""
    residual: bool = False
    """Whether the network predicts the large picture less the enlarged small one, not the large picture (with
    ``diffusion.prediction`` x0 alone): off is the paper's; on, a small network starts from bicubic enlargement."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Noising of the picture."""
    sampler: SamplerConfig = field(
        default_factory=lambda: SamplerConfig(method="ddim", num_steps=27, respacing="fast27")
    )
    """Sampling (table 3: DDIM, 27 and 15 steps)."""

    def __post_init__(self) -> None:
        require(
            self.unet.position_bands == 0, "unet.position_bands: an upsampler is trained on crops, where places differ"
        )
        require(not self.unet.attention_resolutions, "unet.attention_resolutions: an upsampler has none")
        require(
            0 < self.low_res_px < self.image_px and self.image_px % self.low_res_px == 0,
            f"image_px = {self.image_px} is not a larger multiple of low_res_px = {self.low_res_px}",
        )
        factor = self.image_px // self.low_res_px
        require(
            0 < self.crop_px <= self.image_px and self.crop_px % factor == 0,
            f"crop_px = {self.crop_px}: at most image_px, and a multiple of {factor}",
        )
        self.unet.require_fits(self.image_px)
        self.unet.require_fits(self.crop_px)
        require(0 <= self.noise_level_max < 1, f"noise_level_max = {self.noise_level_max}: must be in [0, 1)")
        require(
            0 <= self.noise_level <= self.noise_level_max,
            f"noise_level = {self.noise_level}: between 0 and noise_level_max = {self.noise_level_max}",
        )
        require(
            not self.residual or self.diffusion.prediction == "x0",
            f"residual = true needs diffusion.prediction = 'x0', not {self.diffusion.prediction!r}",
        )
        require_steps(self.sampler, self.diffusion)
        require_measured(self.sampler)
        require(self.sampler.guidance_scale == 1.0, "sampler.guidance_scale: an upsampler is not guided; set 1.0")
        require(self.sampler.clip_guidance_scale == 0, "sampler.clip_guidance_scale: of the decoder alone; set 0.0")
