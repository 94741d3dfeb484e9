"""The engine samples the pictures of many requests together, each at its own step.

One thread runs the networks. Between two steps it admits waiting pictures, drops those of cancelled requests, and
takes the stages in turn, so that a late request neither waits for the others nor delays them.
A picture is a batch of one item: it equals the picture that ``Cascade.sample_request`` samples alone.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import cast

import torch

from models.cascade import Cascade
from models.pixels import to_uint8
from models.request import SampleRequest
from models.stage import PIXELS, Z_IMAGE, Batch, Chain, JoinedChains
from pipeline.clip import FrozenClip
from pipeline.serve.protocols import Images, Overloaded, SampledPictures, Vectors

_log = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts since the start, and the work in progress."""

    requests: int = 0
    """Accepted."""
    refused: int = 0
    """Refused because too many requests waited."""
    dropped: int = 0
    """Cancelled by their clients before they were finished."""
    failed: int = 0
    """Ended by an error of a network."""
    pictures: int = 0
    """Finished."""
    steps: int = 0
    """Network steps taken."""
    rows: int = 0
    """Pictures in those steps, summed: rows / steps is the mean batch."""
    waiting: int = 0
    """Requests not started."""
    active: int = 0
    """Pictures in progress."""


@dataclass(eq=False)
class _Pending:
    """A request without an answer yet."""

    request: SampleRequest
    future: Future[SampledPictures] = field(default_factory=Future[SampledPictures])
    pictures: list["_Picture"] = field(default_factory=list["_Picture"])
    """Its pictures in progress or finished, in the order of the seeds."""


@dataclass(eq=False)
class _Picture:
    """One picture in the cascade."""

    pending: _Pending
    batch: Batch
    """One item."""
    stage: int = 0
    """Number of its stage, which it may not have entered yet."""
    chain: Chain | None = None
    """Its state in that stage; None before it enters."""


