"""Search under conditions: it asks the index for more rows until K of them fulfil the conditions.

Legend: Q queries, D features, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc

from pipeline.retrieve.build import Modality
from pipeline.retrieve.columns import StoredColumns
from pipeline.retrieve.exact import EmbeddedShards, ExactVectors, Floats, Ids
from pipeline.retrieve.index import Neighbour, NeighbourIndex
from pipeline.retrieve.where import RowFilter, parse_filter
from pipeline.workspace.store import Artifact

MAX_CANDIDATES = 1_000_000
"""Most rows of the index that are looked at for one query, unless its conditions say otherwise."""

_FIRST_CANDIDATES = 4
_MORE_CANDIDATES = 4
_CANDIDATES_AT_ONCE = 1 << 22  # of all queries: 50 MB of ids and similarities


@dataclass(frozen=True)
class Conditions:
    """What a neighbour must fulfil beside being near."""

    where: RowFilter | None = None
    """A filter by column."""
    distinct: float | None = None
    """Cosine of two pictures from which on they are near-duplicates; only the nearest to the query of them is kept."""
    max_candidates: int = MAX_CANDIDATES
    """Most rows of the index that are looked at for one query."""


@dataclass(frozen=True)
class Results:
    """The neighbours of one query."""

    neighbours: list[Neighbour]
    """The nearest first."""
    num_candidates: int
    """Rows that were looked at."""
    end: Literal["enough", "index", "limit"]
    """Why the search ended: there are K, the index has no more rows, or as many as allowed were looked at."""

    def shortage(self, k: int) -> str:
        """A sentence if there are fewer than ``k`` neighbours, else empty."""
        if self.end == "enough":
            return ""
        rows = f"all {self.num_candidates:,} rows of the index"
        if self.end == "limit":
            rows = f"the {self.num_candidates:,} nearest rows, the most that one search looks at,"
        return f"only {len(self.neighbours)} of {k}: {rows} were looked at"


class Retriever:
    """Finds neighbours and reads their columns; several threads may use it at once.

    Args:
        index: The index.
        embed: The embeddings from which it was built.
        columns: What a filter may read.
    """

    def __init__(self, index: NeighbourIndex, embed: Artifact, columns: StoredColumns) -> None:
        self.index = index
        self.columns = columns
        self._vectors = ExactVectors(EmbeddedShards.open(embed))

    @classmethod
    def open(cls, artifacts: dict[str, Artifact]) -> "Retriever":
        """Open the index of finished steps: ``index``, ``embed``, and ``download``, for filters by its columns.

        Raises:
            DataError: If a file is missing or damaged.
        """
        index = NeighbourIndex.open(artifacts["index"], artifacts["embed"])
        return cls(index, artifacts["embed"], columns_of(artifacts))

    def conditions(self, where: str = "", distinct: float | None = None) -> Conditions:
        """Parse conditions.

        Raises:
            ConfigError: If ``where`` is no filter by these columns.
        """
        return parse_conditions(self.columns, where, distinct)

    def search(
        self, vectors: Floats, k: int, modality: Modality = "image", conditions: Conditions | None = None
    ) -> list[Results]:
        """Find the nearest rows that fulfil the conditions.

        Args:
            vectors: Queries (Q, D), of length one.
            k: K.
            modality: Compare with pictures (z_image) or with captions (z_text).
            conditions: By default none.

        Raises:
            ValueError: If the queries are not (Q, D).
            DataError: If a file of a neighbour is damaged.
        """
        conditions = conditions or Conditions()
        results: dict[int, Results] = {}
        most = min(self.index.num_rows, max(k, conditions.max_candidates))
        is_plain = conditions.where is None and conditions.distinct is None
        num_candidates = min(k if is_plain else _FIRST_CANDIDATES * k, most)
        while len(results) < len(vectors):
            waiting = np.array([query for query in range(len(vectors)) if query not in results])
            for part in np.array_split(waiting, -(-len(waiting) * num_candidates // _CANDIDATES_AT_ONCE)):
                similarities, ids = self._nearest(vectors[part], num_candidates, modality)
                passed = self._passed(ids, conditions.where)
                for query, near, candidates in zip(part, similarities, ids, strict=True):
                    places = np.flatnonzero(np.isin(candidates, passed))
                    if conditions.distinct is not None:
                        places = places[self._distinct(candidates[places], conditions.distinct, k)]
                    places = places[:k]
                    if len(places) == k or num_candidates == most:
                        end = "enough" if len(places) == k else "index" if most == self.index.num_rows else "limit"
                        neighbours = self._neighbours(near[places], candidates[places])
                        results[int(query)] = Results(neighbours, num_candidates, end)
            num_candidates = min(_MORE_CANDIDATES * num_candidates, most)
        return [results[query] for query in range(len(vectors))]

    def _passed(self, ids: Ids, where: RowFilter | None) -> Ids:
        """Those of ``ids`` that pass the filter, each once."""
        candidates = np.unique(ids[ids >= 0])
        if where is None or not len(candidates):
            return candidates
        rows = self.rows(candidates)
        shards, keys = ([row[name] for row in rows] for name in ("shard", "key"))
        return candidates[where.keep(self.columns.take(shards, keys, where.columns))]

    def _distinct(self, ids: Ids, limit: float, k: int) -> list[int]:
        """Places of the first K rows that are no near-duplicates of a row before them."""
        kept: list[int] = []
        vectors = self.pictures(ids)
        for place, vector in enumerate(vectors):
            if not kept or float((vectors[kept] @ vector).max()) < limit:
                kept.append(place)
            if len(kept) == k:
                break
        return kept

    def _neighbours(self, similarities: Floats, ids: Ids) -> list[Neighbour]:
        return [
            Neighbour(
                id=int(number),
                similarity=float(similarity),
                **{name: row[name] for name in ("uid", "url", "caption", "key", "shard")},
            )
            for number, similarity, row in zip(ids, similarities, self.rows(ids), strict=True)
        ]

    def _nearest(self, vectors: Floats, k: int, modality: Modality) -> tuple[Floats, Ids]:
        """Similarities and ids (Q, K) of the nearest rows, the nearest first; -1 where there is none."""
        similarities = np.full((len(vectors), k), -np.inf, np.float32)
        ids = np.full((len(vectors), k), -1, np.int64)
        for query, neighbours in enumerate(self.index.search(vectors, k, modality)):
            similarities[query, : len(neighbours)] = [one.similarity for one in neighbours]
            ids[query, : len(neighbours)] = [one.id for one in neighbours]
        return similarities, ids

    def rows(self, ids: Ids | Sequence[int]) -> list[dict[str, Any]]:
        """The index's columns of rows by id.

        Raises:
            ValueError: If there is no such row.
        """
        return self.index.rows([int(number) for number in ids])

    def pictures(self, ids: Ids) -> Floats:
        """z_image of rows, (len(ids), D), of length one."""
        return self._vectors.gather(ids, "z_image")

    def id_of(self, uid: str) -> int | None:
        """The id of a row by its uid; None if there is none."""
        uids: Any = getattr(self.index, "_rows").column("uid")  # noqa: B009
        place: int = pc.index(uids, uid).as_py()
        return None if place < 0 else place


def columns_of(artifacts: dict[str, Artifact]) -> StoredColumns:
    """The columns of the tables of ``embed`` and ``download``."""
    return StoredColumns([artifacts["embed"], artifacts["download"]])


def parse_conditions(columns: StoredColumns, where: str, distinct: float | None) -> Conditions:
    """Parse conditions without opening the index.

    Raises:
        ConfigError: If ``where`` is no filter by these columns.
    """
    return Conditions(parse_filter(where, columns.fields) if where else None, distinct)
