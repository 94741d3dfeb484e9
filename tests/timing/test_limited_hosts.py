"""Few rows of each host with limits are fetched, and say what all of them take."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.recipe.sections import DownloadConfig, DownloadResources
from pipeline.timing.limited_hosts import LimitedHosts


def _urls(counts: dict[str, int]) -> list[str]:
    return [f"http://{host}/{row}" for host, count in counts.items() for row in range(count)]


def _hosts(urls: Sequence[str], **limits: Any) -> LimitedHosts:
    return LimitedHosts(DownloadConfig(resources=DownloadResources(**limits)), urls)


def _ask(hosts: LimitedHosts, requests: dict[str, int]) -> None:
    """Both policies of each host, and its pictures, one after another."""

    async def run() -> None:
        for host, count in requests.items():
            for _ in range(2 + count):
                await hosts.release(host, await hosts.start(host, await hosts.reserve(host, 60)))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("limits", "fetched"),
    [
        ({}, {"a": 200, "b": 56}),
        ({"max_rate_per_host": 10.0}, {"a": 50, "b": 50}),  # five seconds
        ({"max_rate_per_host": 0.1}, {"a": 8, "b": 8}),  # too few to go on with, otherwise
        ({"max_per_host": 2}, {"a": 32, "b": 32}),
        ({"max_per_host": 2, "max_rate_per_host": 2.0}, {"a": 10, "b": 10}),
    ],
)
def test_rows_of_each_host_that_are_fetched(limits: dict[str, Any], fetched: dict[str, int]) -> None:
    urls = _urls({"a": 200, "b": 56})
    hosts = _hosts(urls, **limits)
    assert Counter(urls[row].split("/")[2] for row in hosts.rows) == fetched
    assert hosts.rows == sorted(hosts.rows)


def test_other_rows_of_the_same_hosts_follow_those_that_were_chosen_first() -> None:
    urls = _urls({"a": 200, "b": 10})
    hosts = _hosts(urls, max_rate_per_host=0.1)
    first, wait_s = hosts.rows.copy(), hosts.wait_s
    hosts.choose(16)
    assert hosts.rows == first
    hosts.choose(23)
    assert hosts.rows[:16] == first
    assert Counter(urls[row].split("/")[2] for row in hosts.rows) == {"a": 13, "b": 10}
    assert hosts.wait_s - wait_s == pytest.approx(50)
    hosts.choose(1000)
    assert sorted(hosts.rows) == list(range(210))


def test_all_rows_of_many_hosts_and_of_none_are_fetched() -> None:
    urls = [*_urls({f"host-{number}": 1 for number in range(40)}), *[f"file:///{row}.png" for row in range(40)], "bad"]
    hosts = _hosts(urls, max_rate_per_host=0.1)
    assert hosts.rows == list(range(81))
    assert hosts.wait_s == pytest.approx(20)  # two policies and one picture, ten seconds apart


def test_a_host_of_which_few_rows_are_fetched_counts_with_all_of_its_rows() -> None:
    hosts = _hosts(_urls({"large": 90, "small": 10}), max_rate_per_host=2.0)
    assert len(hosts.rows) == 20
    assert hosts.num_good([*[True] * 10, *[False] * 10]) == 90
    assert hosts.num_good([*[False] * 5, *[True] * 15]) == 55


@pytest.mark.parametrize(
    ("requests", "num_waits"),
    [
        ({"large": 20, "small": 20}, 80),
        ({"small": 20}, 19),
        ({"large": 20, "small": 20, "other": 40}, 100),  # to which each of them redirects
    ],
)
def test_the_host_with_the_most_rows_decides(
    monkeypatch: pytest.MonkeyPatch, requests: dict[str, int], num_waits: int
) -> None:
    monkeypatch.setattr("pipeline.timing.limited_hosts._REQUESTS_S", 0.02)
    hosts = _hosts(_urls({"large": 81, "small": 20}), max_rate_per_host=1000.0)
    _ask(hosts, requests)
    assert hosts.row_s() == pytest.approx(num_waits / 1000 / 100)


def test_hosts_of_one_row_each_hold_up_nothing() -> None:
    counts = {f"host-{number}": 1 for number in range(20)}
    hosts = _hosts(_urls(counts), max_per_host=1)
    _ask(hosts, counts)
    assert hosts.row_s() == 0
