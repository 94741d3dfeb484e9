"""Who has a connection while hosts have limits: nobody waits with one, and no request waits for one after its turn."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data import hosts, resolver
from pipeline.data.causes import FetchError
from pipeline.data.clocks import Clock
from pipeline.data.connections import Connections
from pipeline.data.download import Downloader
from pipeline.data.fetch import Fetcher
from pipeline.data.hosts import NO_LEASE, HostLimits
from pipeline.data.resolver import HostCache
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig, DownloadResources
from tests.data.downloading import files_in, rows_of
from tests.data.hostile import HostileServer

_CONFIG = DownloadConfig(
    image_px=32,
    timeout_s=1,
    retries=0,
    robots_txt=False,
    tdm_reservation=False,
    extra_columns=("score",),
    resources=DownloadResources(max_per_host=1),
)
_WITH_ROBOTS = replace(_CONFIG, robots_txt=True, deadline_s=0.6)
_NEAR = AddressRules(["127.0.0.0/8"])
Names = dict[str, tuple[float, list[str]]]


async def _until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.01)


async def _row(fetcher: Fetcher, connections: Connections, url: str) -> str:
    """Fetch a URL as a row does: how it ends."""
    async with connections:
        try:
            with await fetcher.fetch(url):
                return "ok"
        except FetchError as error:
            return error.cause


async def _hold(connections: Connections, until: Awaitable[object]) -> None:
    async with connections:
        await until


def test_who_comes_back_is_served_before_those_that_begin() -> None:
    order = list[str]()

    async def run() -> None:
        connections, ends = Connections(2), asyncio.Event()

        async def come_back(name: str, *, has_turn: bool) -> None:
            async with connections, asyncio.timeout(20) as deadline:
                async with connections.lent(Clock(deadline), has_turn=has_turn):
                    await ends.wait()
                order.append(name)

        back = [asyncio.create_task(come_back(f"turn {has_turn}", has_turn=has_turn)) for has_turn in (False, True)]
        await asyncio.sleep(0)
        held = [asyncio.create_task(_hold(connections, asyncio.sleep(0.2))) for _ in range(2)]
        await asyncio.sleep(0)

        async def begin() -> None:
            async with connections:
                order.append("begins")

        begun = [asyncio.create_task(begin()) for _ in range(3)]
        await asyncio.sleep(0)
        ends.set()
        begun[0].cancel()
        await asyncio.gather(*back, *held, *begun[1:])
        assert connections._num_free == 2

    asyncio.run(run())
    assert order == ["turn True", "turn False", "begins", "begins"]


def test_a_turn_that_is_kept_delays_the_next_one_and_a_pause_takes_it_back() -> None:
    async def run() -> None:
        limits = HostLimits(0, 1000.0)
        await limits.start("a")
        first = await limits.reserve("a", 1)
        second = asyncio.create_task(limits.reserve("a", 1))
        await asyncio.sleep(0.05)  # of fifty requests
        assert not second.done()
        assert await limits.start("a") == NO_LEASE  # nobody overtakes
        assert await limits.start("a", first) != NO_LEASE
        reservation = await second
        await limits.pause("a", 0.1)
        assert await limits.start("a", reservation) == NO_LEASE
        assert await limits.start("a", await limits.reserve("a", 1)) != NO_LEASE

    asyncio.run(run())


@pytest.mark.parametrize(("max_per_host", "rate"), [(1, 0.0), (0, 20.0)])
def test_what_a_lost_worker_had_asked_for_holds_a_host_up_for_a_moment(
    max_per_host: int, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "RESERVATION_S", 0.05)

    async def run() -> None:
        limits = HostLimits(max_per_host, rate, lease_s=90)
        lost = [asyncio.create_task(limits.reserve("a", 1)) for _ in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(20):
            reservation = await limits.reserve("a", 1)
        assert all(one.done() for one in lost)
        assert await limits.start("a", reservation) != NO_LEASE

    asyncio.run(run())


class _NotedLimits(HostLimits):
    """Notes turns and requests."""

    num_reserved = num_started = 0
    is_asked = False

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        lease = await super().start(host, reservation)
        self.num_started += lease != NO_LEASE
        return lease

    async def reserve(self, host: str, patience_s: float) -> int:
        self.is_asked = True
        reservation = await super().reserve(host, patience_s)
        self.num_reserved += 1
        return reservation


@contextlib.asynccontextmanager
async def _row_at_its_turn(
    url: str, limits: _NotedLimits, connections: Connections, ends: asyncio.Event
) -> AsyncGenerator[tuple[asyncio.Task[str], asyncio.Task[None]]]:
    """A row whose host's turn has come, and another that holds the one connection until ``ends``."""
    async with Fetcher(_CONFIG, _NEAR, limits, connections) as fetcher:
        lease = await limits.start("127.0.0.1")
        row = asyncio.create_task(_row(fetcher, connections, f"{url}/ok"))
        await _until(lambda: limits.is_asked)
        other = asyncio.create_task(_hold(connections, ends.wait()))
        await asyncio.sleep(0)
        await limits.release("127.0.0.1", lease)
        await _until(lambda: limits.num_reserved == 1)
        yield row, other


