"""The fetcher against a server and names that do everything wrong: every URL has its class, and ends in time."""

import asyncio
import base64
import contextlib
import os
import socket
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data import bodies, fetch, hosts
from pipeline.data.causes import CLASSES, FetchError
from pipeline.data.clocks import Clock, SharedStops
from pipeline.data.fetch import Fetcher, user_agent
from pipeline.data.hosts import NO_LEASE, HostLimits, Limits
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadConfig, DownloadResources
from tests.data.conftest import make_picture
from tests.data.hostile import DEAD_ADDRESSES, HostileServer, dead_addresses

_CONFIG = DownloadConfig(timeout_s=1, deadline_s=3.5, retries=0, max_body_bytes=2_000_000)
_SPARE_S = 2.0
_NEAR = ("127.0.0.0/8",)
Names = dict[str, tuple[float, list[str]]]


def _fetch(
    urls: Sequence[str],
    config: DownloadConfig = _CONFIG,
    networks: Sequence[str] = _NEAR,
    *,
    folders: Sequence[str] = (),
    limits: Limits | None = None,
) -> list[bytes | FetchError]:
    """Fetch URLs at once: the bytes of each, or its error."""

    async def one(fetcher: Fetcher, url: str) -> bytes | FetchError:
        try:
            with await fetcher.fetch(url) as body:
                return body.read()
        except FetchError as error:
            return error

    async def run() -> list[bytes | FetchError]:
        async with Fetcher(config, AddressRules(networks, folders), limits) as fetcher:
            return await asyncio.gather(*(one(fetcher, url) for url in urls))

    return asyncio.run(run())


def _cause(result: bytes | FetchError) -> str:
    return result.cause if isinstance(result, FetchError) else f"{len(result)} bytes"


_PICTURE = f"{len(make_picture(0))} bytes"
_FAULTS = {
    "/ok": _PICTURE,
    "/silent": "timeout",
    "/half-head": "timeout",
    "/drip-head": "deadline",
    "/half-body": "timeout",
    "/drip": "deadline",
    "/endless": "body-size",
    "/short": "body-cut",
    "/claims-much": "body-size",
    "/cut-chunks": "body-cut",
    "/garbage": "protocol",
    "/long-head": "protocol",
    "/reset": "lost",
    "/reset-body": "body-cut",
    "/loop": "redirects",
    "/nowhere": "redirects",
    "/missing": "http-404",
    "/status?code=500": "http-500",
    "/status?code=429": "http-429",
    "/status?code=503&after=1": "http-503",
    "/status?code=429&after=Wed,%2021%20Oct%2099999999999999999999%2007:28:00%20GMT": "http-429",
    "/status?code=503&after=Fri,%2027%20Nov%202026%2007:28:00%20GMT&date=Wed,%2021%20Oct%20999999999999%2007:28:00": "http-503",
    "/status?code=503&date=Mon,%2001%20Jan%200001%2000:00:00%20%2B2359": "http-503",
    "/gzip?what=picture": _PICTURE,
    "/gzip?what=lie": _PICTURE,
    "/gzip?what=bomb": "body-size",
    "/gzip?what=cut": "body-cut",
    "/gzip?what=broken": "encoding",
    "/brotli": "encoding",
    "/to?url=/ok": _PICTURE,
    "/to?url=//127.0.0.1:1/": "connect",
    "/to?url=file:///etc/hostname": "scheme",
    "/to?url=data:image/png;base64,AAAA": "scheme",
    "/to?url=http://": "url",
    "/header?name=X-Robots-Tag&value=noai": "x-robots-tag",
    "/header?name=X-Robots-Tag&value=other:noai": _PICTURE,
    "/header?name=X-Robots-Tag&value=noai,%20max-image-preview:large": "x-robots-tag",
    "/header?name=tdm-reservation&value=1": "tdm",
}


