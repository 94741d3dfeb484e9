"""Limits of a host: its requests at once and a second, and the clocks that stand still while URLs wait for a turn."""

import asyncio
import contextlib
import time
from dataclasses import replace
from typing import Any

import pytest

from pipeline.data import hosts
from pipeline.data.clocks import Clock, SharedStops
from pipeline.data.hosts import NO_LEASE, HostLimits
from pipeline.recipe.sections import DownloadResources
from tests.data.fetching import CONFIG, PICTURE, cause_of, fetch_all
from tests.data.hostile import HostileServer


def test_a_host_has_no_more_requests_than_allowed_and_another_has_its_own(hostile: HostileServer) -> None:
    urls = [f"http://127.0.0.{host}:{hostile.port}/wait?n={n}" for n in range(8) for host in (1, 2)]
    for most in (0, 2):
        hostile.most.clear()
        config = replace(CONFIG, resources=DownloadResources(max_per_host=most))
        assert {cause_of(result) for result in fetch_all(urls, config)} == {PICTURE}
        if most:
            assert [hostile.most[f"127.0.0.{host}"] for host in (1, 2)] == [2, 2]
        else:
            assert hostile.most["127.0.0.1"] > 2


def test_waiting_for_a_turn_does_not_count_as_slowness(hostile: HostileServer) -> None:
    config = replace(CONFIG, deadline_s=0.6, resources=DownloadResources(max_per_host=1))
    start = time.monotonic()
    results = fetch_all([f"{hostile.url}/wait?s=0.2&n={n}" for n in range(8)], config)
    assert {cause_of(result) for result in results} == {PICTURE}
    assert time.monotonic() - start > 1.5


class _SlowTurns(HostLimits):
    """Every turn comes later than the deadline of a URL."""

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        await asyncio.sleep(0.8)
        return await super().start(host, reservation)


@pytest.mark.parametrize("path", ["/ok", "/to?url=http://127.0.0.2:{port}/ok"])
def test_waiting_for_the_turn_of_robots_txt_does_not_count_as_slowness(hostile: HostileServer, path: str) -> None:
    url = hostile.url + path.format(port=hostile.port)
    results = fetch_all([url] * 3, replace(CONFIG, deadline_s=0.6), limits=_SlowTurns())
    assert [cause_of(result) for result in results] == [PICTURE] * 3
    assert hostile.requests["127.0.0.1/robots.txt"] == 1


def test_a_clock_stands_still_while_what_it_waits_for_does_and_ends_by_itself() -> None:
    async def ends(*, stop_s: float, join_s: float) -> float:
        """Seconds until a deadline of .2 s that joins others after a while, which stand still from the start on."""
        stops, loop = SharedStops(), asyncio.get_running_loop()

        async def stop() -> None:
            with stops.stopped("a"), stops.stopped("a"):
                await asyncio.sleep(stop_s)

        stopping, start = asyncio.create_task(stop()), loop.time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2) as deadline:
                await asyncio.sleep(join_s)
                with stops.joined("a", Clock(deadline)):
                    await asyncio.sleep(10)
        seconds = loop.time() - start
        await stopping
        assert (stops._clocks, stops._num_stops) == ({}, {})
        return seconds

    async def run() -> list[float]:
        cases = [(0.0, 0.0), (0.4, 0.0), (0.4, 0.1), (0.4, 0.3)]
        return list(await asyncio.gather(*(ends(stop_s=stop_s, join_s=join_s) for stop_s, join_s in cases)))

    assert asyncio.run(run()) == pytest.approx([0.2, 0.6, 0.5, 0.2], abs=0.14)


def test_a_host_gets_no_more_requests_a_second_than_allowed(hostile: HostileServer) -> None:
    config = replace(CONFIG, resources=DownloadResources(max_rate_per_host=10), robots_txt=False, tdm_reservation=False)
    start = time.monotonic()
    assert {cause_of(result) for result in fetch_all([f"{hostile.url}/ok?n={n}" for n in range(11)], config)} == {
        PICTURE
    }
    assert 0.9 < time.monotonic() - start < 2.5


def test_the_slot_of_a_lost_worker_is_free_again() -> None:
    async def run() -> float:
        limits = HostLimits(1, lease_s=0.5)
        await limits.start("a")
        start = time.monotonic()
        assert await limits.start("a") == NO_LEASE
        await limits.reserve("a", 1)
        return time.monotonic() - start

    assert 0.4 < asyncio.run(run()) < 1


def test_limits_forget_hosts(hostile: HostileServer) -> None:
    limits: Any = HostLimits(2, 0.0)
    fetch_all([f"{hostile.url}/ok", f"{hostile.url}/missing", f"{hostile.url}/silent"], limits=limits)
    assert limits._hosts == {}


@pytest.mark.parametrize("is_paused", [False, True])
def test_limits_forget_hosts_that_were_to_wait(is_paused: bool) -> None:
    async def run() -> tuple[int, int]:
        limits: Any = HostLimits(0, 0 if is_paused else 5.0)
        for number in range(1000):
            lease = await limits.start(f"host-{number}")
            if is_paused:
                await limits.pause(f"host-{number}", 0.2)
            await limits.release(f"host-{number}", lease)
        await asyncio.sleep(0.3)
        await limits.start("last")
        return len(limits._hosts), len(limits._idle)

    assert asyncio.run(run()) == (1, 0)


def test_limits_remember_a_host_until_it_may_be_asked_again() -> None:
    async def run() -> float:
        limits = HostLimits(0, 2.0)
        await limits.release("a", await limits.start("a"))
        await limits.release("b", await limits.start("b"))
        start = time.monotonic()
        assert await limits.start("a") == NO_LEASE
        await limits.reserve("a", 1)
        return time.monotonic() - start

    assert 0.4 < asyncio.run(run()) < 1


@pytest.mark.parametrize("seconds", [1e9, float("inf")])
def test_no_host_is_paused_for_the_whole_run(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    monkeypatch.setattr(hosts, "LONGEST_PAUSE_S", 0.3)

    async def run() -> int:
        limits = HostLimits()
        await limits.pause("a", seconds)
        return await limits.start("a", await limits.reserve("a", 1))

    assert asyncio.run(run()) != NO_LEASE
