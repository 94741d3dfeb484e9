"""Requests for pictures and their answers, as OpenAI's Images API, with additional fields.

``seed``, and by the names that other servers of diffusion models use: ``negative_prompt``, ``guidance_scale`` and
``num_inference_steps`` of the decoder, ``prior_guidance_scale`` of the prior. Fields of OpenAI's that mean nothing to a
model of one's own are accepted, and the answer's ``notes`` say so; docs/http.md lists every field. Bodies of requests
that start from pictures are in pipeline/serve/edits.py; their answers have the same form.
"""

import asyncio
import base64
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from models.request import WALK_STEPS, Edit, Interpolation, SampleRequest, TextDiff, is_walk
from pipeline.recipe.picture_card import ModelCard, made_with
from pipeline.serve.deadlines import Timeout, end_of, until
from pipeline.serve.picture_files import Format, encode_picture
from pipeline.serve.protocols import (
    DeadlinePassed,
    Event,
    Images,
    NeighbourRow,
    Neighbours,
    NotServing,
    Overloaded,
    PictureModel,
    Preview,
    SampledPictures,
)
from pipeline.serve.traces import current_traceparent, span
from pipeline.serve.web import ApiError, error_event, server_event

MAX_IMAGES = 10
MAX_PROMPT_CHARS = 4000
MIN_SIDE_PX = 8
MAX_GUIDANCE = 100.0
MAX_STEPS = 1000
MAX_NEIGHBOURS = 20
MAX_CANDIDATES = 16
NOTES_HEADER = "X-Unclip-Notes"
"""Of answers that are no objects, which have no place for notes."""
SEED_HEADER = "X-Unclip-Seed"
_MAX_SEED = 2**63 - 1 - MAX_IMAGES
_STEPS_OF_QUALITY = {"low": 0.5, "medium": 1, "standard": 1, "auto": 1, "high": 1.5, "hd": 1.5, "xhigh": 2, "max": 3}
"""Factors of the decoder's steps."""
_QUALITY_OF = {"auto": "medium", "standard": "medium", "hd": "high"}
"""The names of today for those that OpenAI's answers and events do not have any more."""
_USER_ERROR = "invalid_request_error"
_MEANINGLESS = ("style", "moderation", "complexity")
"""Accepted for clients that send them."""
_TEXTS = ("prompt", "negative_prompt", "source", "target")
"""Fields that CLIP reads, of any body."""


