"""The networks behind their guards: pixels are counted, and a safety hook may refuse a prompt or blank a picture."""

import asyncio
import importlib
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

import numpy as np

from models.request import SampleRequest
from pipeline.errors import ConfigError
from pipeline.serve.guards import CURRENT, RequestFacts, refuse_above
from pipeline.serve.keys import Meter
from pipeline.serve.protocols import (
    DeadlinePassed,
    Event,
    Images,
    NotServing,
    Overloaded,
    PictureModel,
    Preview,
    SampledPictures,
    TooLittleTime,
    end_of,
)
from pipeline.serve.web import ApiError

_log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_S = 0.5

SafetyHook = Callable[[str, Images | None], str | None]
"""(prompt, picture) -> the reason to refuse it, or None.

It is called with the prompt alone before pictures are sampled, and with every preview and picture, (H, W, 3), before
it is sent; a picture that it refuses is sent black. It is called in threads, several at once.
"""


def load_hook(name: str) -> SafetyHook:
    """The hook that a recipe names.

    Args:
        name: ``module:function``; the module must be importable where the server runs.

    Raises:
        ConfigError: If there is no such function.
    """
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"serve.safety_hook: {name!r}: {error}; it is MODULE:FUNCTION") from None
    if not callable(hook):
        raise ConfigError(f"serve.safety_hook: {name!r} is not a function")
    return cast("SafetyHook", hook)


async def _until(ends_s: float, answer: Awaitable[T]) -> T:
    """An answer of the networks. The engine, which counts what it drops, has half a second to say that time is up."""
    left_s = None if ends_s == math.inf else max(0.0, ends_s - time.monotonic()) + _GRACE_S
    limit = asyncio.timeout(left_s)
    try:
        async with limit:
            return await answer
    except TimeoutError:
        if limit.expired():
            raise DeadlinePassed("the time of the request was up before it was finished") from None
        raise


class GuardedModel:
    """A ``PictureModel`` that lets through what the guards allow.

    Args:
        model: The networks.
        image_px: Side of their pictures, in pixels.
        meter: What the keys have used.
        hook: Refuses prompts and pictures; None: nothing is refused.
        longest_s: Longest time of a request, in seconds; 0: any.
    """

    def __init__(
        self,
        model: PictureModel,
        image_px: int,
        meter: Meter,
        hook: SafetyHook | None = None,
        longest_s: float = 0.0,
    ) -> None:
        self._model = model
        self._image_px = image_px
        self._meter = meter
        self._hook = hook
        self._longest_s = longest_s

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        facts, request = await self._admit(request), self._timed(request)
        with self._paying_back(facts):
            sampled = await _until(end_of(request), self._model.sample(request, client))
        return await self._checked(sampled, request, facts)

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``."""
        facts, request = await self._admit(request), self._timed(request)
        ends_s, events = end_of(request), self._model.stream(request, client, num_previews)
        try:
            with self._paying_back(facts):
                accepted = await _until(ends_s, anext(events))
            yield accepted
            while (event := await _until(ends_s, anext(events, None))) is not None:
                if isinstance(event, SampledPictures):
                    yield await self._checked(event, request, facts)
                elif isinstance(event, Preview):
                    [image] = await self._images(event.image[None], request.shows, facts)
                    yield replace(event, image=image)
                else:
                    yield event
        finally:
            await events.aclose()

    def _timed(self, request: SampleRequest) -> SampleRequest:
        """A request with the shorter one of its own and the server's longest time."""
        times_s = [time_s for time_s in (request.timeout_s, self._longest_s) if time_s]
        return replace(request, timeout_s=min(times_s)) if times_s else request

    async def _admit(self, request: SampleRequest) -> RequestFacts:
        facts = CURRENT.get() or RequestFacts("")
        facts.prompt = request.shows
        facts.pixels = len(request.seeds) * (request.side_px or self._image_px) ** 2
        if self._hook and (reason := await asyncio.to_thread(self._hook, request.shows, None)):
            facts.refused_by = "safety"
            raise ApiError(400, f"prompt: refused: {reason}", param="prompt", code="content_policy_violation")
        if facts.key:
            refuse_above(self._meter, facts.key, "pixels", facts.pixels, facts)
            self._meter.use(facts.key, "pixels", facts.pixels)
        return facts

    @contextmanager
    def _paying_back(self, facts: RequestFacts) -> Generator[None]:
        """A key pays nothing for pictures that the networks refuse to sample."""
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
        hook = self._hook
        if hook is None:
            return images
        reasons = await asyncio.to_thread(lambda: [hook(prompt, image) for image in images])
        for reason in filter(None, reasons):
            _log.warning("request %s: a picture is blanked: %s", facts.request_id, reason)
        facts.blanked += sum(map(bool, reasons))
        return np.stack(
            [np.zeros_like(image) if reason else image for image, reason in zip(images, reasons, strict=True)]
        )
