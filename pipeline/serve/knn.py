"""``POST /knn-service`` and ``POST /metadata`` of clip-retrieval, and the index that answers them."""

import asyncio
import base64
import contextlib
import dataclasses
import io
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator

from pipeline.data.causes import CLASSES, FetchError
from pipeline.data.fetch import Fetcher
from pipeline.data.urls import AddressRules
from pipeline.errors import ConfigError, DataError
from pipeline.pictures import decode
from pipeline.recipe.sections import DownloadConfig
from pipeline.retrieve.copies import near_copy_similarity
from pipeline.retrieve.index import Neighbour
from pipeline.retrieve.retriever import Retriever
from pipeline.serve.deadlines import Timeout, while_wanted
from pipeline.serve.held import HeldBytes
from pipeline.serve.images import note_of_cut
from pipeline.serve.protocols import NeighbourRow, Neighbours, PictureModel, Vectors
from pipeline.serve.traces import span
from pipeline.serve.uploads import bounded_picture, decode_base64, embed_picture
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
_MAX_TEXT_CHARS = 4000
MAX_QUERIES = 32
"""Most searches of one request."""
MAX_WHOLE_ROWS = 2000
"""Most rows with pictures of all searches of one request: all are in memory at once."""
_FETCHES_S = 30.0
"""Longest time in which all pictures of one request are fetched, in seconds."""
_FETCHED = HeldBytes("pictures of URLs", 512 << 20)
"""Files that were fetched, and wait for the decoder."""
SAFETY = ("use_safety_model", "use_violence_detector")
"""Fields of clip-retrieval's client that ask for safe rows alone; which those are says the recipe (serve.safe_rows)."""
_FETCHING = DownloadConfig(
    max_body_bytes=16 << 20, timeout_s=5, deadline_s=10.0, retries=0, robots_txt=False, tdm_reservation=False
)
"""A person asks for one picture, to look at: the opt-outs of collections do not apply."""
_MEASURING = ThreadPoolExecutor(1, "unclip-near-copy")
"""Measures take seconds on a large index, and wait here for one another: other threads stay free for requests."""
Row = dict[str, Any]
_JPEG = b"\xff\xd8"


def _require_numbers(value: Any) -> Any:
    """Refuse a list at its first wrong item: pydantic would make a kilobyte of message for each of a million."""
    if isinstance(value, list) and not all(type(item) in {int, float} for item in cast("list[Any]", value)):
        raise ValueError("an item is not a number")
    return value


def _check_vectors(value: Any) -> Any:
    """An embedding, or a list of them; refused at its first wrong item, as by ``_require_numbers``."""
    items = cast("list[Any]", value) if isinstance(value, list) else []
    vectors = items if items and isinstance(items[0], list) else [value]
    if len(vectors) > MAX_QUERIES or not all(
        isinstance(vector, list) and len(vector) <= MAX_NUMBERS for vector in vectors
    ):
        raise ValueError(f"give at most {MAX_NUMBERS} numbers, or at most {MAX_QUERIES} lists of numbers")
    for vector in vectors:
        _require_numbers(vector)
    return value


def _check_texts(value: Any) -> Any:
    """A text, or a list of them."""
    items = cast("list[Any]", value) if isinstance(value, list) else [value]
    if not 0 < len(items) <= MAX_QUERIES or not all(isinstance(item, str) for item in items):
        raise ValueError(f"give a text, or a list of 1 to {MAX_QUERIES}")
    return value


def _check_short_texts(value: Any) -> Any:
    for item in [value] if isinstance(value, str) else _check_texts(value):
        if len(item) > _MAX_TEXT_CHARS:
            raise ValueError(f"a text has more than {_MAX_TEXT_CHARS} characters")
    return value


_Vectors = Annotated[list[float] | list[list[float]], PlainValidator(_check_vectors)]
_Ids = Annotated[list[int], BeforeValidator(_require_numbers)]
_Texts = Annotated[str | list[str], PlainValidator(_check_short_texts)]
_Pictures = Annotated[str | list[str], PlainValidator(_check_texts)]


