"""The networks in replicas that Ray Serve places on machines; remote_model.py has the calls that reach them.

A replica has all networks, or a part of them (``serve.mode = "chain"``). A request then goes from part to part: the
process that speaks HTTP calls one after another, and what is left of the request, if it is large, stays in Ray's
object store.

Every call says by a digest which networks it means, and no others answer it. So a picture is of the networks that its
file names, whatever is loaded meanwhile, and when.
"""

import asyncio
import pickle
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray import ObjectRef, serve
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.runtime.keeping import keeping_what_is_served
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import Tables, digest_of
from pipeline.serve.estimate import PartLoad
from pipeline.serve.metrics import EngineMetrics
from pipeline.serve.protocols import (
    Accepted,
    Event,
    Images,
    NotServing,
    OtherNetworks,
    Preview,
    SampledPictures,
    Vectors,
)

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine
    from pipeline.serve.work import Work

_IDLE_POLL_S = 0.2
_MOST_ANNOUNCED = 3
"""Networks that the router knows a replica by: what is served, what a swap brings, and what still finishes."""
_SMALL_BYTES = 64 << 10
"""Of tensors; Ray sends an argument or an answer of at most 100 KB without its object store."""
_LEAST_KEEP_S = 10.0
"""How long networks stay at least once requests mean others: not all HTTP processes turn at the same time."""


@dataclass(frozen=True)
class Hop:
    """A request on its way to the next part of a chain."""

    step: str
    """Step of the recipe whose network comes next; empty: CLIP's part."""
    work: Any
    """``serve.work.Work``, pickled, or Ray's reference to that."""


