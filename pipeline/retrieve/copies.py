"""From which similarity on a picture counts as a near copy of a training picture, by pictures that no training saw.

Real pictures resemble training pictures too: of one kind of data more than of another, and more under a small CLIP than
under a large one. A fixed cosine would say nothing. Held-out pairs of the same data say how near such a picture comes.
"""

import numpy as np

from pipeline.retrieve.index import NeighbourIndex

QUANTILE = 0.99
"""Share of the held-out pictures that are less similar to their nearest training picture than a near copy is."""
_NUM_ROWS = 1000
_NUM_REQUESTED = 24  # neighbours of each; the nearest is a held-out row itself, and others may be too
_MIN_ROWS = 20


def near_copy_similarity(index: NeighbourIndex) -> float | None:
    """The cosine above which a picture is nearer to a training picture than 99 % of the held-out ones.

    Args:
        index: With rows of the splits train and validation. At most 1,000 of its held-out rows are read.

    Returns:
        None if there are fewer than 20 held-out rows that have a training row near them.
    """
    ids = index.sample("validation", _NUM_ROWS)
    if len(ids) < _MIN_ROWS:
        return None
    similarities, neighbours = index.search(index.vectors(ids), _NUM_REQUESTED, "image")
    is_row = neighbours >= 0
    is_training = np.zeros(neighbours.shape, np.bool_)
    is_training[is_row] = np.array(index.rows(neighbours[is_row], ["split"]).column("split").to_pylist()) == "train"
    nearest = np.where(is_training, similarities, -np.inf).max(axis=1)
    nearest = nearest[np.isfinite(nearest)]
    return float(np.quantile(nearest, QUANTILE)) if len(nearest) >= _MIN_ROWS else None
