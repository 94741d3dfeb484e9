"""The HTTP interface, as a FastAPI application around plain objects.

GET /                        the page
POST /v1/images/generations  pictures, as OpenAI's Images API
POST /v1/images/...          pictures from pictures: edits, variations, and the rows of pipeline/serve/edits.py
POST /v1/embeddings          embeddings of texts and pictures
GET /v1/models               the one model
POST /knn-service            neighbours, as clip-retrieval; 404 on a server without an index
POST /metadata, GET /indices-list
GET /docs                    the routes and their fields, for people
GET /healthz, GET /metrics
"""

import base64
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from models.request import PcaReconstruction
from pipeline.recipe.picture_card import ModelCard
from pipeline.serve.api_page import api_page
from pipeline.serve.deadlines import end_of, left_of, until
from pipeline.serve.document import ERRORS, IN_TIME, PICTURES, form_body, json_body
from pipeline.serve.edits import EDITS, EditKind, edit_of, with_embeddings
from pipeline.serve.embeddings import EmbeddingRequest, embed
from pipeline.serve.generation import NOTES_HEADER, Generation
from pipeline.serve.guards import client_of, note_pixels
from pipeline.serve.held import HeldBodies, HeldPictures, end_body
from pipeline.serve.images import GenerationRequest, PictureOptions, check_options, require_model, side_of
from pipeline.serve.knn import find, metadata
from pipeline.serve.knn_bodies import MAX_NUMBERS, KnnRequest, MetadataRequest
from pipeline.serve.metrics import CONTENT_TYPE, HttpMetrics
from pipeline.serve.protocols import Neighbours, PictureModel
from pipeline.serve.uploads import decoding, read_form
from pipeline.serve.web import (
    ApiError,
    install_error_handlers,
    parse,
    read_json,
    while_connected,
)

TEXT_BODY_LIMIT_BYTES = 1 << 20
PICTURE_BODY_LIMIT_BYTES = 24 << 20
_MAX_KNN_VALUES = 2 * MAX_NUMBERS  # an embedding, the commas of a text, and the fields
_MAX_COMMAS = 1 << 20  # of texts to embed, which may hold commas themselves

_NO_PICTURES = nullcontext()

T = TypeVar("T")
Body = TypeVar("Body", bound=PictureOptions | EmbeddingRequest | KnnRequest | MetadataRequest)


@dataclass(frozen=True)
class ApiSettings:
    """Settings of the interface, from a recipe."""

    card: ModelCard
    """What the pictures are made with; its name is that of the model and of the index."""
    created: int = 0
    """When the model was finished, in seconds since the epoch."""
    fetches_urls: bool = False
    """Whether a search may name a picture by its URL."""
    safe_rows: str = ""
    """Filter by columns of a search for safe rows alone; empty: there is none."""
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    """What the HTTP process measures."""
    http_metrics: Callable[[], Awaitable[dict[str, str]]] | None = None
    """What all HTTP processes measure, by name, if there are several."""
    longest_s: float = 0.0
    """Longest time until an answer, in seconds; 0: any."""

    def timed(self, body: Body) -> Body:
        """A checked body whose ``timeout`` is the shorter one of its own and the server's longest time."""
        times_s = [time_s for time_s in (body.timeout, self.longest_s) if time_s]
        return body.model_copy(update={"timeout": min(times_s)}) if times_s else body


def create_app(model: PictureModel, neighbours: Neighbours | None, settings: ApiSettings) -> FastAPI:
    """Build the application.

    Args:
        model: The networks.
        neighbours: Search over the training pictures; None: there is no index, and its routes say so.
        settings: Names and sizes.
    """
    app = FastAPI(title="unclip", version="1", docs_url=None, redoc_url=None, responses=ERRORS)
    install_error_handlers(app)
    app.add_middleware(HeldBodies)
    app.include_router(_openai(model, neighbours, settings))
    app.include_router(_clip_retrieval(model, neighbours, settings))
    app.include_router(_pages(model, settings, has_neighbours=neighbours is not None))
    return app