def test_no_request_starts_at_its_hosts_turn_without_a_connection(hostile: HostileServer) -> None:
    async def run() -> None:
        limits, connections, ends = _NotedLimits(1), Connections(1), asyncio.Event()
        async with _row_at_its_turn(hostile.url, limits, connections, ends) as (row, other):
            await asyncio.sleep(0.05)
            assert limits.num_started == 1
            ends.set()
            assert await row == "ok"
            await other
            assert (limits.num_started, limits._hosts) == (2, {})

    asyncio.run(run())


def test_a_row_whose_turn_is_over_waits_for_another_one(
    hostile: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosts, "RESERVATION_S", 0.1)

    async def run() -> None:
        limits, connections, ends = _NotedLimits(1), Connections(1), asyncio.Event()
        async with asyncio.timeout(20), _row_at_its_turn(hostile.url, limits, connections, ends) as (row, other):
            lease = await limits.start("127.0.0.1", await limits.reserve("127.0.0.1", 1))
            limits.is_asked = False
            ends.set()
            await _until(lambda: limits.is_asked)
            assert limits.num_started == 2
            await limits.release("127.0.0.1", lease)
            assert await row == "ok"
            await other
            assert (limits.num_started, limits._hosts) == (3, {})

    asyncio.run(run())


def test_a_row_that_is_stopped_at_its_turn_gives_the_turn_back(hostile: HostileServer) -> None:
    async def run() -> None:
        limits, connections, ends = _NotedLimits(1), Connections(1), asyncio.Event()
        async with _row_at_its_turn(hostile.url, limits, connections, ends) as (row, other):
            row.cancel()
            await asyncio.wait([row])
            assert limits._hosts == {}
            ends.set()
            await other
            assert connections._num_free == 1

    asyncio.run(run())


def test_a_wait_for_a_connection_after_the_policy_does_not_count_as_slowness(hostile: HostileServer) -> None:
    async def run() -> str:
        connections = Connections(1)
        async with Fetcher(_WITH_ROBOTS, _NEAR, None, connections) as fetcher:
            row = _row(fetcher, connections, f"{hostile.url}/ok")
            result, _ = await asyncio.gather(row, _hold(connections, asyncio.sleep(2 * _WITH_ROBOTS.deadline_s)))
            return result

    assert asyncio.run(run()) == "ok"


