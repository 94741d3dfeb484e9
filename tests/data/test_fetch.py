import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.data.fetch import limited_urlopen
from tests.data.conftest import PictureServer, make_picture


def _get(url: str, timeout: float = 5) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read()


def test_limited_urlopen_gives_what_the_server_sent(server: PictureServer, tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"local")
    with limited_urlopen(5):
        assert _get(f"{server.url}/jpg/1") == make_picture(1)
        assert _get((tmp_path / "a b.jpg").as_uri()) == b"local"


@pytest.mark.parametrize("path", ["drip/1", "moved/1"])
def test_limited_urlopen_ends_a_dripping_response_at_its_deadline(server: PictureServer, path: str) -> None:
    with limited_urlopen(0.8), pytest.raises(TimeoutError, match="deadline"):
        _get(f"{server.url}/{path}")


def test_limited_urlopen_keeps_the_socket_timeout(server: PictureServer) -> None:
    with limited_urlopen(6), pytest.raises(TimeoutError, match="timed out"):
        _get(f"{server.url}/slow/1", timeout=0.3)


def test_limited_urlopen_refuses_a_large_body_and_a_short_one(server: PictureServer) -> None:
    with limited_urlopen(5, max_bytes=200_000):
        with pytest.raises(ValueError, match="larger than 200000 bytes"):
            _get(f"{server.url}/big/1")
        with pytest.raises(http.client.IncompleteRead):
            _get(f"{server.url}/short/1")


def test_limited_urlopen_requests_a_missing_url_once(server: PictureServer) -> None:
    with limited_urlopen(5):
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                _get(f"{server.url}/gone/1")
    assert server.requests["/gone/1"] == 1


def _fetch_all(urls: list[str], num_threads: int) -> list[str]:
    """The error of each URL in img2dataset's threads; empty if its picture arrived."""

    def fetch(url: str) -> str:
        try:
            _get(url, timeout=0.5)
        except Exception as error:  # noqa: BLE001  (as img2dataset does)
            return str(error) or type(error).__name__
        return ""

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(fetch, urls))


def test_a_host_has_no_more_connections_than_allowed_and_another_has_its_own(server: PictureServer) -> None:
    names = ("127.0.0.1", "localhost")
    urls = [f"http://{name}:{server.server_port}/pause/{i}" for i in range(8) for name in names]
    most: list[list[int]] = []
    for max_per_host in (0, 2):
        server.most.clear()
        with limited_urlopen(5, max_per_host=max_per_host):
            assert _fetch_all(urls, num_threads=16) == [""] * 16
        most.append([server.most[name] for name in names])
    assert min(most[0]) > 2
    assert most[1] == [2, 2]


def test_every_end_of_a_connection_releases_its_slot(server: PictureServer) -> None:
    kinds = ["jpg", "gone", "slow", "drip", "short", "big", "moved", "noai"]
    urls = [*(f"{server.url}/{kind}/7" for kind in kinds), "http://127.0.0.1:1/refused", f"{server.url}/jpg/8"]

    def broken() -> Generator[bytes]:
        yield b"a body that ends in an error"
        raise OSError("no more")

    with limited_urlopen(0.7, max_bytes=200_000, max_per_host=1):
        with pytest.raises(urllib.error.URLError, match="no more"):
            urllib.request.urlopen(urllib.request.Request(urls[0], data=broken()))
        errors = _fetch_all(urls, num_threads=6)
    failed = [url.split("/")[3] for url, error in zip(urls, errors, strict=True) if error]
    assert failed == ["gone", "slow", "drip", "short", "big", "moved", "refused"]


def test_waiting_for_a_slot_does_not_count_as_slowness(server: PictureServer) -> None:
    start = time.monotonic()
    with limited_urlopen(0.6, max_per_host=1):
        assert _fetch_all([f"{server.url}/pause/{i}" for i in range(8)], num_threads=8) == [""] * 8
    assert time.monotonic() - start > 1.2


def test_limited_urlopen_leaves_urllib_as_it_was(server: PictureServer) -> None:
    with limited_urlopen(0.5):
        pass
    with urllib.request.urlopen(f"{server.url}/jpg/2") as answer:
        assert type(answer) is http.client.HTTPResponse
