"""Whether the ablation's variants stand in the paper's order: paired differences, with bootstrap intervals.

All variants sample the same prompts with the same seeds, so a prompt that is hard for one is hard for all: its
differences vary less than two separate samples would. The interval is the 95 % percentile interval of 1,000 resamples
of the prompts, which are always the same ones.

Legend: N prompts, R resamples, D features of an embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Json = dict[str, Any]
Statistic = Callable[[Array], float]
"""A number of the prompts with these indices; higher is better."""

VARIANTS = {"caption": "caption only", "z_text": "z_text as z_image", "prior": "prior", "z_image": "true z_image"}
"""The variants of the ablation, with their names for people."""
PAPER_ORDER = ("prior", "caption", "z_text")
"""The best first, by the paper's FID: 7.99, 9.16 and 16.55."""
NUM_RESAMPLES = 1000
HOLDS, REVERSED, OPEN = "holds", "reversed", "open"


def compare(first: Statistic, second: Statistic, num_prompts: int) -> Json:
    """By how much ``first`` is better than ``second`` on the same prompts.

    Args:
        first: The number of the variant that is expected to be better.
        second: The number of the other.
        num_prompts: Prompts 0 .. N - 1 are resampled with replacement.

    Returns:
        ``difference`` with its interval ``low``, ``high``, and ``verdict``: ``holds`` if the interval is above zero,
        ``reversed`` if it is below, else ``open``.
    """

    def difference(places: Array) -> float:
        return first(places) - second(places)

    draws = np.random.default_rng(0).integers(num_prompts, size=(NUM_RESAMPLES, num_prompts))
    low, high = np.quantile([difference(places) for places in draws], [0.025, 0.975])
    verdict = HOLDS if low > 0 else REVERSED if high < 0 else OPEN
    whole = difference(np.arange(num_prompts))
    return {"difference": whole, "low": float(low), "high": float(high), "verdict": verdict}


def mean_statistic(values: Array) -> Statistic:
    """The mean of one value for each prompt, (N,)."""
    return lambda places: float(values[places].mean())


def frechet_statistic(z_image: Array, real: Array) -> Statistic:
    """Minus the squared Frechet distance of embeddings to those of the real pictures, (N, D) each.

    Few rows make the distance too large, and a resample has fewer different rows still; so does that of the other
    variant, and their difference is what is read.
    """
    return lambda places: -frechet_of_rows(z_image[places], real[places])


def frechet_of_rows(a: Array, b: Array) -> float:
    """The squared Frechet distance of two sets of rows, (N, D) and (M, D), as ``metrics.frechet_distance``.

    The trace of the root of the covariances' product is the sum of the singular values of one set's centred rows times
    the other's: a matrix of N by M, or of D by D if there are more rows than features.
    """
    shift = a.mean(axis=0) - b.mean(axis=0)
    centred = [(rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (a, b)]
    traces = sum(float(np.square(rows).sum()) for rows in centred)
    small = [np.asarray(np.linalg.qr(rows, mode="r")) if len(rows) > rows.shape[1] else rows for rows in centred]
    cross = np.linalg.svd(small[0] @ small[1].T, compute_uv=False).sum()
    return max(0.0, float(shift @ shift + traces - 2 * cross))


def check_order(
    order: Sequence[str], measures: Mapping[str, Mapping[str, Statistic]], counts: Mapping[str, int]
) -> Json:
    """Compare each variant with the next one of an expected order, the best first, by every measure.

    Args:
        order: Names of the variants.
        measures: measure -> variant -> its statistic.
        counts: measure -> number of prompts that have it; those with fewer than two are left out.

    Returns:
        measure -> ``"a over b"`` -> the comparison of ``compare``.
    """
    return {
        measure: {
            f"{first} over {second}": compare(variants[first], variants[second], counts[measure])
            for first, second in pairwise(order)
        }
        for measure, variants in measures.items()
        if counts[measure] >= 2
    }
