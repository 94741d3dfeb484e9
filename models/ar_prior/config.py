"""Shape and choices of the autoregressive prior, and how its tokens are sampled; see models/diffusion/config.py."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from models.configclass import configclass, require, require_dropout, require_prob
from models.layers.config import require_transformer


@configclass
class TokenSamplerConfig:
    """How tokens are sampled from a trained network. It changes no weight, so it can be changed at any time."""

    temperature: float = 1.0
    """Divides the logits, dimensionless: below 1 likely tokens are sampled more often."""
    top_k: int = 0
    """Sample only among the k likeliest tokens; 0: among all, 1: always the likeliest."""
    top_p: float = 1.0
    """Sample only among the likeliest tokens that together reach this probability (arXiv:1904.09751); 1: among all."""
    guidance_scale: float = 1.0
    """Classifier-free guidance s in uncond + s (cond - uncond) of the logits; 1 costs no second forward."""
    min_dot_quantile: float = 0.5
    """z_image . z_text is sampled above this quantile of the training data (section 2.2: the top half)."""

    def __post_init__(self) -> None:
        require(
            self.temperature > 0,
            f"temperature = {self.temperature}: must be positive; for greedy sampling set top_k = 1",
        )
        require(self.top_k >= 0, f"top_k = {self.top_k}: must not be negative")
        require(0 < self.top_p <= 1, f"top_p = {self.top_p}: lies in (0, 1]")
        require(self.guidance_scale >= 0, f"guidance_scale = {self.guidance_scale}: must not be negative")
        require(0 <= self.min_dot_quantile < 1, f"min_dot_quantile = {self.min_dot_quantile}: lies in [0, 1)")


@configclass
class ArPriorConfig:
    """Autoregressive prior P(z_image | caption): arXiv:2204.06125, section 2.2; CLIP's widths are in ClipDims."""

    kind: Literal["autoregressive"] = "autoregressive"
    """Samples the principal components of z_image one after another, each as one of ``num_buckets`` values."""
    width: int = 512
    """Width of the transformer, in features (table 3: 1664)."""
    depth: int = 12
    """Blocks of the transformer (table 3: 24)."""
    num_heads: int = 8
    """Attention heads (table 3: 26)."""
    mlp_ratio: int = 4
    """Hidden width of the feed-forward layers, as a multiple of ``width``."""
    dropout: float = 0.0
    """Dropout after attention and feed-forward, per feature (table 3 states none)."""
    text_drop_prob: float = 0.1
    """Probability of dropping caption, z_text and dot product, per sample (section 2.2: 0.1)."""
    num_components: int = 0
    """Principal components of z_image that are kept (paper: 319 of 1024); 0: as many as ``max_pca_error`` needs."""
    max_pca_error: float = 0.01
    """Largest share of the variance of z_image that the components left out may hold (section 2.2: 1 %)."""
    num_buckets: int = 1024
    """Tokens that the value of a component is rounded to (section 2.2: 1024)."""
    bucket_range_std: float = 5.0
    """Buckets are of equal width from minus to plus this many standard deviations of each component."""
    num_dot_buckets: int = 64
    """Tokens that z_image . z_text is rounded to, each as frequent as the others in training."""
    num_candidates: int = 1
    """Samples of z_image per caption, of which the one nearest z_text is kept."""
    sampler: TokenSamplerConfig = field(default_factory=TokenSamplerConfig)
    """Sampling of the tokens."""

    def __post_init__(self) -> None:
        require_transformer(self.width, self.depth, self.num_heads)
        require(self.mlp_ratio >= 1, f"mlp_ratio = {self.mlp_ratio}: at least 1")
        require(self.num_components >= 0, f"num_components = {self.num_components}: must not be negative")
        require(0 < self.max_pca_error < 1, f"max_pca_error = {self.max_pca_error}: lies in (0, 1)")
        require(
            self.num_buckets >= 2 and self.num_dot_buckets >= 1,
            f"num_buckets = {self.num_buckets}, num_dot_buckets = {self.num_dot_buckets}: at least 2 and 1",
        )
        require(self.bucket_range_std > 0, f"bucket_range_std = {self.bucket_range_std}: must be positive")
        require(self.num_candidates >= 1, f"num_candidates = {self.num_candidates}: at least 1")
        require(
            self.sampler.top_k <= self.num_buckets,
            f"sampler.top_k = {self.sampler.top_k} is above num_buckets = {self.num_buckets}",
        )
        require_dropout(self.dropout)
        require_prob("text_drop_prob", self.text_drop_prob)
