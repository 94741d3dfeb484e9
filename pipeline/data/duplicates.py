"""Finds repeated uids among any number of rows with little memory: sorted runs on disk, compared bucket by bucket.

A run holds the uids of up to ``RUN_ROWS`` rows with their positions, sorted by uid. A bucket is the uids with the same
first ten bits: one span of every run. Equal uids are in one bucket, so buckets are compared one by one.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from pipeline.data.arrays import write_values

RUN_ROWS = 1_000_000
"""Rows of a run: 24 MB."""
GROUP_ROWS = 1_000_000
"""About how many rows are compared at once: 24 MB, and four times as much for sorting."""
_BUCKET_BITS = 10
_NUM_BUCKETS = 1 << _BUCKET_BITS
_ROW_BITS = 40
_ENTRY = np.dtype([("high", ">u8"), ("low", ">u8"), ("position", "<u8")])
_BOUND = np.dtype("<i8")

Positions = NDArray[np.uint64]


@dataclass(frozen=True)
class Runs:
    """A file of runs: their entries, then the bounds of each run, then the number of runs."""

    path: Path
    """The file."""
    bounds: NDArray[np.int64]
    """(R, buckets + 1): the entry of the file with which each bucket of each run begins; the last one ends the run."""

    @classmethod
    def of(cls, path: Path) -> "Runs":
        """The runs of a file of ``RunWriter``."""
        num_bytes, of_run = path.stat().st_size, _NUM_BUCKETS + 1
        [num_runs] = np.fromfile(path, dtype=_BOUND, offset=num_bytes - _BOUND.itemsize).tolist()
        start = num_bytes - (num_runs * of_run + 1) * _BOUND.itemsize
        return cls(path, np.fromfile(path, dtype=_BOUND, count=num_runs * of_run, offset=start).reshape(-1, of_run))


class RunWriter:
    """Writes the runs of some pieces into one file; ``close`` ends it.

    Args:
        stream: File to write.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._next = 0
        self._uids: list[bytes] = []
        self._positions: list[Positions] = []
        self._num_written = 0
        self._bounds: list[NDArray[np.int64]] = []

    def begin(self, piece: int) -> None:
        """The rows of a piece come next; its number is a part of their positions."""
        self._next = piece << _ROW_BITS

    def add(self, uids: Sequence[bytes]) -> None:
        """Add the uids (16 bytes each) of the next rows of the piece."""
        self._uids += uids
        self._positions.append(np.arange(self._next, self._next + len(uids), dtype=np.uint64))
        self._next += len(uids)
        if len(self._uids) >= RUN_ROWS:
            self._flush()

    def close(self) -> None:
        """Write the last run and the bounds of all."""
        self._flush()
        for bounds in self._bounds:
            write_values(self._stream, bounds.astype(_BOUND))
        write_values(self._stream, np.array([len(self._bounds)], dtype=_BOUND))

    def _flush(self) -> None:
        if not self._uids:
            return
        halves = np.frombuffer(b"".join(self._uids), dtype=">u8").reshape(-1, 2)
        entries = np.empty(len(halves), dtype=_ENTRY)
        entries["high"], entries["low"] = halves[:, 0], halves[:, 1]
        entries["position"] = np.concatenate(self._positions)
        high = halves[:, 0].astype(np.uint64)
        order = np.argsort(high, kind="stable")
        write_values(self._stream, entries[order])
        first_bits = np.arange(_NUM_BUCKETS, dtype=np.uint64) << np.uint64(64 - _BUCKET_BITS)
        self._bounds.append(self._num_written + np.append(np.searchsorted(high[order], first_bits), len(halves)))
        self._num_written += len(halves)
        self._uids, self._positions = [], []


def bucket_groups(num_rows: int) -> list[tuple[int, int]]:
    """Ranges [first, end) of buckets that together hold about ``GROUP_ROWS`` rows."""
    width = min(_NUM_BUCKETS, max(1, GROUP_ROWS * _NUM_BUCKETS // max(1, num_rows)))
    return [(first, min(_NUM_BUCKETS, first + width)) for first in range(0, _NUM_BUCKETS, width)]


def count_rows(files: Sequence[Runs], buckets: tuple[int, int]) -> int:
    """Number of rows in a range [first, end) of buckets of all files of runs."""
    first, end = buckets
    return sum(int((runs.bounds[:, end] - runs.bounds[:, first]).sum()) for runs in files)


def repeated_positions(files: Sequence[Runs], buckets: tuple[int, int]) -> Positions:
    """Positions, sorted, of the rows in a range of buckets whose uid an earlier row has.

    Args:
        files: Files of runs in the order of their pieces.
        buckets: The range [first, end).
    """
    spans = [(runs.path, start, stop) for runs in files for start, stop in runs.bounds[:, list(buckets)].tolist()]
    parts = [
        np.fromfile(path, dtype=_ENTRY, count=stop - start, offset=start * _ENTRY.itemsize)
        for path, start, stop in spans
        if stop > start
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


def gather_positions(files: Sequence[Path], num_pieces: int, path: Path) -> int:
    """Write the positions of several files into one, in which those of a piece stand together.

    Args:
        files: ``.npy`` files of sorted positions, of which one at a time is in memory.
        num_pieces: Number of pieces.
        path: File to write, as NumPy's ``.npy``.

    Returns:
        Number of positions.

    Raises:
        OSError: If the disk has no room for them.
    """
    counts = np.zeros(num_pieces, dtype=np.int64)
    for file in files:
        counts += np.bincount(_pieces_of(np.load(file)), minlength=num_pieces)
    starts, total = np.cumsum(counts) - counts, int(counts.sum())
    gathered = np.lib.format.open_memmap(path, "w+", np.uint64, (total,))
    with path.open("r+b") as stream:  # a full disk is an error here, and would be the end of the process below
        os.posix_fallocate(stream.fileno(), 0, path.stat().st_size)
    for file in files:
        positions = np.load(file)
        pieces = _pieces_of(positions)
        numbers = np.arange(len(pieces)) - np.searchsorted(pieces, pieces)  # of each among those of its piece
        gathered[starts[pieces] + numbers] = positions
        starts += np.bincount(pieces, minlength=num_pieces)
    gathered.flush()
    return total


def rows_of_piece(positions: Positions, piece: int) -> NDArray[np.int64]:
    """Row numbers, inside a piece, of those positions that belong to it, sorted; they stand together."""
    low, high = np.searchsorted(positions, np.array([piece << _ROW_BITS, (piece + 1) << _ROW_BITS], dtype=np.uint64))
    return np.sort(positions[low:high] & np.uint64((1 << _ROW_BITS) - 1)).astype(np.int64)


def _pieces_of(positions: Positions) -> NDArray[np.int64]:
    """The number of the piece of each position."""
    return (positions >> np.uint64(_ROW_BITS)).astype(np.int64)
