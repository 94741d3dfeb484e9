"""Measures an index against exact search, and finds the effort that reaches the requested recall.

The queries are embeddings of validation rows, half pictures and half captions, as users send both and the two are far
apart. Each is measured as in an index without its own row, which is neither trained on, nor counted among its
neighbours, nor takes a candidate's place. The effort is tuned on one half of them, and the recall is reported on the
other, with a 95 % interval.

Legend: Q queries, D features, K neighbours.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.retrieve import kinds
from pipeline.retrieve.efforts import Effort
from pipeline.retrieve.embedded import Floats, Ids
from pipeline.retrieve.rows import Rows
from pipeline.retrieve.segment import Modality

MEASURED_K = (10, 100, 1000)
_MAX_QUERIES = {100: 128, 1000: 64}  # of each half; for many neighbours, few queries tell as much
NUM_NEAREST = MEASURED_K[-1] + 128
"""Rows that exact search keeps; some more than the largest K, for ties."""
_TIE = 2e-6  # largest difference between two float32 similarities of the same vectors
_TIMED_QUERIES = 64
_ONE_SIDED, _TWO_SIDED = 1.645, 1.96  # normal quantiles for 95 %


@dataclass(frozen=True)
class Truth:
    """What exact search finds."""

    queries: Floats
    """(Q, D)"""
    own_positions: Ids
    """(Q,) position of the row that the query is taken from, -1 if it is not in the segment."""
    scores: dict[Modality, Floats]
    """By modality: the largest similarities (Q, NUM_NEAREST), falling, without the query's own row; -inf if there are
    no more rows."""
    positions: dict[Modality, Ids]
    """By modality: their rows."""

    def measured_k(self, modality: Modality) -> list[int]:
        """The K of ``MEASURED_K`` that the segment has rows for; one smaller K if it has fewer than the first.

        None if a query has no other row at all: there is nothing to measure.
        """
        num_others = int(np.isfinite(self.scores[modality]).sum(axis=1).min())
        return [k for k in MEASURED_K if k <= num_others] or ([num_others] if num_others else [])


@dataclass(frozen=True)
class Tuned:
    """One kind of index of one modality, tuned."""

    kind: kinds.Kind
    efforts: tuple[Effort, ...]
    curve: tuple[dict[str, Any], ...]
    """Recall for each K, effort and number of candidates that was tried; empty if there was nothing to measure."""
    latency_ms: float
    """Median time of one search for the first K, one query at a time, in ms; 0 if there was nothing to measure."""
    reaches_target: bool
    """Whether it reaches the target at every K, on the queries of the tuning; false if it was given up."""

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "latency_ms": self.latency_ms,
            "reaches_target": self.reaches_target,
            "efforts": [effort.to_json() for effort in self.efforts],
            "curve": list(self.curve),
        }


def tune(
    searcher: kinds.Searcher,
    rows: Rows,
    truth: Truth,
    modality: Modality,
    target: float,
    *,
    limit_ms: float = float("inf"),
) -> Tuned:
    """Find the smallest effort at each K whose recall is above the target with 95 % confidence, else the largest.

    A kind that is slower than another that reaches the target is given up after the first K. Of a segment without
    other rows than a query's own nothing is measured: its search compares what there is.

    Args:
        searcher: The index.
        rows: Its rows, for exact similarities.
        truth: The true neighbours.
        modality: What the index holds.
        target: Recall to reach.
        limit_ms: Latency from which on the kind is given up.
    """
    measurement, efforts, smallest, reaches_all = _Measurement(searcher, rows, truth, modality), list[Effort](), 1, True
    latency_ms = 0.0
    measured = truth.measured_k(modality)
    if not measured:
        most = kinds.candidates(searcher.kind, 1)[-1]
        return Tuned(searcher.kind, (Effort(1, max(1, searcher.max_effort), most, 1.0, 1.0, 0.0),), (), 0.0, True)
    for k in measured:
        halves = [np.arange(len(truth.queries))[half::2][: _MAX_QUERIES.get(k)] for half in (0, 1)]
        halves = [half if len(half) else halves[0] for half in halves]
        effort, candidates, tuned = _search_effort(measurement, k, halves[0], smallest, target)
        other = measurement.recalls(k, halves[1], effort, candidates)[candidates]
        reaches_all &= _lower_bound(tuned) >= target
        interval = _TWO_SIDED * _error(other)
        efforts.append(Effort(k, effort, candidates, float(tuned.mean()), float(other.mean()), interval))
        smallest = effort
        if len(efforts) == 1:
            latency_ms = measurement.latency_ms(efforts[0])
            if latency_ms >= limit_ms:
                reaches_all = False
                break
    return Tuned(searcher.kind, tuple(efforts), tuple(measurement.curve), latency_ms, reaches_all)


def _search_effort(
    measurement: "_Measurement", k: int, queries: Ids, smallest: int, target: float
) -> tuple[int, int, NDArray[np.float64]]:
    """The smallest effort, from ``smallest`` on, and number of candidates that reach the target, and their recalls.

    Efforts are tried in steps of 2; when one is enough, the one between it and the last is tried, too.
    """
    searcher = measurement.searcher
    tried = [effort for effort in kinds.efforts(searcher.kind, searcher.max_effort) if effort >= smallest]
    for place in [*range(0, len(tried) - 1, 2), len(tried) - 1]:
        best = _least_candidates(measurement.recalls(k, queries, tried[place]), target)
        if _lower_bound(best[1]) < target and place < len(tried) - 1:
            continue
        if place:
            between = _least_candidates(measurement.recalls(k, queries, tried[place - 1]), target)
            if _lower_bound(between[1]) >= target:
                return tried[place - 1], *between
        return tried[place], *best
    raise AssertionError("the last effort always returns")


def _least_candidates(recalls: dict[int, NDArray[np.float64]], target: float) -> tuple[int, NDArray[np.float64]]:
    """The fewest candidates that reach the target, else the most, with their recalls."""
    enough = [count for count, each in recalls.items() if _lower_bound(each) >= target]
    count = enough[0] if enough else max(recalls)
    return count, recalls[count]


def fastest(tuned: Sequence[Tuned]) -> Tuned:
    """The kind of the lowest latency among those that reach the target; if none does, that of the highest recall."""
    able = [item for item in tuned if item.reaches_target]
    if able:
        return min(able, key=lambda item: item.latency_ms)
    return max(tuned, key=lambda item: min(effort.tuned_recall for effort in item.efforts))


class _Measurement:
    """Recall and latency of one index."""

    def __init__(self, searcher: kinds.Searcher, rows: Rows, truth: Truth, modality: Modality) -> None:
        self.searcher = searcher
        self.curve = list[dict[str, Any]]()
        """What was measured."""
        self._rows = rows
        self._truth = truth
        self._modality: Modality = modality

    def recalls(self, k: int, chosen: Ids, effort: int, candidates: int = 0) -> dict[int, NDArray[np.float64]]:
        """By number of candidates for each result (0: all that may be tried), the recall of each chosen query."""
        numbers = [candidates] if candidates else kinds.candidates(self.searcher.kind, k)
        # A query's own row takes the place of a candidate that a new query would have.
        count = min(k * numbers[-1] + 1, self.searcher.num_rows)
        _, positions = self.searcher.search(self._truth.queries[chosen], count, effort)
        hits: dict[int, list[int]] = {number: [] for number in numbers}
        for query, returned in zip(chosen.tolist(), positions, strict=True):
            others = returned[(returned >= 0) & (returned != self._truth.own_positions[query])]
            is_hit = np.cumsum(self._is_neighbour(query, k, others))
            for number, values in hits.items():
                counted = is_hit[: k * number]
                values.append(min(k, int(counted[-1])) if len(counted) else 0)
        recalls = {number: np.array(values) / k for number, values in hits.items()}
        for number, each in recalls.items():
            point = {"k": k, "effort": effort, "candidates": number, "recall": round(float(each.mean()), 4)}
            self.curve.append(point)
        return recalls

    def _is_neighbour(self, query: int, k: int, positions: Ids) -> NDArray[np.bool_]:
        """Whether each row is at least as near as the K-th true neighbour.

        Ties are frequent: pictures of one caption have the same z_text.
        """
        scores, nearest = self._truth.scores[self._modality][query], self._truth.positions[self._modality][query]
        threshold = scores[k - 1] - _TIE
        is_near = scores >= threshold
        if is_near.all():  # there may be more of them than exact search kept
            vectors = self._rows.vectors(positions, f"z_{self._modality}")
            return np.asarray(vectors @ self._truth.queries[query] >= threshold)
        return np.isin(positions, nearest[is_near])

    def latency_ms(self, effort: Effort) -> float:
        """Median time of one search, re-ranking included, rounded as it is said: a choice is by what is said."""
        times = list[float]()
        for query in self._truth.queries[:_TIMED_QUERIES]:
            start = time.perf_counter()
            count = min(effort.k * effort.candidates, self.searcher.num_rows)
            _, positions = self.searcher.search(query[None], count, effort.effort)
            if not kinds.is_exact(self.searcher.kind):
                _ = self._rows.vectors(positions[0][positions[0] >= 0], f"z_{self._modality}") @ query
            times.append(time.perf_counter() - start)
        return round(1000 * float(np.median(times)), 3)


def _lower_bound(recalls: NDArray[np.float64]) -> float:
    """What the true recall exceeds with 95 % confidence."""
    return float(recalls.mean()) - _ONE_SIDED * _error(recalls)


def _error(recalls: NDArray[np.float64]) -> float:
    """Standard error of the mean."""
    return float(np.std(recalls)) / len(recalls) ** 0.5
