"""The search of ``filter`` for duplicates: pictures that occur again, exactly or nearly, in parts of bounded size.

Equal pictures have equal digests, so a part takes the digests with one remainder. Hashes that differ in at most d bits
agree in at least one of d + 1 pieces of their bits, so near pictures are searched once for each piece, among those that
agree in it; a part takes the values of the piece with one remainder. The first row stays, in the order of shards and
keys, unless another part leaves it out (``left_out``). Legend: N rows of a part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.filter.gathered import Bundle, read_batches
from pipeline.filter.hashes import NUM_BITS, THUMB_BYTES, Hashes, Thumbs, find_near
from pipeline.filter.labels import Rows, duplicates_table, sorted_duplicates
from pipeline.recipe.sections import FilterConfig
from pipeline.workspace.store import Artifact

ROWS_PER_PART = 2_000_000
"""Rows of a part: 140 MB of digests and uids, or 560 MB of hashes, colours and uids; twice as much again while they are
sorted, and up to 200 MB of what is found."""


@dataclass(frozen=True)
class Part:
    """One part of the search."""

    piece: int
    """-1: equal digests; else the piece of the bits that agrees."""
    remainder: int
    divisor: int

    @property
    def name(self) -> str:
        """Name of its file; the names sort in the order in which the parts count."""
        kind = "exact" if self.piece < 0 else f"near-{self.piece}"
        return f"{kind}-{self.remainder:05d}"


def search_parts(config: FilterConfig, num_rows: int) -> list[Part]:
    """The parts of the search in ``num_rows`` rows."""
    if config.duplicates == "keep":
        return []
    divisor = max(1, -(-num_rows // ROWS_PER_PART))
    pieces = range(-1, config.max_hash_distance + 1 if config.duplicates == "near" else 0)
    return [Part(piece, remainder, divisor) for piece in pieces for remainder in range(divisor)]


def find_duplicates(gathered: Artifact, bundles: Sequence[Bundle], part: Part, config: FilterConfig) -> pa.Table:
    """The duplicates of one part, in the layout of ``sorted_duplicates``; memory is that of ``ROWS_PER_PART`` rows.

    Args:
        gathered: The files of the bundles, see ``gather_measures``.
        bundles: All bundles.
        part: The part.
        config: The recipe's section.
    """
    if part.piece < 0:
        rows, again, first = _find_exact(gathered, bundles, part)
        return sorted_duplicates([duplicates_table(rows, again, first, "duplicate")])
    rows, again, first = _find_near(gathered, bundles, part, config.max_hash_distance)
    return sorted_duplicates([duplicates_table(rows, again, first, "near_duplicate")])


def _find_exact(gathered: Artifact, bundles: Sequence[Bundle], part: Part) -> tuple[pa.Table, Rows, Rows]:
    """The part's N rows; the positions of the repeated ones, (M,), and of the first of each, (M,)."""
    places: list[pa.Table] = []
    keys: list[Hashes] = []
    for table in read_batches(gathered, bundles):
        digests = _fixed(table["digest"], 16).view(np.uint64)
        rows = np.flatnonzero(digests[:, 0] % np.uint64(part.divisor) == part.remainder)
        places.append(_places(table, rows))
        keys.append(np.column_stack([digests[rows], _numbers(table["group"])[rows]]))
    all_keys = np.concatenate(keys)
    order = np.lexsort((np.arange(len(all_keys)), *all_keys.T))
    ordered = all_keys[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))] if len(order) else order
    return pa.concat_tables(places).combine_chunks(), order[~is_new], firsts[~is_new]


def _find_near(
    gathered: Artifact, bundles: Sequence[Bundle], part: Part, max_distance: int
) -> tuple[pa.Table, Rows, Rows]:
    """As ``_find_exact``; of the rows that agree in the part's piece of their bits."""
    start, stop = (NUM_BITS * (part.piece + i) // (max_distance + 1) for i in (0, 1))
    shift, mask = np.uint64(start), np.uint64((1 << (stop - start)) - 1)
    places, columns, thumbs = list[pa.Table](), list[Hashes](), list[Thumbs]()
    for table in read_batches(gathered, bundles):
        hashes = np.column_stack([_numbers(table[name]) for name in ("direct", "mirrored", "group")])
        is_here = (hashes[:, :2] >> shift & mask) % np.uint64(part.divisor) == part.remainder
        rows = np.flatnonzero(is_here.any(axis=1))
        places.append(_places(table, rows))
        columns.append(hashes[rows])
        thumbs.append(_fixed(table["thumb"], THUMB_BYTES)[rows])
    hashes, colours = np.concatenate(columns), np.concatenate(thumbs)
    firsts = np.full(len(hashes), -1, np.int64)
    for members in _buckets(hashes[:, :2] >> shift & mask):
        direct, mirrored, groups = hashes[members].T
        same_as = find_near(direct, mirrored, colours[members], groups, max_distance)
        again = np.flatnonzero(same_as >= 0)
        firsts[members[again]] = members[same_as[again]]
    again = np.flatnonzero(firsts >= 0)
    return pa.concat_tables(places).combine_chunks(), again, firsts[again]


def _buckets(values: Hashes) -> Iterator[Rows]:
    """Rows that have one of two values (N, 2) in common, ascending; only buckets of several rows."""
    entries = np.column_stack([values.T.reshape(-1), np.tile(np.arange(len(values), dtype=np.uint64), 2)])
    entries = np.unique(entries, axis=0)
    borders = np.flatnonzero(entries[1:, 0] != entries[:-1, 0]) + 1
    for bucket in np.split(entries[:, 1].astype(np.int64), borders):
        if len(bucket) > 1:
            yield bucket


def _places(table: pa.Table, rows: Rows) -> pa.Table:
    return table.select(["number", "row", "uid"]).take(pa.array(rows))


def _numbers(column: pa.ChunkedArray) -> Hashes:
    return column.to_numpy().astype(np.uint64, copy=False)


def _fixed(column: pa.ChunkedArray, width: int) -> Thumbs:
    """A column of binary values of ``width`` bytes, (N, width)."""
    values: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    data = np.frombuffer(values.buffers()[1], np.uint8) if len(values) else np.zeros(0, np.uint8)
    return data[values.offset * width : (values.offset + len(values)) * width].reshape(-1, width)
