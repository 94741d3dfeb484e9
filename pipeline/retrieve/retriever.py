"""Search under conditions: it asks the index for more rows until K of them fulfil the conditions.

Legend: Q queries, D features, K neighbours.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.data.rows import row_id
from pipeline.data.shards import StoredPictures
from pipeline.errors import DataError
from pipeline.retrieve.columns import StoredColumns, as_type, common_type
from pipeline.retrieve.embedded import Floats, Ids
from pipeline.retrieve.index import Neighbour, NeighbourIndex
from pipeline.retrieve.segment import Modality
from pipeline.retrieve.where import RowFilter, parse_filter
from pipeline.workspace.store import Artifact, Workspace

MAX_CANDIDATES = 1_000_000
"""Most rows of the index that are looked at for one query, unless its conditions say otherwise."""

_FIRST_CANDIDATES = 4
_MORE_CANDIDATES = 4
_DISTINCT_ROWS = 1024
"""Candidates that are compared with the kept rows at once: 3 MB of vectors at D = 768."""
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
    """Finds neighbours and reads their columns and pictures; several threads may use it at once.

    Args:
        index: The index.
    """

    def __init__(self, index: NeighbourIndex) -> None:
        self.index = index
        self._columns: Callable[[str], StoredColumns] = functools.cache(self._columns_of)
        self._pictures: Callable[[str], StoredPictures] = functools.cache(_pictures_of)
        self._lock = Lock()

    @classmethod
    def open(cls, index: Artifact, *, version_number: int | None = None, is_verified: bool = False) -> "Retriever":
        """Open the index of a finished step; arguments and errors as ``NeighbourIndex.open``."""
        return cls(NeighbourIndex.open(index, version_number=version_number, is_verified=is_verified))

    @functools.cached_property
    def fields(self) -> dict[str, pa.DataType]:
        """Type of every column that a filter may name: those of the index, and of the tables of embed and download.

        A column that is a number in one source and text in another is text: ``number(NAME)`` reads it.
        """
        fields = dict[str, pa.DataType]()
        for source in self.index.sources:
            for name, kind in self._columns(source.uri).fields.items():
                fields[name] = common_type(fields.get(name, kind), kind)
        return fields | {field.name: field.type for field in self.index.rows([]).schema}

    def conditions(self, where: str = "", distinct: float | None = None) -> Conditions:
        """Parse conditions.

        Raises:
            ConfigError: If ``where`` is no filter by these columns.
        """
        return Conditions(parse_filter(where, self.fields) if where else None, distinct)

    def search(
        self,
        vectors: Floats,
        k: int,
        modality: Modality = "image",
        conditions: Conditions | None = None,
        *,
        check: Callable[[], object] = lambda: None,
    ) -> list[Results]:
        """Find the nearest rows that fulfil the conditions.

        Args:
            vectors: Queries (Q, D), of length one.
            k: K.
            modality: Compare with pictures (z_image) or with captions (z_text).
            conditions: By default none.
            check: Called between the parts of a long search, which ends with what it raises.

        Raises:
            ValueError: If the queries are not (Q, D).
            DataError: If a file of a neighbour is damaged.
        """
        conditions = conditions or Conditions()
        if conditions.where is None and conditions.distinct is None:
            return self._search_plainly(vectors, k, modality)
        most = min(self.index.num_rows, max(k, conditions.max_candidates))
        num_candidates = min(_FIRST_CANDIDATES * k, most)
        results: list[Results | None] = [None if most else Results([], 0, "index")] * len(vectors)
        while waiting := [query for query, one in enumerate(results) if one is None]:
            num_parts = -(-len(waiting) * num_candidates // _CANDIDATES_AT_ONCE)
            for part in np.array_split(np.array(waiting), num_parts):
                check()
                answers = self._search_once(vectors[part], k, modality, conditions, num_candidates, most)
                for query, one in zip(part, answers, strict=True):
                    results[query] = one
            num_candidates = min(_MORE_CANDIDATES * num_candidates, most)
        return [one for one in results if one is not None]

    def _search_plainly(self, vectors: Floats, k: int, modality: Modality) -> list[Results]:
        """Find the nearest rows, without conditions; some queries at a time."""
        count = min(k, self.index.num_rows)
        if not count:  # an index of no rows has no width either
            return [Results([], 0, "index")] * len(vectors)
        at_once = max(1, _CANDIDATES_AT_ONCE // count)
        return [
            Results(neighbours, count, "enough" if len(neighbours) == k else "index")
            for start in range(0, len(vectors), at_once)
            for neighbours in self.index.find(vectors[start : start + at_once], count, modality)
        ]

    def _search_once(
        self, vectors: Floats, k: int, modality: Modality, conditions: Conditions, num_candidates: int, most: int
    ) -> list[Results | None]:
        """Look at some candidates of each query; None if fewer than K fulfil the conditions and there are more."""
        similarities, ids = self.index.search(vectors, num_candidates, modality)
        is_kept = self._passed(ids, conditions.where)
        for candidates, passed in zip(ids, is_kept, strict=True):
            places = np.flatnonzero(passed)
            if conditions.distinct is not None:
                places = places[self._distinct(candidates[places], conditions.distinct, k)]
            passed[:] = False
            passed[places[:k]] = True
        counts = is_kept.sum(axis=1)
        is_last = num_candidates == most
        is_kept[(counts < k) & (not is_last)] = False
        neighbours = iter(self.index.neighbours(similarities[is_kept], ids[is_kept]))  # of all queries at once
        end = "index" if most == self.index.num_rows else "limit"
        return [
            Results(list(itertools.islice(neighbours, count)), num_candidates, "enough" if count == k else end)
            if count == k or is_last
            else None
            for count in counts.tolist()
        ]

    def columns(self, ids: Ids, names: Sequence[str]) -> pa.Table:
        """Columns of rows by id, in the order of ``ids``; null where a row's source has no such column.

        Raises:
            DataError: If a table is damaged.
        """
        of_index = self.index.column_names
        rows = self.index.rows(ids, names if of_index.issuperset(names) else {*names, "shard", "key"})
        stored = [name for name in names if name not in rows.column_names]
        if not stored:
            return rows.select(list(names))
        shards, keys = (rows.column(name).to_pylist() for name in ("shard", "key"))
        artifacts = list(self.index.sources)
        sources = self.index.sources_of(ids) if len(artifacts) > 1 else np.zeros(len(ids), np.int64)
        parts, places = list[pa.Table](), list[int]()
        for source in np.unique(sources).tolist():
            own: list[int] = np.flatnonzero(sources == source).tolist()
            columns = self._columns(artifacts[source].uri)
            present = [name for name in stored if name in columns.fields]
            source_rows = columns.take([shards[place] for place in own], [keys[place] for place in own], present)
            typed = {name: as_type(source_rows[name], self.fields[name]) for name in present}
            missing = {name: pa.nulls(len(own), self.fields[name]) for name in stored if name not in typed}
            parts.append(pa.table({name: missing[name] if name in missing else typed[name] for name in stored}))
            places += own
        table = pa.concat_tables(parts).take(pa.array(np.argsort(places)))
        chosen = {name: table.column(name) if name in stored else rows.column(name) for name in names}
        return pa.table(chosen)

    def picture(self, neighbour: Neighbour) -> bytes:
        """The stored picture file of a row.

        Raises:
            DataError: If it cannot be read; names shard, key and uid.
        """
        [source] = self.index.sources_of([neighbour.id])
        with self._lock:  # threads that ask at once must share the shards that stay open
            pictures = self._pictures(self.index.sources[int(source)].uri)
        return pictures.read(neighbour.shard, neighbour.key, neighbour.uid)

    def ids_of(self, uids: Sequence[str]) -> Ids:
        """The ids of rows by their uids, (len(uids),); -1 where there is no such row."""
        ids = np.array([row_id(uid) for uid in uids], np.int64)
        places: list[int] = np.flatnonzero(self.index.has(ids)).tolist()
        stored = self.index.rows(ids[places], ["uid"])["uid"].to_pylist() if places else []
        right = [place for place, uid in zip(places, stored, strict=True) if uid == uids[place]]  # an id is a hash
        chosen = np.full(len(ids), -1, np.int64)
        chosen[right] = ids[right]
        return chosen

    def _columns_of(self, embed: str) -> StoredColumns:
        download = _download_of(embed)
        return StoredColumns([Artifact(embed), *([download] if download else [])], self.index.first_shards[embed])

    def _passed(self, ids: Ids, where: RowFilter | None) -> NDArray[np.bool_]:
        """Which of ``ids`` are rows that pass the filter, in the same shape."""
        if where is None:
            return ids >= 0
        candidates = np.unique(ids[ids >= 0])
        passed = where.keep(self.columns(candidates, where.columns)) if len(candidates) else []
        return np.isin(ids, candidates[passed])

    def _distinct(self, ids: Ids, limit: float, k: int) -> list[int]:
        """Places of the first K rows that are no near-duplicates of a row before them.

        Vectors are read in blocks until there are K: those of a million candidates are gigabytes.
        """
        places: list[int] = []
        vectors = np.empty((0, self.index.embed_dim), np.float32)  # of the kept rows
        for start in range(0, len(ids), _DISTINCT_ROWS):
            block = self.index.vectors(ids[start : start + _DISTINCT_ROWS])
            is_new = (block @ vectors.T).max(axis=1, initial=-np.inf) < limit
            similarities, own = block @ block.T, list[int]()
            for row in np.flatnonzero(is_new).tolist():
                if similarities[row, own].max(initial=-np.inf) < limit:
                    own.append(row)
            own = own[: k - len(places)]
            places += [start + row for row in own]
            if len(places) == k:
                break
            vectors = np.concatenate([vectors, block[own]])
        return places


def _pictures_of(embed: str) -> StoredPictures:
    download = _download_of(embed)
    if download is None:
        raise DataError(f"{embed}: these embeddings name no download with their pictures")
    return StoredPictures(download, by_ranges=True)


def _download_of(embed: str) -> Artifact | None:
    """The download step's artifact from which embeddings were made, in the same workspace; None if they name none."""
    manifest = Artifact(embed).manifest()
    key = manifest.inputs.get("download") if manifest else None
    return Workspace(embed.rsplit("/", 2)[0]).artifact("download", key) if key else None
