"""The neighbour index and the stored pictures, as the API asks for them."""

import io
import logging
from collections.abc import Sequence
from typing import Any, Literal

from pipeline.data.shards import StoredPictures
from pipeline.errors import DataError
from pipeline.pictures import decode
from pipeline.retrieve import NeighbourIndex
from pipeline.serve.protocols import Found, Vectors
from pipeline.workspace.store import Artifact

_log = logging.getLogger(__name__)
_JPEG = b"\xff\xd8"


class LocalLibrary:
    """A ``contract.Library`` around an index and the shards that it was made from."""

    def __init__(self, index: NeighbourIndex, download: Artifact) -> None:
        self._index = index
        self._stored = StoredPictures(download)

    @property
    def embed_dim(self) -> int:
        """See ``contract.Library``."""
        return self._index.embed_dim

    def search(self, vector: Vectors, k: int, modality: Literal["image", "text"]) -> list[Found]:
        """See ``contract.Library``."""
        [neighbours] = self._index.search(vector[None], k, modality)
        rows = self._index.rows([neighbour.id for neighbour in neighbours])
        return [
            Found(neighbour.id, neighbour.similarity, dict(row))
            for neighbour, row in zip(neighbours, rows, strict=True)
        ]

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See ``contract.Library``."""
        return [dict(row) for row in self._index.rows(ids)]

    def picture(self, found: Found) -> bytes | None:
        """See ``contract.Library``."""
        try:
            data = self._stored.read(*(found.columns[name] for name in ("shard", "key", "uid")))
            image = None if data.startswith(_JPEG) else decode(data, where=f"row {found.id}")
        except DataError as error:
            _log.warning("no picture for row %d: %s", found.id, error)
            return None
        if image is None:
            return data
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=95)
        return stream.getvalue()
