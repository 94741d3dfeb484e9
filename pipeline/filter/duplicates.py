"""The second pass of ``filter``: pictures that occur again, exactly or nearly, in parts of bounded size.

Equal pictures have equal digests, so a part takes the digests with one remainder. Hashes that differ in at most d bits
agree in at least one of d + 1 pieces of their bits, so near pictures are searched once for each piece, among those that
agree in it; a part takes the values of the piece with one remainder. The first row stays, in the order of shards and
keys. Legend: N rows of a part.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from numpy.typing import NDArray

from pipeline.filter.hashes import NUM_BITS, THUMB_BYTES, Hashes, Thumbs, find_near
from pipeline.filter.labels import duplicates_table, map_table
from pipeline.recipe.sections import FilterConfig
from pipeline.workspace.store import Artifact

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them

ROWS_PER_PART = 2_000_000
"""Rows of a part: 80 MB of digests, or 500 MB of hashes and colours, and as much again while they are sorted."""

Rows = NDArray[np.int64]


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


def find_duplicates(measures: Artifact, shards: Sequence[str], part: Part, config: FilterConfig) -> pa.Table:
    """The duplicates of one part, in the layout of ``duplicates_table``; memory is that of ``ROWS_PER_PART`` rows.

    Args:
        measures: ``<shard>.arrow`` of every shard, as ``RowRules`` measures it.
        shards: Names of the shards, sorted.
        part: The part.
        config: The recipe's section.
    """
    if part.piece < 0:
        places, pairs = _find_exact(measures, shards, part)
    else:
        places, pairs = _find_near(measures, shards, part, config.max_hash_distance)
    uids = _uids(measures, shards, places, sorted(set(pairs.values())))
    reason = "duplicate" if part.piece < 0 else "near_duplicate"
    return duplicates_table(
        [
            {
                "shard": shards[places[again, 0]],
                "row": int(places[again, 1]),
                "reason": reason,
                "detail": "",
                "same_as": uids[first],
                "same_as_shard": shards[places[first, 0]],
            }
            for again, first in pairs.items()
        ]
    )


def _find_exact(measures: Artifact, shards: Sequence[str], part: Part) -> tuple[Rows, dict[int, int]]:
    """Places (N, 2) of shard number and row; and for each repeated one the place of its first, by position."""
    places: list[Rows] = []
    keys: list[Hashes] = []
    for number, table in _stays(measures, shards):
        digests = _fixed(table["digest"], 16).view(np.uint64)
        rows = np.flatnonzero(digests[:, 0] % np.uint64(part.divisor) == part.remainder)
        places.append(_places(number, table, rows))
        keys.append(np.column_stack([digests[rows], _numbers(table["group"])[rows]]))
    if not keys:
        return np.zeros((0, 2), np.int64), {}
    all_keys = np.concatenate(keys)
    order = np.lexsort((np.arange(len(all_keys)), *all_keys.T))
    ordered = all_keys[order]
    is_new = np.ones(len(order), np.bool_)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    firsts = order[np.maximum.accumulate(np.where(is_new, np.arange(len(order)), 0))] if len(order) else order
    return np.concatenate(places), dict(zip(order[~is_new].tolist(), firsts[~is_new].tolist(), strict=True))


def _find_near(measures: Artifact, shards: Sequence[str], part: Part, max_distance: int) -> tuple[Rows, dict[int, int]]:
    """As ``_find_exact``; of the rows that agree in the part's piece of their bits."""
    start, stop = (NUM_BITS * (part.piece + i) // (max_distance + 1) for i in (0, 1))
    shift, mask = np.uint64(start), np.uint64((1 << (stop - start)) - 1)
    places, columns, thumbs = [np.zeros((0, 2), np.int64)], [np.zeros((0, 3), np.uint64)], [_no_thumbs()]
    for number, table in _stays(measures, shards):
        hashes = np.column_stack([_numbers(table[name]) for name in ("direct", "mirrored", "group")])
        is_here = (hashes[:, :2] >> shift & mask) % np.uint64(part.divisor) == part.remainder
        rows = np.flatnonzero(is_here.any(axis=1))
        places.append(_places(number, table, rows))
        columns.append(hashes[rows])
        thumbs.append(_fixed(table["thumb"], THUMB_BYTES)[rows])
    hashes, colours = np.concatenate(columns), np.concatenate(thumbs)
    pairs: dict[int, int] = {}
    for members in _buckets(hashes[:, :2] >> shift & mask):
        direct, mirrored, groups = hashes[members].T
        same_as = find_near(direct, mirrored, colours[members], groups, max_distance)
        again = np.flatnonzero(same_as >= 0)
        pairs |= dict(zip(members[again].tolist(), members[same_as[again]].tolist(), strict=True))
    return np.concatenate(places), pairs


def _buckets(values: Hashes) -> Iterator[Rows]:
    """Rows that have one of two values (N, 2) in common, ascending; only buckets of several rows."""
    entries = np.column_stack([values.T.reshape(-1), np.tile(np.arange(len(values), dtype=np.uint64), 2)])
    entries = np.unique(entries, axis=0)
    borders = np.flatnonzero(entries[1:, 0] != entries[:-1, 0]) + 1
    for bucket in np.split(entries[:, 1].astype(np.int64), borders):
        if len(bucket) > 1:
            yield bucket


def _stays(measures: Artifact, shards: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """The measured rows without a reason, with their row number, by number of the shard."""
    for number, shard in enumerate(shards):
        table = map_table(measures.path(f"{shard}.arrow"))
        table = table.append_column("row", pa.array(range(table.num_rows), pa.int64()))
        yield number, table.filter(pc.equal(table["reason"], "")).combine_chunks()


def _places(number: int, table: pa.Table, rows: Rows) -> Rows:
    return np.column_stack([np.full(len(rows), number), table["row"].to_numpy()[rows]])


def _numbers(column: pa.ChunkedArray) -> Hashes:
    return column.to_numpy().astype(np.uint64, copy=False)


def _fixed(column: pa.ChunkedArray, width: int) -> Thumbs:
    """A column of binary values of ``width`` bytes, (N, width)."""
    values: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    data = np.frombuffer(values.buffers()[1], np.uint8) if len(values) else np.zeros(0, np.uint8)
    return data[values.offset * width : (values.offset + len(values)) * width].reshape(-1, width)


def _no_thumbs() -> Thumbs:
    return np.zeros((0, THUMB_BYTES), np.uint8)


def _uids(measures: Artifact, shards: Sequence[str], places: Rows, positions: list[int]) -> dict[int, str]:
    """The uids of some places, by position; each shard is opened once."""
    uids: dict[int, str] = {}
    numbers = places[positions, 0] if positions else np.zeros(0, np.int64)
    for number in np.unique(numbers):
        here = [position for position, own in zip(positions, numbers, strict=True) if own == number]
        column = map_table(measures.path(f"{shards[number]}.arrow"))["uid"]
        uids |= dict(zip(here, column.take(pa.array(places[here, 1])).to_pylist(), strict=True))
    return uids
