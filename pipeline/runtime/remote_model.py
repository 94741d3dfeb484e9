"""The calls that reach the replicas of the networks, from the process that speaks HTTP.

A replica that dies, or of which none runs, is noticed here: requests are begun once more, wait, or get an error.
"""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray.exceptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.runtime.parts import NEIGHBOURS
from pipeline.runtime.replicas import Hop
from pipeline.serve.deadlines import end_of, left_of, read_error
from pipeline.serve.estimate import PartLoad, load_of_all
from pipeline.serve.fair_queue import is_full
from pipeline.serve.protocols import (
    DeadlinePassed,
    Event,
    Images,
    NotServing,
    OtherNetworks,
    Overloaded,
    Preview,
    SampledPictures,
    Vectors,
)
from pipeline.serve.upkeep import Upkeep

_log = logging.getLogger(__name__)

_ASKING = ThreadPoolExecutor(8, "unclip-asking")
"""Waits for the answers of all replicas; files of finished pictures are made by other threads, and do not wait."""

T = TypeVar("T")

Handles = Mapping[str, DeploymentHandle[Any]]
"""Of the parts, by name; CLIP's is the first."""

_STATS_TIMEOUT_S = 2.0
_STATS_FRESH_S = 0.5
"""How long the counts of all replicas are passed on: anybody may ask for them, as often as they like."""
_ABSENCE_POLL_S = 1.0
_LONGEST_ABSENCE_S = 60.0
"""How long requests that are under way wait for a replica of a part while none runs."""
_LONGEST_ABSENCE_OF_INDEX_S = 5.0
"""The same for the index: finished pictures wait for their neighbours, and are sent without them then."""
_LONGEST_TURN_S = 10.0
"""How long a request looks for a replica that has its networks, while others are swapped in."""
_TURN_POLL_S = 0.1
_LONGEST_TURN_POLL_S = 1.0
"""The first and the longest pause before another replica is asked; each is twice as long as the one before."""
_LOADS_FRESH_S = 1.0
_SMOOTHING = 0.1
"""Weight of the newest measurement in a running mean."""
_UNAVAILABLE = (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
    ray.exceptions.RayActorError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.ObjectLostError,  # an answer, or what is left of a request, went with its machine
)


class _NoReplica(NotServing):
    """A call waits for a replica that does not come."""


class _Ended(NotServing):
    """There will be no replica any more."""

    def __init__(self) -> None:
        super().__init__("the server has ended")


@dataclass
class _Search:
    """The search of one call for a replica that has its networks."""

    num_refusals: int = 0
    since_s: float = field(default_factory=time.monotonic)


