"""``POST /knn-service`` and ``POST /metadata`` as clip-retrieval has them."""

import asyncio
import base64
import binascii
import math
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.pictures import PictureError, read, square
from pipeline.serve.protocols import Found, Images, Library, Painter, Vectors
from pipeline.serve.web import ApiError

MAX_IMAGES = 1000
MAX_RESULT_IDS = 10_000
_MAX_QUERY_PX = 40_000_000
_KEPT_PX = 1024


class KnnRequest(BaseModel):
    """The body of a request; clip-retrieval's filters are accepted and do nothing where their models are not loaded."""

    model_config = ConfigDict(extra="ignore")

    modality: Literal["image", "text"]
    num_images: int = Field(ge=0, le=MAX_IMAGES)
    indice_name: str | None = None
    num_result_ids: int | None = Field(default=None, ge=0, le=MAX_RESULT_IDS)
    text: str | None = Field(default=None, max_length=4000)
    image: str | None = None
    image_url: str | None = None
    embedding_input: list[float] | None = None
    deduplicate: bool | None = False


class MetadataRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    ids: list[int] = Field(max_length=MAX_RESULT_IDS)
    indice_name: str | None = None


async def find(painter: Painter, library: Library, asked: KnnRequest) -> list[dict[str, Any]]:
    """Answer a search: the rows nearest to a text, a picture or an embedding, in this order of precedence.

    Raises:
        ApiError: 400, if there is nothing to search for, or it cannot be read.
    """
    vector = await _query(painter, library, asked)
    num_results = max(asked.num_images, asked.num_result_ids or 0)
    if num_results == 0:
        return []
    return await asyncio.to_thread(_search, library, vector, num_results, asked)


def metadata(library: Library, asked: MetadataRequest) -> list[dict[str, Any]]:
    """Answer a question for rows by number.

    Raises:
        ApiError: 400, if there is no such row.
    """
    try:
        rows = library.rows(asked.ids)
    except ValueError as error:
        raise ApiError(400, f"ids: {error}", param="ids", code="invalid_value") from None
    return [{"id": number, "metadata": row} for number, row in zip(asked.ids, rows, strict=True)]


def _search(library: Library, vector: Vectors, num_results: int, asked: KnnRequest) -> list[dict[str, Any]]:
    found = library.search(vector, num_results, asked.modality)
    if asked.deduplicate:
        found = _distinct(found)
    results: list[dict[str, Any]] = []
    for place, one in enumerate(found):
        result: dict[str, Any] = {}
        if place < asked.num_images:
            result |= one.columns
            picture = library.picture(one)
            if picture is not None:
                result["image"] = base64.b64encode(picture).decode()
        results.append(result | {"id": one.id, "similarity": one.similarity})
    return results


def _distinct(found: list[Found]) -> list[Found]:
    """The first of each URL."""
    by_url: dict[str, Found] = {}
    for one in found:
        by_url.setdefault(one.columns["url"], one)
    return list(by_url.values())


async def _query(painter: Painter, library: Library, asked: KnnRequest) -> Vectors:
    if asked.text:
        return await painter.embed_text(asked.text)
    if asked.image:
        return await painter.embed_image(await asyncio.to_thread(decode_query, asked.image))
    if asked.image_url:
        message = "image_url: this server fetches no URLs (a request could reach addresses inside its network); "
        raise ApiError(400, message + "send the picture itself as image, base64", param="image_url", code="unsupported")
    if asked.embedding_input is None:
        raise ApiError(400, "give one of text, image, embedding_input", code="missing_parameter")
    values = asked.embedding_input
    if len(values) != library.embed_dim or not all(math.isfinite(value) for value in values):
        message = f"embedding_input: {len(values)} numbers; this index takes {library.embed_dim}, all finite"
        raise ApiError(400, message, param="embedding_input", code="invalid_value")
    vector = np.asarray(values, np.float64)
    length = float(np.linalg.norm(vector))
    if length == 0:
        raise ApiError(400, "embedding_input: all zero", param="embedding_input", code="invalid_value")
    return (vector / length).astype(np.float32)


def decode_query(encoded: str) -> Images:
    """The centre square of a picture in base64, of side 1,024 px at most.

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
    return square(image, min(_KEPT_PX, *image.size))
