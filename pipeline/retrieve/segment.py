"""One segment of an index: rows that were built together, and never change."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.errors import DataError
from pipeline.retrieve import kinds
from pipeline.retrieve.efforts import Effort, effort_for
from pipeline.retrieve.embedded import EmbeddedShards, Floats, Ids
from pipeline.retrieve.rows import Rows, are_among
from pipeline.workspace.store import Artifact

Modality = Literal["image", "text"]
MODALITIES: tuple[Modality, ...] = ("image", "text")
_RERANKED_AT_ONCE = 8192
"""Candidates whose vectors are read together, of several queries or of one: 60 MB at D = 768. A store answers many
requests at a time."""
_CANDIDATES_AT_ONCE = 1 << 22
"""Candidates of several queries that are compared together; a query alone may have more."""


@dataclass(frozen=True)
class _Side:
    """The index of one modality."""

    searcher: kinds.Searcher
    efforts: tuple[Effort, ...]

    @functools.cached_property
    def effort_for(self) -> Callable[[int], tuple[int, int]]:
        """The effort and the number of candidates for any K."""
        return functools.cache(functools.partial(effort_for, self.efforts))


class Segment:
    """Searches the rows of one segment.

    Args:
        artifact: The index.
        name: The segment's folder in it.
        deleted: Ids of rows that are not returned.

    Raises:
        DataError: If a file is missing or damaged.
    """

    def __init__(self, artifact: Artifact, name: str, deleted: Ids) -> None:
        description = artifact.read_json(f"{name}/segment.json")
        shards = EmbeddedShards.from_json(description["embedded"], workspace_of(artifact))
        self.name = name
        self.rows = Rows(artifact, name, shards)
        self.sides = {modality: _open_side(artifact, name, modality, description[modality]) for modality in MODALITIES}
        for modality, side in self.sides.items():
            if side.searcher.num_rows != len(self.rows):
                counts = f"{side.searcher.num_rows} vectors of {modality}, {len(self.rows)} rows"
                raise DataError(f"{artifact.uri}/{name}: {counts}; {artifact.mend()}")
        hidden = np.load(artifact.path(f"{name}/hidden.npy"))
        positions = self.rows.positions(deleted)
        self._left_out = np.union1d(hidden, positions[positions >= 0])

    @property
    def num_rows(self) -> int:
        """Rows that a search may return."""
        return len(self.rows) - len(self._left_out)

    def positions(self, ids: Ids) -> Ids:
        """The position of each id, -1 if no search returns such a row."""
        positions = self.rows.positions(ids)
        return np.where(are_among(positions, self._left_out), -1, positions)

    def search(self, queries: Floats, k: int, modality: Modality) -> tuple[Floats, Ids]:
        """The exact similarities and the positions (Q, k) of the nearest rows, the nearest first.

        Missing rows, in a segment of fewer than k, have the similarity -inf and the position -1.
        """
        effort, count = self.sides[modality].effort_for(k)
        return self._search(queries, k, modality, effort, count)

    def _search(self, queries: Floats, k: int, modality: Modality, effort: int, count: int) -> tuple[Floats, Ids]:
        """Search until each query has k rows: those of deleted rows, and of lists with few rows, are searched again."""
        searcher = self.sides[modality].searcher
        count, effort = min(count, len(self.rows)), min(effort, searcher.max_effort)
        at_once = max(1, _CANDIDATES_AT_ONCE // max(1, count))
        if len(queries) > at_once:
            parts = [queries[start : start + at_once] for start in range(0, len(queries), at_once)]
            answers = [self._search(part, k, modality, effort, count) for part in parts]
            return np.concatenate([one for one, _ in answers]), np.concatenate([one for _, one in answers])
        scores, positions = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1, np.int64)
        if not count:
            return scores, positions
        near, candidates = searcher.search(queries, count, effort)
        candidates[are_among(candidates, self._left_out)] = -1
        is_row = candidates >= 0
        if not kinds.is_exact(searcher.kind):
            near = self._exact(queries, candidates, is_row, modality)
        near[~is_row] = -np.inf
        width = min(k, count)
        query, best = np.arange(len(queries))[:, None], np.lexsort((candidates, -near))[:, :width]
        scores[:, :width], positions[:, :width] = near[query, best], candidates[query, best]
        is_short = is_row.sum(axis=1) < min(k, self.num_rows)
        if is_short.any() and (count < len(self.rows) or effort < searcher.max_effort):
            again = self._search(np.ascontiguousarray(queries[is_short]), k, modality, 2 * effort, 2 * count)
            scores[is_short], positions[is_short] = again
        return scores, positions

    def _exact(self, queries: Floats, candidates: Ids, is_row: Any, modality: Modality) -> Floats:
        """The exact similarities of the candidates (Q, C) that are rows."""
        near = np.empty(candidates.shape, np.float32)
        width = min(candidates.shape[1], _RERANKED_AT_ONCE)
        at_once = _RERANKED_AT_ONCE // width
        for start, first in itertools.product(range(0, len(queries), at_once), range(0, candidates.shape[1], width)):
            some = np.s_[start : start + at_once, first : first + width]
            vectors = self.rows.vectors(candidates[some][is_row[some]], f"z_{modality}")
            ends = np.cumsum(is_row[some].sum(axis=1))
            for number, own in enumerate(np.split(vectors, ends[:-1])):
                near[some][number, is_row[some][number]] = own @ queries[start + number]
        return near


def workspace_of(artifact: Artifact) -> str:
    """The root of the artifact's workspace."""
    return artifact.uri.rsplit("/", 2)[0]


def index_file(segment: str, modality: str, kind: str) -> str:
    """Name of the FAISS index of one modality; of an index with lists, it holds all but the rows."""
    return f"{segment}/{modality}.{kind}.faiss"


def lists_file(segment: str, modality: str, kind: str) -> str:
    """Name of the codes and positions of the rows, list after list."""
    return f"{segment}/{modality}.{kind}.lists"


def sizes_file(segment: str, modality: str, kind: str) -> str:
    """Name of the numbers of rows of each list."""
    return f"{segment}/{modality}.{kind}.sizes.npy"


def open_searcher(artifact: Artifact, segment: str, modality: Modality, kind: kinds.Kind) -> kinds.Searcher:
    """Open the index of one modality.

    Raises:
        DataError: If a file is missing or damaged.
    """
    path = artifact.path(index_file(segment, modality, kind))
    try:
        index = kinds.read(path)
        if kinds.is_listed(kind):
            sizes = np.load(artifact.path(sizes_file(segment, modality, kind)))
            lists = kinds.Lists(sizes, int(index.code_size))
            kinds.map_lists(index, lists, artifact.path(lists_file(segment, modality, kind)))
    except (RuntimeError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); {artifact.mend()}") from error
    return kinds.Searcher(kind, index)


def _open_side(artifact: Artifact, segment: str, modality: Modality, description: dict[str, Any]) -> _Side:
    efforts = tuple(Effort(**item) for item in description["efforts"])
    return _Side(open_searcher(artifact, segment, modality, description["kind"]), efforts)