class RemoteModel:
    """A ``protocols.PictureModel`` that calls the replicas, and means the same networks all its life.

    If a replica dies, what was asked of it is asked once more, of another one or of its successor: the same request has
    the same pictures.

    Args:
        handles: Of the deployments of ``ModelReplica``.
        served: Digest of the networks that answer; see ``parts.digest_of``.
        most: Requests that may be in a chain at a time, but for ``is_full``; 0: the engines decide.
        upkeep: What is known of the replicas.
    """

    def __init__(self, handles: Handles, served: str, most: int = 0, upkeep: Upkeep | None = None) -> None:
        self._handles = handles
        self._served = served
        self._most = most
        self._upkeep = upkeep or Upkeep()
        self._open = Counter[str]()
        """Requests under way, by client."""
        self._mean_s = 0.0
        """Running mean of the time of a request."""
        self._loads: Sequence[PartLoad] = ()
        """What the later parts of a chain had to do when they were last asked."""
        self._loads_s = -math.inf
        self._asking: asyncio.Task[None] | None = None
        self._counting: asyncio.Task[dict[str, int]] | None = None
        """The counts of all replicas, or what asks for them."""
        self._counted_s = -math.inf

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        ends_s = end_of(request.timeout_s)
        with self._admitted(client):
            return await self._twice(lambda: self._pass_on(request, client, ends_s))

    async def _pass_on(self, request: SampleRequest, client: str, ends_s: float) -> SampledPictures:
        hop: Hop | None = None
        while True:
            left, later = _left(request, hop, ends_s), self._later(request, hop)
            result = await self._call(self._part_of(hop), "sample", self._served, left, client, hop, later)
            if not isinstance(result, Hop):
                return result
            hop = result

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``. If a replica dies, what was sent of the stream is not sent again."""
        ends_s = end_of(request.timeout_s)
        with self._admitted(client):
            sent = set[object]()
            has_begun_again = is_over = False
            while not is_over:
                try:
                    async with aclosing(self._stream(request, client, num_previews, ends_s)) as events:
                        async for event in events:
                            place = (event.index, event.number) if isinstance(event, Preview) else type(event)
                            if place not in sent:
                                sent.add(place)
                                yield event
                    is_over = True
                except NotServing as error:
                    if has_begun_again or not self._may_begin_again(error):
                        raise
                    has_begun_again = True
                    self._note_again(error)

    async def _stream(
        self, request: SampleRequest, client: str, num_previews: int, ends_s: float
    ) -> AsyncGenerator[Event]:
        hop: Hop | None = None
        is_over, search = False, _Search()
        while not is_over:
            part = self._part_of(hop)
            streaming = self._replicas(part, search).options(stream=True)
            left, later = _left(request, hop, ends_s), self._later(request, hop)
            events: Any = streaming.stream.remote(self._served, left, client, num_previews, hop, later)
            is_over = True
            try:
                while True:
                    try:
                        event = await self._while_served(part, anext(events))
                    except StopAsyncIteration:
                        break
                    if isinstance(event, Hop):
                        hop, is_over, search = event, False, _Search()
                    else:
                        yield event
            except OtherNetworks as error:  # it comes before anything else
                await self._look_on(part, search, error)
                is_over = False
            finally:
                if not self._upkeep.has_ended:
                    events.cancel()

    async def _twice(self, act: Callable[[], Awaitable[T]]) -> T:
        try:
            return await act()
        except NotServing as error:
            if not self._may_begin_again(error):
                raise
            self._note_again(error)
            return await act()

    def _may_begin_again(self, error: NotServing) -> bool:
        """Whether another replica may answer: networks that are gone do not come back, and one was waited for."""
        return not (self._upkeep.has_ended or isinstance(error, OtherNetworks | _NoReplica))

    def _note_again(self, error: NotServing) -> None:
        _log.warning("%s; a request is begun once more", error)
        self._upkeep.begun_again.inc()

    @property
    def _first(self) -> str:
        return next(iter(self._handles))

    def _part_of(self, hop: Hop | None) -> str:
        return hop.step if hop is not None and hop.step in self._handles else self._first

    def _later(self, request: SampleRequest, hop: Hop | None) -> Sequence[PartLoad]:
        """What the first part has to know of the others to tell whether the time of a new request suffices.

        They are asked once a second while such requests come. No request waits for that: one that comes early is
        taken, as by an engine that has measured nothing yet.
        """
        if hop is not None or not request.timeout_s or len(self._handles) == 1:
            return ()
        if (self._asking is None or self._asking.done()) and time.monotonic() - self._loads_s > _LOADS_FRESH_S:
            self._loads_s = time.monotonic()
            self._asking = asyncio.create_task(self._ask_loads())
            self._asking.add_done_callback(read_error)
        return self._loads

    async def _ask_loads(self) -> None:
        _, *later = [handle for part, handle in self._handles.items() if part != NEIGHBOURS]
        answers = await asyncio.gather(*(answers_of(handle, "load") for handle in later))
        self._loads = [load_of_all(engines) for engines in answers if engines]

    @contextmanager
    def _admitted(self, client: str) -> Generator[None]:
        """Bound the requests in a chain: its first part is done with a request long before the last one is.

        Raises:
            Overloaded: If there are too many.
        """
        if self._most and is_full(self._open, client, self._most):
            num_open = self._open.total()
            next_s = self._mean_s / num_open  # until one of them is likely to leave
            raise Overloaded(f"{num_open} requests are under way already", retry_after_s=next_s)
        self._open[client] += 1
        begun_s = time.monotonic()
        try:
            yield
            self._mean_s += (time.monotonic() - begun_s - self._mean_s) * (_SMOOTHING if self._mean_s else 1.0)
        finally:
            self._open[client] -= 1
            if not self._open[client]:
                del self._open[client]

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call(self._first, "embed_texts", self._served, texts))

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call(self._first, "embed_image", self._served, image))

    async def reduce_image(self, image: Images, components: Sequence[int]) -> tuple[tuple[int, ...], Vectors]:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call(self._first, "reduce_image", self._served, image, components))

    async def cut_at(self, texts: Sequence[str]) -> list[int]:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call(self._first, "cut_at", self._served, texts))

    async def ask(self, part: str, method: str, *arguments: Any, **settings: Any) -> Any:
        """Call a method of a part by name.

        Raises:
            NotServing: If no replica of it answers.
        """
        return await self._twice(lambda: self._call(part, method, *arguments, **settings))

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``; the sums over all replicas, which are asked once for all who want to know."""
        counting = self._counting
        if counting is None or (counting.done() and time.monotonic() - self._counted_s > _STATS_FRESH_S):
            counting = self._counting = asyncio.create_task(self._count())
            counting.add_done_callback(read_error)
        return dict(await asyncio.shield(counting))

    async def _count(self) -> dict[str, int]:
        sums = Counter[str]()
        for counts in await self._of_all("stats"):
            sums.update(counts)
        self._counted_s = time.monotonic()
        return dict(sums)

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        return {name: text for texts in await self._of_all("metrics") for name, text in texts.items()}

    async def _of_all(self, method: str) -> list[Any]:
        """The answers of all replicas of all parts."""
        answers = await asyncio.gather(*(answers_of(handle, method) for handle in self._handles.values()))
        return [answer for some in answers for answer in some]

    async def _call(self, part: str, method: str, *arguments: Any, **settings: Any) -> Any:
        search = _Search()
        while True:
            try:
                response = getattr(self._replicas(part, search), method).remote(*arguments, **settings)
                return await self._answer(part, response)
            except OtherNetworks as error:
                await self._look_on(part, search, error)

    def _replicas(self, part: str, search: _Search) -> DeploymentHandle[Any]:
        """The replicas of a part; once one has refused, first those that have said that they have the networks.

        Not before: after a death of Ray Serve's controller the replicas that came since have said it alone, and would
        get all requests.
        """
        handle = self._handles[part]
        return handle.options(multiplexed_model_id=self._served) if search.num_refusals else handle

    async def _look_on(self, part: str, search: _Search, error: OtherNetworks) -> None:
        """Wait before another replica is asked.

        Args:
            part: Whose replicas.
            search: What is looked for; counts one more refusal.
            error: What the last replica said.

        Raises:
            OtherNetworks: If that takes too long; or at once if none has these networks, and none will have: others are
                served by now.
        """
        search.num_refusals += 1
        is_replaced = self._upkeep.served not in {"", self._served}
        if search.num_refusals > 1 and is_replaced:
            answers = await answers_of(self._handles[part], "serves", self._served)
            if answers and not any(answers):
                raise error
        if time.monotonic() - search.since_s > _LONGEST_TURN_S:
            raise error
        await asyncio.sleep(min(_TURN_POLL_S * 2 ** (search.num_refusals - 1), _LONGEST_TURN_POLL_S))

    async def _answer(self, part: str, response: Any) -> Any:
        try:
            return await self._while_served(part, response)
        except (asyncio.CancelledError, _NoReplica):  # a Ray that has ended is not called
            response.cancel()
            raise

    async def _while_served(self, part: str, answer: Awaitable[T]) -> T:
        """An answer of a replica of a part, unless none has run for long: Ray Serve would wait for one without end.

        Raises:
            NotServing: If the replica dies, no one comes, or Ray has ended.
        """
        longest_s = _LONGEST_ABSENCE_OF_INDEX_S if part == NEIGHBOURS else _LONGEST_ABSENCE_S
        task = asyncio.ensure_future(answer)
        task.add_done_callback(read_error)
        try:
            with _plain_errors():
                while not task.done():
                    await asyncio.wait({task}, timeout=_ABSENCE_POLL_S)
                    if self._upkeep.has_ended and not task.done():
                        raise _Ended
                    if self._upkeep.absent_s(part) > longest_s and not task.done():
                        raise _NoReplica(f"no replica of {part} has been running for {longest_s:g} s")
                return task.result()
        finally:
            task.cancel()


