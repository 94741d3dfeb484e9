"""The engine: requests in, pictures out, with as many as fit drawn together, each at its own step.

One thread runs the networks. Between two steps it lets in waiting pictures, drops those that nobody waits for any more,
and takes the stages in turn, so that a request that comes late neither waits for the others nor holds them up.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from models.cascade import Cascade, CascadeSettings
from models.pixels import to_uint8
from pipeline.serve.chains import Picture
from pipeline.serve.protocols import Drawn, Overloaded
from pipeline.serve.steppers import make_steppers

_log = logging.getLogger(__name__)


@dataclass
class EngineStats:
    """Counts since the start, and what is under way."""

    requests: int = 0
    """Accepted."""
    refused: int = 0
    """Turned away because too many waited."""
    dropped: int = 0
    """Left by those who asked, before they were finished."""
    failed: int = 0
    """Ended by an error of a network."""
    pictures: int = 0
    """Finished."""
    steps: int = 0
    """Network steps taken."""
    rows: int = 0
    """Pictures in those steps, summed: rows / steps is the mean batch."""
    waiting: int = 0
    """Requests not begun."""
    active: int = 0
    """Pictures being drawn."""


@dataclass(eq=False)
class _Request:
    prompt: str
    seeds: tuple[int, ...]
    future: Future[Drawn] = field(default_factory=Future[Drawn])
    pictures: list[Picture] = field(default_factory=list[Picture])
    entered: int = 0
    """Pictures let in so far."""


class Engine:
    """Draws prompts with a cascade.

    Args:
        cascade: The trained networks, on their device.
        settings: How to sample; the cascade's own if None.
        max_batch_size: Pictures drawn at a time.
        max_waiting: Requests that may wait to be begun; a further one is refused.
    """

    def __init__(
        self,
        cascade: Cascade,
        settings: CascadeSettings | None = None,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 64,
    ) -> None:
        settings = settings or cascade.default_settings()
        self._clip = cascade.clip
        self._steppers = make_steppers(cascade, settings)
        self._max_batch_size = max_batch_size
        self._max_waiting = max_waiting
        self._stats = EngineStats()
        self._waiting: deque[_Request] = deque()
        self._active: list[tuple[_Request, Picture]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._turn = 0
        self._thread = threading.Thread(target=self._run, name="unclip-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive() and not self._closed

    def stats(self) -> dict[str, int]:
        """``EngineStats`` as plain numbers."""
        with self._changed:
            self._stats.waiting, self._stats.active = len(self._waiting), len(self._active)
            return asdict(self._stats)

    def submit(self, prompt: str, seeds: Sequence[int]) -> Future[Drawn]:
        """Ask for one picture of ``prompt`` for each seed; cancelling the future drops the request.

        Raises:
            ValueError: If there are no seeds.
            Overloaded: If too many requests wait, or the engine is closed.
        """
        if not seeds:
            raise ValueError("no seeds: give one for each picture")
        request = _Request(prompt, tuple(seeds))
        with self._changed:
            if self._closed:
                raise Overloaded("the engine is shutting down")
            num_waiting = sum(not waiting.future.cancelled() for waiting in self._waiting)
            if num_waiting >= self._max_waiting:
                self._stats.refused += 1
                raise Overloaded(f"{num_waiting} requests are waiting already")
            self._stats.requests += 1
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    async def draw(self, prompt: str, seeds: Sequence[int]) -> Drawn:
        """``submit`` for asynchronous callers; cancelling the task drops the request."""
        return await asyncio.wrap_future(self.submit(prompt, seeds))

    def close(self) -> None:
        """Stop after the present step; whoever still waits gets ``Overloaded``."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        left = {*self._waiting, *(request for request, _ in self._active)}
        self._remove(left)
        for request in left:
            if request.future.set_running_or_notify_cancel():
                request.future.set_exception(Overloaded("the engine is shutting down"))

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
                    self._guarded(self._enter, entering)
                chosen = self._choose()
                if chosen:
                    self._guarded(self._advance, chosen)

    def _take_waiting(self) -> list[tuple[_Request, int]]:
        """Requests, in their order, with the seeds for which there is room."""
        room = self._max_batch_size - len(self._active)
        entering: list[tuple[_Request, int]] = []
        while self._waiting and room > 0:
            request = self._waiting[0]
            seeds = request.seeds[request.entered : request.entered + room]
            entering += [(request, seed) for seed in seeds]
            request.entered += len(seeds)
            room -= len(seeds)
            if request.entered == len(request.seeds):
                self._waiting.popleft()
        return entering

    def _enter(self, entering: Sequence[tuple[_Request, int]]) -> None:
        prompts = list(dict.fromkeys(request.prompt for request, _ in entering))
        text = self._clip.encode_text(prompts)
        row = {prompt: number for number, prompt in enumerate(prompts)}
        added: list[tuple[_Request, Picture]] = []
        for request, seed in entering:
            number = row[request.prompt]
            picture = Picture(request.prompt, seed, text[number : number + 1])
            request.pictures.append(picture)
            added.append((request, picture))
        with self._changed:
            self._active += added

    def _choose(self) -> list[tuple[_Request, Picture]]:
        """The pictures of the next stage that has any."""
        for offset in range(len(self._steppers)):
            number = (self._turn + offset) % len(self._steppers)
            chosen = [(request, picture) for request, picture in self._active if picture.stage == number]
            if chosen:
                self._turn = number + 1
                return chosen
        return []

    def _advance(self, chosen: Sequence[tuple[_Request, Picture]]) -> None:
        self._steppers[chosen[0][1].stage].advance([picture for _, picture in chosen])
        finished = [(request, picture) for request, picture in chosen if picture.stage == len(self._steppers)]
        with self._changed:
            self._stats.steps += 1
            self._stats.rows += len(chosen)
            self._stats.pictures += len(finished)
            gone = {id(picture) for _, picture in finished}
            self._active = [pair for pair in self._active if id(pair[1]) not in gone]
        for request in dict.fromkeys(request for request, _ in finished):
            if len(request.pictures) == len(request.seeds) and all(
                picture.stage == len(self._steppers) for picture in request.pictures
            ):
                _answer(request)

    def _guarded(
        self, act: Callable[[Sequence[tuple[_Request, Any]]], None], items: Sequence[tuple[_Request, Any]]
    ) -> None:
        """Run a part of the loop; its error goes to those who wait for it, and the loop goes on."""
        try:
            act(items)
        except Exception as error:  # noqa: BLE001  (whatever a network raises (memory above all) is the request's, not the server's)
            _log.exception("drawing failed")
            requests = dict.fromkeys(request for request, _ in items)
            for request in requests:
                if request.future.set_running_or_notify_cancel():
                    request.future.set_exception(error)
            with self._changed:
                self._stats.failed += len(requests)
                self._remove(set(requests))

    def _forget_cancelled(self) -> None:
        """Drop requests that nobody waits for; call with the lock held."""
        requests = {*self._waiting, *(request for request, _ in self._active)}
        gone = {request for request in requests if request.future.cancelled()}
        self._stats.dropped += len(gone)
        self._remove(gone)

    def _remove(self, requests: set[_Request]) -> None:
        if requests:
            self._waiting = deque(request for request in self._waiting if request not in requests)
            self._active = [pair for pair in self._active if pair[0] not in requests]


def _answer(request: _Request) -> None:
    images = to_uint8(torch.cat([picture.pixels for picture in request.pictures])).cpu().numpy()
    z_image = torch.cat([picture.z_image for picture in request.pictures]).float().cpu().numpy()
    if request.future.set_running_or_notify_cancel():
        request.future.set_result(Drawn(images, z_image))
