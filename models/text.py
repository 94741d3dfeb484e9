"""Captions as the networks read them, as plain tensors.

Legend: B batch, L text tokens, D joint space, W text width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.clip_config import END_TOKEN, START_TOKEN, ClipDims
from models.rows import map_rows, take_rows


@dataclass(frozen=True)
class TextEncoding:
    """Captions as the frozen CLIP reads them; L is the longest caption of the batch, at most the context length."""

    pooled: Float[Tensor, "B D"]
    """Text embedding before it is made of length one: what the networks read (as in Karlo and diffusers)."""
    hidden: Float[Tensor, "B L W"]
    """Token states after the final layer norm."""
    mask: Bool[Tensor, "B L"]
    """True at the caption's own tokens, start and end included: a prefix of each row, never empty."""
    tokens: Int[Tensor, "B L"]
    """Token ids in CLIP's vocabulary, zero at padding: for a decoder with a text transformer of its own."""

    @property
    def z_text(self) -> Float[Tensor, "B D"]:
        """Embedding of each caption in the joint space, of length one."""
        return F.normalize(self.pooled, dim=-1)

    def __len__(self) -> int:
        return self.pooled.shape[0]

    def __getitem__(self, index: slice | Tensor) -> TextEncoding:
        return take_rows(self, index)

    def to(self, device: torch.device | str) -> TextEncoding:
        """The same encoding on another device."""
        return map_rows(self, lambda tensor: tensor.to(device, non_blocking=True))

    def padded(self, length: int) -> TextEncoding:
        """The same captions with L = ``length`` tokens; the added ones are masked.

        Raises:
            ValueError: If ``length`` is below L.
        """
        extra = length - self.mask.shape[1]
        if extra < 0:
            raise ValueError(f"cannot pad {self.mask.shape[1]} text tokens to {length}")
        if extra == 0:
            return self
        mask, tokens = F.pad(self.mask, (0, extra)), F.pad(self.tokens, (0, extra))
        return TextEncoding(self.pooled, F.pad(self.hidden, (0, 0, 0, extra)), mask, tokens)


_LENGTH_MULTIPLE = 8
"""Batches of captions are cut to a multiple of this many tokens, so that kernels see few different shapes."""


def padded_length(longest: int, context_length: int) -> int:
    """Tokens of a batch whose longest caption has ``longest``."""
    return min(context_length, -(-longest // _LENGTH_MULTIPLE) * _LENGTH_MULTIPLE)


NUM_NULL_TOKENS = 2
"""Tokens of the empty caption: start and end of text."""


class NullText(nn.Module):
    """The encoding of "no caption": that of the empty caption by the frozen CLIP, saved with the weights.

    It is not learned, so that a pipeline which encodes "" for its unconditional half (diffusers' UnCLIPPipeline,
    Karlo) computes the same. Until ``set`` is called it is zero, which is enough for a network that is not exported.
    """

    pooled: Tensor
    hidden: Tensor
    tokens: Tensor

    def __init__(self, dims: ClipDims) -> None:
        super().__init__()
        self.register_buffer("pooled", torch.zeros(1, dims.embed_dim))
        self.register_buffer("hidden", torch.zeros(1, NUM_NULL_TOKENS, dims.text_width))
        self.register_buffer("tokens", torch.tensor([[START_TOKEN, END_TOKEN]]), persistent=False)

    def set(self, empty: TextEncoding) -> None:
        """Take ``clip.encode_text([""])``; raises ValueError if that is not one empty caption."""
        if len(empty) != 1 or int(empty.mask.sum()) != NUM_NULL_TOKENS:
            raise ValueError('the null caption is clip.encode_text([""]): one caption of two tokens')
        self.pooled.copy_(empty.pooled)
        self.hidden.copy_(empty.hidden[:, :NUM_NULL_TOKENS])

    def encoding(self, batch_size: int) -> TextEncoding:
        """The empty caption ``batch_size`` times, L = 2."""
        mask = torch.ones(batch_size, NUM_NULL_TOKENS, dtype=torch.bool, device=self.hidden.device)
        hidden, tokens = self.hidden.expand(batch_size, -1, -1), self.tokens.expand(batch_size, -1)
        return TextEncoding(self.pooled.expand(batch_size, -1), hidden, mask, tokens)

    def drop(self, text: TextEncoding, keep: Bool[Tensor, " B"] | None) -> TextEncoding:
        """Replace the captions that are not kept by the empty one; ``keep`` None keeps all."""
        if keep is None:
            return text
        length = max(text.mask.shape[1], NUM_NULL_TOKENS)
        text, null = text.padded(length), self.encoding(1).padded(length)
        return TextEncoding(
            torch.where(keep[:, None], text.pooled, null.pooled.to(text.pooled.dtype)),
            torch.where(keep[:, None, None], text.hidden, null.hidden.to(text.hidden.dtype)),
            torch.where(keep[:, None], text.mask, null.mask),
            torch.where(keep[:, None], text.tokens, null.tokens),
        )

    def drop_pooled(self, text: TextEncoding, keep: Bool[Tensor, " B"]) -> TextEncoding:
        """Replace the pooled vectors that are not kept by the empty caption's; the token states stay."""
        return replace(text, pooled=torch.where(keep[:, None], text.pooled, self.pooled.to(text.pooled.dtype)))
