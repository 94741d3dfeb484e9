"""No URL, no redirect, no name and no proxy leads to our side, nor to the files of a worker."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.data.fetch import Fetcher
from pipeline.data.urls import AddressRules
from pipeline.recipe.sections import DownloadResources
from tests.data.fetching import CONFIG, PICTURE, Names, cause_of, fetch_all
from tests.data.hostile import HostileServer

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
    results = fetch_all(urls, networks=["127.0.0.1/32"])
    assert [cause_of(result) for result in results] == ["address"] * len(urls)
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
    assert {cause_of(result) for result in fetch_all(urls)} == {"scheme"}
    causes = [cause_of(result) for result in fetch_all(urls, folders=[str(inside.parent)])]
    assert causes == ["6 bytes", "scheme", "scheme", "file", "file", "scheme", "scheme", "scheme"]


def test_a_name_that_points_elsewhere_later_is_checked_again(names: Names, hostile: HostileServer) -> None:
    names["rebind.test"] = (0, ["127.0.0.1"])
    url = f"http://rebind.test:{hostile.port}/ok"

    async def run() -> list[str]:
        causes: list[str] = []
        async with Fetcher(CONFIG, AddressRules(["127.0.0.1/32"])) as fetcher:
            for _ in range(2):
                with await fetcher.fetch(url) as body:
                    causes.append(f"{len(body.read())} bytes")
                names["rebind.test"] = (0, ["127.0.0.2"])
        return causes

    assert asyncio.run(run()) == [PICTURE] * 2  # the address that was checked is the address that is used
    assert [cause_of(result) for result in fetch_all([url], networks=["127.0.0.1/32"])] == ["address"]
    assert not [target for target in hostile.requests if target.startswith("127.0.0.2")]


def test_no_proxy_is_asked_for_the_loopback(hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.3:1")
    monkeypatch.setenv("no_proxy", "")
    near, proxied = fetch_all([f"{hostile.url}/ok", "http://93.184.215.14/a.jpg"])
    assert cause_of(near) == PICTURE
    assert cause_of(proxied) == "connect"  # it asked the proxy, where nobody listens


def test_a_proxy_is_asked_for_the_rest(names: Names, hostile: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    names["pictures.example"] = (0, ["93.184.215.14"])
    monkeypatch.setenv("http_proxy", hostile.url)
    monkeypatch.setenv("no_proxy", "")
    (result,) = fetch_all(["http://pictures.example/ok"], networks=())
    assert "http://pictures.example/robots.txt" in hostile.heads
    assert cause_of(result) == PICTURE
    assert cause_of(fetch_all([f"{hostile.url}/ok"], networks=())[0]) == "address"


_BEHIND_PROXIES: dict[str, tuple[list[str], str, str]] = {
    "public.example": (["93.184.215.14"], PICTURE, PICTURE),
    "metadata.google.internal": (["169.254.169.254"], "address", PICTURE),
    "intranet": (["10.1.2.3"], "address", PICTURE),
    "both.example": (["93.184.215.14", "10.1.2.3"], "address", PICTURE),
    "unknown.example": ([], "dns", PICTURE),
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
    config = replace(CONFIG, resources=DownloadResources(trust_proxy=is_trusted))
    results = fetch_all([f"http://{name}/ok" for name in _BEHIND_PROXIES], config, networks=())
    causes = dict(zip(_BEHIND_PROXIES, map(cause_of, results), strict=True))
    assert causes == {name: expected[1 + is_trusted] for name, expected in _BEHIND_PROXIES.items()}
    asked = {name for name in _BEHIND_PROXIES if f"http://{name}/robots.txt" in hostile.heads}
    assert asked == {name for name, cause in causes.items() if cause == PICTURE}
    assert is_trusted or "trust_proxy" in str(results[4])
