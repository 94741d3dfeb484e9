import http.client
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from pipeline.stages.fetch import limited_urlopen
from tests.stages.conftest import PictureServer, make_picture


def _get(url: str, timeout: float = 5) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return answer.read()


def test_limited_urlopen_gives_what_the_server_sent(server: PictureServer, tmp_path: Path) -> None:
    (tmp_path / "a b.jpg").write_bytes(b"local")
    with limited_urlopen(5):
        assert _get(f"{server.url}/jpg/1") == make_picture(1)
        assert _get((tmp_path / "a b.jpg").as_uri()) == b"local"


@pytest.mark.parametrize("path", ["drip/1", "moved/1"])
def test_limited_urlopen_ends_a_dripping_answer_at_its_deadline(server: PictureServer, path: str) -> None:
    start = time.monotonic()
    with limited_urlopen(0.8), pytest.raises(TimeoutError, match="deadline"):
        _get(f"{server.url}/{path}")
    assert time.monotonic() - start < 2


def test_limited_urlopen_keeps_the_socket_timeout(server: PictureServer) -> None:
    with limited_urlopen(6), pytest.raises(TimeoutError, match="timed out"):
        _get(f"{server.url}/slow/1", timeout=0.3)


def test_limited_urlopen_refuses_a_large_body_and_a_short_one(server: PictureServer) -> None:
    with limited_urlopen(5, max_bytes=200_000):
        with pytest.raises(ValueError, match="larger than 200000 bytes"):
            _get(f"{server.url}/big/1")
        with pytest.raises(http.client.IncompleteRead):
            _get(f"{server.url}/short/1")


def test_limited_urlopen_asks_once_for_what_is_gone(server: PictureServer) -> None:
    with limited_urlopen(5):
        for _ in range(3):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                _get(f"{server.url}/gone/1")
    assert server.requests["/gone/1"] == 1


def test_limited_urlopen_leaves_urllib_as_it_was(server: PictureServer) -> None:
    with limited_urlopen(0.5):
        pass
    with urllib.request.urlopen(f"{server.url}/jpg/2") as answer:
        assert type(answer) is http.client.HTTPResponse