class PictureOptions(BaseModel):
    """The fields that every request for pictures has; None is the default, as in OpenAI's clients."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_IMAGES)
    size: str | None = None
    response_format: Literal["b64_json", "url", "file"] | None = None
    quality: Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None = None
    background: Literal["auto", "opaque"] | None = None
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100)
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    user: str | None = None
    safety_identifier: str | None = None
    complexity: Literal["low", "medium", "high"] | None = None
    seed: int | None = Field(default=None, ge=0, le=_MAX_SEED)
    guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    num_inference_steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    neighbours: int | None = Field(default=None, ge=0, le=MAX_NEIGHBOURS)
    timeout: Timeout = None

    default_n: ClassVar[int] = 1

    @property
    def num_images(self) -> int:
        """Pictures of the answer."""
        return self.n or self.default_n


class PromptOptions(PictureOptions):
    """The fields of a request with a prompt."""

    prompt: str = Field(max_length=MAX_PROMPT_CHARS)
    negative_prompt: str | None = Field(default=None, max_length=MAX_PROMPT_CHARS)
    prior_guidance_scale: float | None = Field(default=None, ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)
    num_candidates: int | None = Field(default=None, ge=1, le=MAX_CANDIDATES)

    @field_validator("prompt")
    @classmethod
    def _not_blank(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("is empty; say what the picture shows")
        return prompt


class GenerationRequest(PromptOptions):
    """The body of ``POST /v1/images/generations``."""

    style: Literal["vivid", "natural"] | None = None
    moderation: Literal["auto", "low"] | None = None


def require_model(name: str | None, card: ModelCard) -> None:
    """Refuse a model that is not there; None is the one that is.

    Raises:
        ApiError: 404.
    """
    if name not in {None, card.name, *card.aliases}:
        message = f"model {name!r} does not exist; this server has {card.name!r}"
        raise ApiError(404, message, param="model", code="model_not_found")


def check_options(body: PictureOptions, card: ModelCard) -> None:
    """Refuse what a checked body must not combine, before its pictures are decoded.

    Raises:
        ApiError: 404 for another model, 400 for an impossible size or combination of fields.
    """
    require_model(body.model, card)
    if body.partial_images and not body.stream:
        raise ApiError(400, "partial_images: needs stream = true", param="partial_images", code="invalid_value")
    if body.response_format == "file" and (body.stream or body.num_images > 1):
        message = "response_format: 'file' is one picture (n = 1), and not streamed"
        raise ApiError(400, message, param="response_format", code="invalid_value")
    if body.response_format == "file" and body.neighbours:
        message = "neighbours: response_format 'file' is the picture alone, which has no place for them"
        raise ApiError(400, message, param="neighbours", code="invalid_value")
    side_of(body.size, card.image_px)


class Generation:
    """One checked request on its way through a server.

    Args:
        model: The networks.
        body: The checked body.
        card: What the pictures are made with.
        client: Who asks; clients get equal shares.
        edit: The pictures that it starts from.
        notes: What the answer says of fields that had no effect.
        index: Of the training pictures, for ``neighbours``.
        encoding: Measures the time in which files are made.

    Raises:
        ApiError: As ``check_options``; 400 if neighbours are requested and there is no index.
    """

    def __init__(
        self,
        model: PictureModel,
        body: PictureOptions,
        card: ModelCard,
        client: str = "",
        *,
        edit: Edit | None = None,
        notes: Sequence[str] = (),
        index: Neighbours | None = None,
        encoding: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        check_options(body, card)
        if body.neighbours and index is None:
            message = "neighbours: this server has no index of the training pictures"
            raise ApiError(400, message, param="neighbours", code="index_not_found")
        self._index, self._encoding = index, encoding
        self._model, self._body, self._card, self._client, self._notes = model, body, card, client, list(notes)
        self.side_px = side_of(body.size, card.image_px)
        request = sample_request(body, self.side_px, card, edit)
        self.request = replace(request, traceparent=current_traceparent())
        self._ends_s = end_of(request.timeout_s)

    async def answer(self) -> dict[str, Any]:
        """The answer in one piece.

        Raises:
            ApiError: 400, if the networks cannot do what is requested.
            Overloaded: If too many requests wait, or its time would not suffice.
            DeadlinePassed: If its time is up.
            NotServing: If no networks are there.
        """
        sampled = await self._sample()
        work = asyncio.gather(self._files(sampled), self._neighbours(sampled), self._note_cuts())
        files, neighbours, _ = await work
        form = f"data:image/{self._format};base64," if self._body.response_format == "url" else ""
        name = "url" if self._body.response_format == "url" else "b64_json"
        data = [
            {name: form + _base64(file), **self._about(index), **near}
            for index, (file, near) in enumerate(zip(files, neighbours, strict=True))
        ]
        return {"created": int(time.time()), "data": data, **self._facts(), "usage": self._usage(sampled)}

    async def file(self) -> tuple[bytes, dict[str, str]]:
        """The only picture as a file, and headers that say what an answer in JSON would; raises as ``answer``."""
        sampled = await self._sample()
        [file], _ = await asyncio.gather(self._files(sampled), self._note_cuts())
        [seed], notes = self.request.seeds, self._facts().get("notes", [])
        headers = {"Content-Type": f"image/{self._format}", SEED_HEADER: str(seed)}
        return file, headers | ({NOTES_HEADER: "; ".join(notes)} if notes else {})

    async def events(self) -> AsyncGenerator[str]:
        """Server-sent events: previews while the pictures are sampled, then the pictures.

        The events begin when the request is accepted: until then it raises as ``answer``.
        """
        stream = self._model.stream(self.request, self._client, self._body.partial_images or 0)
        try:
            await anext(stream)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None
        return self._events(stream)

    async def _events(self, stream: AsyncGenerator[Event]) -> AsyncGenerator[str]:
        created = int(time.time())
        kind = "image_generation" if self.request.edit is None else "image_edit"
        try:
            await self._note_cuts()
            facts = {"created_at": created, **self._facts()}
            async for event in stream:
                if isinstance(event, Preview):
                    [file] = await self._encode([event.image], [None])
                    yield server_event(
                        f"{kind}.partial_image",
                        {"b64_json": _base64(file), "partial_image_index": event.number, "index": event.index, **facts},
                    )
                elif isinstance(event, SampledPictures):
                    usage = self._usage(event)
                    files, neighbours = await asyncio.gather(self._files(event), self._neighbours(event))
                    for index, (file, near) in enumerate(zip(files, neighbours, strict=True)):
                        yield server_event(
                            f"{kind}.completed",
                            {
                                "b64_json": _base64(file),
                                "index": index,
                                **self._about(index),
                                **near,
                                "usage": usage,
                                **facts,
                            },
                        )
        except ValueError as error:  # of an edit that its pictures and texts do not allow
            yield error_event(str(error), _USER_ERROR, "invalid_value")
        except (Overloaded, NotServing) as error:
            yield error_event(str(error), "overloaded_error", "not_ready")
        except DeadlinePassed as error:
            yield error_event(f"timeout: {error}", "timeout_error", "deadline_exceeded")
        except Exception as error:  # the status is sent already, so the error goes into the stream
            message = f"{type(error).__name__}: see the server's log"
            yield error_event(message, "server_error", "internal_error")
            raise
        finally:
            await stream.aclose()

    async def _sample(self) -> SampledPictures:
        try:
            return await self._model.sample(self.request, self._client)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    async def _note_cuts(self) -> None:
        """Note which texts are longer than CLIP reads."""
        texts = {name: text for name in _TEXTS if (text := getattr(self._body, name, None))}
        if not texts:
            return
        try:
            cuts = await until(self._ends_s, self._model.cut_at(list(texts.values())))
        except NotServing:  # they ended when they had sampled: pictures without a note are better than none
            return
        self._notes += [note_of_cut(name, tokens) for name, tokens in zip(texts, cuts, strict=True) if tokens]

    async def _files(self, sampled: SampledPictures) -> list[bytes]:
        return await self._encode(list(sampled.images), list(self.request.seeds))

    async def _encode(self, images: list[Images], seeds: list[int] | list[None]) -> list[bytes]:
        """Pictures as files; those with a seed say what made them."""
        quality = 100 if self._body.output_compression is None else self._body.output_compression

        def encode(image: Images, seed: int | None) -> bytes:
            chunks = None if seed is None else made_with(self._card, self.request, seed, self.side_px)
            signer = self._card.signer
            return encode_picture(image, self.side_px, self._format, quality=quality, made_with=chunks, signer=signer)

        pairs = list(zip(images, seeds, strict=True))
        with span("encode", pictures=len(pairs)), self._encoding():
            return await asyncio.to_thread(lambda: [encode(image, seed) for image, seed in pairs])

    async def _neighbours(self, sampled: SampledPictures) -> list[dict[str, Any]]:
        """What is said of the training pictures nearest to each picture; nothing unless it is requested."""
        count, index = self._body.neighbours, self._index
        if not count or index is None:
            return [{}] * len(sampled.images)

        async def search() -> tuple[list[list[NeighbourRow]], float | None]:
            vectors = await asyncio.gather(*(self._model.embed_image(image) for image in sampled.images))
            return await asyncio.gather(index.search(np.stack(vectors), count, "image"), index.near_copy())

        with span("neighbours", pictures=len(sampled.images)):
            neighbours, limit = await until(self._ends_s, search())
        return [{"neighbours": [_neighbour(row, limit) for row in rows]} for rows in neighbours]

    def _about(self, index: int) -> dict[str, Any]:
        """What is said of one picture: its seed, and its place among the frames of an edit."""
        about: dict[str, Any] = {"seed": self.request.seeds[index]}
        match self.request.edit:
            case Interpolation(_, shares):
                about["share"] = shares[index]
            case TextDiff(_, _, _, thetas):
                about["theta"] = thetas[index]
            case _:
                pass
        return about

    @property
    def _format(self) -> Format:
        return self._body.output_format or "png"

    def _facts(self) -> dict[str, Any]:
        """What OpenAI's answers and events say of the pictures, and which fields had no effect."""
        body = self._body
        notes = [f"{name}: has no effect here" for name in _MEANINGLESS if getattr(body, name, None) is not None]
        notes += self._notes
        if body.output_compression is not None and self._format == "png":
            notes.append("output_compression: has no effect on png, which loses nothing")
        if body.stream and body.response_format == "url":
            notes.append("response_format: events have b64_json alone, as OpenAI's")
        identifier = body.safety_identifier or body.user
        return {
            "background": "opaque",
            "output_format": self._format,
            "quality": _QUALITY_OF.get(body.quality or "auto", body.quality),
            "size": f"{self.side_px}x{self.side_px}",
            **({"safety_identifier": identifier} if identifier else {}),
            **({"notes": notes} if notes else {}),
        }

    def _usage(self, sampled: SampledPictures) -> dict[str, Any]:
        """Steps of the networks and pixels, beside OpenAI's tokens, of which there are none."""
        return {
            "input_tokens": 0,
            "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
            "output_tokens": 0,
            "total_tokens": 0,
            "steps": sampled.num_steps,
            "pixels": len(self.request.seeds) * self.side_px**2,
        }


