"""Measures of pictures and embeddings, from sums that merge across workers.

Legend: N samples, D features of an embedding. Sums are float64, so that they agree to rounding for any number of
workers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Json = dict[str, Any]

_ROWS_AT_A_TIME = 1024
_Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the standard normal distribution."""


@dataclass(frozen=True)
class Rate:
    """Hits among a number of trials."""

    hits: int
    total: int

    def __add__(self, other: "Rate") -> "Rate":
        return Rate(self.hits + other.hits, self.total + other.total)

    @property
    def value(self) -> float:
        """Share of hits, 0 to 1; nan without trials."""
        return self.hits / self.total if self.total else math.nan

    def to_dict(self) -> Json:
        """The rate with its counts and its 95 % Wilson interval."""
        low, high = wilson_interval(self.hits, self.total)
        return {"rate": self.value, "hits": self.hits, "total": self.total, "low": low, "high": high}


def rate_of(flags: Iterable[bool]) -> Rate:
    """The rate of true flags."""
    values = list(flags)
    return Rate(sum(values), len(values))


def wilson_interval(hits: int, total: int, z: float = _Z95) -> tuple[float, float]:
    """Interval of a rate (Wilson, 1927): stays inside [0, 1] and keeps its coverage for few trials.

    Args:
        hits: Successes, 0..total.
        total: Trials; without any, the interval is (0, 1).
        z: Quantile of the standard normal distribution; 1.96 gives 95 %.

    Raises:
        ValueError: If ``hits`` is not in 0..total.
    """
    if not 0 <= hits <= total:
        raise ValueError(f"hits = {hits} is not in 0..{total}")
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    scale = 1 + z**2 / total
    centre = (share + z**2 / (2 * total)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == total else centre + half
    return low, high


def difference_of(a: Rate, b: Rate) -> Json:
    """Rate ``a`` minus rate ``b`` of other trials, with its 95 % interval (Newcombe 1998, method 10).

    The interval is made of the Wilson intervals of both, so it keeps its coverage for few trials and near 0 and 1.
    """
    difference = a.value - b.value
    (low_a, high_a), (low_b, high_b) = (wilson_interval(rate.hits, rate.total) for rate in (a, b))
    below = math.hypot(a.value - low_a, high_b - b.value)
    above = math.hypot(high_a - a.value, b.value - low_b)
    return {"difference": difference, "low": difference - below, "high": difference + above}


def mean_of(values: Sequence[float] | Array) -> Json:
    """Mean with its count, standard deviation and 95 % interval (normal); ``mean`` is None without values."""
    data = np.asarray(values, np.float64)
    if data.size == 0:
        return {"mean": None, "std": None, "count": 0, "low": None, "high": None}
    mean, std = float(data.mean()), float(data.std(ddof=1)) if data.size > 1 else 0.0
    half = _Z95 * std / math.sqrt(data.size)
    return {"mean": mean, "std": std, "count": int(data.size), "low": mean - half, "high": mean + half}


def cosine(a: Array, b: Array) -> Array:
    """Cosine of each row of ``a`` with the same row of ``b``: (N, D), (N, D) -> (N,), float64.

    Raises:
        ValueError: If the shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(f"cosine of {a.shape} with {b.shape}: one row for each row")
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return (x * y).sum(axis=1) / np.maximum(lengths, 1e-12)


def r_precision(z_image: Array, z_text: Array, own: Sequence[int] | Array) -> Rate:
    """Share of pictures whose own caption is the nearest of all captions (R-precision at 1)."""
    return rate_of(bool(hit) for hit in own_is_nearest(z_image, z_text, own))


def own_is_nearest(z_image: Array, z_text: Array, own: Sequence[int] | Array) -> Array:
    """For each picture whether its own caption is the nearest of all captions, (N,).

    Args:
        z_image: (N, D), unit rows.
        z_text: (M, D), unit rows, the distinct captions.
        own: (N,), the row of each picture's caption.
    """
    starts = range(0, len(z_image), _ROWS_AT_A_TIME)
    nearest = [(z_image[start : start + _ROWS_AT_A_TIME] @ z_text.T).argmax(axis=1) for start in starts]
    return np.concatenate(nearest) == np.asarray(own)


@dataclass(frozen=True)
class FeatureSums:
    """Sums that give the mean and covariance of features; the sums of parts add up to those of the whole."""

    count: int
    total: NDArray[np.float64]
    """Sum of the rows, (D,)."""
    outer: NDArray[np.float64]
    """Sum of the rows' outer products, (D, D)."""

    @classmethod
    def of(cls, features: Array) -> "FeatureSums":
        """Sums of the rows of ``features``, (N, D)."""
        rows = features.astype(np.float64)
        return cls(rows.shape[0], rows.sum(axis=0), rows.T @ rows)

    def __add__(self, other: "FeatureSums") -> "FeatureSums":
        return FeatureSums(self.count + other.count, self.total + other.total, self.outer + other.outer)

    @property
    def mean(self) -> NDArray[np.float64]:
        """Mean, (D,)."""
        return self.total / self.count

    @property
    def covariance(self) -> NDArray[np.float64]:
        """Unbiased covariance, (D, D); needs two rows.

        Raises:
            ValueError: If there are fewer than two rows.
        """
        if self.count < 2:
            raise ValueError(f"covariance of {self.count} rows: at least 2")
        return (self.outer - np.outer(self.total, self.total) / self.count) / (self.count - 1)


def frechet_distance(a: FeatureSums, b: FeatureSums) -> float:
    """Squared Frechet distance of the two normal distributions (arXiv:1706.08500, eq. 6).

    The trace of the product's square root is taken from the symmetric matrix A^(1/2) B A^(1/2), whose eigenvalues are
    those of A B: real and non-negative even where fewer rows than features leave a covariance singular.
    """
    shift = a.mean - b.mean
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b.covariance @ root), 0)).sum()
    distance = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    return max(0.0, float(distance))
