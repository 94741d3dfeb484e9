"""The networks in replicas that Ray Serve places on machines, and the calls that reach them.

A replica has all networks, or a part of them (``serve.mode = "chain"``). A request then goes from part to part: the
process that speaks HTTP calls one after another, and what is left of the request stays in Ray's object store.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
import ray.exceptions
from ray import ObjectRef, serve
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.parts import (
    NETWORKS,
    Tables,
    networks_options,
    part_tables,
    parts_of,
    place_of,
    read_tables,
    write_tables,
)
from pipeline.serve.protocols import Accepted, Event, Images, NotServing, Overloaded, Preview, SampledPictures, Vectors
from pipeline.serve.upkeep import Upkeep
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine
    from pipeline.serve.work import Work

_log = logging.getLogger(__name__)

T = TypeVar("T")

Handles = Mapping[str, DeploymentHandle[Any]]
"""Of the parts, by name; CLIP's is the first."""

_IDLE_POLL_S = 0.2
_STATS_TIMEOUT_S = 2.0
_ABSENCE_POLL_S = 1.0
_LONGEST_ABSENCE_S = 60.0
"""How long requests that are under way wait for a replica while none runs."""
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


@dataclass(frozen=True)
class Hop:
    """A request on its way to the next part of a chain."""

    step: str
    """Step of the recipe whose network comes next; empty: CLIP's part."""
    work: Any
    """``serve.work.Work``, or Ray's reference to it."""
    served: str
    """Digest of what is served: other networks do not continue with it."""


