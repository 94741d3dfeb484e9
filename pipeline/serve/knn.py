"""``POST /knn-service`` and ``POST /metadata`` of clip-retrieval, and the index that answers them."""

import asyncio
import base64
import binascii
import io
import logging
import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from pipeline.errors import DataError
from pipeline.pictures import PictureError, decode, read, resize
from pipeline.retrieve.retriever import Conditions, Retriever
from pipeline.serve.protocols import Images, NeighbourRow, Neighbours, PictureModel, Vectors
from pipeline.serve.web import ApiError

_log = logging.getLogger(__name__)

MAX_IMAGES = 1000
MAX_RESULT_IDS = 10_000
MAX_NUMBERS = 65_536
"""Most numbers of an embedding."""
_DUPLICATE_COSINE = 0.94
"""Cosine of the pictures of near-duplicates, as in clip-retrieval."""
_MAX_CANDIDATES = 50_000
"""Most rows that are looked at for one request without near-duplicates."""
_MAX_ID = 2**53
_MAX_QUERY_PX = 40_000_000
_MAX_SHORTER_PX = 1024
_JPEG = b"\xff\xd8"


def _require_numbers(value: Any) -> Any:
    """Refuse a list at its first wrong item: pydantic would make a kilobyte of message for each of a million."""
    if isinstance(value, list) and not all(type(item) in {int, float} for item in cast("list[Any]", value)):
        raise ValueError("an item is not a number")
    return value


_Numbers = Annotated[list[float], BeforeValidator(_require_numbers)]
_Ids = Annotated[list[int], BeforeValidator(_require_numbers)]


class KnnRequest(BaseModel):
    """The body of a request; clip-retrieval's filter fields are ignored, as there without the filters' models."""

    model_config = ConfigDict(extra="ignore")

    modality: Literal["image", "text"]
    num_images: int = Field(ge=0, le=MAX_IMAGES)
    indice_name: str | None = None
    num_result_ids: int | None = Field(default=None, ge=0, le=MAX_RESULT_IDS)
    text: str | None = Field(default=None, max_length=4000)
    image: str | None = None
    image_url: str | None = None
    embedding_input: _Numbers | None = Field(default=None, max_length=MAX_NUMBERS)
    deduplicate: bool | None = False


class MetadataRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    ids: _Ids = Field(max_length=MAX_RESULT_IDS)
    indice_name: str | None = None


class LocalNeighbours:
    """``protocols.Neighbours`` from an index and the shards of its pictures."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    @property
    def embed_dim(self) -> int:
        """See ``Neighbours``."""
        return self._retriever.index.embed_dim

    def search(
        self, vector: Vectors, k: int, modality: Literal["image", "text"], *, distinct: bool = False
    ) -> list[NeighbourRow]:
        """See ``Neighbours``."""
        conditions = Conditions(distinct=_DUPLICATE_COSINE, max_candidates=_MAX_CANDIDATES) if distinct else None
        [results] = self._retriever.search(vector[None], k, modality, conditions)
        rows = self.rows([neighbour.id for neighbour in results.neighbours])
        return [
            NeighbourRow(neighbour.id, neighbour.similarity, row)
            for neighbour, row in zip(results.neighbours, rows, strict=True)
        ]

    def rows(self, ids: Sequence[int]) -> list[dict[str, Any]]:
        """See ``Neighbours``."""
        too_large = [number for number in ids if not 0 <= number < _MAX_ID]
        if too_large:
            raise ValueError(f"no row {too_large[0]}: an id has 53 bits")
        return self._retriever.index.rows(ids).to_pylist()

    def picture(self, row: NeighbourRow) -> bytes | None:
        """See ``Neighbours``."""
        [neighbour] = self._retriever.index.neighbours(np.array([row.similarity]), np.array([row.id]))
        try:
            data = self._retriever.picture(neighbour)
            image = None if data.startswith(_JPEG) else decode(data, where=f"row {row.id}")
        except DataError as error:
            _log.warning("no picture for row %d: %s", row.id, error)
            return None
        if image is None:
            return data
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=95)
        return stream.getvalue()


async def find(model: PictureModel, neighbours: Neighbours, body: KnnRequest) -> list[dict[str, Any]]:
    """Answer a search: the rows nearest to a text, else a picture, else an embedding.

    Raises:
        ApiError: 400, if there is nothing to search for, or it cannot be read.
    """
    vector = await _query(model, neighbours, body)
    num_results = max(body.num_images, body.num_result_ids or 0)
    if num_results == 0:
        return []
    return await asyncio.to_thread(_search, neighbours, vector, num_results, body)


def metadata(neighbours: Neighbours, body: MetadataRequest) -> list[dict[str, Any]]:
    """Answer a request for rows by number.

    Raises:
        ApiError: 400, if there is no such row.
    """
    try:
        rows = neighbours.rows(body.ids)
    except ValueError as error:
        raise ApiError(400, f"ids: {error}", param="ids", code="invalid_value") from None
    return [{"id": number, "metadata": row} for number, row in zip(body.ids, rows, strict=True)]


def _search(neighbours: Neighbours, vector: Vectors, num_results: int, body: KnnRequest) -> list[dict[str, Any]]:
    rows = neighbours.search(vector, num_results, body.modality, distinct=bool(body.deduplicate))
    results: list[dict[str, Any]] = []
    for place, row in enumerate(rows):
        result: dict[str, Any] = {}
        if place < body.num_images:
            result |= row.columns
            picture = neighbours.picture(row)
            if picture is not None:
                result["image"] = base64.b64encode(picture).decode()
        results.append(result | {"id": row.id, "similarity": row.similarity})
    return results


async def _query(model: PictureModel, neighbours: Neighbours, body: KnnRequest) -> Vectors:
    if body.text:
        return await model.embed_text(body.text)
    if body.image:
        return await model.embed_image(await asyncio.to_thread(decode_query, body.image))
    if body.image_url:
        message = "image_url: this server fetches no URLs (a request could reach addresses inside its network); "
        raise ApiError(400, message + "send the picture itself as image, base64", param="image_url", code="unsupported")
    if body.embedding_input is None:
        raise ApiError(400, "give one of text, image, embedding_input", code="missing_parameter")
    values = body.embedding_input
    if len(values) != neighbours.embed_dim or not all(math.isfinite(value) for value in values):
        message = f"embedding_input: {len(values)} numbers; this index takes {neighbours.embed_dim}, all finite"
        raise ApiError(400, message, param="embedding_input", code="invalid_value")
    vector = np.asarray(values, np.float64)
    length = float(np.linalg.norm(vector))
    if length == 0:
        raise ApiError(400, "embedding_input: all zero", param="embedding_input", code="invalid_value")
    return (vector / length).astype(np.float32)


def decode_query(encoded: str) -> Images:
    """A picture in base64, resized so that its shorter side is 1,024 px at most.

    Raises:
        ApiError: 400, if it is not base64, no picture, or too large to decode.
    """
    try:
        data = base64.b64decode(encoded, validate=True)
        image = read(data, where="image", max_area_px=_MAX_QUERY_PX).image
    except binascii.Error:
        raise ApiError(400, "image: not base64", param="image", code="invalid_value") from None
    except PictureError as error:
        raise ApiError(400, str(error), param="image", code="invalid_value") from None
    scale = min(
        1, _MAX_SHORTER_PX / min(image.size)
    )  # a whole picture, because CLIP's own framing decides what it sees
    return np.array(resize(image, (round(image.width * scale), round(image.height * scale))) if scale < 1 else image)