class ModelReplica:
    """One copy of the cascade or of a part of it; a ``protocols.PictureModel`` that Ray Serve places.

    Args:
        others: The other parts of the chain, so that Ray Serve starts them too.
    """

    def __init__(self, *others: DeploymentHandle[Any]) -> None:
        del others
        self._engines: dict[str, Engine] = {}
        """By digest of what they serve."""
        self._metrics = EngineMetrics()
        self._served = ""
        """What new requests mean; empty before anything is loaded."""
        self._newest = ""
        """What was configured last; other networks than ``_served`` from a swap's load until it is turned to."""
        self._lacking = ""
        """What it loads now or could not load; empty: neither."""
        self._is_behind = False
        """Whether requests mean what it could not load: Ray Serve then replaces it."""
        self._keep_s = 0.0
        self._loading = asyncio.Lock()
        self._ending: dict[str, asyncio.Task[None]] = {}
        """What ends an engine, by the digest of what it serves."""
        self._needed_s: dict[str, float] = {}
        """When an engine that ends was needed last, by the same."""
        self._requests = set[asyncio.Task[Any]]()
        """What is under way."""

    async def reconfigure(self, tables: Tables) -> None:
        """As ``prepare``; networks that cannot be loaded leave what is served already.

        Called by Ray Serve at the start, and when the recipe that is served changes.
        """
        with keeping_what_is_served(is_serving=bool(self._served)):
            await self.prepare(tables)

    async def prepare(self, tables: Tables) -> None:
        """Load the networks of a recipe beside those that are served; ``turn_to`` then ends the others.

        Args:
            tables: See ``write_tables`` and ``part_tables``.

        Raises:
            DataError: If a network is damaged; as for other errors, what is served stays.
        """
        async with self._loading:
            newest = digest_of(tables)
            if newest not in self._engines:
                self._lacking = newest
                self._engines[newest] = await asyncio.to_thread(load_engine, tables, self._metrics)
            elif newest in self._ending:
                self._ending.pop(newest).cancel()
            self._newest = newest
            self._lacking, self._is_behind = "", False
            self._keep_s = max(tables["recipe"]["serve"]["drain_s"], _LEAST_KEEP_S)
            self._served = self._served or newest
            for other in self._engines.keys() - {newest, self._served}:  # of a swap that was given up
                self._end_later(other, 0.0)
            if ray.is_initialized() and ray.get_runtime_context().get_actor_id():
                await self._announce(newest)  # pyright: ignore[reportCallIssue]  (Ray types it as a coroutine)

    @serve.multiplexed(max_num_models_per_replica=_MOST_ANNOUNCED)
    async def _announce(self, served: str) -> str:
        """Let Ray Serve's router know that these networks are here; calls that look for them then come here first."""
        return served

    async def turn_to(self, served: str) -> None:
        """Learn which networks new requests mean; all others end ``serve.drain_s`` after they were needed last."""
        self._turn_to(served)

    async def keep(self, served: str) -> None:
        """Learn that requests of networks of before are under way, here or in another part: these are still needed."""
        if served in self._ending:
            self._needed_s[served] = time.monotonic()

    def _turn_to(self, served: str) -> None:
        if served in self._engines and served != self._served:
            self._served = served
            if served in self._ending:
                self._ending.pop(served).cancel()
            for other in self._engines.keys() - {served, self._newest}:
                self._end_later(other, self._keep_s)
        elif served == self._lacking and not self._loading.locked():
            self._is_behind = True

    def _end_later(self, served: str, keep_s: float) -> None:
        if served not in self._ending:
            self._ending[served] = asyncio.create_task(self._end_when_idle(served, keep_s))

    async def _end_when_idle(self, served: str, keep_s: float) -> None:
        """End an engine that new requests do not mean; some are still on their way to it."""
        self._needed_s[served] = time.monotonic()
        while time.monotonic() - self._needed_s[served] < keep_s or not self._engines[served].idle:
            await asyncio.sleep(_IDLE_POLL_S)
        engine = self._engines.pop(served)
        del self._ending[served], self._needed_s[served]
        await asyncio.to_thread(engine.close)

    async def serves(self, served: str) -> bool:
        """Whether it has these networks."""
        return served in self._engines

    @property
    def _engine(self) -> "Engine":
        if not self._served:
            raise NotServing("the networks are loading")
        return self._engines[self._served]

    async def _engine_of(self, served: str) -> "Engine":
        """The engine of the networks that a request means; while it is being loaded, the request waits.

        Raises:
            OtherNetworks: If there is none.
        """
        if served == self._lacking and self._loading.locked():
            async with self._loading:
                pass
        if served in {self._newest, self._lacking}:
            self._turn_to(served)  # a replica that came during a swap may not have been told
        if served not in self._engines:
            raise OtherNetworks("other networks are served than those that the request means")
        return self._engines[served]

    async def _continued(self, served: str, hop: Hop | None) -> "tuple[Engine, Work | None]":
        """The engine of a request, and what is left of it."""
        engine = await self._engine_of(served)
        if hop is None:
            return engine, None
        try:
            if isinstance(hop.work, ObjectRef):
                return engine, await asyncio.to_thread(pickle.loads, await hop.work)
            return engine, pickle.loads(hop.work)
        except ray.exceptions.RayError as error:
            raise NotServing(f"the replica before this one has died ({type(error).__name__})") from None

    async def sample(
        self,
        served: str,
        request: SampleRequest,
        client: str = "",
        hop: Hop | None = None,
        later: Sequence[PartLoad] = (),
    ) -> Any:
        """See ``PictureModel``; a part of a chain may end with the way to the next one.

        Args:
            served: Digest of the networks that the request means.
            request: What to sample.
            client: Who asks.
            hop: What is left of the request.
            later: What the later parts have to do.

        Raises:
            OtherNetworks: If they are not here, as in all calls that name networks.
        """
        with self._under_way():
            engine, work = await self._continued(served, hop)
            return await _sent(await engine.sample(request, client, work, later))

    async def stream(
        self,
        served: str,
        request: SampleRequest,
        client: str = "",
        num_previews: int = 0,
        hop: Hop | None = None,
        later: Sequence[PartLoad] = (),
    ) -> AsyncGenerator[Event | Hop]:
        """See ``PictureModel``; a part of a chain may end with the way to the next one."""
        with self._under_way():
            engine, work = await self._continued(served, hop)
            async with aclosing(engine.stream(request, client, num_previews, work, later)) as events:
                async for event in events:
                    yield await _sent(event)

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

    async def embed_texts(self, served: str, texts: Sequence[str]) -> Vectors:
        """See ``PictureModel``."""
        return await (await self._engine_of(served)).embed_texts(texts)

    async def embed_image(self, served: str, image: Images) -> Vectors:
        """See ``PictureModel``."""
        return await (await self._engine_of(served)).embed_image(image)

    async def reduce_image(
        self, served: str, image: Images, components: Sequence[int]
    ) -> tuple[tuple[int, ...], Vectors]:
        """See ``PictureModel``."""
        return await (await self._engine_of(served)).reduce_image(image, components)

    async def cut_at(self, served: str, texts: Sequence[str]) -> list[int]:
        """See ``PictureModel``."""
        return await (await self._engine_of(served)).cut_at(texts)

    async def load(self) -> PartLoad:
        """What its engines have to do."""
        return self._engine.load()

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
        if self._is_behind:
            raise RuntimeError("requests mean networks that this replica could not load")

    def __del__(self) -> None:
        for engine in getattr(self, "_engines", {}).values():
            engine.close()


async def _sent(result: Any) -> Any:
    """A result as another process gets it; what is left of a request goes by reference, unless it is small.

    A small one costs less in the message itself than in the object store; packed, for the process that speaks HTTP and
    passes it on has no torch.
    """
    if isinstance(result, Accepted | Preview | SampledPictures):
        return result
    from pipeline.serve.work import packed

    if result.num_bytes <= _SMALL_BYTES:
        return Hop(result.step, packed(result))
    return Hop(result.step, ray.put(await asyncio.to_thread(packed, result)))