def test_every_fault_of_a_server_has_its_class_and_ends_in_time(hostile: HostileServer) -> None:
    start = time.monotonic()
    results = _fetch([hostile.url + path for path in _FAULTS])
    assert time.monotonic() - start < _CONFIG.deadline_s + _SPARE_S
    assert {path: _cause(result) for path, result in zip(_FAULTS, results, strict=True)} == _FAULTS
    classes = {cause.partition("-")[0] if cause.startswith("http-") else cause for cause in _FAULTS.values()}
    assert classes - {_PICTURE} <= CLASSES.keys()


def test_a_picture_comes_as_it_was_sent(hostile: HostileServer) -> None:
    assert _fetch([f"{hostile.url}/ok?seed={seed}" for seed in range(20)]) == [make_picture(seed) for seed in range(20)]


@pytest.fixture
def black_holes() -> Generator[int]:
    """The port of the addresses that never answer."""
    with dead_addresses() as port:
        yield port


def test_six_dead_addresses_end_at_the_deadline(names: Names, black_holes: int) -> None:
    names["dead.test"] = (0, list(DEAD_ADDRESSES))
    start = time.monotonic()
    (result,) = _fetch([f"http://dead.test:{black_holes}/a.jpg"], replace(_CONFIG, retries=2))
    assert _cause(result) in {"deadline", "timeout"}
    assert time.monotonic() - start < _CONFIG.deadline_s + _SPARE_S


def test_a_slow_resolver_ends_at_the_deadline_and_holds_nobody_up(names: Names, hostile: HostileServer) -> None:
    names |= {f"slow-{number}.test": (12, ["127.0.0.1"]) for number in range(80)}
    names["quick.test"] = (0, ["127.0.0.1"])
    start = time.monotonic()
    slow = [f"http://slow-{number}.test:{hostile.port}/ok" for number in range(80)]
    results = _fetch([*slow, f"http://quick.test:{hostile.port}/ok"])
    assert time.monotonic() - start < _CONFIG.deadline_s + _SPARE_S
    assert [_cause(result) for result in results] == ["deadline"] * 80 + [_PICTURE]


