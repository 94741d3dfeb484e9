"""Principal components of embeddings, kept by energy: arXiv:2204.06125, section 2.2.

Legend: B batch, D features, K components, R reductions of an embedding. All of it is float64 on the CPU: the covariance
of embeddings of length one is a small difference of sums over millions of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Pca:
    """An orthonormal basis of the directions in which embeddings vary most."""

    mean: Float[Tensor, " D"]
    """Mean of the embeddings."""
    components: Float[Tensor, "K D"]
    """Unit vectors in order of decreasing variance, each with its largest entry (by size) positive."""
    variance: Float[Tensor, " K"]
    """Variance along each (divided by n - 1)."""
    total_variance: float
    """Sum of the variance along all D directions."""

    @property
    def error(self) -> float:
        """Share of the variance that the components left out hold: the relative squared error of ``reconstruct``."""
        return 1 - float(self.variance.sum()) / self.total_variance if self.total_variance > 0 else 0.0

    def keep(self, num_components: int) -> Pca:
        """The first of the components alone.

        Raises:
            ValueError: If ``num_components`` is below 1 or above their number.
        """
        if not 1 <= num_components <= len(self.components):
            raise ValueError(f"{num_components} components: there are 1 to {len(self.components)}")
        first = slice(num_components)
        return Pca(self.mean, self.components[first], self.variance[first], self.total_variance)

    def keep_by_energy(self, max_error: float) -> Pca:
        """As few components as leave out at most the share ``max_error`` of the variance, at least one."""
        energy = self.variance.cumsum(0)
        enough = energy >= (1 - max_error) * self.total_variance
        first = int(enough.int().argmax()) if enough.any() else len(energy) - 1
        return self.keep(first + 1)

    def project(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B K"]:
        """Coordinates along the components, of the type of ``x``."""
        return (x - self.mean.to(x)) @ self.components.T.to(x)

    def reconstruct(self, coordinates: Float[Tensor, "B K"]) -> Float[Tensor, "B D"]:
        """The embeddings with these coordinates; they are not normalised to length one."""
        return coordinates @ self.components.to(coordinates) + self.mean.to(coordinates)

    def reduce(self, x: Float[Tensor, "1 D"], counts: Sequence[int]) -> Float[Tensor, "R D"]:
        """One embedding with so many components alone, for each of ``counts``, of length one; last as it is: section 4.

        Raises:
            ValueError: As ``keep``.
        """
        bases = [self.keep(count) for count in counts]
        return torch.cat([*(F.normalize(basis.reconstruct(basis.project(x)), dim=1) for basis in bases), x])


class PcaSums:
    """Sums over rows, from which the components follow.

    Args:
        num_features: D.
    """

    def __init__(self, num_features: int) -> None:
        self.num_rows = 0
        # Sums are of x - shift, where shift is the first row: otherwise the mean's square would swallow the variance.
        self._shift: Tensor | None = None
        self._total = torch.zeros(num_features, dtype=torch.float64)
        self._products = torch.zeros(num_features, num_features, dtype=torch.float64)

    def update(self, x: Float[Tensor, "B D"]) -> None:
        """Add rows."""
        if not len(x):
            return
        x = x.to("cpu", torch.float64)
        if self._shift is None:
            self._shift = x[0].clone()
        x = x - self._shift
        self.num_rows += len(x)
        self._total += x.sum(0)
        self._products += x.T @ x

    def pca(self) -> Pca:
        """All D components, the one with the largest variance first.

        Raises:
            ValueError: If fewer than two rows were added.
        """
        if self._shift is None or self.num_rows < 2:
            raise ValueError(f"{self.num_rows} rows: principal components need at least two")
        mean = self._total / self.num_rows
        covariance = (self._products - self.num_rows * torch.outer(mean, mean)) / (self.num_rows - 1)
        variance, vectors = torch.linalg.eigh(covariance)
        components = vectors.T.flip(0)
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        variance = variance.flip(0).clamp(min=0)  # rounding may leave a vanishing one below zero
        return Pca(mean + self._shift, components * largest.sign(), variance, float(variance.sum()))
