"""Shape and choices of the diffusion prior, as data: arXiv:2204.06125, section 2.2."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from models.configclass import configclass, require, require_dropout, require_norm, require_prob
from models.diffusion.config import DiffusionConfig, SamplerConfig, require_steps
from models.layers.config import require_transformer


@configclass
class PriorConfig:
    """Diffusion prior P(z_image | caption): arXiv:2204.06125, section 2.2; CLIP's widths are in ClipDims."""

    kind: Literal["diffusion"] = "diffusion"
    """Removes noise from z_image; models/ar_prior/config.py is the other kind."""
    width: int = 512
    """Width of the transformer, in features (table 3: 2048)."""
    depth: int = 12
    """Blocks of the transformer (table 3: 24)."""
    num_heads: int = 8
    """Attention heads (table 3: 32)."""
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, as a multiple of ``width``."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward, per feature (table 3 states none)."""
    text_drop_prob: float = 0.1
    """Probability of dropping the text conditioning, per sample (section 2.2: 0.1)."""
    num_candidates: int = 2
    """Samples of z_image per caption, of which the one nearest z_text is kept (section 2.2: 2)."""
    image_norm: float = 1.0
    """Length of z_image as the weights read it: 1, or about 10 where `unclip import` brought weights that were trained
    on CLIP's raw embeddings (Karlo). Outside the network every z_image has length one."""
    diffusion: DiffusionConfig = field(default_factory=lambda: DiffusionConfig(prediction="x0"))
    """Noising of z_image; the network predicts x0 (section 2.2)."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(method="ddpm", num_steps=64, clip_x0=False))
    """Sampling of z_image (table 3: 64 steps)."""

    def __post_init__(self) -> None:
        require_transformer(self.width, self.depth, self.num_heads)
        require(self.mlp_ratio >= 1, f"mlp_ratio = {self.mlp_ratio}: at least 1")
        require(self.num_candidates >= 1, f"num_candidates = {self.num_candidates}: at least 1")
        require_norm(self.image_norm)
        require_dropout(self.dropout)
        require_prob("text_drop_prob", self.text_drop_prob)
        require(
            self.diffusion.variance != "learned_range",
            "diffusion.variance = 'learned_range': the prior predicts the embedding alone; use fixed_small",
        )
        require(
            self.diffusion.loss == "simple",
            "diffusion.loss = 'vlb' bounds the likelihood of 256 grey levels, which an embedding has not; set 'simple'",
        )
        require(self.sampler.clip_guidance_scale == 0, "sampler.clip_guidance_scale: of the decoder alone; set 0.0")
        require_steps(self.sampler, self.diffusion)
