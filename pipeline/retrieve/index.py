"""Opens and searches the neighbour index."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.rows import require_columns
from pipeline.errors import DataError
from pipeline.retrieve.build import MODALITIES, ROW_COLUMNS, Modality, set_effort
from pipeline.retrieve.exact import EmbeddedShards, ExactVectors, Floats, Ids
from pipeline.workspace.store import Artifact


@dataclass(frozen=True)
class Neighbour:
    """One result of a search."""

    id: int
    """Row number in the index."""
    uid: str
    similarity: float
    """Exact cosine similarity, never the approximation of a quantised index."""
    url: str
    caption: str
    key: str
    shard: str


class NeighbourIndex:
    """Searches the nearest rows by z_image or by z_text; several threads may search at once."""

    def __init__(
        self, indices: dict[Modality, Any], rows: pa.Table, exact: ExactVectors | None, candidates_per_result: int
    ) -> None:
        self._indices = indices
        self._rows = rows
        self._exact = exact
        self._candidates_per_result = candidates_per_result

    @classmethod
    def open(cls, index: Artifact, embed: Artifact | None = None) -> "NeighbourIndex":
        """Load an index.

        Args:
            index: The index step's artifact.
            embed: The embeddings from which it was built, for exact similarities of a quantised index; by default those
                that its manifest names, in the same workspace.

        Raises:
            DataError: If a file is missing or damaged, or the numbers of rows of index and embeddings differ.
        """
        description = index.read_json("index.json")
        rows = _read_rows(index)
        indices: dict[Modality, Any] = {}
        for modality in MODALITIES:
            path = index.path(f"{modality}.faiss")
            try:
                indices[modality] = faiss.read_index(str(path))
            except RuntimeError as error:
                raise DataError(f"{path}: damaged; remove {index.uri} and run the step again") from error
            if indices[modality].ntotal != rows.num_rows or indices[modality].d != description["embed_dim"]:
                raise DataError(f"{path}: {indices[modality].ntotal} vectors for {rows.num_rows} rows of rows.parquet")
            set_effort(indices[modality], description["kind"], description[modality]["effort"])
        exact = None
        if description["candidates_per_result"] > 1:
            shards = EmbeddedShards.open(embed or _embed_of(index))
            if shards.num_rows != rows.num_rows:
                raise DataError(f"{index.uri}: {rows.num_rows} rows, but {shards.embed.uri} has {shards.num_rows}")
            exact = ExactVectors(shards)
        return cls(indices, rows, exact, description["candidates_per_result"])

    @property
    def num_rows(self) -> int:
        """Number of rows of the index."""
        return self._rows.num_rows

    @property
    def embed_dim(self) -> int:
        """Width D of a query, in features."""
        return int(self._indices["image"].d)

    def search(self, vectors: Floats, k: int, modality: Modality = "image") -> list[list[Neighbour]]:
        """Find the nearest rows.

        Args:
            vectors: Queries (Q, D), of length one.
            k: Neighbours of each query; the result has fewer if the index has fewer rows.
            modality: Compare with pictures (z_image) or with captions (z_text).

        Raises:
            ValueError: If the queries are not (Q, D).
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.embed_dim:
            raise ValueError(f"queries of shape {vectors.shape}: this index takes (Q, {self.embed_dim})")
        queries = np.ascontiguousarray(vectors, np.float32)
        num_candidates = min(k * self._candidates_per_result, self.num_rows)
        similarities, ids = self._indices[modality].search(queries, num_candidates)
        results: list[list[Neighbour]] = []
        for query, near, candidates in zip(queries, similarities, ids, strict=True):
            valid = candidates >= 0
            results.append(self._best(query, near[valid], candidates[valid], k, modality))
        return results

    def rows(self, ids: Sequence[int]) -> list[dict[str, str]]:
        """Read rows by number.

        Raises:
            ValueError: If a row does not exist.
        """
        wrong = [row for row in ids if not 0 <= row < self.num_rows]
        if wrong:
            raise ValueError(f"no row {wrong[0]}: the index has {self.num_rows}")
        return self._rows.take(pa.array(ids, pa.int64())).to_pylist()

    def _best(self, query: Floats, near: Floats, candidates: Ids, k: int, modality: Modality) -> list[Neighbour]:
        if self._exact is not None:
            near = self._exact.gather(candidates, f"z_{modality}") @ query
        order = np.lexsort((candidates, -near))[:k]  # ties by row number, so that results do not change
        rows = self.rows([int(row) for row in candidates[order]])
        return [
            Neighbour(int(number), row["uid"], float(similarity), *(row[name] for name in _NEIGHBOUR_COLUMNS))
            for number, similarity, row in zip(candidates[order], near[order], rows, strict=True)
        ]


_NEIGHBOUR_COLUMNS = ("url", "caption", "key", "shard")


def _read_rows(index: Artifact) -> pa.Table:
    path = index.path("rows.parquet")
    try:
        rows = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: damaged ({error}); remove {index.uri} and run the step again") from error
    require_columns(rows.column_names, list(ROW_COLUMNS), where=str(path))
    return rows


def _embed_of(index: Artifact) -> Artifact:
    manifest = index.manifest()
    if manifest is None or "embed" not in manifest.inputs:
        raise DataError(f"{index.uri}: not finished; run the recipe again")
    return Artifact(f"{index.uri.rsplit('/', 2)[0]}/embed/{manifest.inputs['embed']}")
