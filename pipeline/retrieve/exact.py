"""Exact similarities from the embeddings, for re-ranking and for measuring the recall of an index.

Legend: Q queries, N rows, D features, K neighbours.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.data.shards import REPAIR_HINT
from pipeline.data.vectors import ROW_GROUP_ROWS, Vectors, read_vectors, to_numpy, to_unit
from pipeline.errors import DataError
from pipeline.workspace.store import Artifact

_CACHED_GROUPS = 256
_TIE = 1e-6  # largest difference between two float32 similarities of the same vectors

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class EmbeddedShards:
    """The embed step's rows with row numbers 0 .. N - 1, in order of shard name and key."""

    embed: Artifact
    names: tuple[str, ...]
    starts: Ids
    """First row number of each shard, and N as the last entry."""
    embed_dim: int

    @property
    def num_rows(self) -> int:
        """N."""
        return int(self.starts[-1])

    @classmethod
    def open(cls, embed: Artifact) -> "EmbeddedShards":
        """Read the row counts of every committed shard.

        Raises:
            DataError: If there are no rows.
        """
        records = embed.shard_records()
        sizes = [record.counts["ok"] for record in records.values()]
        if not sum(sizes):
            raise DataError(f"index: {embed.uri} holds no embeddings: every picture failed")
        schema = pq.read_schema(embed.path(f"{next(iter(records))}.parquet"))
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        return cls(embed, tuple(records), starts, int(schema.field("z_image").type.list_size))

    def __iter__(self) -> Iterator[tuple[str, int, Vectors]]:
        for name, start, stop in zip(self.names, self.starts[:-1], self.starts[1:], strict=True):
            vectors = read_vectors(self.embed.path(f"{name}.parquet"))
            if len(vectors.z_image) != stop - start:
                raise DataError(
                    f"index: {self.embed.uri}/{name}.parquet has {len(vectors.z_image)} rows, its record says "
                    f"{stop - start}; {REPAIR_HINT}"
                )
            yield name, int(start), vectors


class ExactVectors:
    """Reads single vectors by row number; it caches row groups."""

    def __init__(self, shards: EmbeddedShards) -> None:
        self._shards = shards
        self._group = functools.lru_cache(_CACHED_GROUPS)(self._read_group)

    def gather(self, ids: Ids, column: str) -> Floats:
        """Vectors (len(ids), D) of rows ``ids`` of ``z_image`` or ``z_text``."""
        rows = np.empty((len(ids), self._shards.embed_dim), np.float16)
        shards = np.searchsorted(self._shards.starts, ids, side="right") - 1
        for position, (row, shard) in enumerate(zip(ids, shards, strict=True)):
            offset = int(row - self._shards.starts[shard])
            rows[position] = self._group(int(shard), offset // ROW_GROUP_ROWS, column)[offset % ROW_GROUP_ROWS]
        return to_unit(rows)

    def _read_group(self, shard: int, group: int, column: str) -> NDArray[np.float16]:
        path = self._shards.embed.path(f"{self._shards.names[shard]}.parquet")
        with pq.ParquetFile(path, memory_map=True) as parquet:
            return to_numpy(parquet.read_row_group(group, columns=[column]).column(column))


def true_neighbours(shards: EmbeddedShards, queries: Floats, column: str, k: int) -> list[set[int]]:
    """For each query, every row at least as near as its exact K-th neighbour: more than K if rows tie.

    Ties are frequent: pictures with the same caption have the same z_text, and any of them is correct.
    """
    least = _kth_similarity(shards, queries, column, k) - _TIE
    neighbours: list[set[int]] = [set() for _ in queries]
    for _, start, vectors in shards:
        for query, row in np.argwhere(_scores(vectors, queries, column) >= least[:, None]):
            neighbours[query].add(start + int(row))
    return neighbours


def recall(returned: NDArray[Any], true: list[set[int]], k: int) -> float:
    """Share of the K true neighbours among the returned candidates.

    Args:
        returned: Row numbers, (Q, candidates); -1 for a missing candidate.
        true: The result of ``true_neighbours``.
        k: K.
    """
    hits = [min(k, sum(int(row) in nearest for row in rows)) for rows, nearest in zip(returned, true, strict=True)]
    return float(np.mean(hits)) / k


def _kth_similarity(shards: EmbeddedShards, queries: Floats, column: str, k: int) -> Floats:
    """The exact similarity of the K-th neighbour of each query, (Q,)."""
    best = np.full((len(queries), k), -np.inf, np.float32)
    for _, _, vectors in shards:
        scores = _scores(vectors, queries, column)
        best = -np.partition(-np.concatenate([best, scores], axis=1), k - 1, axis=1)[:, :k]
    return best.min(axis=1)


def _scores(vectors: Vectors, queries: Floats, column: str) -> Floats:
    return queries @ to_unit(getattr(vectors, column)).T
