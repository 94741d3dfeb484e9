"""Shape of the noise-aware CLIP."""

from __future__ import annotations

from dataclasses import field

from models.configclass import configclass, require
from models.diffusion.config import DiffusionConfig
from models.layers.config import UNetConfig


@configclass
class NoisyClipConfig:
    """A CLIP image tower that sees noised pictures and their timestep: arXiv:2112.10741, section 2.4."""

    image_px: int = 64
    """Side of the pictures, in pixels: the decoder's."""
    tower: UNetConfig = field(
        default_factory=lambda: UNetConfig(channels=64, num_res_blocks=2, attention_resolutions=(), dropout=0.0)
    )
    """Shape of the tower: the downward half of such a UNet, then the mean over its last pixels."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """The noising; schedule and number of timesteps must be the decoder's."""

    def __post_init__(self) -> None:
        require(not self.tower.attention_resolutions, "tower.attention_resolutions: this tower has no attention")
        self.tower.require_fits(self.image_px)
        require(
            (self.diffusion.loss, self.diffusion.timestep_draws) == ("simple", "uniform"),
            "diffusion.loss, diffusion.timestep_draws: this tower is trained by contrast; set 'simple' and 'uniform'",
        )