def side_of(size: str | None, image_px: int) -> int:
    """The side that ``size`` requests, in pixels.

    Args:
        size: "WxH", "auto" or None.
        image_px: Side of the cascade's pictures, in pixels: the largest possible.

    Raises:
        ApiError: 400, if it is no size, not square, or larger than those of the cascade.
    """
    if size in {None, "auto"}:
        return image_px
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "")
    width, height = (int(match[1]), int(match[2])) if match else (0, 1)
    if width != height or not MIN_SIDE_PX <= width <= image_px:
        message = f"size: {size!r}: pictures are square, from {MIN_SIDE_PX}x{MIN_SIDE_PX} to {image_px}x{image_px}"
        raise ApiError(400, message, param="size", code="invalid_value")
    return width


def sample_request(
    body: PictureOptions,
    side_px: int = 0,
    card: ModelCard | None = None,
    edit: Edit | None = None,
) -> SampleRequest:
    """The request to the cascade; without a seed in the body, the first seed is random.

    Args:
        body: The checked body.
        side_px: Side of the pictures; the cascade ends at the first stage that reaches it.
        card: How each stage is sampled by default, for ``quality``, which multiplies the decoder's steps as far as it
            has that many.
        edit: The pictures that it starts from; the frames of a way from one picture to another share one seed.
    """
    first = secrets.randbelow(2**31) if body.seed is None else body.seed
    is_way = isinstance(edit, Interpolation | TextDiff)
    seeds = (first,) * body.num_images if is_way else tuple(range(first, first + body.num_images))
    prompt = body if isinstance(body, PromptOptions) else None
    scales = {"decoder": body.guidance_scale, "prior": prompt.prior_guidance_scale if prompt else None}
    num_steps, factor = body.num_inference_steps, _STEPS_OF_QUALITY[body.quality or "auto"]
    decoder = card.sampling.get("decoder", {}) if card else {}
    usual = WALK_STEPS if is_walk(edit) else decoder.get("num_steps")
    if num_steps is None and factor != 1 and usual and card:
        num_steps = min(card.num_timesteps, max(1, round(factor * usual)))
    return SampleRequest(
        prompt.prompt if prompt else "",
        seeds,
        guidance_scale={stage: scale for stage, scale in scales.items() if scale is not None},
        num_steps={} if num_steps is None else {"decoder": num_steps},
        negative_prompt=(prompt.negative_prompt if prompt else "") or "",
        side_px=side_px,
        num_candidates=(prompt.num_candidates if prompt else 0) or 0,
        edit=edit,
        timeout_s=body.timeout or 0.0,
    )


def note_of_cut(name: str, tokens: int) -> str:
    """What an answer says of a text that is longer than CLIP reads."""
    return f"{name}: CLIP reads {tokens} tokens, start and end included; what follows is cut off"


def _neighbour(row: NeighbourRow, limit: float | None) -> dict[str, Any]:
    """A row for an answer."""
    columns = {name: row.columns[name] for name in ("uid", "url", "caption", "split")}
    return {"id": row.id, **columns, "similarity": row.similarity, "near_copy": row.is_near_copy(limit)}


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()
