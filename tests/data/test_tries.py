"""What is tried again, and when: after the pause that a host asks for."""

import asyncio
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.answers import asked_wait_s
from pipeline.data.fetch import Fetcher
from pipeline.data.urls import AddressRules
from tests.data.fetching import CONFIG, NEAR, PICTURE, Names, cause_of, fetch_all
from tests.data.hostile import HostileServer


def test_temporary_faults_are_tried_again_and_others_are_not(names: Names, hostile: HostileServer) -> None:
    again = ["/status?code=503&times=1", "/status?code=500&times=2"]
    once = ["/missing", "/status?code=403", "/endless", "/garbage", "/loop"]
    config = replace(CONFIG, retries=2, deadline_s=8, robots_txt=False, tdm_reservation=False)
    results = fetch_all([hostile.url + path for path in [*again, *once]] + ["http://nowhere.test/a.jpg"], config)
    assert [cause_of(result) for result in results[:2]] == [PICTURE] * 2
    counts = [hostile.requests[f"127.0.0.1{path}"] for path in [*again, *once]]
    assert counts == [2, 3, 1, 1, 1, 1, 11]
    assert cause_of(results[-1]) == "dns"


def test_retry_after_is_honoured_for_the_whole_host(hostile: HostileServer) -> None:
    config = replace(CONFIG, retries=1, deadline_s=5)
    assert cause_of(fetch_all([f"{hostile.url}/status?code=429&after=2&times=1"], config)[0]) == PICTURE
    times = hostile.times["127.0.0.1"]
    assert times[-1] - times[-2] > 1.9

    async def run() -> float:
        async with Fetcher(config, AddressRules(NEAR)) as fetcher:
            slow = asyncio.create_task(fetcher.fetch(f"{hostile.url}/status?code=503&after=2&times=2"))
            await asyncio.sleep(0.5)
            start = time.monotonic()
            with await fetcher.fetch(f"{hostile.url}/ok"):
                waited_s = time.monotonic() - start
            slow.cancel()
            return waited_s

    assert 1 < asyncio.run(run()) < 3


_DATES = (
    st.text(max_size=30)
    | st.from_regex(r"(Wed, )?[0-9]{1,3} Oct [0-9]{1,25} [0-9]{1,25}:28:00( GMT| [+-][0-9]{1,25})?", fullmatch=True)
    | st.integers(0, 6000).map(lambda count: "9" * count)
)


@given(_DATES, _DATES)
def test_any_date_to_retry_after_is_a_time_or_none(value: str, date: str) -> None:
    wait_s = asked_wait_s({"Retry-After": value, "Date": date})
    assert wait_s is None or wait_s >= 0


@pytest.mark.parametrize("off_s", [86_400, -86_400])
def test_a_date_to_retry_after_is_read_by_the_clock_of_the_server(hostile: HostileServer, off_s: int) -> None:
    config = replace(CONFIG, retries=1, deadline_s=5)
    assert cause_of(fetch_all([f"{hostile.url}/status?code=429&clock={off_s}&times=1"], config)[0]) == PICTURE
    times = hostile.times["127.0.0.1"]
    assert 1 < times[-1] - times[-2] < 4


def test_a_host_that_asks_to_wait_longer_than_the_deadline_is_left_alone(hostile: HostileServer) -> None:
    start = time.monotonic()
    config = replace(CONFIG, retries=3)
    urls = [f"{hostile.url}/status?code=503&after=3600", f"{hostile.url}/status?code=503&after=3600&second=1"]
    assert {cause_of(result) for result in fetch_all(urls, config)} == {"http-503"}
    assert time.monotonic() - start < 1.5
    assert sum(hostile.requests[target] for target in hostile.requests if "/status" in target) == 2
