"""Numbers as tokens: equal widths for principal components, equal frequencies for dot products.

Legend: B batch, N buckets.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def to_buckets(x: Float[Tensor, "*shape"], limit: float, num_buckets: int) -> Int[Tensor, "*shape"]:
    """Bucket, 0 .. N - 1, of each value: N of equal width over [-limit, limit]; values beyond go to an end.

    Args:
        x: Values, in the unit of ``limit``.
        limit: Half the range.
        num_buckets: N.
    """
    return ((x + limit) * (num_buckets / (2 * limit))).floor().clamp(0, num_buckets - 1).long()


def from_buckets(buckets: Int[Tensor, "*shape"], limit: float, num_buckets: int) -> Float[Tensor, "*shape"]:
    """The middle of each bucket: within ``limit`` / N of every value in [-limit, limit] that was put there."""
    return (buckets.float() + 0.5) * (2 * limit / num_buckets) - limit


class DotHistogram:
    """How often each dot product of unit vectors occurs.

    Args:
        num_bins: Bins of equal width over [-1, 1]; quantiles are exact to one of them.
    """

    def __init__(self, num_bins: int = 1 << 14) -> None:
        self.counts = torch.zeros(num_bins, dtype=torch.float64)

    def update(self, dot: Float[Tensor, " B"]) -> None:
        """Add dot products."""
        bins = to_buckets(dot.to("cpu", torch.float64), 1.0, len(self.counts))
        self.counts += torch.bincount(bins, minlength=len(self.counts))

    def edges(self, num_buckets: int) -> Float[Tensor, " N_less_1"]:
        """The N - 1 values between N equally frequent buckets, rising, linear inside a bin.

        Raises:
            ValueError: If nothing was counted.
        """
        total = self.counts.sum()
        if total == 0:
            raise ValueError("no dot product was counted")
        below = torch.cat([torch.zeros(1, dtype=torch.float64), self.counts.cumsum(0)])
        ranks = torch.arange(1, num_buckets, dtype=torch.float64) * (total / num_buckets)
        bins = torch.searchsorted(below, ranks) - 1
        inside = (ranks - below[bins]) / self.counts[bins]
        return ((bins + inside) * (2 / len(self.counts)) - 1).float()
