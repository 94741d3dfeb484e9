"""The fetcher against a server and names that do everything wrong: every URL has its class, and ends in time."""

import asyncio
import base64
import socket
import time
from collections.abc import Generator
from dataclasses import replace

import pytest

from pipeline.data import bodies
from pipeline.data.causes import CLASSES
from pipeline.data.fetch import Fetcher, user_agent
from pipeline.data.urls import AddressRules
from tests.data.conftest import make_picture
from tests.data.fetching import CONFIG, NEAR, PICTURE, SPARE_S, Names, cause_of, fetch_all
from tests.data.hostile import DEAD_ADDRESSES, HostileServer, dead_addresses

_FAULTS = {
    "/ok": PICTURE,
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
    "/gzip?what=picture": PICTURE,
    "/gzip?what=picture&first=1": PICTURE,
    "/gzip?what=picture&first=12": PICTURE,
    "/gzip?what=lie": PICTURE,
    "/gzip?what=bomb": "body-size",
    "/gzip?what=cut": "body-cut",
    "/gzip?what=broken": "encoding",
    "/brotli": "encoding",
    "/to?url=/ok": PICTURE,
    "/to?url=//127.0.0.1:1/": "connect",
    "/to?url=file:///etc/hostname": "scheme",
    "/to?url=data:image/png;base64,AAAA": "scheme",
    "/to?url=http://": "url",
    "/header?name=X-Robots-Tag&value=noai": "x-robots-tag",
    "/header?name=X-Robots-Tag&value=other:noai": PICTURE,
    "/header?name=X-Robots-Tag&value=noai,%20max-image-preview:large": "x-robots-tag",
    "/header?name=tdm-reservation&value=1": "tdm",
}


def test_every_fault_of_a_server_has_its_class_and_ends_in_time(hostile: HostileServer) -> None:
    start = time.monotonic()
    results = fetch_all([hostile.url + path for path in _FAULTS])
    assert time.monotonic() - start < CONFIG.deadline_s + SPARE_S
    assert {path: cause_of(result) for path, result in zip(_FAULTS, results, strict=True)} == _FAULTS
    classes = {cause.partition("-")[0] if cause.startswith("http-") else cause for cause in _FAULTS.values()}
    assert classes - {PICTURE} <= CLASSES.keys()


def test_a_picture_comes_as_it_was_sent(hostile: HostileServer) -> None:
    assert fetch_all([f"{hostile.url}/ok?seed={seed}" for seed in range(20)]) == [
        make_picture(seed) for seed in range(20)
    ]


@pytest.fixture
def black_holes() -> Generator[int]:
    """The port of the addresses that never answer."""
    with dead_addresses() as port:
        yield port


def test_six_dead_addresses_end_at_the_deadline(names: Names, black_holes: int) -> None:
    names["dead.test"] = (0, list(DEAD_ADDRESSES))
    start = time.monotonic()
    (result,) = fetch_all([f"http://dead.test:{black_holes}/a.jpg"], replace(CONFIG, retries=2))
    assert cause_of(result) in {"deadline", "timeout"}
    assert time.monotonic() - start < CONFIG.deadline_s + SPARE_S


def test_a_slow_resolver_ends_at_the_deadline_and_holds_nobody_up(names: Names, hostile: HostileServer) -> None:
    names |= {f"slow-{number}.test": (12, ["127.0.0.1"]) for number in range(80)}
    names["quick.test"] = (0, ["127.0.0.1"])
    start = time.monotonic()
    slow = [f"http://slow-{number}.test:{hostile.port}/ok" for number in range(80)]
    results = fetch_all([*slow, f"http://quick.test:{hostile.port}/ok"])
    assert time.monotonic() - start < CONFIG.deadline_s + SPARE_S
    assert [cause_of(result) for result in results] == ["deadline"] * 80 + [PICTURE]


def test_tls_that_never_answers_and_a_server_without_it_have_their_classes(hostile: HostileServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        urls = [f"https://127.0.0.1:{mute.getsockname()[1]}/a.jpg", f"https://127.0.0.1:{hostile.port}/ok"]
        start = time.monotonic()
        causes = [cause_of(result) for result in fetch_all(urls)]
    assert time.monotonic() - start < CONFIG.deadline_s + SPARE_S
    assert causes[0] in {"timeout", "deadline"}
    assert causes[1] in {"tls", "timeout", "connect"}


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
    fetch_all([f"  {hostile.url}{path}\t" for path in _WHATWG])
    assert set(_WHATWG.values()) <= hostile.heads.keys()


def test_user_names_are_sent_and_stay_with_their_host(hostile: HostileServer) -> None:
    here = f"us%65r:p%40ss@127.0.0.1:{hostile.port}"
    odd = "a%3Ab:%FF\u00e9"
    other = f"http://127.0.0.2:{hostile.port}/ok?other"
    fetch_all([f"http://{here}/ok?own", f"http://{here}/to?url=/ok?same", f"http://{here}/to?url={other}"])
    assert cause_of(fetch_all([f"http://{odd}@127.0.0.1:{hostile.port}/ok?odd"])[0]) == PICTURE
    login = base64.b64encode(b"a:b:\xff\xc3\xa9").decode()
    assert f"authorization: basic {login}".lower() in hostile.heads["/ok?odd"].lower()
    assert "authorization: basic dxnlcjpwqhnz" in hostile.heads["/ok?own"].lower()
    assert "authorization: basic" in hostile.heads["/ok?same"].lower()
    assert "authorization" not in hostile.heads["/ok?other"].lower()


def test_names_of_other_scripts_are_resolved_in_punycode(names: Names, hostile: HostileServer) -> None:
    names["xn--bcher-kva.test"] = (0, ["127.0.0.1"])
    assert cause_of(fetch_all([f"http://B\u00dcCHER.test:{hostile.port}/ok"])[0]) == PICTURE


def test_hosts_see_an_honest_name_with_the_contact(hostile: HostileServer) -> None:
    config = replace(CONFIG, contact="https://example.org/bot")
    fetch_all([f"{hostile.url}/ok"], config)
    assert user_agent(config).startswith("Mozilla/5.0 (compatible; unclip/")
    assert f"User-Agent: {user_agent(config)}\r\n" in hostile.heads["/ok"]
    assert "+https://example.org/bot)" in hostile.heads["/ok"]


def test_large_bodies_leave_memory(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MEMORY_BYTES", 1000)

    async def run() -> bool:
        async with Fetcher(CONFIG, AddressRules(NEAR)) as fetcher:
            with await fetcher.fetch(f"{hostile.url}/ok") as body:
                is_on_disk = bool(body._rolled)  # type: ignore[attr-defined]
                return is_on_disk and body.read() == make_picture(0)

    assert asyncio.run(run())
