"""Rows that the workers of a training exchange: each holds its share of the global batch.

Legend: B samples of the global batch, b of this worker's share, D features.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
from torch import Tensor

from pipeline.data.order import Share


def rows_of_all(rows: Tensor, share: Share, *, exchanges: bool = True) -> Tensor:
    """The rows of all workers in the order of the global batch, (B, D); their gradients go back to their workers.

    Args:
        rows: (b, D), of this worker's share.
        share: Which share that is.
        exchanges: Whether the others are there. Where the memory of a training is counted they are not: what would come
            from them has only a shape.
    """
    if share.world_size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows, share, exchanges)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: Share, exchanges: bool) -> Tensor:
        ctx.share, ctx.exchanges = share, exchanges
        sizes = [len(Share(share.batch_size, rank, share.world_size)) for rank in range(share.world_size)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])  # a collective wants equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        if exchanges:
            torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].contiguous()
        if ctx.exchanges:
            torch.distributed.all_reduce(total)
        return total[ctx.share.start : ctx.share.stop], None, None