def _pages(model: PictureModel, settings: ApiSettings, *, has_neighbours: bool) -> APIRouter:
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse)
    async def show(request: Request) -> HTMLResponse:
        page, policy = _page(settings, list(request.app.openapi()["paths"]), has_neighbours=has_neighbours)
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    @router.get("/docs", response_class=HTMLResponse)
    async def docs(request: Request) -> HTMLResponse:
        page, policy = api_page(request.app.openapi(), settings.card.name)
        return HTMLResponse(page, headers={"Content-Security-Policy": policy})

    @router.get("/healthz")
    async def healthz() -> JSONResponse:
        stats = await model.stats()
        if not stats:
            raise ApiError(503, "the engine is not running", code="not_ready")
        return JSONResponse({"status": "ok", "model": settings.card.name, **stats})

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> PlainTextResponse:
        replicas = await model.metrics()
        if settings.http_metrics is None:
            text = settings.metrics.text(replicas)
        else:
            text = settings.metrics.text(replicas | await settings.http_metrics(), with_own=False)
        return PlainTextResponse(text, media_type=CONTENT_TYPE)

    return router


def _openai(model: PictureModel, neighbours: Neighbours | None, settings: ApiSettings) -> APIRouter:
    router = APIRouter(prefix="/v1")
    names, encoding = [settings.card.name, *settings.card.aliases], settings.metrics.encoding.time
    held = HeldPictures()

    def entry(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": settings.created, "owned_by": "unclip"}

    @router.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry(name) for name in names]}

    @router.get("/models/{name}")
    async def one_model(name: str) -> dict[str, Any]:
        require_model(name, settings.card)
        return entry(name)

    @router.post("/images/generations", responses=PICTURES, openapi_extra=json_body(GenerationRequest))
    async def generations(request: Request) -> Response:
        body = settings.timed(parse(GenerationRequest, await read_json(request, TEXT_BODY_LIMIT_BYTES)))
        return await _answer(
            request,
            body,
            Generation(model, body, settings.card, client_of(request), index=neighbours, encoding=encoding),
        )

    def route(name: str, kind: EditKind) -> None:
        form_of_kind = form_body(kind.body, kind.num_pictures, takes_mask=kind.takes_mask)

        @router.post(f"/images/{name}", name=name, responses=PICTURES, openapi_extra=form_of_kind)
        async def edits(request: Request) -> Response:
            form = await read_form(request, PICTURE_BODY_LIMIT_BYTES)
            body = settings.timed(parse(kind.body, form.texts, is_form=True))
            check_options(body, settings.card)
            if kind.reads_embeddings:
                _require_index(neighbours)
            ends_s = end_of(body.timeout or 0.0)
            decoded = decoding(edit_of, kind, body, form, settings.card.image_px)
            edit, notes = await while_connected(request, until(ends_s, decoded))
            hold, client = held.hold_edit(edit), client_of(request)
            del form  # its files are not needed any more, and pictures take long
            end_body(request)
            if isinstance(edit, PcaReconstruction):
                note_pixels(body.num_images * side_of(body.size, settings.card.image_px) ** 2)
                edit = await while_connected(request, until(ends_s, with_embeddings(edit, model)))
            body = body.model_copy(update={"timeout": left_of(ends_s) or None})
            generation = Generation(
                model, body, settings.card, client, edit=edit, notes=notes, index=neighbours, encoding=encoding
            )
            return await _answer(request, body, generation, hold)

    for name, kind in EDITS.items():
        route(name, kind)

    @router.post("/embeddings", responses=IN_TIME, openapi_extra=json_body(EmbeddingRequest))
    async def embeddings(request: Request) -> JSONResponse:
        body = parse(EmbeddingRequest, await read_json(request, PICTURE_BODY_LIMIT_BYTES, _MAX_COMMAS))
        return JSONResponse(await _in_time(request, settings.timed(body), embed(model, body, settings.card)))

    return router


