"""Comparisons of two sets of embeddings beyond mean and covariance: CMMD, and precision and recall of manifolds.

Legend: N, M rows of the two sets, D features. Everything is exact, in float64, and computed for 1,024 rows at a time.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.metrics import Rate, rate_of

Array = NDArray[Any]

CMMD_BANDWIDTH = 10.0
"""Bandwidth of the Gaussian kernel on CLIP embeddings of length one (arXiv:2401.09603, section 4)."""
CMMD_SCALE = 1000.0
"""The paper multiplies by this factor, for readable numbers (same section)."""
NUM_NEIGHBOURS = 3
"""The sphere of a row reaches to this neighbour (arXiv:1904.06991, section 3: 3)."""
_ROWS_AT_A_TIME = 1024


def cmmd(a: Array, b: Array) -> float:
    """Squared maximum mean discrepancy of two sets of embeddings, times 1000: arXiv:2401.09603, equation 4.

    The estimate is the unbiased one, so it may fall slightly below zero for two sets of one distribution.

    Args:
        a: (N, D), rows of length one, N >= 2.
        b: (M, D), rows of length one, M >= 2.

    Raises:
        ValueError: If a set has fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"CMMD of {len(a)} and {len(b)} rows: at least 2 each")
    within = [(_kernel_sum(rows, rows) - len(rows)) / (len(rows) * (len(rows) - 1)) for rows in (a, b)]
    between = _kernel_sum(a, b) / (len(a) * len(b))
    return CMMD_SCALE * (within[0] + within[1] - 2 * between)


def precision_recall(generated: Array, real: Array, num_neighbours: int = NUM_NEIGHBOURS) -> tuple[Rate, Rate]:
    """Improved precision and recall: arXiv:1904.06991, equations 1 and 2.

    Precision is the share of generated rows inside the manifold of the real ones, recall the share of real rows inside
    that of the generated ones; a manifold is the union of spheres around its rows, each as wide as the distance to the
    row's ``num_neighbours``-th nearest other row.

    Args:
        generated: (N, D).
        real: (M, D).
        num_neighbours: Below N and M.

    Raises:
        ValueError: If a set does not have more rows than ``num_neighbours``.
    """
    if min(len(generated), len(real)) <= num_neighbours:
        raise ValueError(f"{len(generated)} and {len(real)} rows: more than {num_neighbours} neighbours each")
    return _inside(generated, real, num_neighbours), _inside(real, generated, num_neighbours)


def _inside(rows: Array, manifold: Array, num_neighbours: int) -> Rate:
    # The row itself is at distance zero: the k-th other row is number k from 0.
    radii = [np.partition(part, num_neighbours, axis=1)[:, num_neighbours] for part in _distances(manifold, manifold)]
    radius = np.concatenate(radii)
    inside = [(part <= radius).any(axis=1) for part in _distances(rows, manifold)]
    return rate_of(bool(flag) for flag in np.concatenate(inside))


def _kernel_sum(a: Array, b: Array) -> float:
    return float(sum(np.exp(-part / (2 * CMMD_BANDWIDTH**2)).sum() for part in _distances(a, b)))


def _distances(a: Array, b: Array) -> Iterator[Array]:
    """Squared distances of each row of ``a`` to all rows of ``b``; exactly zero from a row to itself."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    lengths = (y**2).sum(axis=1)
    for start in range(0, len(x), _ROWS_AT_A_TIME):
        part = x[start : start + _ROWS_AT_A_TIME]
        squared = (part**2).sum(axis=1)[:, None] + lengths - 2 * part @ y.T
        if a is b:
            rows = np.arange(len(part))
            squared[rows, start + rows] = 0.0
        yield np.maximum(squared, 0.0)
