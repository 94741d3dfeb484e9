"""How much work a search takes for K results, so that the share of true neighbours among them reaches the target."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Effort:
    """What the tuning found for one K."""

    k: int
    effort: int
    """Lists to visit (ivf) or nodes to keep (hnsw)."""
    candidates: int
    """Rows to compare exactly, for each result."""
    tuned_recall: float
    """Recall at K on the queries of the tuning."""
    recall: float
    """Recall at K on other queries."""
    recall_interval: float
    """Half of its 95 % interval."""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


def effort_for(efforts: Sequence[Effort], k: int) -> tuple[int, int]:
    """The effort and the number of candidates for any K.

    Below the first measured K they stay as they are there, because a coarse code orders few rows badly; between two
    measured K both grow evenly on a log scale; above the last they grow as K does.

    Args:
        efforts: Ascending by K; not empty.
        k: Number of results.
    """
    last = efforts[-1]
    if k >= last.k:
        return -(-last.effort * k // last.k), k * last.candidates
    ks = np.log([item.k for item in efforts])
    measured = ([item.effort for item in efforts], [item.k * item.candidates for item in efforts])
    effort, count = (int(np.ceil(np.exp(np.interp(np.log(k), ks, np.log(values))) - 1e-9)) for values in measured)
    return effort, max(k, count)