class Engine:
    """Samples requests with a cascade; a ``protocols.PictureModel`` in this process.

    Args:
        cascade: The trained networks, on their device.
        max_batch_size: Pictures sampled at a time.
        max_waiting: Most requests that may wait to start; further ones are refused.
    """

    def __init__(self, cascade: Cascade, *, max_batch_size: int = 16, max_waiting: int = 64) -> None:
        self._cascade = cascade
        self._joined: list[JoinedChains | None] = [None] * len(cascade.stages)
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._stats = EngineStats()
        self._waiting: deque[_Pending] = deque()
        self._active: list[_Picture] = []
        self._changed = threading.Condition()
        self._closed = False
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="unclip-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closed

    def counts(self) -> dict[str, int]:
        """``EngineStats`` as plain numbers."""
        with self._changed:
            self._stats.waiting, self._stats.active = len(self._waiting), len(self._active)
            return asdict(self._stats)

    def submit(self, request: SampleRequest) -> Future[SampledPictures]:
        """Request pictures; cancelling the future drops the request.

        Raises:
            ValueError: If the cascade cannot do what is requested.
            Overloaded: If too many requests wait, or the engine is closed.
        """
        self._cascade.check(request)
        pending = _Pending(request)
        with self._changed:
            if self._closed:
                raise Overloaded("the engine is shutting down")
            num_waiting = sum(not waiting.future.cancelled() for waiting in self._waiting)
            if num_waiting >= self._max_waiting:
                self._stats.refused += 1
                raise Overloaded(f"{num_waiting} requests are waiting already")
            self._stats.requests += 1
            self._waiting.append(pending)
            self._changed.notify()
        return pending.future

    async def sample(self, request: SampleRequest) -> SampledPictures:
        """See ``PictureModel``; cancelling the task drops the request."""
        return await asyncio.wrap_future(self.submit(request))

    async def embed_text(self, text: str) -> Vectors:
        """See ``PictureModel``."""
        return await asyncio.to_thread(lambda: self._clip.encode_text([text]).z_text[0].cpu().numpy())

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await asyncio.to_thread(lambda: self._clip.encode_image(torch.from_numpy(image)[None])[0].cpu().numpy())

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``."""
        return self.counts() if self.alive else {}

    @property
    def _clip(self) -> FrozenClip:
        return cast("FrozenClip", self._cascade.clip)

    def close(self) -> None:
        """Stop after the current step; unanswered requests fail with ``Overloaded``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        unanswered = self._unanswered()
        self._remove(unanswered)
        for pending in unanswered:
            if pending.future.set_running_or_notify_cancel():
                pending.future.set_exception(Overloaded("the engine is shutting down"))

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                with self._changed:
                    while not (self._closed or self._waiting or self._active):
                        self._changed.wait()
                    if self._closed:
                        return
                    self._forget_cancelled()
                    entering = self._take_waiting()
                if entering:
                    self._guarded([pending for pending, _ in entering], partial(self._enter, entering))
                pictures = self._choose()
                if pictures:
                    self._guarded([picture.pending for picture in pictures], partial(self._advance, pictures))

    def _take_waiting(self) -> list[tuple[_Pending, tuple[int, ...]]]:
        """The next requests, each with the seeds for which there is room."""
        room = self._max_batch_size - len(self._active)
        entering: list[tuple[_Pending, tuple[int, ...]]] = []
        while self._waiting and room > 0:
            pending = self._waiting[0]
            seeds = pending.request.seeds[len(pending.pictures) :]
            entering.append((pending, seeds[:room]))
            if len(seeds) <= room:
                self._waiting.popleft()
            room -= len(seeds[:room])
        return entering

    def _enter(self, entering: Sequence[tuple[_Pending, tuple[int, ...]]]) -> None:
        prompts = list(dict.fromkeys(pending.request.prompt for pending, _ in entering))
        text = self._clip.encode_text(prompts)
        for pending, seeds in entering:
            row = prompts.index(pending.request.prompt)
            caption = text[row : row + 1]
            pictures = [_Picture(pending, Batch(caption, (seed,), request=pending.request)) for seed in seeds]
            with self._changed:
                pending.pictures += pictures
                self._active += pictures

    def _choose(self) -> list[_Picture]:
        """The pictures of the next stage that holds any."""
        for offset in range(len(self._joined)):
            number = (self._turn + offset) % len(self._joined)
            pictures = [picture for picture in self._active if picture.stage == number]
            if pictures:
                self._turn = number + 1
                return pictures
        return []

    def _advance(self, pictures: Sequence[_Picture]) -> None:
        """Take pictures of one stage one step further; those that finish the stage leave it."""
        number = pictures[0].stage
        stage = self._cascade.stages[number]
        chains: list[Chain] = []
        for picture in pictures:
            picture.chain = picture.chain or stage.enter(picture.batch)
            chains.append(picture.chain)
        joined = self._joined[number]
        if joined is None or joined.chains != chains:  # what no step changes is joined once for the same pictures
            joined = self._joined[number] = stage.join(chains)
        joined.advance()
        for picture, chain in zip(pictures, chains, strict=True):
            if chain.finished:
                picture.batch = picture.batch.with_values(**{stage.makes: stage.leave(chain)})
                picture.chain, picture.stage, self._joined[number] = None, number + 1, None
        finished = {picture for picture in pictures if picture.stage == len(self._joined)}
        with self._changed:
            self._stats.steps += 1
            self._stats.rows += len(pictures)
            self._stats.pictures += len(finished)
            self._active = [picture for picture in self._active if picture not in finished]
        for pending in {picture.pending for picture in finished}:
            if len(pending.pictures) == len(pending.request.seeds) and all(
                picture.stage == len(self._joined) for picture in pending.pictures
            ):
                _answer(pending)

    def _guarded(self, requests: Sequence[_Pending], act: Callable[[], None]) -> None:
        """Run a part of the loop; an error fails its requests, and the loop continues."""
        try:
            act()
        except Exception as error:  # noqa: BLE001  (any error of a network, often of memory, fails the request, not the server)
            _log.exception("sampling failed")
            failed = set(requests)
            for pending in failed:
                if pending.future.set_running_or_notify_cancel():
                    pending.future.set_exception(error)
            with self._changed:
                self._stats.failed += len(failed)
                self._remove(failed)

    def _forget_cancelled(self) -> None:
        """Drop cancelled requests; call with the lock held."""
        cancelled = {pending for pending in self._unanswered() if pending.future.cancelled()}
        self._stats.dropped += len(cancelled)
        self._remove(cancelled)

    def _unanswered(self) -> set[_Pending]:
        return {*self._waiting, *(picture.pending for picture in self._active)}

    def _remove(self, requests: set[_Pending]) -> None:
        if requests:
            self._waiting = deque(pending for pending in self._waiting if pending not in requests)
            self._active = [picture for picture in self._active if picture.pending not in requests]
            self._joined = [None] * len(self._joined)


def _answer(pending: _Pending) -> None:
    values = [picture.batch.values for picture in pending.pictures]
    images = to_uint8(torch.cat([value[PIXELS] for value in values])).cpu().numpy()
    z_image = torch.cat([value[Z_IMAGE] for value in values]).float().cpu().numpy() if Z_IMAGE in values[0] else None
    if pending.future.set_running_or_notify_cancel():
        pending.future.set_result(SampledPictures(images, z_image))
