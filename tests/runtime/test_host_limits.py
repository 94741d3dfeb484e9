"""How a worker asks the process that holds the limits of hosts: for many requests by one call."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
import ray.exceptions

from pipeline.data import hosts
from pipeline.data.hosts import NO_LEASE, HostLimits, HostPauses
from pipeline.errors import StepError
from pipeline.runtime import host_limits
from pipeline.runtime.host_limits import ClusterLimits, ClusterPauses

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


class _PausesActor:
    """An actor of pauses in this process, which counts how often it is looked at."""

    def __init__(self, error: Exception | None = None) -> None:
        self.pauses, self.num_looks = HostPauses(), 0
        self._error = error
        self.pause = _Remote(self.pauses.pause)
        self.since = _Remote(self._since)

    async def _since(self, number: int) -> tuple[int, list[tuple[str, float]]]:
        self.num_looks += 1
        if self._error:
            raise self._error
        return await self.pauses.since(number)


async def _turns(num_turns: int = 10) -> None:
    for _ in range(num_turns):
        await asyncio.sleep(0)


def test_a_pause_that_a_host_asks_of_one_worker_holds_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        monkeypatch.setattr(host_limits, "_LOOK_EVERY_S", 1e9)
        actor = _PausesActor()
        one, other = ClusterPauses(actor, 60), ClusterPauses(actor, 60)
        await one.pause("busy", 60)
        await _turns()
        for _ in range(1000):
            assert await other.start("idle")
            await asyncio.sleep(0)
        assert actor.num_looks == 1  # now and then, and not for each request
        assert await other.start("busy") == NO_LEASE
        assert await other.reserve("busy", 1) == NO_LEASE
        await actor.pauses.pause("busy too", 60)
        assert await other.start("busy too")  # nobody has told it yet
        monkeypatch.setattr(host_limits, "_LOOK_EVERY_S", 0.0)
        other._next_look = 0.0
        await other.start("idle")
        await _turns()
        assert await other.start("busy too") == NO_LEASE

    asyncio.run(use())


def test_a_pause_that_ends_the_rows_of_one_worker_ends_no_others() -> None:
    async def use() -> None:
        actor = _PausesActor()
        one, other = ClusterPauses(actor, 30), ClusterPauses(actor, 30)
        await one.pause("for long", 31)
        await one.pause("for a while", 30)
        await _turns()
        assert await other.start("idle")
        await _turns()
        assert [await one.start(host) for host in ("for long", "for a while")] == [NO_LEASE] * 2
        assert await other.start("for long")
        assert await other.start("for a while") == NO_LEASE

    asyncio.run(use())


def test_workers_go_on_without_the_process_that_holds_the_pauses() -> None:
    async def use() -> None:
        limits = ClusterPauses(actor := _PausesActor(ray.exceptions.ActorDiedError()), 60)
        assert await limits.start("a")
        await _turns()
        limits._next_look = 0.0
        assert await limits.start("a")
        await _turns()
        assert actor.num_looks == 2
        await limits.pause("a", 60)
        assert await limits.start("a") == NO_LEASE

    asyncio.run(use())


def test_pauses_are_told_once_while_they_last_also_by_a_process_that_starts_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def use() -> None:
        pauses = HostPauses()
        for host, seconds in (("short", 0.0), ("long", 60.0), ("longest", 1e9), ("long", 1.0)):
            await pauses.pause(host, seconds)
        number, news = await pauses.since(0)
        assert [(host, round(seconds)) for host, seconds in news] == [("long", 60), ("longest", 3600)]
        assert await pauses.since(number) == (number, [])
        monkeypatch.setattr(hosts, "LONGEST_PAUSE_S", 0.0)
        pauses = HostPauses()
        for host in range(100):
            await pauses.pause(str(host), 60)
        assert len(pauses._pauses) <= 1
        monkeypatch.setattr(hosts, "LONGEST_PAUSE_S", 60.0)
        await pauses.pause("new", 60)
        assert [host for host, _ in (await pauses.since(number))[1]] == ["new"]

    asyncio.run(use())