async def _in_time(request: Request, body: EmbeddingRequest | KnnRequest | MetadataRequest, work: Awaitable[T]) -> T:
    """Wait for ``work`` while the client is there, and no longer than the body says."""
    return await while_connected(request, until(end_of(body.timeout or 0.0), work))


async def _answer(
    request: Request, body: PictureOptions, generation: Generation, hold: AbstractContextManager[None] = _NO_PICTURES
) -> Response:
    """The answer in the form that the body asks for; ``hold`` ends with it."""
    if body.stream:
        return StreamingResponse(_holding(hold, await generation.events()), media_type="text/event-stream")
    with hold:
        if body.response_format == "file":
            file, headers = await while_connected(request, generation.file())
            return Response(file, headers=headers)
        return JSONResponse(await while_connected(request, generation.answer()))


async def _holding(hold: AbstractContextManager[None], events: AsyncGenerator[str]) -> AsyncGenerator[str]:
    with hold:
        async with aclosing(events):
            async for event in events:
                yield event


def _require_index(neighbours: Neighbours | None) -> Neighbours:
    """The index; it comes with the training embeddings.

    Raises:
        ApiError: 404, if there is none.
    """
    if neighbours is None:
        message = "this server has no index: it serves a folder of networks, or `index` was not finished at its start"
        raise ApiError(404, message, code="index_not_found")
    return neighbours


def _clip_retrieval(model: PictureModel, neighbours: Neighbours | None, settings: ApiSettings) -> APIRouter:
    router = APIRouter()

    def require_index(name: str | None) -> Neighbours:
        index = _require_index(neighbours)
        if name and name != settings.card.name:
            message = f"no index {name!r}; this server has {settings.card.name!r}"
            raise ApiError(404, message, param="indice_name", code="index_not_found")
        return index

    @router.get("/indices-list")
    async def indices() -> list[str]:
        return [] if neighbours is None else [settings.card.name]

    @router.post("/knn-service", responses=IN_TIME, openapi_extra=json_body(KnnRequest))
    async def knn(request: Request) -> JSONResponse:
        body = parse(KnnRequest, await read_json(request, PICTURE_BODY_LIMIT_BYTES, _MAX_KNN_VALUES))
        index = require_index(body.indice_name)
        work = find(model, index, body, fetches_urls=settings.fetches_urls, safe_rows=settings.safe_rows)
        answer, notes = await _in_time(request, settings.timed(body), work)
        return JSONResponse(answer, headers={NOTES_HEADER: "; ".join(notes)} if notes else None)

    @router.post("/metadata", responses=IN_TIME, openapi_extra=json_body(MetadataRequest))
    async def rows(request: Request) -> JSONResponse:
        body = parse(MetadataRequest, await read_json(request, TEXT_BODY_LIMIT_BYTES))
        index = require_index(body.indice_name)
        return JSONResponse(await _in_time(request, settings.timed(body), metadata(index, body)))

    return router


def _page(settings: ApiSettings, routes: Sequence[str], *, has_neighbours: bool) -> tuple[str, str]:
    """The page, and a policy that lets it run only its own script, show its own pictures and call this server.

    Args:
        settings: Names, sizes and how stages are sampled by default.
        routes: Paths of this server: the page shows no button for a route that is not there.
        has_neighbours: Whether the data can be searched.
    """
    page = files("pipeline.serve").joinpath("page.html").read_text(encoding="utf-8")
    facts = {
        "model": settings.card.name,
        "image_px": settings.card.image_px,
        "sampling": settings.card.sampling,
        "routes": routes,
        "neighbours": has_neighbours,
    }
    digests: dict[str, str] = {}
    for tag in ("script", "style"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        text = inside[1] if inside else ""
        digests[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    encoded = json.dumps(facts, default=dict).replace("<", "\\u003c")  # no text of a recipe ends the element
    return page.replace("{{FACTS}}", encoded), (
        f"default-src 'none'; script-src 'sha256-{digests['script']}'; style-src 'sha256-{digests['style']}'; "
        "img-src data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