class KnnRequest(BaseModel):
    """The body of a request; a list of texts, pictures or embeddings is as many searches, and a list of answers.

    Of clip-retrieval's fields, ``aesthetic_score`` and ``aesthetic_weight`` have no effect: they add to the query what
    an aesthetic picture has in one particular CLIP.
    """

    model_config = ConfigDict(extra="ignore")

    modality: Literal["image", "text"]
    num_images: int = Field(ge=0, le=MAX_IMAGES)
    indice_name: str | None = None
    num_result_ids: int | None = Field(default=None, ge=0, le=MAX_RESULT_IDS)
    text: _Texts | None = None
    image: _Pictures | None = None
    image_url: _Texts | None = None
    embedding_input: _Vectors | None = None
    deduplicate: bool | None = False
    use_mclip: bool | None = False
    use_safety_model: bool | None = False
    use_violence_detector: bool | None = False
    aesthetic_score: float | Literal[""] | None = None
    aesthetic_weight: float | Literal[""] | None = None
    near_copy: bool | None = False
    timeout: Timeout = None

    @property
    def is_safe(self) -> bool:
        """Whether safe rows alone are asked for."""
        return any(getattr(self, name) for name in SAFETY)

    def unused(self, *, has_filter: bool) -> list[str]:
        """Fields that were sent and had no effect. The client sends them by default, so they are not refused.

        Args:
            has_filter: Whether the recipe says which rows are safe.
        """
        safety = [name for name in SAFETY if getattr(self, name) and not has_filter]
        aesthetic = ["aesthetic_score", "aesthetic_weight"] if self.aesthetic_score not in {None, ""} else []
        return safety + [name for name in aesthetic if getattr(self, name) not in {None, ""}]

    @property
    def query(self) -> tuple[str, list[Any], bool]:
        """What is searched for: the field, its values, and whether they came as a list; no field if there is none."""
        for name in ("text", "image", "image_url", "embedding_input"):
            if value := getattr(self, name):
                is_list = isinstance(value[0] if name == "embedding_input" else value, list)
                return name, value if is_list else [value], is_list
        return "", [], False


