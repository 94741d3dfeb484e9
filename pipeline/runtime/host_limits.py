"""What all workers of a download share of hosts: their limits, or their pauses alone where they have no limits.

One actor holds it (``pipeline.data.hosts``).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions

from pipeline.data.hosts import NO_LEASE, HostLimits, HostPauses, Limits
from pipeline.errors import StepError
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import cluster_has_roles, controller_options

_NAME = "download-limits"
_LEASE_SPARE_S = 60.0
_SPARE_REQUESTS = 1000
_LOOK_EVERY_S = 1.0
"""Between two looks of a worker at the pauses that others have heard of: 256 workers take the actor an eighth of its
processor."""
SHARDS_AT_ONCE = 2
"""Shards that one worker downloads at a time."""


class ClusterLimits:
    """The limits of hosts that all workers share.

    A call takes the actor about half a millisecond of its processor, however much it asks for. So what a worker has to
    start and to give back while a call is under way goes together with the next one.

    Args:
        actor: The actor that holds them. If its process is lost, it starts again and knows of no request: for as long
            as those under way last, a host may have more than it should.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        """One request of this worker asks for a host at a time, so that few wait at the actor if it is crowded."""
        self._requests: list[_Request] = []
        self._released: list[tuple[str, int]] = []
        self._calls: asyncio.Task[None] | None = None

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        """See ``pipeline.data.hosts.Limits``.

        Raises:
            StepError: If the actor is gone for good.
        """
        request = _Request(host, reservation, asyncio.get_running_loop().create_future())
        self._requests.append(request)
        if not self._is_calling:
            self._calls = asyncio.create_task(self._call())
        with _gone():
            return await request.lease

    async def reserve(self, host: str, patience_s: float) -> int:
        """See ``pipeline.data.hosts.Limits``.

        Raises:
            StepError: If the actor is gone for good.
        """
        turn = self._turns.get(host) or asyncio.Lock()
        self._turns[host] = turn
        with _gone():
            async with turn:
                return await self._actor.reserve.remote(host, patience_s)

    async def release(self, host: str, lease: int) -> None:
        """See ``pipeline.data.hosts.Limits``."""
        if self._is_calling:
            self._released.append((host, lease))
        else:
            self._actor.release.remote(host, lease)

    async def pause(self, host: str, seconds: float) -> None:
        """See ``pipeline.data.hosts.Limits``."""
        self._actor.pause.remote(host, seconds)

    @property
    def _is_calling(self) -> bool:
        return self._calls is not None and not self._calls.done()

    async def _call(self) -> None:
        """Ask the actor until nothing waits."""
        while self._requests or self._released:
            requests, self._requests = self._requests, []
            released, self._released = self._released, []
            try:
                answer = self._actor.start_all.remote([(one.host, one.reservation) for one in requests], released)
                if not requests:  # nobody waits for it
                    return
                leases: list[tuple[_Request, int]] = list(zip(requests, await answer, strict=True))
            except Exception as error:  # noqa: BLE001  (whoever asked gets it)
                for request in requests:
                    if not request.lease.done():
                        request.lease.set_exception(error)
                continue
            for request, lease in leases:
                if not request.lease.done():
                    request.lease.set_result(lease)
                elif lease != NO_LEASE:  # who asked has been cancelled
                    self._released.append((request.host, lease))


@dataclass(frozen=True)
class _Request:
    host: str
    reservation: int
    lease: asyncio.Future[int]
    """The actor's answer."""


@contextlib.contextmanager
def _gone() -> Generator[None]:
    """Say what is lost with the actor."""
    try:
        yield
    except ray.exceptions.RayActorError as error:
        raise StepError(
            f"download: the process that keeps download.resources.max_per_host and max_rate_per_host is gone "
            f"({type(error).__name__}); run again to continue"
        ) from error


class ClusterPauses(HostLimits):
    """The pauses of hosts that have no limits: what one worker is told by a host, all keep a second later.

    A request asks nobody: the actor hears of each pause, and is looked at now and then while requests start.

    Args:
        actor: The actor that holds them. A download goes on without it.
        deadline_s: Longest pause that others hear of: a longer one ends rows, and one server of a host that has many
            must not end those of all workers.
    """

    def __init__(self, actor: Any, deadline_s: float) -> None:
        super().__init__()
        self._actor = actor
        self._deadline_s = deadline_s
        self._number = 0
        """The newest pause that this worker has heard of."""
        self._next_look = 0.0
        self._look: asyncio.Task[None] | None = None

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        """See ``pipeline.data.hosts.Limits``."""
        if time.monotonic() >= self._next_look and (self._look is None or self._look.done()):
            self._next_look = time.monotonic() + _LOOK_EVERY_S
            self._look = asyncio.create_task(self._hear())
        return await super().start(host, reservation)

    async def pause(self, host: str, seconds: float) -> None:
        """See ``pipeline.data.hosts.Limits``."""
        await super().pause(host, seconds)
        if seconds <= self._deadline_s:
            self._actor.pause.remote(host, seconds)

    async def _hear(self) -> None:
        """Keep what others have heard of since the last look."""
        with contextlib.suppress(ray.exceptions.RayError):
            self._number, pauses = await self._actor.since.remote(self._number)
            for host, seconds in pauses:
                await super().pause(host, seconds)


@contextlib.contextmanager
def shared_limits(context: StepContext) -> Generator[None]:
    """An actor with what the workers share of hosts, inside the block, if it is anything; on the machine that stays."""
    config = context.recipe.download
    needs = config.resources
    if not _are_limited(context) and not _are_paused_by_all(context):
        yield
        return
    options = controller_options(has_roles=cluster_has_roles()) | {
        "name": _name(context),
        "max_restarts": -1,
        "max_task_retries": -1,
        # Beyond it, the calls that give a slot back would stand behind those that wait for one: one for each host of
        # the rows that a worker has begun.
        "max_concurrency": needs.num_workers * SHARDS_AT_ONCE * config.samples_per_shard + _SPARE_REQUESTS,
    }
    actor_class: Any = ray.remote(HostLimits if _are_limited(context) else HostPauses).options(**options)
    if _are_limited(context):
        lease_s = config.deadline_s + _LEASE_SPARE_S
        actor = actor_class.remote(needs.max_per_host, needs.max_rate_per_host, lease_s=lease_s)
    else:
        actor = actor_class.remote()
    try:
        yield
    finally:
        ray.kill(actor)


def find_limits(context: StepContext) -> Limits | None:
    """What ``shared_limits`` shares, in a worker; None: nothing."""
    if _are_limited(context):
        return ClusterLimits(ray.get_actor(_name(context)))
    if _are_paused_by_all(context):
        return ClusterPauses(ray.get_actor(_name(context)), context.recipe.download.deadline_s)
    return None


def _are_limited(context: StepContext) -> bool:
    """Whether the recipe limits the requests to a host."""
    needs = context.recipe.download.resources
    return bool(needs.max_per_host or needs.max_rate_per_host)


def _are_paused_by_all(context: StepContext) -> bool:
    """Whether several workers ask hosts that may ask them to wait: not one's own files, and not the demo's server."""
    return context.recipe.pairs.source == "list" and context.recipe.download.resources.num_workers > 1


def _name(context: StepContext) -> str:
    return f"{_NAME}-{context.output.uri}"
