"""The networks behind their guards: pixels are counted, and a safety hook may refuse a prompt or blank a picture."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np

from models.request import SampleRequest
from pipeline.serve.deadlines import end_of, left_of, until
from pipeline.serve.guards import CURRENT, RequestFacts, refuse_above
from pipeline.serve.keys import Meter
from pipeline.serve.protocols import (
    Event,
    Images,
    NotServing,
    Overloaded,
    PictureModel,
    Preview,
    SampledPictures,
    TooLittleTime,
    Vectors,
)
from pipeline.serve.safety import SafetyCalls
from pipeline.serve.web import ApiError

_log = logging.getLogger(__name__)

_GRACE_S = 0.5
"""How much longer the engine, which counts what it drops, may take to say that the time is up."""


class GuardedModel:
    """A ``PictureModel`` that lets through what the guards allow.

    Args:
        model: The networks.
        image_px: Side of their pictures, in pixels.
        meter: What the keys have used.
        safety: Refuses prompts and pictures; None: nothing is refused.
    """

    def __init__(
        self,
        model: PictureModel,
        image_px: int,
        meter: Meter,
        safety: SafetyCalls | None = None,
    ) -> None:
        self._model = model
        self._image_px = image_px
        self._meter = meter
        self._safety = safety

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        ends_s = end_of(request.timeout_s)
        facts = await until(ends_s, self._admit(request))
        request = replace(request, timeout_s=left_of(ends_s))
        with self._paying_back(facts):
            sampled = await until(ends_s, self._model.sample(request, client), grace_s=_GRACE_S)
        return await until(ends_s, self._checked(sampled, request, facts))

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``."""
        ends_s = end_of(request.timeout_s)
        facts = await until(ends_s, self._admit(request))
        request = replace(request, timeout_s=left_of(ends_s))
        events = self._model.stream(request, client, num_previews)
        has_pictures = False
        try:
            while True:
                with nullcontext() if has_pictures else self._paying_back(facts):
                    event = await until(ends_s, anext(events, None), grace_s=_GRACE_S)
                if event is None:
                    break
                if isinstance(event, SampledPictures):
                    has_pictures = True
                    yield await until(ends_s, self._checked(event, request, facts))
                elif isinstance(event, Preview):
                    [image] = await until(ends_s, self._images(event.image[None], request.shows, facts))
                    yield replace(event, image=image)
                else:
                    yield event
        finally:
            await events.aclose()

    async def reduce_image(self, image: Images, components: Sequence[int]) -> tuple[tuple[int, ...], Vectors]:
        """See ``PictureModel``; a key that has not the pixels of its request has no embeddings read for it."""
        facts = CURRENT.get()
        if facts and facts.key:
            refuse_above(self._meter, facts.key, "pixels", facts.pixels, facts)
        return await self._model.reduce_image(image, components)

    async def _admit(self, request: SampleRequest) -> RequestFacts:
        facts = CURRENT.get() or RequestFacts("")
        facts.prompt = request.shows
        facts.pixels = len(request.seeds) * (request.side_px or self._image_px) ** 2
        [reason] = await self._reasons(request.shows, [None])
        if reason:
            facts.refused_by = "safety"
            raise ApiError(400, f"prompt: refused: {reason}", param="prompt", code="content_policy_violation")
        if facts.key:
            refuse_above(self._meter, facts.key, "pixels", facts.pixels, facts)
            self._meter.use(facts.key, "pixels", facts.pixels)
        return facts

    @contextmanager
    def _paying_back(self, facts: RequestFacts) -> Generator[None]:
        """A key pays nothing for pictures that the networks refuse to sample, or cannot finish."""
        try:
            yield
        except (Overloaded, NotServing, ValueError) as error:
            if isinstance(error, TooLittleTime):
                facts.refused_by = "deadline"
            if facts.key:
                self._meter.use(facts.key, "pixels", -facts.pixels)
            raise

    async def _checked(self, sampled: SampledPictures, request: SampleRequest, facts: RequestFacts) -> SampledPictures:
        return replace(sampled, images=await self._images(sampled.images, request.shows, facts))

    async def _images(self, images: Images, prompt: str, facts: RequestFacts) -> Images:
        """Pictures (n, H, W, 3) with those black that the hook refuses."""
        if self._safety is None:
            return images
        reasons = await self._reasons(prompt, images)
        for reason in filter(None, reasons):
            _log.warning("request %s: a picture is blanked: %s", facts.request_id, reason)
        facts.blanked += sum(map(bool, reasons))
        return np.stack(
            [np.zeros_like(image) if reason else image for image, reason in zip(images, reasons, strict=True)]
        )

    async def _reasons(self, prompt: str, images: Iterable[Images | None]) -> list[str | None]:
        """What the hook says of each of these pictures, or of the prompt alone (None)."""
        safety = self._safety
        if safety is None:
            return [None for _ in images]
        # A call for each, so that many pictures of one request hold up no other request.
        calls = [asyncio.ensure_future(safety.reason(prompt, image)) for image in images]
        try:
            return await asyncio.gather(*calls)
        finally:
            for call in calls:
                call.cancel()
