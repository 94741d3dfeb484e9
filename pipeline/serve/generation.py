"""A request for pictures on its way through a server, and its answer: JSON, events or a file, as OpenAI's Images API.

Fields of OpenAI's that mean nothing to a model of one's own are accepted, and the answer's ``notes`` say so.
"""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from models.request import Edit, Interpolation, PcaReconstruction, TextDiff, is_untouched
from pipeline.errors import DataError, StepError
from pipeline.recipe.picture_card import ModelCard, made_with
from pipeline.serve.deadlines import beside, end_of, until
from pipeline.serve.guards import opens
from pipeline.serve.images import PictureOptions, check_options, note_of_cut, sample_request, side_of
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

_log = logging.getLogger(__name__)

NOTES_HEADER = "X-Unclip-Notes"
"""Of answers that are no objects, which have no place for notes."""
SEED_HEADER = "X-Unclip-Seed"
_QUALITY_OF = {"auto": "medium", "standard": "medium", "hd": "high"}
"""The names of today for those that OpenAI's answers and events do not have any more."""
_USER_ERROR = "invalid_request_error"
_MEANINGLESS = ("style", "moderation", "complexity")
"""Accepted for clients that send them."""
_TEXTS = ("prompt", "negative_prompt", "source", "target")
"""Fields that CLIP reads, of any body."""
_LONGEST_NOTE_S = 0.5
"""How long finished pictures wait for the notes on these, which are looked for while they are sampled."""


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
        self._encoding, self._notes = encoding, list(notes)
        self._model, self._body, self._card, self._client = model, body, card, client
        self._index = index if opens("search") else None
        if body.neighbours and self._index is None:
            self._notes.append("neighbours: left out, because this key lacks the scope 'search'")
        self._cut_notes, self._created = list[str](), int(time.time())
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
        with beside(self._find_cuts()) as cuts:
            sampled = await self._sample()
            files, neighbours = await asyncio.gather(self._files(sampled), self._neighbours(sampled))
            await self._note_cuts(cuts)
        form = f"data:image/{self._format};base64," if self._body.response_format == "url" else ""
        name = "url" if self._body.response_format == "url" else "b64_json"
        data = [
            {name: form + _base64(file), **self._about(index), **near}
            for index, (file, near) in enumerate(zip(files, neighbours, strict=True))
        ]
        return {"created": int(time.time()), "data": data, **self._facts(), "usage": self._usage(sampled)}

    async def file(self) -> tuple[bytes, dict[str, str]]:
        """The only picture as a file, and headers that say what an answer in JSON would; raises as ``answer``."""
        with beside(self._find_cuts()) as cuts:
            [file] = await self._files(await self._sample())
            await self._note_cuts(cuts)
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
        kind = "image_generation" if self.request.edit is None else "image_edit"
        try:
            with beside(self._find_cuts()) as cuts:
                async for event in stream:
                    if isinstance(event, Preview):
                        yield server_event(f"{kind}.partial_image", await self._partial(event, cuts))
                    elif isinstance(event, SampledPictures):
                        for picture in await self._completed(event, cuts):
                            yield server_event(f"{kind}.completed", picture)
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

    async def _partial(self, preview: Preview, cuts: asyncio.Task[list[str]]) -> dict[str, Any]:
        """What the event of a preview says."""
        [file] = await self._encode([preview.image], [None])
        await self._note_cuts(cuts)
        place = {"partial_image_index": preview.number, "index": preview.index}
        return {"b64_json": _base64(file), **place, **self._event_facts()}

    async def _completed(self, sampled: SampledPictures, cuts: asyncio.Task[list[str]]) -> list[dict[str, Any]]:
        """What the event of each finished picture says."""
        files, neighbours = await asyncio.gather(self._files(sampled), self._neighbours(sampled))
        await self._note_cuts(cuts)
        facts = {"usage": self._usage(sampled), **self._event_facts()}
        return [
            {"b64_json": _base64(file), "index": index, **self._about(index), **near, **facts}
            for index, (file, near) in enumerate(zip(files, neighbours, strict=True))
        ]

    async def _sample(self) -> SampledPictures:
        try:
            return await self._model.sample(self.request, self._client)
        except ValueError as error:
            raise ApiError(400, str(error), code="invalid_value") from None

    async def _find_cuts(self) -> list[str]:
        """Notes on the texts that are longer than CLIP reads."""
        texts = {name: text for name in _TEXTS if (text := getattr(self._body, name, None))}
        try:
            cuts = await self._model.cut_at(list(texts.values())) if texts else []
        except NotServing:
            return []
        except Exception:  # noqa: BLE001  (whatever it is: pictures without notes are better than none)
            _log.exception("pictures are sent without notes on texts that CLIP cuts off")
            return []
        return [note_of_cut(name, tokens) for name, tokens in zip(texts, cuts, strict=True) if tokens]

    async def _note_cuts(self, cuts: asyncio.Task[list[str]]) -> None:
        """Keep the notes of ``_find_cuts`` for the answer. Pictures without them are better than pictures that wait."""
        await asyncio.wait({cuts}, timeout=_LONGEST_NOTE_S)
        cuts.cancel()  # if they have not come by now, no later event waits for them
        self._cut_notes = cuts.result() if cuts.done() and not cuts.cancelled() else []

    async def _files(self, sampled: SampledPictures) -> list[bytes]:
        return await self._encode(list(sampled.images), list(self.request.seeds))

    async def _encode(self, images: list[Images], seeds: list[int] | list[None]) -> list[bytes]:
        """Pictures as files; those with a seed say what made them, unless no network did."""
        quality = 100 if self._body.output_compression is None else self._body.output_compression

        def encode(index: int, image: Images, seed: int | None) -> bytes:
            if seed is None or is_untouched(self.request.edit):
                texts = None
            else:
                texts = made_with(self._card, self.request, seed, self.side_px, self._frame(index))
            signer = self._card.signer
            return encode_picture(image, self.side_px, self._format, quality=quality, made_with=texts, signer=signer)

        pairs = list(zip(images, seeds, strict=True))
        with span("encode", pictures=len(pairs)), self._encoding():
            return await asyncio.to_thread(lambda: [encode(index, *pair) for index, pair in enumerate(pairs)])

    async def _neighbours(self, sampled: SampledPictures) -> list[dict[str, Any]]:
        """What is said of the training pictures nearest to each picture; nothing unless it is requested."""
        count, index = self._body.neighbours, self._index
        if not count or index is None:
            return [{}] * len(sampled.images)

        async def search() -> tuple[list[list[NeighbourRow]], float | None]:
            vectors = await asyncio.gather(*(self._model.embed_image(image) for image in sampled.images))
            return await asyncio.gather(index.search(np.stack(vectors), count, "image"), index.near_copy())

        try:
            with span("neighbours", pictures=len(sampled.images)):
                neighbours, limit = await until(self._ends_s, search())
        except (NotServing, DataError, StepError, OSError) as error:  # pictures without them are better than none
            _log.warning("pictures are sent without their neighbours: %s", error)
            self._notes.append("neighbours: the index of the training pictures does not answer")
            return [{}] * len(sampled.images)
        return [{"neighbours": [_neighbour(row, limit) for row in rows]} for rows in neighbours]

    def _about(self, index: int) -> dict[str, Any]:
        """What is said of one picture: its seed, and its place among the frames of an edit."""
        return {"seed": self.request.seeds[index], **self._frame(index)}

    def _frame(self, index: int) -> dict[str, Any]:
        """The place of one picture among the frames of an edit."""
        match self.request.edit:
            case Interpolation(_, shares):
                return {"share": shares[index]}
            case TextDiff(_, _, _, thetas):
                return {"theta": thetas[index]}
            case PcaReconstruction(_, components):
                return {"components": components[index]}
            case _:
                return {}

    @property
    def _format(self) -> Format:
        return self._body.output_format or "png"

    def _facts(self) -> dict[str, Any]:
        """What OpenAI's answers and events say of the pictures, and which fields had no effect."""
        body = self._body
        notes = [f"{name}: has no effect here" for name in _MEANINGLESS if getattr(body, name, None) is not None]
        notes += [*self._notes, *self._cut_notes]
        if is_untouched(self.request.edit):
            notes.append("strength: with 0 the picture comes back as it is, and no file says that the model made it")
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

    def _event_facts(self) -> dict[str, Any]:
        return {"created_at": self._created, **self._facts()}

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


def _neighbour(row: NeighbourRow, limit: float | None) -> dict[str, Any]:
    """A row for an answer."""
    columns = {name: row.columns[name] for name in ("uid", "url", "caption", "split")}
    return {"id": row.id, **columns, "similarity": row.similarity, "near_copy": row.is_near_copy(limit)}


def _base64(file: bytes) -> str:
    return base64.b64encode(file).decode()