class ModelReplica:
    """One copy of the cascade or of a part of it; a ``protocols.PictureModel`` that Ray Serve places.

    Args:
        others: The other parts of the chain, so that Ray Serve starts them too.
    """

    def __init__(self, *others: DeploymentHandle[Any]) -> None:
        del others
        self._served = ""
        self._engines: dict[str, Engine] = {}
        """By digest of what they serve; those before the last are ending."""
        self._loading = asyncio.Lock()
        self._ending: dict[str, asyncio.Task[None]] = {}
        """What ends an engine, by the digest of what it serves."""
        self._requests = set[asyncio.Task[Any]]()
        """What is under way."""

    async def reconfigure(self, tables: Tables) -> None:
        """Load the networks of a recipe; requests under way end with those that they began with.

        Called by Ray Serve at the start, and when the recipe that is served changes.

        Args:
            tables: See ``write_tables`` and ``part_tables``.
        """
        async with self._loading:
            served = _digest(tables)
            if served == self._served:
                return
            if served in self._engines:  # it is ending, and goes on
                self._ending.pop(served).cancel()
            else:
                self._engines[served] = await asyncio.to_thread(_load_engine, tables)
            previous, self._served = self._served, served
            if previous:
                keep_s = tables["recipe"]["serve"]["drain_s"] if "part" in tables else 0.0
                self._ending[previous] = asyncio.create_task(self._end_when_idle(previous, keep_s))

    async def _end_when_idle(self, served: str, keep_s: float) -> None:
        """End an engine that serves no new requests; in a chain some are still with the parts before it."""
        await asyncio.sleep(keep_s)
        while not self._engines[served].idle:
            await asyncio.sleep(_IDLE_POLL_S)
        engine = self._engines.pop(served)
        await asyncio.to_thread(engine.close)

    @property
    def _engine(self) -> "Engine":
        if not self._served:
            raise NotServing("the networks are loading")
        return self._engines[self._served]

    async def _continued(self, hop: Hop | None) -> "tuple[str, Engine, Work | None]":
        """What is served, its engine, and what is left of a request."""
        if hop is None:
            return self._served, self._engine, None
        engine = self._engines.get(hop.served)
        if engine is None:
            raise NotServing("other networks are served since the request began")
        try:
            work = await hop.work if isinstance(hop.work, ObjectRef) else hop.work
        except ray.exceptions.RayError as error:
            raise NotServing(f"the replica before this one has died ({type(error).__name__})") from None
        return hop.served, engine, work

    async def sample(self, request: SampleRequest, client: str = "", hop: Hop | None = None) -> Any:
        """See ``PictureModel``; a part of a chain may end with the way to the next one."""
        with self._under_way():
            served, engine, work = await self._continued(hop)
            return _sent(await engine.sample(request, client, work), served)

    async def stream(
        self, request: SampleRequest, client: str = "", num_previews: int = 0, hop: Hop | None = None
    ) -> AsyncGenerator[Event | Hop]:
        """See ``PictureModel``; a part of a chain may end with the way to the next one."""
        with self._under_way():
            served, engine, work = await self._continued(hop)
            async with aclosing(engine.stream(request, client, num_previews, work)) as events:
                async for event in events:
                    yield _sent(event, served)

    @contextmanager
    def _under_way(self) -> Generator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)

    async def end_requests(self) -> None:
        """Cancel what is under way."""
        for task in self._requests:
            task.cancel()

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_texts(texts)

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._engine.embed_image(image)

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``."""
        return await self._engine.stats()

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        name = serve.get_replica_context().replica_id.unique_id
        [text] = (await self._engine.metrics()).values()
        return {name: text}

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica that raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")

    def __del__(self) -> None:
        for engine in getattr(self, "_engines", {}).values():
            engine.close()


def _digest(tables: Tables) -> str:
    """Of what is served, the same for all parts of a chain."""
    common = {name: value for name, value in tables.items() if name not in {"part", "steps"}}
    return hashlib.sha256(json.dumps(common, sort_keys=True).encode()).hexdigest()[:16]


def _sent(result: Any, served: str) -> Any:
    """A result as another process gets it; what is left of a request goes by reference."""
    if isinstance(result, Accepted | Preview | SampledPictures):
        return result
    return Hop(result.step, ray.put(result) if ray.is_initialized() else result, served)


def _load_engine(tables: Tables) -> "Engine":
    """The networks of a recipe, with checksums compared, and the engine that samples them."""
    import torch

    from pipeline.networks.arithmetic import Arithmetic
    from pipeline.networks.cascade import load_cascade, network_configs
    from pipeline.networks.files import verified_files
    from pipeline.serve.engine import Engine
    from pipeline.serve.memory import GpuMemory
    from pipeline.serve.traces import open_traces

    recipe, artifacts = read_tables(tables)
    config, part, steps = recipe.serve, tables.get("part", NETWORKS), tables.get("steps")
    place = place_of(config, part)
    torch.set_num_threads(max(1, int(place.cpus_per_replica)))
    networks = {name: artifact for name, artifact in artifacts.items() if name in CASCADE_STEPS}
    for name in networks.keys() if steps is None else networks.keys() & steps:
        verified_files(networks[name])
    arithmetic = Arithmetic(config.precision, config.compiled)
    arithmetic.set_up()
    configs = network_configs(recipe)
    cascade = load_cascade(networks, config.accelerator, configs, steps=steps, arithmetic=arithmetic)
    return Engine(
        cascade,
        max_batch_size=place.max_batch_size,
        max_waiting=config.max_queued_requests,
        steps=steps,
        device=config.accelerator,
        traces=open_traces(config.traces, config.name or recipe.name),
        memory=GpuMemory(place.gpus_per_replica) if config.accelerator == "cuda" else None,
    )


class _NoReplica(NotServing):
    """A call waits for a replica that does not come."""


class _Ended(NotServing):
    """There will be no replica any more."""

    def __init__(self) -> None:
        super().__init__("the server has ended")


class RemoteModel:
    """A ``protocols.PictureModel`` that calls the replicas.

    If a replica dies, what was asked of it is asked once more, of another one or of its successor: the same request has
    the same pictures.

    Args:
        handles: Of the deployments of ``ModelReplica``.
        most: Requests that may be in a chain at a time; 0: the engines decide.
        upkeep: What is known of the replicas.
    """

    def __init__(self, handles: Handles, most: int = 0, upkeep: Upkeep | None = None) -> None:
        self._handles = handles
        self._most = most
        self._upkeep = upkeep or Upkeep()
        self._num_open = 0
        self._mean_s = 0.0
        """Running mean of the time of a request."""

    async def sample(self, request: SampleRequest, client: str = "") -> SampledPictures:
        """See ``PictureModel``."""
        with self._admitted():
            return await self._twice(lambda: self._pass_on(request, client))

    async def _pass_on(self, request: SampleRequest, client: str) -> SampledPictures:
        hop: Hop | None = None
        while True:
            result = await self._call("sample", _left(request, hop), client, hop, handle=self._handle_of(hop))
            if not isinstance(result, Hop):
                return result
            hop = result

    async def stream(self, request: SampleRequest, client: str = "", num_previews: int = 0) -> AsyncGenerator[Event]:
        """See ``PictureModel``. If a replica dies, what was sent of the stream is not sent again."""
        with self._admitted():
            sent = set[object]()
            has_begun_again = is_over = False
            while not is_over:
                try:
                    async with aclosing(self._stream(request, client, num_previews)) as events:
                        async for event in events:
                            place = (event.index, event.number) if isinstance(event, Preview) else type(event)
                            if place not in sent:
                                sent.add(place)
                                yield event
                    is_over = True
                except NotServing as error:
                    if has_begun_again or self._upkeep.has_ended:
                        raise
                    has_begun_again = True
                    self._note_again(error)

    async def _stream(self, request: SampleRequest, client: str, num_previews: int) -> AsyncGenerator[Event]:
        hop: Hop | None = None
        is_over = False
        while not is_over:
            streaming = self._handle_of(hop).options(stream=True)
            events: Any = streaming.stream.remote(_left(request, hop), client, num_previews, hop)
            is_over = True
            try:
                while True:
                    try:
                        event = await self._while_served(anext(events))
                    except StopAsyncIteration:
                        break
                    if isinstance(event, Hop):
                        hop, is_over = event, False
                    else:
                        yield event
            finally:
                if not self._upkeep.has_ended:
                    events.cancel()

    async def _twice(self, act: Callable[[], Awaitable[T]]) -> T:
        try:
            return await act()
        except NotServing as error:
            if self._upkeep.has_ended:
                raise
            self._note_again(error)
            return await act()

    def _note_again(self, error: NotServing) -> None:
        _log.warning("%s; a request is begun once more", error)
        self._upkeep.begun_again.inc()

    @property
    def _first(self) -> DeploymentHandle[Any]:
        return next(iter(self._handles.values()))

    def _handle_of(self, hop: Hop | None) -> DeploymentHandle[Any]:
        return self._first if hop is None else self._handles.get(hop.step, self._first)

    @contextmanager
    def _admitted(self) -> Generator[None]:
        """Bound the requests in a chain: its first part is done with a request long before the last one is.

        Raises:
            Overloaded: If there are too many.
        """
        if self._most and self._num_open >= self._most:
            raise Overloaded(f"{self._num_open} requests are under way already", retry_after_s=self._mean_s)
        self._num_open += 1
        begun_s = time.monotonic()
        try:
            yield
            self._mean_s += (time.monotonic() - begun_s - self._mean_s) * (_SMOOTHING if self._mean_s else 1.0)
        finally:
            self._num_open -= 1

    async def embed_texts(self, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call("embed_texts", texts))

    async def embed_image(self, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await self._twice(lambda: self._call("embed_image", image))

    async def stats(self) -> dict[str, int]:
        """See ``PictureModel``; the sums over all replicas."""
        sums = Counter[str]()
        for counts in await self._of_all("stats"):
            sums.update(counts)
        return dict(sums)

    async def metrics(self) -> dict[str, str]:
        """See ``PictureModel``."""
        return {name: text for texts in await self._of_all("metrics") for name, text in texts.items()}

    async def _of_all(self, method: str) -> list[dict[str, Any]]:
        """The answers of all replicas that answer soon."""

        async def of(handle: DeploymentHandle[Any]) -> list[Any]:
            try:
                # results_async would give up all answers for one that does not come.
                results = handle.broadcast(method).results
                return await asyncio.to_thread(results, timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)
            except (TimeoutError, *_UNAVAILABLE):
                return []

        answers = await asyncio.gather(*map(of, self._handles.values()))
        return [cast("dict[str, Any]", answer) for some in answers for answer in some if isinstance(answer, dict)]

    async def _call(self, method: str, *arguments: Any, handle: DeploymentHandle[Any] | None = None) -> Any:
        response = getattr(handle or self._first, method).remote(*arguments)
        try:
            return await self._while_served(response)
        except (asyncio.CancelledError, _NoReplica):  # a Ray that has ended is not called
            response.cancel()
            raise

    async def _while_served(self, answer: Awaitable[T]) -> T:
        """An answer of a replica, unless none has run for long: Ray Serve would wait for one without end.

        Raises:
            NotServing: If the replica dies, no one comes, or Ray has ended.
        """
        task = asyncio.ensure_future(answer)
        task.add_done_callback(_read_error)
        try:
            with _plain_errors():
                while not task.done():
                    await asyncio.wait({task}, timeout=_ABSENCE_POLL_S)
                    if self._upkeep.has_ended and not task.done():
                        raise _Ended
                    if self._upkeep.absent_s > _LONGEST_ABSENCE_S and not task.done():
                        raise _NoReplica(f"no replica has been running for {_LONGEST_ABSENCE_S:g} s")
                return task.result()
        finally:
            task.cancel()


def end_requests(handles: Handles) -> None:
    """Cancel what a server that was killed has left under way: nobody waits for it."""
    for handle in handles.values():
        with suppress(TimeoutError, *_UNAVAILABLE):
            handle.broadcast("end_requests").results(timeout_s=_STATS_TIMEOUT_S, return_exceptions=True)


def _read_error(task: asyncio.Task[Any] | asyncio.Future[Any]) -> None:
    """Let asyncio not complain of an error that nobody waits for, because the client has left."""
    if not task.cancelled():
        task.exception()


def _left(request: SampleRequest, hop: Hop | None) -> SampleRequest:
    """What the next part reads of a request: its pictures go to CLIP's part alone."""
    return replace(request, edit=None) if hop is not None and hop.step else request


@contextmanager
def _plain_errors() -> Generator[None]:
    """Raise the errors of a replica as the engine raised them."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Overloaded | NotServing | ValueError):
            raise error.cause from None
        raise
    except _UNAVAILABLE as error:
        raise NotServing(f"no replica is ready ({type(error).__name__})") from None


def networks_application(recipe: Recipe, artifacts: dict[str, Artifact]) -> serve.Application:
    """The networks of a recipe as an application of Ray Serve.

    Args:
        recipe: The recipe.
        artifacts: Its finished steps, by name.
    """
    tables = write_tables(recipe, artifacts)

    def bind(part: str, *others: serve.Application) -> serve.Application:
        options = networks_options(recipe.serve, part)
        deployment: Any = serve.deployment(
            ModelReplica, name=part, user_config=part_tables(recipe, tables, part), **options
        )
        # With a version of our own, Ray Serve sees when only the networks changed, and keeps the replicas.
        return deployment.options(version=version("unclip"), _internal=True).bind(*others)

    first, *others = parts_of(recipe)
    return bind(first, *map(bind, others))
