"""How a worker asks the process that holds the limits of hosts: for many requests by one call."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
import ray.exceptions

from pipeline.data.hosts import NO_LEASE, HostLimits
from pipeline.errors import StepError
from pipeline.runtime.host_limits import ClusterLimits

Pairs = Sequence[tuple[str, int]]


class _Remote:
    """A method of an actor."""

    def __init__(self, method: Callable[..., Awaitable[object]]) -> None:
        self._method = method

    def remote(self, *arguments: object) -> "asyncio.Future[object]":
        return asyncio.ensure_future(self._method(*arguments))


class _Actor:
    """An actor in this process, whose calls take some turns of the loop."""

    def __init__(self, error: Exception | None = None) -> None:
        self.limits, self.sizes = HostLimits(max_per_host=1), list[int]()
        self._error = error
        self.release = _Remote(self.limits.release)
        self.start_all = _Remote(self._start_all)

    async def _start_all(self, requests: Pairs, released: Pairs) -> list[int]:
        self.sizes.append(len(requests) + len(released))
        for _ in range(5):
            await asyncio.sleep(0)
        if self._error:
            raise self._error
        return await self.limits.start_all(requests, released)


def test_requests_that_start_and_end_together_ask_together() -> None:
    async def use() -> None:
        limits = ClusterLimits(actor := _Actor())
        leases = await asyncio.gather(*(limits.start(f"host {number % 100}") for number in range(200)))
        assert sum(lease != NO_LEASE for lease in leases) == 100
        assert actor.sizes == [200]
        again = [asyncio.create_task(limits.start(f"host {number}")) for number in range(100)]
        while len(actor.sizes) < 2:  # they ask, while all places are taken
            await asyncio.sleep(0)
        for number, lease in enumerate(leases[:100]):
            await limits.release(f"host {number}", lease)
        last = await asyncio.gather(*(limits.start(f"host {number}") for number in range(100)))
        assert {await one for one in again} == {NO_LEASE}
        assert NO_LEASE not in last
        assert actor.sizes == [200, 100, 200]

    asyncio.run(use())


def test_a_request_that_is_cancelled_gives_back_what_it_asked_for() -> None:
    async def use() -> None:
        limits = ClusterLimits(_Actor())
        asked = asyncio.create_task(limits.start("a"))
        await asyncio.sleep(0)
        asked.cancel()
        await asyncio.wait([asked])
        assert await limits.start("b")
        assert await limits.start("a")

    asyncio.run(use())


@pytest.mark.parametrize(
    ("error", "heard"),
    [
        (ray.exceptions.ActorDiedError(), StepError),
        (ray.exceptions.RaySystemError("ended"), None),
        (ValueError(), None),
    ],
)
def test_every_request_hears_why_the_limits_do_not_answer(error: Exception, heard: type[Exception] | None) -> None:
    async def use() -> None:
        limits = ClusterLimits(_Actor(error))
        answers = asyncio.gather(*(limits.start(host) for host in "ab"), return_exceptions=True)
        assert [type(answer) for answer in await asyncio.wait_for(answers, 30)] == [heard or type(error)] * 2

    asyncio.run(use())


def test_what_is_given_back_while_nothing_is_asked_goes_at_once() -> None:
    async def use() -> None:
        limits = ClusterLimits(actor := _Actor())
        await limits.release("a", await limits.start("a"))
        await asyncio.sleep(0)
        assert await actor.limits.start("a")

    asyncio.run(use())
