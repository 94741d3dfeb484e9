"""The diffusion prior, P(z_image | caption): arXiv:2204.06125, section 2.2.

A causal transformer reads [caption tokens, z_text, timestep, noised z_image, query]; its output at the query is the
un-noised z_image. Legend: B batch, L text tokens, P = L + 1 prefix tokens, D joint space, W width of the transformer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.clip_config import ClipDims
from models.layers.embedding import TimestepEmbedding
from models.layers.transformer import CausalTransformer, KeysValues, causal_mask
from models.prior.config import PriorConfig
from models.text import NullText, TextEncoding

NUM_SUFFIX_TOKENS = 3
"""Timestep, noised z_image and query: the tokens that change from step to step."""
EMBEDDING_SCALE = 0.5375
"""Standard deviation of each feature of a scaled embedding: 17.2 / sqrt(1024), the scale of the paper at its width."""


@dataclass(frozen=True)
class PriorCondition:
    """Captions as the prior reads them, computed once for all steps of a chain."""

    tokens: Float[Tensor, "B P W"]
    """Caption tokens and z_text, projected, positions added."""
    valid: Bool[Tensor, "B P"]
    """False at padding."""
    cache: tuple[KeysValues, ...] | None
    """Keys and values of the prefix in each block: it is causal, so no step changes them. None while training."""

    def __len__(self) -> int:
        return self.tokens.shape[0]


class Prior(nn.Module):
    """Predicts the scaled, un-noised z_image. The chain runs on scaled embeddings: see ``scale`` and ``unscale``."""

    z_mean: Tensor
    z_std: Tensor
    x0_variance: Tensor

    def __init__(self, config: PriorConfig, dims: ClipDims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        width = config.width
        self.text_in = nn.Linear(dims.text_width, width)
        self.pooled_in = nn.Linear(dims.embed_dim, width)
        self.image_in = nn.Linear(dims.embed_dim, width)
        self.timestep = TimestepEmbedding(width, width)
        self.query = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        num_tokens = dims.context_length + 1 + NUM_SUFFIX_TOKENS
        self.positions = nn.Parameter(torch.randn(1, num_tokens, width) * 0.02)
        self.transformer = CausalTransformer(width, config.depth, config.num_heads, config.mlp_ratio, config.dropout)
        self.out = nn.Linear(width, dims.embed_dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.null_text = NullText(dims)
        std = 1 / (EMBEDDING_SCALE * math.sqrt(dims.embed_dim))
        self.register_buffer("z_mean", torch.zeros(dims.embed_dim))
        self.register_buffer("z_std", torch.full((dims.embed_dim,), std))
        # Variance of x0 given x_t at each step, for analytic sampling: measured after training (models/diffusion/).
        self.register_buffer("x0_variance", torch.zeros(config.diffusion.num_timesteps, dtype=torch.float64))

    def scale(self, z_image: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Embeddings of length one to the values that are noised: times 0.5375 sqrt(D) (17.2 at D = 1024).

        An imported prior has statistics of its own for this, of embeddings of length ``config.image_norm``.
        """
        return (z_image * self.config.image_norm - self.z_mean) / self.z_std

    def unscale(self, scaled: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """Inverse of ``scale``, normalised to length one.

        Decoder, index and candidate ranking expect unit vectors, but a sample is not one: guidance makes it longer
        (mean length 1.41, up to 3.4 at guidance 8 on the demo). The longest samples have the least certain direction,
        and their larger dot product with z_text would win the ranking.
        """
        return F.normalize(scaled * self.z_std + self.z_mean, dim=-1)

    def encode_condition(
        self, text: TextEncoding, *, keep: Bool[Tensor, " B"] | None = None, cache: bool = False
    ) -> PriorCondition:
        """Encode the part of the input that is the same at every step.

        Args:
            text: B captions.
            keep: False where the caption is dropped (all are kept if None).
            cache: Also keep each block's keys and values: faster from the second step on, never in training.
        """
        text = self.null_text.drop(text, keep)
        length = text.mask.shape[1]
        tokens = self.text_in(text.hidden) + self.positions[:, :length]
        place = self.dims.context_length
        pooled = self.pooled_in(text.pooled)[:, None] + self.positions[:, place : place + 1]
        tokens = torch.cat([tokens, pooled], dim=1)
        valid = F.pad(text.mask, (0, 1), value=True)
        if not cache:
            return PriorCondition(tokens, valid, None)
        layers = self.transformer.cache(tokens, causal_mask(valid, tokens.shape[1]))
        return PriorCondition(tokens, valid, layers)

    def forward(self, x: Float[Tensor, "B D"], t: Int[Tensor, " B"], condition: PriorCondition) -> Float[Tensor, "B D"]:
        """Predict the clean scaled embedding from its noised form ``x`` at steps ``t``."""
        suffix = torch.stack([self.timestep(t), self.image_in(x), self.query[0].expand(x.shape[0], -1)], dim=1)
        suffix = suffix + self.positions[:, -NUM_SUFFIX_TOKENS:]
        if condition.cache is None:
            tokens = torch.cat([condition.tokens, suffix.to(condition.tokens.dtype)], dim=1)
        else:
            tokens = suffix
        mask = causal_mask(condition.valid, tokens.shape[1], num_appended=NUM_SUFFIX_TOKENS)
        hidden = self.transformer(tokens, mask, condition.cache, num_out=1)
        return self.out(hidden[:, 0])
