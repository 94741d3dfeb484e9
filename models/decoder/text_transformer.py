"""What the decoder learns of its own to read captions: GLIDE's text transformer, or an adapter on CLIP's token states.

Legend: B batch, L text tokens, W width, H heads.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.clip_config import VOCAB_SIZE
from models.decoder.config import TextAdapterConfig, TextTransformerConfig
from models.layers.transformer import CausalTransformer

_POSITION_STD, _ONE_WAY_POSITION_STD = 0.01, 0.2


class TextTransformer(nn.Module):
    """Captions to token states (arXiv:2112.10741, section 4.1).

    Every token reads all tokens of its caption, as the mask is not causal.
    """

    def __init__(self, config: TextTransformerConfig, context_length: int) -> None:
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(1, context_length, width) * _POSITION_STD)
        self.transformer = CausalTransformer(width, config.depth, config.num_heads, config.mlp_ratio, dropout=0.0)

    def forward(
        self, tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B W"], Float[Tensor, "B L W"]]:
        """Read captions.

        Args:
            tokens: Token ids; those at padding do not matter.
            mask: True at the caption's own tokens: a prefix of each row.

        Returns:
            The state of each caption's last token, which stands for the whole, and the states of all tokens.
        """
        hidden = self.embedding(tokens) + self.positions[:, : tokens.shape[1]]
        hidden = self.transformer(hidden, _both_ways(mask))
        last = mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last], hidden


class TextAdapter(nn.Module):
    """Token states to token states of the same width, each of which has read the whole caption."""

    def __init__(self, config: TextAdapterConfig, width: int, context_length: int) -> None:
        super().__init__()
        std = _ONE_WAY_POSITION_STD if config.one_way_heads else _POSITION_STD
        self.positions = nn.Parameter(torch.randn(1, context_length, width) * std)
        num_heads = width // config.head_width
        self._num_one_way = num_heads if config.one_way_heads else 0
        self.transformer = CausalTransformer(width, config.depth, num_heads, config.mlp_ratio, dropout=0.0)
        self._code_width = config.code_width
        self.read_code = None if config.code_width == 0 else nn.Linear(config.code_width, width, bias=False)

    def forward(
        self, states: Float[Tensor, "B L W"], tokens: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"]
    ) -> Float[Tensor, "B L W"]:
        """Read captions, as token states and token ids.

        ``mask`` is True at their own tokens; states and ids elsewhere do not matter.
        """
        if self.read_code is not None:
            states = states + self.read_code(_codes(tokens, self._code_width).to(states.dtype))
        reads = _one_way(mask, self._num_one_way) if self._num_one_way else _both_ways(mask)
        return self.transformer(states + self.positions[:, : states.shape[1]], reads)


def _codes(tokens: Int[Tensor, "B L"], width: int) -> Float[Tensor, "B L N"]:
    """A fixed code of each token id, uniform with variance one: two ids hardly ever have similar ones.

    A hash of id and place, so that it is the same in every release and takes no memory.
    """
    mask = (1 << 31) - 1  # products then fit 63 bits
    code = (tokens[..., None] * width + torch.arange(1, width + 1, device=tokens.device)) & mask
    for multiplier, shift in ((0x1E3779B1, 15), (0x45EBCA77, 13), (0x42B2AE3D, 16)):
        code = (code * multiplier) & mask
        code = code ^ (code >> shift)
    return (code.float() / mask - 0.5) * math.sqrt(12)


def _both_ways(mask: Bool[Tensor, "B L"]) -> Bool[Tensor, "B 1 L L"]:
    """Which tokens each token reads: all of its own caption's."""
    return mask[:, None, None].expand(-1, 1, mask.shape[1], -1)


def _one_way(mask: Bool[Tensor, "B L"], num_heads: int) -> Bool[Tensor, "B H L L"]:
    """Which tokens each token reads beside itself: in even heads those before it, in odd ones those after it."""
    length = mask.shape[1]
    before = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    is_even = (torch.arange(num_heads, device=mask.device) % 2 == 0)[:, None, None]
    reads = torch.where(is_even, before, before.T)
    # Padding has nothing after it: without itself its softmax would be nan.
    own = torch.eye(length, dtype=torch.bool, device=mask.device)
    return (mask[:, None, None] & reads) | own
