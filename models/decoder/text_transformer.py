"""A text transformer that is trained with the decoder: GLIDE, arXiv:2112.10741, section 4.1.

Legend: B batch, L text tokens, W width.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.clip_config import VOCAB_SIZE
from models.decoder.config import TextTransformerConfig
from models.layers.transformer import CausalTransformer


class TextTransformer(nn.Module):
    """Captions to token states; every token reads all tokens of its caption, as the mask is not causal."""

    def __init__(self, config: TextTransformerConfig, context_length: int) -> None:
        super().__init__()
        width = config.width
        self.embedding = nn.Embedding(VOCAB_SIZE, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = nn.Parameter(torch.randn(1, context_length, width) * 0.01)
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
        length = tokens.shape[1]
        hidden = self.embedding(tokens) + self.positions[:, :length]
        hidden = self.transformer(hidden, mask[:, None, None].expand(-1, 1, length, -1))
        last = mask.sum(1) - 1
        return hidden[torch.arange(len(hidden), device=hidden.device), last], hidden