class MetadataRequest(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    ids: _Ids = Field(max_length=MAX_RESULT_IDS)
    indice_name: str | None = None
    timeout: Timeout = None


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
            return [
                [
                    NeighbourRow(
                        neighbour.id,
                        neighbour.similarity,
                        next(rows),
                        self._picture(neighbour, check) if place < num_pictures else None,
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
        """The stored picture as a JPEG file; None if it cannot be read."""
        check()
        try:
            data = self._retriever.picture(neighbour)
            image = None if data.startswith(_JPEG) else decode(data, where=f"row {neighbour.id}")
        except DataError as error:
            _log.warning("no picture for row %d: %s", neighbour.id, error)
            return None
        if image is None:
            return data
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=95)
        return stream.getvalue()


async def find(
    model: PictureModel, neighbours: Neighbours, body: KnnRequest, *, fetches_urls: bool = False, safe_rows: str = ""
) -> tuple[Any, list[str]]:
    """Answer a search: the rows nearest to a text, else a picture, else one of a URL, else an embedding.

    Args:
        model: Embeds texts and pictures.
        neighbours: The index.
        body: What to look for.
        fetches_urls: Whether pictures of ``image_url`` are fetched.
        safe_rows: Filter of a search for safe rows alone; empty: there is none.

    Returns:
        A list of rows; of a list of texts, pictures or embeddings, a list of such lists. And notes on what had no
        effect.

    Raises:
        ApiError: 400, if there is nothing to search for, it cannot be read, or too much is requested.
    """
    name, values, is_list = body.query
    _refuse(body, name, len(values), fetches_urls=fetches_urls)
    vectors = await _embed(model, neighbours, name, values)
    unused = body.unused(has_filter=bool(safe_rows))
    notes = [f"no effect: {', '.join(unused)}"] if unused else []
    if name == "text" and (tokens := max(await model.cut_at(values))):
        notes.append(note_of_cut("text", tokens))
    num_results = max(body.num_images, body.num_result_ids or 0)
    if num_results == 0:
        return [[] for _ in vectors] if is_list else [], notes
    with span("neighbours", queries=len(vectors)):
        hits = await neighbours.search(
            vectors,
            num_results,
            body.modality,
            distinct=bool(body.deduplicate),
            where=safe_rows if body.is_safe else "",
            num_pictures=body.num_images,
        )
        limit = await neighbours.near_copy() if body.near_copy else None
    # Many pictures are large as text.
    answers = await asyncio.to_thread(lambda: [_results(rows, body, limit) for rows in hits])
    return answers if is_list else answers[0], notes


async def metadata(neighbours: Neighbours, body: MetadataRequest) -> list[dict[str, Any]]:
    """Answer a request for rows by number.

    Raises:
        ApiError: 400, if there is no such row.
    """
    try:
        rows = await neighbours.rows(body.ids)
    except ValueError as error:
        raise ApiError(400, f"ids: {error}", param="ids", code="invalid_value") from None
    return [{"id": number, "metadata": row} for number, row in zip(body.ids, rows, strict=True)]


def _refuse(body: KnnRequest, name: str, num_queries: int, *, fetches_urls: bool) -> None:
    """Refuse what this server cannot do, or what is too much, before anything is embedded.

    Args:
        body: The request.
        name: The field that it searches for; empty: none.
        num_queries: Values of that field.
        fetches_urls: Whether pictures of ``image_url`` are fetched.

    Raises:
        ApiError: 400.
    """
    if body.use_mclip:
        message = "use_mclip: this server has one CLIP, which made the index; search without it"
        raise ApiError(400, message, param="use_mclip", code="unsupported")
    if not name:
        raise ApiError(400, "give one of text, image, embedding_input", code="missing_parameter")
    if name == "image_url" and not fetches_urls:
        message = "image_url: this server fetches no URLs (serve.image_urls); send the picture as image, base64"
        raise ApiError(400, message, param="image_url", code="unsupported")
    if body.near_copy and (name == "text" or body.modality == "text"):
        message = "near_copy: is of a picture and pictures; search for a picture, with the modality image"
        raise ApiError(400, message, param="near_copy", code="invalid_value")
    for field, count, most in (
        ("num_images", body.num_images, MAX_WHOLE_ROWS),
        ("num_result_ids", body.num_result_ids or 0, MAX_RESULT_IDS),
    ):
        if num_queries * count > most:
            message = f"{field}: {count} for each of {num_queries} searches; all of a request have at most {most:,}"
            raise ApiError(400, message, param=field, code="invalid_value")


def _results(rows: Sequence[NeighbourRow], body: KnnRequest, limit: float | None) -> list[Row]:
    """The nearest rows with all that is known of them, the others by number alone."""
    results: list[Row] = []
    for place, row in enumerate(rows):
        result: Row = dict(row.columns) if place < body.num_images else {}
        if result and body.near_copy:
            result["near_copy"] = row.is_near_copy(limit)
        if row.picture is not None:
            result["image"] = base64.b64encode(row.picture).decode()
        results.append(result | {"id": row.id, "similarity": row.similarity})
    return results


async def _embed(model: PictureModel, neighbours: Neighbours, name: str, values: Sequence[Any]) -> Vectors:
    """The queries (Q, D), of length one; pictures one after another, because each is large.

    Args:
        model: Embeds texts and pictures.
        neighbours: The index.
        name: The field of the values.
        values: Q texts, pictures in base64, URLs of pictures, or embeddings.

    Raises:
        ApiError: 400, if one cannot be read or fetched.
    """
    if name == "text":
        return await model.embed_texts(values)
    if name == "image":
        rows = [await embed_picture(model, decode_base64, text, "image") for text in values]
    elif name == "image_url":
        left_s, rows = _FETCHES_S, list[Vectors]()
        for url in values:
            started_s = time.monotonic()
            data = await _fetch(url, left_s)
            left_s -= time.monotonic() - started_s
            with _FETCHED.hold(len(data)):
                rows.append(await embed_picture(model, bounded_picture, data, "image_url"))
    else:
        width = await neighbours.embed_dim()
        rows = [_unit(vector, width) for vector in values]
    return np.stack(rows)


async def _fetch(url: str, longest_s: float) -> bytes:
    """A file of the public internet: every hop is checked, its size and time are limited (pipeline/data/fetch.py).

    Args:
        url: Its address.
        longest_s: How long all of it may take, in seconds.

    Raises:
        ApiError: 400, if it does not come.
    """
    if longest_s <= 0:
        message = f"image_url: the pictures did not come within {_FETCHES_S:g} s; send fewer in one request"
        raise ApiError(400, message, param="image_url", code="invalid_value")
    config = dataclasses.replace(_FETCHING, deadline_s=min(_FETCHING.deadline_s, longest_s))
    try:
        async with Fetcher(config, AddressRules()) as fetcher:
            with await fetcher.fetch(url) as body:
                return body.read()
    except FetchError as error:
        message = f"image_url: {error.cause}: {CLASSES.get(error.cause.partition('-')[0], error.cause)}"
        raise ApiError(400, message, param="image_url", code="invalid_value") from None


def _unit(values: Sequence[float], width: int) -> Vectors:
    if len(values) != width or not all(math.isfinite(value) for value in values):
        message = f"embedding_input: {len(values)} numbers; this index takes {width}, all finite"
        raise ApiError(400, message, param="embedding_input", code="invalid_value")
    vector = np.asarray(values, np.float64)
    length = float(np.linalg.norm(vector))
    if length == 0:
        raise ApiError(400, "embedding_input: all zero", param="embedding_input", code="invalid_value")
    return (vector / length).astype(np.float32)
