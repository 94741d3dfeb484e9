"""Answers to ``POST /knn-service`` and ``POST /metadata`` of clip-retrieval."""

import asyncio
import base64
import dataclasses
import logging
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from pipeline.data.causes import CLASSES, FetchError
from pipeline.data.fetch import Fetcher
from pipeline.data.urls import AddressRules
from pipeline.errors import StepError
from pipeline.recipe.sections import DownloadConfig
from pipeline.serve.held import HeldBytes
from pipeline.serve.images import note_of_cut
from pipeline.serve.knn_bodies import MAX_RESULT_IDS, KnnRequest, MetadataRequest
from pipeline.serve.protocols import NeighbourRow, Neighbours, NotServing, PictureModel, Vectors
from pipeline.serve.traces import span
from pipeline.serve.uploads import bounded_picture, decode_base64, embed_picture
from pipeline.serve.web import ApiError

_log = logging.getLogger(__name__)

MAX_WHOLE_ROWS = 2000
"""Most rows with pictures of all searches of one request: all are in memory at once."""
_FETCHES_S = 30.0
"""Longest time in which all pictures of one request are fetched, in seconds."""
_FETCHED = HeldBytes("pictures of URLs", 512 << 20)
"""Files that were fetched, and wait for the decoder."""
_FETCHING = DownloadConfig(
    max_body_bytes=16 << 20, timeout_s=5, deadline_s=10.0, retries=0, robots_txt=False, tdm_reservation=False
)
"""A person asks for one picture, to look at: the opt-outs of collections do not apply."""
Row = dict[str, Any]


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
        NotServing: If networks or index do not answer.
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
    with span("neighbours", queries=len(vectors)), _answering():
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
        NotServing: If the index does not answer.
    """
    try:
        with _answering():
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
    if body.aesthetic_choice:
        field, sent = body.aesthetic_choice, getattr(body, body.aesthetic_choice)
        message = f"{field} = {sent:g}: this server adds no aesthetic score to a search; search without it"
        raise ApiError(400, message, param=field, code="unsupported")
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
        with _answering():
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
    wrong = f"embedding_input: {len(values)} numbers; this index takes {width}, all finite"
    refusal = ApiError(400, wrong, param="embedding_input", code="invalid_value")
    try:
        vector = np.asarray(values, np.float64)
    except OverflowError:  # JSON has integers of any size
        raise refusal from None
    if len(values) != width or not np.isfinite(vector).all():
        raise refusal
    largest = np.abs(vector).max()
    if largest == 0:
        raise ApiError(400, "embedding_input: all zero", param="embedding_input", code="invalid_value")
    vector /= largest  # the square of a large number is infinite
    return (vector / np.linalg.norm(vector)).astype(np.float32)


@contextmanager
def _answering() -> Generator[None]:
    """Say of a store that does not answer what is said of networks that do not: ``NotServing``."""
    try:
        yield
    except (StepError, OSError) as error:
        _log.warning("a search is refused: %s", error)
        raise NotServing("the index of the training pictures does not answer") from None