async def answers_of(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """The answers of all replicas of a deployment that answer soon."""
    return await asyncio.get_running_loop().run_in_executor(_ASKING, answers_now, handle, method, *arguments)


def answers_now(handle: DeploymentHandle[Any], method: str, *arguments: Any) -> list[Any]:
    """As ``answers_of``, for a thread that may wait."""
    try:
        # results_async would give up all answers for one that does not come.
        answers = handle.broadcast(method, *arguments).results(timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
    except (TimeoutError, *_UNAVAILABLE):
        return []
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def end_requests(handles: Handles) -> None:
    """Cancel what a server that was killed has left under way: nobody waits for it."""
    tell(handles, "end_requests")


def are_served(handles: Handles, served: str) -> bool:
    """Whether all replicas that answer have the networks of a digest, and some of each part do, but for the index."""
    answers = {part: answers_now(handle, "serves", served) for part, handle in handles.items()}
    return all(all(some) and (some or part == NEIGHBOURS) for part, some in answers.items())


def tell(handles: Handles, method: str, *arguments: Any) -> None:
    """Call a method of all replicas of all parts, and wait for their answers, though not for long."""
    for handle in handles.values():
        answers_now(handle, method, *arguments)


def _left(request: SampleRequest, hop: Hop | None, ends_s: float) -> SampleRequest:
    """What the next part reads of a request: its pictures go to CLIP's part alone, and some of its time is gone.

    Raises:
        DeadlinePassed: If all of it is.
    """
    if request.timeout_s:
        request = replace(request, timeout_s=left_of(ends_s))
    return replace(request, edit=None) if hop is not None and hop.step else request


@contextmanager
def _plain_errors() -> Generator[None]:
    """Raise the errors of a replica as the engine raised them."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Overloaded | NotServing | DeadlinePassed | ValueError):
            raise error.cause from None
        raise
    except _UNAVAILABLE as error:
        raise NotServing(f"no replica is ready ({type(error).__name__})") from None
