"""The autoregressive prior, P(z_image | caption): arXiv:2204.06125, section 2.2.

z_image is projected on its principal components; each coordinate is a token. A causal transformer reads [caption
tokens, z_text, dot product, component 1, ..., component K - 1]; its output at the dot product predicts component 1, and
so on.
Legend: B batch, R sequences, L text tokens, D joint space, W width, K components, V buckets of a component.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.ar_prior.buckets import from_buckets, to_buckets
from models.ar_prior.config import ArPriorConfig
from models.clip_config import ClipDims
from models.layers.transformer import CausalTransformer, TokenCache, causal_mask
from models.pca import Pca
from models.text import NullText, TextEncoding


@dataclass(frozen=True)
class Prefix:
    """Captions as the transformer reads them: caption tokens and z_text, positions added."""

    tokens: Float[Tensor, "B L_and_1 W"]
    valid: Bool[Tensor, "B L_and_1"]
    """False at padding."""


class ArPrior(nn.Module):
    """Predicts the components of z_image, the one with the largest variance first.

    The code (components, their deviations, the limits of the dot product's buckets) is measured on training data and
    kept with the weights: see ``set_code``.

    Args:
        config: Shape; with ``num_components`` 0 (measure first) there is room for all D.
        dims: CLIP's widths.

    Raises:
        ValueError: If ``num_components`` is above the number of features.
    """

    z_mean: Tensor
    components: Tensor
    component_std: Tensor
    dot_edges: Tensor

    def __init__(self, config: ArPriorConfig, dims: ClipDims) -> None:
        super().__init__()
        num_components = config.num_components or dims.embed_dim
        if num_components > dims.embed_dim:
            raise ValueError(
                f"num_components = {num_components}: this CLIP's embeddings have {dims.embed_dim} features"
            )
        self.config = config
        self.dims = dims
        self.num_components = num_components
        width = config.width
        self.text_in = nn.Linear(dims.text_width, width)
        self.pooled_in = nn.Linear(dims.embed_dim, width)
        self.dot_in = nn.Embedding(config.num_dot_buckets + 1, width)  # the last: no dot product
        self.component_in = nn.Embedding(config.num_buckets, width)
        for table in (self.dot_in, self.component_in):
            nn.init.normal_(table.weight, std=0.02)
        self.num_places = dims.context_length + 1 + num_components
        self.positions = nn.Parameter(torch.randn(1, self.num_places, width) * 0.02)
        self.transformer = CausalTransformer(width, config.depth, config.num_heads, config.mlp_ratio, config.dropout)
        self.out = nn.Linear(width, config.num_buckets)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.null_text = NullText(dims)
        self.register_buffer("z_mean", torch.zeros(dims.embed_dim))
        self.register_buffer("components", torch.eye(num_components, dims.embed_dim))
        self.register_buffer("component_std", torch.full((num_components,), 1 / math.sqrt(dims.embed_dim)))
        self.register_buffer("dot_edges", torch.linspace(-1, 1, config.num_dot_buckets + 1)[1:-1])

    def set_code(self, pca: Pca, dot_edges: Float[Tensor, " buckets_less_1"]) -> None:
        """Store what was measured on training data: the components to keep, and ``DotHistogram.edges``.

        Raises:
            ValueError: If their numbers are not those of the configuration.
        """
        if pca.components.shape != self.components.shape or dot_edges.shape != self.dot_edges.shape:
            raise ValueError(
                f"a code of {len(pca.components)} components and {len(dot_edges) + 1} dot buckets; "
                f"this prior has {self.num_components} and {self.config.num_dot_buckets}"
            )
        self.z_mean.copy_(pca.mean)
        self.components.copy_(pca.components)
        self.component_std.copy_(pca.variance.sqrt())
        self.dot_edges.copy_(dot_edges)

    def tokenize(self, z_image: Float[Tensor, "B D"]) -> Int[Tensor, "B K"]:
        """Embeddings as buckets of their components."""
        # In a training's bfloat16 the outer scores would be off by more than a bucket.
        with torch.autocast(z_image.device.type, enabled=False):
            scores = ((z_image - self.z_mean) @ self.components.T) / self.component_std.clamp(min=1e-12)
        return to_buckets(scores, self.config.bucket_range_std, self.config.num_buckets)

    def detokenize(self, tokens: Int[Tensor, "B k"]) -> Float[Tensor, "B D"]:
        """The embedding in the middle of the buckets, of length one as z_image is.

        Args:
            tokens: The first k components; the others are at their mean.
        """
        scores = from_buckets(tokens, self.config.bucket_range_std, self.config.num_buckets)
        first = slice(tokens.shape[1])
        return F.normalize((scores * self.component_std[first]) @ self.components[first] + self.z_mean, dim=-1)

    def dot_tokens(
        self, z_image: Float[Tensor, "B D"], z_text: Float[Tensor, "B D"], keep: Bool[Tensor, " B"] | None = None
    ) -> Int[Tensor, " B"]:
        """Bucket of z_image . z_text; the null bucket where the caption is dropped."""
        tokens = torch.bucketize((z_image * z_text).sum(1), self.dot_edges)
        return tokens if keep is None else tokens.where(keep, self.config.num_dot_buckets)

    def encode_condition(self, text: TextEncoding, *, keep: Bool[Tensor, " B"] | None = None) -> Prefix:
        """Captions as a prefix; ``keep`` is False where one is dropped (all are kept if None)."""
        text = self.null_text.drop(text, keep)
        length, place = text.mask.shape[1], self.dims.context_length
        hidden = self.text_in(text.hidden) + self.positions[:, :length]
        pooled = self.pooled_in(text.pooled)[:, None] + self.positions[:, place : place + 1]
        return Prefix(torch.cat([hidden, pooled], dim=1), F.pad(text.mask, (0, 1), value=True))

    def forward(self, tokens: Int[Tensor, "B K"], dot: Int[Tensor, " B"], prefix: Prefix) -> Float[Tensor, "B K V"]:
        """Logits of every component given those before it, for training.

        Args:
            tokens: The true components; the last is not read.
            dot: Buckets of the dot product, from ``dot_tokens``.
            prefix: The captions.
        """
        suffix = torch.cat([self.dot_in(dot)[:, None], self.component_in(tokens[:, :-1])], dim=1)
        suffix = suffix + self.positions[:, -self.num_components :]
        x = torch.cat([prefix.tokens, suffix.to(prefix.tokens.dtype)], dim=1)
        mask = causal_mask(prefix.valid, x.shape[1], num_appended=self.num_components)
        return self.out(self.transformer(x, mask, num_out=self.num_components))

    def start(self, prefix: Prefix) -> TokenCache:
        """A cache that holds the captions and has room for all components."""
        length, place = prefix.valid.shape[1] - 1, self.dims.context_length
        places = torch.tensor([*range(length), place], device=prefix.valid.device)
        return self.transformer.prefill(prefix.tokens, prefix.valid, places, self.num_places)

    def next_logits(
        self, cache: TokenCache, last: Int[Tensor, " R"], position: Int[Tensor, " R"]
    ) -> Float[Tensor, "R V"]:
        """Logits of the next component of each sequence; the token before it goes into the cache.

        Args:
            cache: From ``start``; changed in place.
            last: The token before: the dot product's where ``position`` is 0, else that of the component before.
            position: Number of components sampled so far, 0 .. K - 1; it may differ between sequences.
        """
        is_first = (position == 0)[:, None]
        # Both tables are read at a valid token; torch.where then selects one of the two.
        component = self.component_in(last.clamp(max=self.config.num_buckets - 1))
        x = torch.where(is_first, self.dot_in(last.clamp(max=self.config.num_dot_buckets)), component)
        places = self.dims.context_length + 1 + position
        return self.out(self.transformer.step(x + self.positions[0, places], cache, places)).float()
