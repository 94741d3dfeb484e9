"""Whether the ablation's variants stand in the paper's order: paired differences, with bootstrap intervals.

All variants sample the same prompts with the same seeds, so a prompt that is hard for one is hard for all: its
differences vary less than two separate samples would. The interval is the 95 % percentile interval of 1,000 resamples
of the prompts, which are always the same ones; of 200 for the Frechet distance, which of one variant and one resample
takes .2 s at 240 prompts and 3 s at 1,000.

Legend: N prompts, R resamples, D features of an embedding.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
NUM_FRECHET_RESAMPLES = 200
_LOOK_S = 10.0
"""Seconds between two words on how far a comparison is."""
HOLDS, REVERSED, OPEN = "holds", "reversed", "open"


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


@dataclass(frozen=True)
class Measure:
    """What the variants are compared by."""

    variants: Mapping[str, Statistic]
    """By the name of the variant."""
    num_prompts: int
    """Prompts 0 .. N - 1 have it, and are resampled with replacement."""
    num_resamples: int = NUM_RESAMPLES


def check_order(
    order: Sequence[str], measures: Mapping[str, Measure], watch: Callable[[int, int], None] = lambda *_: None
) -> Json:
    """Compare each variant with the next one of an expected order, the best first, by every measure.

    Args:
        order: Names of the variants.
        measures: By name; those of fewer than two prompts are left out.
        watch: Called with (resamples that are computed, resamples of all measures) at first and every ten seconds.

    Returns:
        measure -> ``"a over b"`` -> ``difference``, by how much the first is better on the same prompts, with its
        interval ``low``, ``high``, and ``verdict``: ``holds`` if the interval is above zero, ``reversed`` if it is
        below, else ``open``.
    """
    compared = {name: measure for name, measure in measures.items() if measure.num_prompts >= 2}
    done, total = 0, sum(measure.num_resamples for measure in compared.values())
    watch(done, total)
    watched, table = time.monotonic(), dict[str, Any]()
    for name, measure in compared.items():
        places = [np.arange(measure.num_prompts), *_resamples(measure)]
        values = np.empty((len(order), len(places)))
        for number, prompts in enumerate(places):  # the prompts themselves first
            values[:, number] = [measure.variants[variant](prompts) for variant in order]
            if time.monotonic() - watched >= _LOOK_S:
                watch(done + number, total)
                watched = time.monotonic()
        done += measure.num_resamples
        pairs = zip(pairwise(order), values[:-1] - values[1:], strict=True)
        table[name] = {f"{first} over {second}": _verdict(differences) for (first, second), differences in pairs}
    return table


def _resamples(measure: Measure) -> NDArray[np.int64]:
    """The prompts of each resample, (R, N); always the same."""
    return np.random.default_rng(0).integers(measure.num_prompts, size=(measure.num_resamples, measure.num_prompts))


def _verdict(differences: Array) -> Json:
    """Of the difference of two variants on the prompts themselves and on their resamples, (1 + R,)."""
    low, high = np.quantile(differences[1:], [0.025, 0.975])
    verdict = HOLDS if low > 0 else REVERSED if high < 0 else OPEN
    return {"difference": float(differences[0]), "low": float(low), "high": float(high), "verdict": verdict}
