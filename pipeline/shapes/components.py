"""Connected components of a mask, from the runs of its rows (scipy.ndimage.label would need one more package)."""

import numpy as np
from numpy.typing import NDArray


def connected_components(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int32], int]:
    """Number the connected regions of a mask; pixels connect along rows and columns (4 neighbours).

    Args:
        mask: (height, width).

    Returns:
        Region numbers, (height, width) int32: 0 outside, 1 .. count inside, in order of first pixels; and the count.
    """
    parents: list[int] = []
    runs: list[tuple[int, int, int]] = []  # row, first column, column after the last
    previous: list[int] = []
    for row, edges in _edges(mask):
        current: list[int] = []
        for start, stop in edges:
            run = len(runs)
            runs.append((row, start, stop))
            parents.append(run)
            current.append(run)
            for above in previous:
                above_row, above_start, above_stop = runs[above]
                if above_row == row - 1 and above_start < stop and start < above_stop:
                    low, high = sorted((_root(parents, above), _root(parents, run)))
                    parents[high] = low
        previous = current
    numbers = np.zeros(mask.shape, np.int32)
    names: dict[int, int] = {}
    for run, (row, start, stop) in enumerate(runs):
        numbers[row, start:stop] = names.setdefault(_root(parents, run), len(names) + 1)
    return numbers, len(names)


def _edges(mask: NDArray[np.bool_]) -> list[tuple[int, list[tuple[int, int]]]]:
    """Rows that are not empty, with the (start, stop) columns of their runs."""
    steps = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]  # in the same order: each run has one start and one stop
    runs: dict[int, list[tuple[int, int]]] = {}
    for row, start, stop in zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True):
        runs.setdefault(row, []).append((start, stop))
    return list(runs.items())


def _root(parents: list[int], run: int) -> int:
    while parents[run] != run:
        parents[run] = parents[parents[run]]
        run = parents[run]
    return run
