"""The sketch: what a caption says of places, as a coarse picture that the decoder sees beside the noisy one.

Legend: B batch, L text tokens, W width, C channels, H heads, P side of the sketch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.decoder.config import TextAdapterConfig
from models.decoder.text_transformer import TextAdapter


class Sketch(nn.Module):
    """Token states to the coarse picture that they describe: each of its pixels reads all words, once.

    The words are read by an adapter of its own: one that the UNet reads too learns shapes later (docs/lab.md).

    Args:
        side_px: P.
        adapter: How the adapter is built.
        width: W.
        context_length: Most tokens of a caption.
        num_channels: Channels of the picture.
    """

    def __init__(
        self, side_px: int, adapter: TextAdapterConfig, width: int, context_length: int, num_channels: int
    ) -> None:
        super().__init__()
        self._side_px = side_px
        self._num_heads = width // adapter.head_width
        self.adapter = TextAdapter(adapter, width, context_length)
        self.norm = nn.LayerNorm(width)
        self.places = nn.Parameter(torch.randn(1, side_px * side_px, width))
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, num_channels)

    def forward(
        self, states: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B C P P"]:
        """The sketches of captions; ``mask`` is True at their own tokens."""
        words = self.norm(self.adapter(states, tokens, mask))
        keys, values = (self._heads(part) for part in self.key_value(words).chunk(2, dim=-1))
        query = self._heads(self.places.to(keys.dtype).expand(len(words), -1, -1))
        read = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask[:, None, None])
        pixels = self.out(read.transpose(1, 2).flatten(2))
        return pixels.transpose(1, 2).unflatten(2, (self._side_px, self._side_px))

    def _heads(self, x: Float[Tensor, "B N W"]) -> Float[Tensor, "B H N V"]:
        return x.unflatten(-1, (self._num_heads, -1)).transpose(1, 2)
