"""The index of the training pictures, in the process that answers."""

import asyncio
import contextlib
import dataclasses
import io
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from pipeline.errors import ConfigError, DataError, StepError
from pipeline.pictures.read import decode
from pipeline.retrieve.copies import near_copy_similarity
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.retriever import Retriever
from pipeline.serve.deadlines import while_wanted
from pipeline.serve.protocols import NeighbourRow, Vectors

_log = logging.getLogger(__name__)

_DUPLICATE_COSINE = 0.94
"""Cosine of the pictures of near-duplicates, as in clip-retrieval."""
_MAX_CANDIDATES = 50_000
"""Most rows that are looked at for one request without near-duplicates."""
_MAX_ID = 2**53
_MEASURING = ThreadPoolExecutor(1, "unclip-near-copy")
"""Measures take seconds on a large index, and wait here for one another: other threads stay free for requests."""
_PICTURES = ThreadPoolExecutor(8, "unclip-pictures")
"""Pictures of an object store take some requests each: of 40 one after another, seconds."""
_JPEG = b"\xff\xd8"


class LocalNeighbours:
    """``protocols.Neighbours`` from an index and the shards of its pictures.

    Args:
        retriever: The index.
        timed: Opens a context that measures one search.
    """

    def __init__(
        self, retriever: Retriever, timed: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    ) -> None:
        self._retriever = retriever
        self._timed = timed
        self._near_copy: Future[float | None] | None = None
        """What was measured, or is being; None before anybody has asked."""

    def require_filter(self, where: str) -> None:
        """Refuse a filter that its columns do not allow.

        Args:
            where: ``serve.safe_rows``.

        Raises:
            ConfigError: If it is no filter, or names a column that there is not.
        """
        try:
            self._retriever.conditions(where)
        except ConfigError as error:
            raise ConfigError(f"serve.safe_rows: {str(error).removeprefix('--where: ')}") from None

    async def embed_dim(self) -> int:
        """See ``Neighbours``."""
        return self._retriever.index.embed_dim

    async def near_copy(self) -> float | None:
        """See ``Neighbours``; measured when it is first asked for, once for all who ask meanwhile."""
        measuring = self._near_copy
        if measuring is None or (measuring.done() and measuring.exception()):
            measuring = self._near_copy = _MEASURING.submit(near_copy_similarity, self._retriever.index)
        return await asyncio.shield(asyncio.wrap_future(measuring))  # others wait for it, if this request is cancelled

    async def search(
        self,
        vectors: Vectors,
        k: int,
        modality: Literal["image", "text"],
        *,
        distinct: bool = False,
        where: str = "",
        num_pictures: int = 0,
    ) -> list[list[NeighbourRow]]:
        """See ``Neighbours``."""

        def search(check: Callable[[], None]) -> list[list[NeighbourRow]]:
            conditions = self._retriever.conditions(where, _DUPLICATE_COSINE if distinct else None)
            conditions = dataclasses.replace(conditions, max_candidates=_MAX_CANDIDATES)
            with self._timed():
                results = self._retriever.search(vectors, k, modality, conditions, check=check)
                rows = iter(self._rows([neighbour.id for result in results for neighbour in result.neighbours]))
            shown = [neighbour for result in results for neighbour in result.neighbours[:num_pictures]]
            pictures = iter(list(_PICTURES.map(lambda neighbour: self._picture(neighbour, check), shown)))
            return [
                [
                    NeighbourRow(
                        neighbour.id,
                        neighbour.similarity,
                        next(rows),
                        next(pictures) if place < num_pictures else None,
                    )
                    for place, neighbour in enumerate(result.neighbours)
                ]
                for result in results
            ]

        return await while_wanted(search)

    async def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See ``Neighbours``."""
        return await asyncio.to_thread(self._rows, ids)

    def _rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        too_large = [number for number in ids if not 0 <= number < _MAX_ID]
        if too_large:
            raise ValueError(f"no row {too_large[0]}: an id has 53 bits")
        return self._retriever.index.rows(ids).to_pylist()

    def _picture(self, neighbour: Neighbour, check: Callable[[], None]) -> bytes | None:
        """The stored picture as a JPEG file; None if it cannot be read, or its store does not answer now."""
        check()
        try:
            data = self._retriever.picture(neighbour)
            image = None if data.startswith(_JPEG) else decode(data, where=f"row {neighbour.id}")
        except (DataError, StepError) as error:
            _log.warning("no picture for row %d: %s", neighbour.id, error)
            return None
        if image is None:
            return data
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=95)
        return stream.getvalue()
