"""The networks in replicas that Ray Serve places on machines; remote_model.py has the calls that reach them.

A replica has all networks, or a part of them (``serve.mode = "chain"``). A request then goes from part to part: the
process that speaks HTTP calls one after another, and what is left of the request stays in Ray's object store.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
import ray.exceptions
from ray import ObjectRef, serve
from ray.serve.handle import DeploymentHandle

from models.request import SampleRequest
from pipeline.runtime.loading import load_engine
from pipeline.runtime.parts import (
    Tables,
)
from pipeline.serve.estimate import PartLoad
from pipeline.serve.protocols import Accepted, Event, Images, NotServing, Preview, SampledPictures, Vectors

if TYPE_CHECKING:
    from pipeline.serve.engine import Engine
    from pipeline.serve.work import Work

_IDLE_POLL_S = 0.2


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
                self._engines[served] = await asyncio.to_thread(load_engine, tables)
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

    async def sample(
        self, request: SampleRequest, client: str = "", hop: Hop | None = None, later: Sequence[PartLoad] = ()
    ) -> Any:
        """See ``PictureModel``; a part of a chain may end with the way to the next one."""
        with self._under_way():
            served, engine, work = await self._continued(hop)
            return _sent(await engine.sample(request, client, work, later), served)

    async def stream(
        self,
        request: SampleRequest,
        client: str = "",
        num_previews: int = 0,
        hop: Hop | None = None,
        later: Sequence[PartLoad] = (),
    ) -> AsyncGenerator[Event | Hop]:
        """See ``PictureModel``; a part of a chain may end with the way to the next one."""
        with self._under_way():
            served, engine, work = await self._continued(hop)
            async with aclosing(engine.stream(request, client, num_previews, work, later)) as events:
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

    async def load(self) -> PartLoad:
        """What its engine has to do."""
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