def test_tls_that_never_answers_and_a_server_without_it_have_their_classes(hostile: HostileServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        urls = [f"https://127.0.0.1:{mute.getsockname()[1]}/a.jpg", f"https://127.0.0.1:{hostile.port}/ok"]
        start = time.monotonic()
        causes = [_cause(result) for result in _fetch(urls)]
    assert time.monotonic() - start < _CONFIG.deadline_s + _SPARE_S
    assert causes[0] in {"timeout", "deadline"}
    assert causes[1] in {"tls", "timeout", "connect"}


_OUR_SIDE = [
    "http://127.0.0.2:{port}/ok",
    "http://127.2:{port}/ok",
    "http://2130706434:{port}/ok",
    "http://0x7f000002:{port}/ok",
    "http://0177.0.0.2:{port}/ok",
    "http://[::1]:{port}/ok",
    "http://[::ffff:127.0.0.2]:{port}/ok",
    "http://[64:ff9b::7f00:2]:{port}/ok",
    "http://[fd00:ec2::254]/latest",
    "http://169.254.169.254/latest/meta-data/",
    "http://100.100.100.200/latest/meta-data/",
    "http://168.63.129.16/metadata",
    "http://10.0.0.1/",
    "http://192.168.1.1/",
    "http://0.0.0.0:{port}/ok",
    "http://localhost:{port}/ok",
    "http://inside.test:{port}/ok",
]


@pytest.mark.parametrize("way", ["{url}", "http://127.0.0.1:{port}/to?url={url}"])
def test_no_url_and_no_redirect_reaches_our_side(names: Names, hostile: HostileServer, way: str) -> None:
    names |= {"localhost": (0, ["127.0.0.2"]), "inside.test": (0, ["10.1.2.3", "127.0.0.2"])}
    urls = [way.format(url=url.format(port=hostile.port), port=hostile.port) for url in _OUR_SIDE]
    results = _fetch(urls, networks=["127.0.0.1/32"])
    assert [_cause(result) for result in results] == ["address"] * len(urls)
    assert not [target for target in hostile.requests if target.startswith("127.0.0.2")]


def test_schemes_that_read_the_worker_are_refused_and_allowed_folders_are_not(tmp_path: Path) -> None:
    inside, outside, link = tmp_path / "in" / "a b.jpg", tmp_path / "out.jpg", tmp_path / "in" / "link.jpg"
    inside.parent.mkdir()
    inside.write_bytes(b"inside")
    os.mkfifo(inside.parent / "pipe.jpg")
    outside.write_bytes(b"outside")
    link.symlink_to(outside)
    urls = [inside.as_uri(), outside.as_uri(), link.as_uri(), (inside.parent / "none.jpg").as_uri()]
    urls += [(inside.parent / "pipe.jpg").as_uri()]
    urls += ["data:image/png;base64,AAAA", "ftp://example.com/a.jpg", "gopher://127.0.0.1/"]
    assert {_cause(result) for result in _fetch(urls)} == {"scheme"}
    causes = [_cause(result) for result in _fetch(urls, folders=[str(inside.parent)])]
    assert causes == ["6 bytes", "scheme", "scheme", "file", "file", "scheme", "scheme", "scheme"]


def test_a_name_that_points_elsewhere_later_is_checked_again(names: Names, hostile: HostileServer) -> None:
    names["rebind.test"] = (0, ["127.0.0.1"])
    url = f"http://rebind.test:{hostile.port}/ok"

    async def run() -> list[str]:
        causes: list[str] = []
        async with Fetcher(_CONFIG, AddressRules(["127.0.0.1/32"])) as fetcher:
            for _ in range(2):
                with await fetcher.fetch(url) as body:
                    causes.append(f"{len(body.read())} bytes")
                names["rebind.test"] = (0, ["127.0.0.2"])
        return causes

    assert asyncio.run(run()) == [_PICTURE] * 2  # the address that was checked is the address that is used
    assert [_cause(result) for result in _fetch([url], networks=["127.0.0.1/32"])] == ["address"]
    assert not [target for target in hostile.requests if target.startswith("127.0.0.2")]


def test_temporary_faults_are_tried_again_and_others_are_not(names: Names, hostile: HostileServer) -> None:
    again = ["/status?code=503&times=1", "/status?code=500&times=2"]
    once = ["/missing", "/status?code=403", "/endless", "/garbage", "/loop"]
    config = replace(_CONFIG, retries=2, deadline_s=8, robots_txt=False, tdm_reservation=False)
    results = _fetch([hostile.url + path for path in [*again, *once]] + ["http://nowhere.test/a.jpg"], config)
    assert [_cause(result) for result in results[:2]] == [_PICTURE] * 2
    counts = [hostile.requests[f"127.0.0.1{path}"] for path in [*again, *once]]
    assert counts == [2, 3, 1, 1, 1, 1, 11]
    assert _cause(results[-1]) == "dns"


def test_retry_after_is_honoured_for_the_whole_host(hostile: HostileServer) -> None:
    config = replace(_CONFIG, retries=1, deadline_s=5)
    assert _cause(_fetch([f"{hostile.url}/status?code=429&after=2&times=1"], config)[0]) == _PICTURE
    times = hostile.times["127.0.0.1"]
    assert times[-1] - times[-2] > 1.9

    async def run() -> float:
        async with Fetcher(config, AddressRules(_NEAR)) as fetcher:
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
    wait_s = fetch._retry_after_s({"Retry-After": value, "Date": date})
    assert wait_s is None or wait_s >= 0


@pytest.mark.parametrize("off_s", [86_400, -86_400])
def test_a_date_to_retry_after_is_read_by_the_clock_of_the_server(hostile: HostileServer, off_s: int) -> None:
    config = replace(_CONFIG, retries=1, deadline_s=5)
    assert _cause(_fetch([f"{hostile.url}/status?code=429&clock={off_s}&times=1"], config)[0]) == _PICTURE
    times = hostile.times["127.0.0.1"]
    assert 1 < times[-1] - times[-2] < 4


def test_a_host_that_asks_to_wait_longer_than_the_deadline_is_left_alone(hostile: HostileServer) -> None:
    start = time.monotonic()
    config = replace(_CONFIG, retries=3)
    urls = [f"{hostile.url}/status?code=503&after=3600", f"{hostile.url}/status?code=503&after=3600&second=1"]
    assert {_cause(result) for result in _fetch(urls, config)} == {"http-503"}
    assert time.monotonic() - start < 1.5
    assert sum(hostile.requests[target] for target in hostile.requests if "/status" in target) == 2


_WHATWG = {
    "/b c.jpg": "/b%20c.jpg",
    "/caf\u00e9/\u732b.jpg?q=\u732b b": "/caf%C3%A9/%E7%8C%AB.jpg?q=%E7%8C%AB%20b",
    "/a%2Fb%zz.jpg": "/a%2Fb%zz.jpg",
    "/x/../y/./z.jpg#part": "/y/z.jpg",
    "\\back\\slash.jpg": "/back/slash.jpg",
    "/a|b^c`d{e}.jpg": "/a|b%5Ec%60d%7Be%7D.jpg",
    "/q?a='b'&c=[d]": "/q?a=%27b%27&c=[d]",
    "": "/",
}


def test_urls_go_out_as_browsers_send_them(hostile: HostileServer) -> None:
    _fetch([f"  {hostile.url}{path}\t" for path in _WHATWG])
    assert set(_WHATWG.values()) <= hostile.heads.keys()


def test_user_names_are_sent_and_stay_with_their_host(hostile: HostileServer) -> None:
    here = f"us%65r:p%40ss@127.0.0.1:{hostile.port}"
    odd = "a%3Ab:%FF\u00e9"
    other = f"http://127.0.0.2:{hostile.port}/ok?other"
    _fetch([f"http://{here}/ok?own", f"http://{here}/to?url=/ok?same", f"http://{here}/to?url={other}"])
    assert _cause(_fetch([f"http://{odd}@127.0.0.1:{hostile.port}/ok?odd"])[0]) == _PICTURE
    login = base64.b64encode(b"a:b:\xff\xc3\xa9").decode()
    assert f"authorization: basic {login}".lower() in hostile.heads["/ok?odd"].lower()
    assert "authorization: basic dxnlcjpwqhnz" in hostile.heads["/ok?own"].lower()
    assert "authorization: basic" in hostile.heads["/ok?same"].lower()
    assert "authorization" not in hostile.heads["/ok?other"].lower()


def test_names_of_other_scripts_are_resolved_in_punycode(names: Names, hostile: HostileServer) -> None:
    names["xn--bcher-kva.test"] = (0, ["127.0.0.1"])
    assert _cause(_fetch([f"http://B\u00dcCHER.test:{hostile.port}/ok"])[0]) == _PICTURE


def test_hosts_see_an_honest_name_with_the_contact(hostile: HostileServer) -> None:
    config = replace(_CONFIG, contact="https://example.org/bot")
    _fetch([f"{hostile.url}/ok"], config)
    assert user_agent(config).startswith("Mozilla/5.0 (compatible; unclip/")
    assert f"User-Agent: {user_agent(config)}\r\n" in hostile.heads["/ok"]
    assert "+https://example.org/bot)" in hostile.heads["/ok"]


def test_robots_txt_is_asked_for_once_and_decides_by_path(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.1"] = "User-agent: *\nDisallow: /ok\nAllow: /ok?seed=7$\n"
    hostile.robots["127.0.0.2"] = "User-agent: *\nAllow: /\n\nUser-agent: UnClip\nDisallow: /*seed=3\n"
    hostile.robots["127.0.0.3"] = "status 503 Busy"
    paths = [f"/ok?seed={seed}" for seed in (3, 7)]
    urls = [f"http://127.0.0.{host}:{hostile.port}{path}" for host in (1, 2, 3) for path in paths]
    expected = ["robots-txt", "picture", "robots-txt", "picture", "robots-txt", "robots-txt"]
    results = _fetch(urls)
    assert ["picture" if isinstance(one, bytes) else one.cause for one in results] == expected
    assert [hostile.requests[f"127.0.0.{host}/robots.txt"] for host in (1, 2, 3)] == [1, 1, 1]
    assert all(isinstance(one, bytes) for one in _fetch(urls, replace(_CONFIG, robots_txt=False)))


def test_a_robots_txt_counts_as_far_as_it_is_read_and_one_that_cannot_be_read_allows_nothing(
    hostile: HostileServer,
) -> None:
    hostile.robots["127.0.0.1"] = "User-agent: *\nDisallow: /ok?seed=3\n" + "# long\n" * 100_000
    hostile.robots["127.0.0.2"], hostile.robots["127.0.0.3"] = "cut", "garbage"
    paths = [(1, "/ok?seed=3"), (1, "/ok?seed=7"), (2, "/ok"), (3, "/ok")]
    results = _fetch([f"http://127.0.0.{host}:{hostile.port}{path}" for host, path in paths])
    details = [one.detail if isinstance(one, FetchError) else "picture" for one in results]
    assert details == ["", "picture", "it cannot be read: body-cut", "it cannot be read: protocol"]
    assert {one.cause for one in results if isinstance(one, FetchError)} == {"robots-txt"}


def test_a_redirect_does_not_lead_around_robots_txt(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.2"] = "User-agent: *\nDisallow: /\n"
    (result,) = _fetch([f"{hostile.url}/to?url=http://127.0.0.2:{hostile.port}/ok"])
    assert _cause(result) == "robots-txt"


def test_a_host_that_does_not_answer_for_robots_txt_costs_its_rows_one_wait(hostile: HostileServer) -> None:
    hostile.robots["127.0.0.2"] = "stall"
    start = time.monotonic()
    results = _fetch([f"http://127.0.0.2:{hostile.port}/ok?seed={seed}" for seed in range(50)])
    assert {_cause(result) for result in results} == {"timeout"}
    assert time.monotonic() - start < _CONFIG.deadline_s + _SPARE_S
    assert hostile.requests["127.0.0.2/robots.txt"] == 1


def test_reservations_of_text_and_data_mining_are_honoured(hostile: HostileServer) -> None:
    hostile.tdm["127.0.0.1"] = (
        '[{"location": "/ok*", "tdm-reservation": 1}, {"location": "/ok?seed=7", "tdm-reservation": 0}]'
    )
    hostile.tdm["127.0.0.2"], hostile.tdm["127.0.0.3"] = "not JSON", "[" * 100_000
    urls = [f"http://127.0.0.{host}:{hostile.port}/ok?seed={seed}" for host, seed in ((1, 3), (1, 7), (2, 3), (3, 3))]
    causes = ["picture" if isinstance(one, bytes) else one.cause for one in _fetch(urls)]
    assert causes == ["tdm", "picture", "picture", "picture"]
    assert all(isinstance(one, bytes) for one in _fetch(urls, replace(_CONFIG, tdm_reservation=False)))


def test_a_host_has_no_more_requests_than_allowed_and_another_has_its_own(hostile: HostileServer) -> None:
    urls = [f"http://127.0.0.{host}:{hostile.port}/wait?n={n}" for n in range(8) for host in (1, 2)]
    for most in (0, 2):
        hostile.most.clear()
        config = replace(_CONFIG, resources=DownloadResources(max_per_host=most))
        assert {_cause(result) for result in _fetch(urls, config)} == {_PICTURE}
        if most:
            assert [hostile.most[f"127.0.0.{host}"] for host in (1, 2)] == [2, 2]
        else:
            assert hostile.most["127.0.0.1"] > 2


def test_waiting_for_a_turn_does_not_count_as_slowness(hostile: HostileServer) -> None:
    config = replace(_CONFIG, deadline_s=0.6, resources=DownloadResources(max_per_host=1))
    start = time.monotonic()
    results = _fetch([f"{hostile.url}/wait?s=0.2&n={n}" for n in range(8)], config)
    assert {_cause(result) for result in results} == {_PICTURE}
    assert time.monotonic() - start > 1.5


class _SlowTurns(HostLimits):
    """Every turn comes later than the deadline of a URL."""

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        await asyncio.sleep(0.8)
        return await super().start(host, reservation)


@pytest.mark.parametrize("path", ["/ok", "/to?url=http://127.0.0.2:{port}/ok"])
def test_waiting_for_the_turn_of_robots_txt_does_not_count_as_slowness(hostile: HostileServer, path: str) -> None:
    url = hostile.url + path.format(port=hostile.port)
    results = _fetch([url] * 3, replace(_CONFIG, deadline_s=0.6), limits=_SlowTurns())
    assert [_cause(result) for result in results] == [_PICTURE] * 3
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
    config = replace(
        _CONFIG, resources=DownloadResources(max_rate_per_host=10), robots_txt=False, tdm_reservation=False
    )
    start = time.monotonic()
    assert {_cause(result) for result in _fetch([f"{hostile.url}/ok?n={n}" for n in range(11)], config)} == {_PICTURE}
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
    _fetch([f"{hostile.url}/ok", f"{hostile.url}/missing", f"{hostile.url}/silent"], limits=limits)
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


def test_no_proxy_is_asked_for_the_loopback(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.3:1")
    monkeypatch.setenv("no_proxy", "")
    near, proxied = _fetch([f"{hostile.url}/ok", "http://93.184.215.14/a.jpg"])
    assert _cause(near) == _PICTURE
    assert _cause(proxied) == "connect"  # it asked the proxy, where nobody listens


def test_a_proxy_is_asked_for_the_rest(names: Names, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names["pictures.example"] = (0, ["93.184.215.14"])
    monkeypatch.setenv("http_proxy", hostile.url)
    monkeypatch.setenv("no_proxy", "")
    (result,) = _fetch(["http://pictures.example/ok"], networks=())
    assert "http://pictures.example/robots.txt" in hostile.heads
    assert _cause(result) == _PICTURE
    assert _cause(_fetch([f"{hostile.url}/ok"], networks=())[0]) == "address"


_BEHIND_PROXIES: dict[str, tuple[list[str], str, str]] = {
    "public.example": (["93.184.215.14"], _PICTURE, _PICTURE),
    "metadata.google.internal": (["169.254.169.254"], "address", _PICTURE),
    "intranet": (["10.1.2.3"], "address", _PICTURE),
    "both.example": (["93.184.215.14", "10.1.2.3"], "address", _PICTURE),
    "unknown.example": ([], "dns", _PICTURE),
    "foo.localhost": (["127.0.0.2"], "address", "address"),
    "localhost.": (["127.0.0.2"], "address", "address"),
    "169.254.169.254": ([], "address", "address"),
}
"""Names with what the system resolves them to, and what comes of them: as they are, and if the proxy is trusted."""


@pytest.mark.parametrize("is_trusted", [False, True])
def test_no_proxy_is_asked_for_a_name_of_our_side_unless_it_is_trusted(
    names: Names, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch, is_trusted: bool
) -> None:
    names |= {name: (0, addresses) for name, (addresses, _, _) in _BEHIND_PROXIES.items() if addresses}
    monkeypatch.setenv("http_proxy", hostile.url)
    monkeypatch.setenv("no_proxy", "")
    config = replace(_CONFIG, resources=DownloadResources(trust_proxy=is_trusted))
    results = _fetch([f"http://{name}/ok" for name in _BEHIND_PROXIES], config, networks=())
    causes = dict(zip(_BEHIND_PROXIES, map(_cause, results), strict=True))
    assert causes == {name: expected[1 + is_trusted] for name, expected in _BEHIND_PROXIES.items()}
    asked = {name for name in _BEHIND_PROXIES if f"http://{name}/robots.txt" in hostile.heads}
    assert asked == {name for name, cause in causes.items() if cause == _PICTURE}
    assert is_trusted or "trust_proxy" in str(results[4])


def test_large_bodies_leave_memory(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MEMORY_BYTES", 1000)

    async def run() -> bool:
        async with Fetcher(_CONFIG, AddressRules(_NEAR)) as fetcher:
            with await fetcher.fetch(f"{hostile.url}/ok") as body:
                is_on_disk = bool(body._rolled)  # type: ignore[attr-defined]
                return is_on_disk and body.read() == make_picture(0)

    assert asyncio.run(run())
