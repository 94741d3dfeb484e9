"""A causal pre-norm transformer with a cache of keys and values.

Two caches: a prefix that grows by whole pieces (``cache``), and places that are filled token by token (``TokenCache``).
Legend: B batch, S new tokens, K all tokens (cached and new), N places, W width, H heads, C = W / H.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.layers.dropout import SampleDropout


class KeysValues(NamedTuple):
    """The part of earlier tokens that later ones read, in one layer."""

    keys: Float[Tensor, "B H K C"]
    values: Float[Tensor, "B H K C"]


@dataclass(frozen=True)
class TokenCache:
    """N places for the tokens of each of B sequences, filled in place; the sequences may differ in length."""

    layers: tuple[KeysValues, ...]
    """Of each block, (B, H, N, C)."""
    filled: Bool[Tensor, "B N"]
    """True at places that may be read."""


def causal_mask(valid: Bool[Tensor, "B K"], num_new: int, *, num_appended: int = 0) -> Bool[Tensor, "B 1 S K_all"]:
    """Which tokens the last ``num_new`` of a sequence may read: valid ones, and none after themselves.

    Args:
        valid: Tokens that may be read at all.
        num_new: S, of the tokens in ``valid`` and those appended.
        num_appended: Tokens after those of ``valid``, all of them valid.
    """
    valid = F.pad(valid, (0, num_appended), value=True)
    total = valid.shape[1]
    order = torch.ones(num_new, total, dtype=torch.bool, device=valid.device).tril(total - num_new)
    return order[None, None] & valid[:, None, None]


class Block(nn.Module):
    """Attention, then feed-forward, each after its norm and added to its input."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, mlp_ratio * width)
        self.mlp_out = nn.Linear(mlp_ratio * width, width)
        self.dropout = SampleDropout(dropout)
        self.dropout_mlp = SampleDropout(dropout)

    def forward(
        self, x: Float[Tensor, "B S W"], mask: Bool[Tensor, "B _ S K"], past: KeysValues | None, num_out: int
    ) -> tuple[Float[Tensor, "B n W"], KeysValues]:
        """The last ``num_out`` tokens after this block, and the keys and values of all K tokens."""
        normed = self.norm_attention(x)
        query = self._heads(self.query(normed[:, -num_out:]))
        keys, values = (self._heads(part) for part in self.key_value(normed).chunk(2, dim=-1))
        if past is not None:
            keys, values = torch.cat([past.keys, keys], dim=2), torch.cat([past.values, values], dim=2)
        x = self._mix(x[:, -num_out:], query, KeysValues(keys, values), mask[:, :, -num_out:])
        return x, KeysValues(keys, values)

    def step(
        self, x: Float[Tensor, "B 1 W"], mask: Bool[Tensor, "B 1 1 N"], cached: KeysValues, places: Int[Tensor, " B"]
    ) -> Float[Tensor, "B 1 W"]:
        """One token of each sequence after this block; its keys and values are put at its place."""
        normed = self.norm_attention(x)
        query = self._heads(self.query(normed))
        rows = torch.arange(len(x), device=x.device)
        for memory, part in zip(cached, self.key_value(normed).chunk(2, dim=-1), strict=True):
            memory[rows, :, places] = self._heads(part)[:, :, 0].to(memory.dtype)
        return self._mix(x, query, cached, mask)

    def _mix(self, x: Float[Tensor, "B n W"], query: Tensor, read: KeysValues, mask: Tensor) -> Float[Tensor, "B n W"]:
        mixed = F.scaled_dot_product_attention(query, read.keys, read.values, attn_mask=mask)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))
        hidden = F.gelu(self.mlp_in(self.norm_mlp(x)))
        return x + self.dropout_mlp(self.mlp_out(hidden))

    def _heads(self, x: Float[Tensor, "B S W"]) -> Float[Tensor, "B H S C"]:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class CausalTransformer(nn.Module):
    """A stack of blocks and a final norm; initialised as CLIP's text tower is."""

    def __init__(self, width: int, depth: int, num_heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, num_heads, mlp_ratio, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(("query.weight", "key_value.weight")):
                nn.init.normal_(parameter, std=width**-0.5)
            elif name.endswith("mlp_in.weight"):
                nn.init.normal_(parameter, std=(2 * width) ** -0.5)
            elif name.endswith(("out.weight", "mlp_out.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif name.endswith("bias") and "norm" not in name:
                nn.init.zeros_(parameter)

    def forward(
        self,
        x: Float[Tensor, "B S W"],
        mask: Bool[Tensor, "B _ S K"],
        past: Sequence[KeysValues] | None = None,
        *,
        num_out: int | None = None,
    ) -> Float[Tensor, "B n W"]:
        """Run S new tokens.

        Args:
            x: The new tokens, positions added.
            mask: True where a new token may read one of the K = cached + S tokens, in all heads or in each.
            past: Cached keys and values of each block, from ``cache``.
            num_out: How many of the last tokens to return (all if None); the last block computes no others.
        """
        for index, block in enumerate(self.blocks):
            num_kept = x.shape[1] if num_out is None or index + 1 < len(self.blocks) else num_out
            layer = None if past is None else past[index]
            if self.checkpointing and torch.is_grad_enabled():
                x, _ = checkpoint(block, x, mask, layer, num_kept, use_reentrant=False)
            else:
                x, _ = block(x, mask, layer, num_kept)
        return self.norm(x)

    def cache(
        self, x: Float[Tensor, "B S W"], mask: Bool[Tensor, "B 1 S K"], past: Sequence[KeysValues] | None = None
    ) -> tuple[KeysValues, ...]:
        """Keys and values of each block after S new tokens, for the tokens that follow."""
        layers: list[KeysValues] = []
        for index, block in enumerate(self.blocks):
            x, layer = block(x, mask, None if past is None else past[index], x.shape[1])
            layers.append(layer)
        return tuple(layers)

    def prefill(
        self, x: Float[Tensor, "B S W"], valid: Bool[Tensor, "B S"], places: Int[Tensor, " S"], num_places: int
    ) -> TokenCache:
        """A cache with room for ``num_places`` tokens that holds the first S of each sequence.

        Args:
            x: The tokens, positions added.
            valid: Tokens that may be read.
            places: Where each is put, the same for all sequences.
            num_places: N.
        """
        layers: list[KeysValues] = []
        for layer in self.cache(x, causal_mask(valid, x.shape[1])):
            rooms = [part.new_zeros(*part.shape[:2], num_places, part.shape[3]) for part in layer]
            for room, part in zip(rooms, layer, strict=True):
                room[:, :, places] = part
            layers.append(KeysValues(*rooms))
        filled = valid.new_zeros(len(valid), num_places)
        filled[:, places] = valid
        return TokenCache(tuple(layers), filled)

    def step(self, x: Float[Tensor, "B W"], cache: TokenCache, places: Int[Tensor, " B"]) -> Float[Tensor, "B W"]:
        """Run one further token of each sequence, and put it into the cache.

        Args:
            x: The tokens, positions added.
            cache: What they may read; changed in place.
            places: Where each is put; it may read every filled place, so it must be the last of its sequence.
        """
        cache.filled[torch.arange(len(x), device=x.device), places] = True
        mask, hidden = cache.filled[:, None, None], x[:, None]
        for block, layer in zip(self._blocks(), cache.layers, strict=True):
            hidden = block.step(hidden, mask, layer, places)
        return self.norm(hidden)[:, 0]

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]
