"""Finds repeated uids among any number of rows with little memory: sorted runs on disk, compared bucket by bucket.

A run holds the uids of up to ``RUN_ROWS`` rows with their positions, sorted by uid. A bucket is the uids with the same
first ten bits: one span of every run. Equal uids are in one bucket, so buckets are compared one by one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

RUN_ROWS = 1_000_000
"""Rows of a run: 24 MB."""
GROUP_ROWS = 1_000_000
"""About how many rows are compared at once: 24 MB, and four times as much for sorting."""
_BUCKET_BITS = 10
_NUM_BUCKETS = 1 << _BUCKET_BITS
_ROW_BITS = 40
_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("position", "<u8")])

Positions = NDArray[np.uint64]


@dataclass(frozen=True)
class Run:
    """One run of a file of runs."""

    first: int
    """Its first entry in the file."""
    bounds: tuple[int, ...]
    """First entry of each bucket, counted inside the run; the last number is the run's length."""


class RunWriter:
    """Writes the runs of one piece.

    Args:
        stream: File to write.
        piece: Number of the piece, which is part of every position.
    """

    def __init__(self, stream: BinaryIO, piece: int) -> None:
        self._stream = stream
        self._next = piece << _ROW_BITS
        self._waiting: list[bytes] = []
        self._written = 0
        self.runs: list[Run] = []

    def add(self, uids: Iterable[bytes]) -> None:
        """Add the uids (16 bytes each) of the next rows of the piece."""
        self._waiting.extend(uids)
        if len(self._waiting) >= RUN_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the last run."""
        if not self._waiting:
            return
        halves = np.frombuffer(b"".join(self._waiting), dtype=">u8").reshape(-1, 2)
        entries = np.empty(len(halves), dtype=_ENTRY)
        entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
        entries["position"] = np.arange(self._next, self._next + len(halves), dtype=np.uint64)
        high = halves[:, 0].astype(np.uint64)
        order = np.argsort(high, kind="stable")
        entries[order].tofile(self._stream)
        first_bits = np.arange(_NUM_BUCKETS, dtype=np.uint64) << np.uint64(64 - _BUCKET_BITS)
        bounds = [*np.searchsorted(high[order], first_bits).tolist(), len(halves)]
        self.runs.append(Run(self._written, tuple(bounds)))
        self._written += len(halves)
        self._next += len(halves)
        self._waiting = []


def bucket_groups(num_rows: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of buckets that together hold about ``GROUP_ROWS`` rows."""
    width = min(_NUM_BUCKETS, max(1, GROUP_ROWS * _NUM_BUCKETS // max(1, num_rows)))
    return [(first, min(_NUM_BUCKETS, first + width)) for first in range(0, _NUM_BUCKETS, width)]


def count_rows(files: Iterable[tuple[Path, Sequence[Run]]], buckets: tuple[int, int]) -> int:
    """Number of rows in a range [first, end) of buckets of all files of runs."""
    first, end = buckets
    return sum(run.bounds[end] - run.bounds[first] for _, runs in files for run in runs)


def repeated_positions(files: Sequence[tuple[Path, Sequence[Run]]], buckets: tuple[int, int]) -> Positions:
    """Positions, sorted, of the rows in a range of buckets whose uid an earlier row has.

    Args:
        files: Files of runs in the order of their pieces, each with its runs.
        buckets: The range [first, end).
    """
    parts = [
        np.fromfile(
            path,
            dtype=_ENTRY,
            count=run.bounds[buckets[1]] - run.bounds[buckets[0]],
            offset=(run.first + run.bounds[buckets[0]]) * _ENTRY.itemsize,
        )
        for path, runs in files
        for run in runs
    ]
    entries = np.concatenate([np.empty(0, dtype=_ENTRY), *parts])
    if not len(entries):
        return np.empty(0, dtype=np.uint64)
    high: NDArray[Any] = entries["high"].astype(np.uint64)
    order = np.argsort(high, kind="stable")  # stable: rows with equal halves stay in the order of their positions
    high = high[order]
    same = high[1:] == high[:-1]
    in_group = np.concatenate([[False], same]) | np.concatenate([same, [False]])
    candidates = entries[order[in_group]]
    candidates = candidates[np.lexsort((candidates["position"], candidates["low"], candidates["high"]))]
    repeats = (candidates["high"][1:] == candidates["high"][:-1]) & (candidates["low"][1:] == candidates["low"][:-1])
    return np.sort(candidates["position"][1:][repeats].astype(np.uint64))


def rows_of_piece(positions: Positions, piece: int) -> NDArray[np.int64]:
    """Row numbers, inside a piece, of those positions that belong to it."""
    low, high = np.searchsorted(positions, np.array([piece << _ROW_BITS, (piece + 1) << _ROW_BITS], dtype=np.uint64))
    return (positions[low:high] & np.uint64((1 << _ROW_BITS) - 1)).astype(np.int64)