def test_a_row_whose_time_is_over_waits_for_no_connection(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.1"] = "stall"

    async def run() -> str:
        connections, ends = Connections(1), asyncio.Event()
        async with Fetcher(_WITH_ROBOTS, _NEAR, None, connections) as fetcher:
            row = asyncio.create_task(_row(fetcher, connections, f"{hostile.url}/ok"))
            await asyncio.sleep(0)
            other = asyncio.create_task(_hold(connections, ends.wait()))
            result = await asyncio.wait_for(row, 20)
            ends.set()
            await other
            assert connections._num_free == 1
        return result

    assert asyncio.run(run()) == "deadline"


def test_a_crowded_host_keeps_its_limit_and_is_not_left_behind(
    hostile: HostileServer, names: Names, tmp_path: Path
) -> None:
    names |= {f"host-{number}.test": (0, ["127.0.0.1"]) for number in range(81)}
    urls = [f"http://host-0.test:{hostile.port}/wait?n={number}" for number in range(8)]
    urls += [f"http://host-{number}.test:{hostile.port}/wait" for number in range(1, 81)]
    config = replace(_CONFIG, resources=DownloadResources(max_per_host=2, num_connections=4))
    with Downloader(config, _NEAR, HostLimits(2, lease_s=1)) as downloader:  # the queue is longer than a lease
        assert downloader.download(rows_of(urls), "00000", files_in(tmp_path))["ok"] == 88
    assert hostile.most["host-0.test"] == 2
    others = sorted(hostile.times[f"host-{number}.test"][0] for number in range(1, 81))
    assert hostile.times["host-0.test"][-1] < others[60]


def test_policies_are_asked_for_some_at_a_time(hostile: HostileServer, names: Names, tmp_path: Path) -> None:
    hosts = [f"host-{number}.test" for number in range(40)]
    names |= {host: (0, ["127.0.0.1"]) for host in hosts}
    hostile.robots = dict.fromkeys(hosts, "slow")
    resources = DownloadResources(max_per_host=1, num_connections=2)
    config = replace(_CONFIG, robots_txt=True, tdm_reservation=True, deadline_s=20, resources=resources)
    with Downloader(config, _NEAR) as downloader:
        urls = [f"http://{host}:{hostile.port}/ok" for host in hosts]
        assert downloader.download(rows_of(urls), "00000", files_in(tmp_path))["ok"] == 40
    # Pictures, and two files for each of as many hosts; a busy server sees the end of each later than the client does.
    assert hostile.most_in_all <= 2 * (2 + 2 * 2)


def test_each_connection_may_wait_for_a_slow_name(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = threading.Barrier(3)

    def addresses(_host: str) -> list[str]:
        slow.wait(60)
        return ["127.0.0.1"]

    monkeypatch.setattr(resolver, "_LOOKUPS_AT_ONCE", 2)
    monkeypatch.setattr(resolver, "_addresses", addresses)
    config = replace(_CONFIG, resources=DownloadResources(num_connections=3))

    async def run() -> list[str]:
        connections = Connections(3)
        async with asyncio.timeout(30), Fetcher(config, _NEAR, None, connections) as fetcher:
            urls = [f"http://host-{number}.test:{hostile.port}/ok" for number in range(3)]
            return await asyncio.gather(*(_row(fetcher, connections, url) for url in urls))

    assert asyncio.run(run()) == ["ok"] * 3


def test_an_error_of_a_host_is_remembered_from_its_end_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "_FAILURE_TTL_S", 0.2)
    asked = list[str]()

    async def ask(key: str) -> FetchError:
        asked.append(key)
        await asyncio.sleep(0.3)
        return FetchError("connect")

    async def run() -> None:
        cache = HostCache[str](ask, 10)
        for _ in range(2):
            with pytest.raises(FetchError):
                await cache.get("a")
        assert cache.knows("a")

    asyncio.run(run())
    assert asked == ["a"]


def test_the_results_of_hosts_take_no_more_than_they_may_and_the_oldest_go() -> None:
    asked = list[str]()

    async def ask(key: str) -> str | FetchError:
        asked.append(key)
        if key == "late":
            await asyncio.sleep(0.1)
        return FetchError("connect") if key == "error" else key * 40

    async def run() -> None:
        cache = HostCache[str](ask, 10, size_of=len, most_bytes=100)
        late = asyncio.create_task(cache.get("late"))
        await asyncio.sleep(0)
        for key in ("a", "b", "b", "c", "c", "b"):
            assert await cache.get(key) == key * 40
        with pytest.raises(FetchError):
            await cache.get("error")
        assert asked == ["late", "a", "b", "c", "error"]
        assert [cache.knows(key) for key in ("late", "a", "b", "c", "error")] == [False, False, True, True, True]
        await asyncio.gather(late, cache.get("late"))  # which is asked for once, though it is the oldest
        assert asked.count("late") == 1
        assert [cache.knows(key) for key in ("late", "b", "c", "error")] == [True, False, False, True]
        await cache.get("b")
        assert [cache.knows(key) for key in ("late", "b")] == [False, True]
        assert cache._num_bytes == 40

    asyncio.run(run())


def test_the_result_that_came_first_goes_first_whenever_it_was_asked_for() -> None:
    may_come = asyncio.Event()

    async def ask(key: str) -> str:
        if key == "slow":
            await may_come.wait()
        return "" if key.startswith("empty") else key * 10

    async def run() -> None:
        cache = HostCache[str](ask, 10, size_of=len, most_bytes=100)
        slow = asyncio.create_task(cache.get("slow"))
        await asyncio.sleep(0)
        for key in ("empty 1", "fast", "empty 2"):
            await cache.get(key)
        may_come.set()
        await slow
        assert list(cache._sized) == ["fast", "slow"]  # what takes nothing is not looked through
        await cache.get("last")
        assert [cache.knows(key) for key in ("slow", "fast", "last", "empty 1")] == [True, False, True, True]

    asyncio.run(run())


def test_a_rate_slower_than_the_deadline_is_no_pause_that_the_host_asks_for() -> None:
    async def run() -> None:
        limits = HostLimits(max_rate=0.1)
        assert await limits.start("a") != NO_LEASE
        turn = asyncio.create_task(limits.reserve("a", 1))
        await asyncio.sleep(0.05)
        assert not turn.done()
        await limits.pause("a", 60)
        assert await turn == NO_LEASE

    asyncio.run(run())
