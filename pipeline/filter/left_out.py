"""What the parts of a search for duplicates found, put together: which rows are left out, and why, bundle by bundle.

The parts know nothing of one another. If one leaves out C because of B, and another B because of A, then B does not
stand in the place of C: C stays, unless a row that stays is found for it, too. So every row that is left out names one
that stays.
Legend: N rows of all shards, which are numbered through in their order.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.filter.gathered import Bundle
from pipeline.workspace.store import Artifact

Bools = NDArray[np.bool_]
Rows = NDArray[np.int64]
_PLACES = ("number", "row", "same_as_number", "same_as_row")


def starts_of(sizes: Sequence[int]) -> Rows:
    """First row of each shard by the shards' numbers of rows, and N as the last entry."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)


def find_left_out(results: Artifact, parts: Sequence[str], starts: Rows) -> Bools:
    """Whether each row is left out, (N,): whether a row that stays was found for it.

    Memory is three bytes a row, and 16 for each finding whose first row is one of another finding.

    Args:
        results: ``<part>.parquet`` of every part, see ``sorted_duplicates``.
        parts: Names of the parts.
        starts: See ``starts_of``.
    """
    is_open, is_out = np.zeros(starts[-1], np.bool_), np.zeros(starts[-1], np.bool_)
    for again, _ in _findings(results, parts, starts):
        is_open[again] = True
    is_repeat, nobody = is_open.copy(), np.zeros(0, np.int64)
    chains = [(nobody, nobody)]
    for again, first in _findings(results, parts, starts):
        is_chained = is_repeat[first]
        is_out[again[~is_chained]] = True
        chains.append((again[is_chained], first[is_chained]))
    is_open &= ~is_out
    again, first = (np.concatenate(rows) for rows in zip(*chains, strict=True))
    while is_open[again].any():  # ends, because a first row comes before: that of an earliest open row is decided
        again, first = again[is_open[again]], first[is_open[again]]
        newly_out = again[~is_open[first] & ~is_out[first]]
        is_out[newly_out] = True
        is_open[newly_out] = False
        is_open[np.setdiff1d(again, again[~is_out[first]])] = False  # all its first rows are out, so it stays
    return is_out


def findings_of_bundle(
    results: Artifact, parts: Sequence[str], bundle: Bundle, shards: Sequence[str], starts: Rows, is_out: Bools
) -> pa.Table:
    """Why rows of a bundle's shards are left out, one finding for each, sorted by shard and row.

    Memory is that of the findings of a bundle.

    Args:
        results: See ``find_left_out``.
        parts: Names of the parts, in the order in which they count.
        bundle: The bundle.
        shards: Names of all shards.
        starts: See ``starts_of``.
        is_out: Result of ``find_left_out``, (N,).

    Returns:
        ``number`` of the shard, ``row``, ``reason``, ``detail``, ``same_as`` and ``same_as_shard`` of a row that stays.
    """
    tables = list[pa.Table]()
    has_reason = np.zeros(starts[bundle.stop] - starts[bundle.first], np.bool_)
    here: Any = [("number", ">=", bundle.first), ("number", "<", bundle.stop)]
    for part in parts:
        table = pq.read_table(results.path(f"{part}.parquet"), filters=here)
        again, first = _rows_of(table, starts)
        own = again - starts[bundle.first]
        counts = is_out[again] & ~is_out[first] & ~has_reason[own]
        has_reason[own[counts]] = True
        tables.append(table.filter(pa.array(counts)))
    findings = pa.concat_tables(tables).sort_by([("number", "ascending"), ("row", "ascending")])
    names = pa.array(shards, pa.string()).take(findings["same_as_number"])
    return findings.append_column("same_as_shard", names).drop_columns(["same_as_number", "same_as_row"])


def _findings(results: Artifact, parts: Sequence[str], starts: Rows) -> Iterator[tuple[Rows, Rows]]:
    for part in parts:
        yield _rows_of(pq.read_table(results.path(f"{part}.parquet"), columns=list(_PLACES)), starts)


def _rows_of(table: pa.Table, starts: Rows) -> tuple[Rows, Rows]:
    """The rows that were found again, and the first row of each; both numbered through."""
    number, row, same_as_number, same_as_row = (table[name].to_numpy() for name in _PLACES)
    return starts[number] + row, starts[same_as_number] + same_as_row
