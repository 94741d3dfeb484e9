import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPResponse

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from pipeline.errors import ConfigError
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import training_scene
from pipeline.shapes.server import DRIP_S, serve_pictures
from pipeline.shapes.url_list import url_table


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    with serve_pictures() as url:
        yield url


def get(url: str, timeout_s: float = 10.0) -> HTTPResponse:
    return urllib.request.urlopen(url, timeout=timeout_s)


def test_serve_pictures_draws_the_scene_of_the_url(base_url: str) -> None:
    for seed, image_px, index in ((0, 128, 0), (3, 64, 123456789)):
        with get(f"{base_url}/{seed}/{image_px}/{index}.png") as response, Image.open(response) as picture:
            assert response.headers["Content-Type"] == "image/png"
            np.testing.assert_array_equal(np.asarray(picture), draw_array(training_scene(seed, index), image_px))


def test_serve_pictures_answers_many_clients_at_once(base_url: str) -> None:
    def length(index: int) -> int:
        with get(f"{base_url}/0/64/{index}.png", timeout_s=60) as response:
            return len(response.read())

    with ThreadPoolExecutor(64) as pool:
        assert min(pool.map(length, range(256))) > 100


@pytest.mark.parametrize(("kind", "status"), [("missing", 404), ("broken", 500)])
def test_faulty_urls_answer_with_their_status(base_url: str, kind: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{base_url}/faulty/{kind}/5.png")
    assert caught.value.code == status
    caught.value.close()


@pytest.mark.parametrize(("kind", "content_type"), [("corrupt", "image/jpeg"), ("html", "text/html")])
def test_faulty_urls_answer_with_what_no_decoder_reads(base_url: str, kind: str, content_type: str) -> None:
    with get(f"{base_url}/faulty/{kind}/5.png") as response:
        body = response.read()
        assert response.headers["Content-Type"] == content_type
    assert body.startswith(b"\xff\xd8\xff" if kind == "corrupt" else b"<!doctype html>")
    with pytest.raises((UnidentifiedImageError, OSError)), Image.open(io.BytesIO(body)) as picture:
        picture.load()


def test_slow_url_sends_nothing_in_time(base_url: str) -> None:
    with pytest.raises(TimeoutError):
        get(f"{base_url}/faulty/slow/5.png", timeout_s=0.5)


def test_drip_url_outlasts_a_timeout_per_read_and_never_ends(base_url: str) -> None:
    start = time.monotonic()
    with get(f"{base_url}/faulty/drip/5.png", timeout_s=5) as response:
        assert len(response.read(10)) == 10
        assert int(response.headers["Content-Length"]) > 2 * DRIP_S / 0.25
    assert time.monotonic() - start > 2


def test_refused_url_has_no_server(base_url: str) -> None:
    (url,) = [row["url"] for row in url_table(base_url, 1, 0, faults={"refused": 1}).to_pylist() if ":1/" in row["url"]]
    with pytest.raises(urllib.error.URLError, match="refused"):
        get(url)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("0/8/0.png", 400),
        ("0/2048/0.png", 400),
        ("0/128/x.png", 404),
        ("faulty/sleepy/0.png", 404),
        ("0/128/0.png?", 404),
    ],
)
def test_other_urls_are_refused(base_url: str, path: str, status: int) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        get(f"{base_url}/{path}")
    assert caught.value.code == status
    caught.value.close()


def test_serve_pictures_says_that_the_port_is_taken() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        message = f"cannot serve on 127.0.0.1:{port}: Address already in use"
        with pytest.raises(ConfigError, match=message), serve_pictures(port):
            pass


def test_serve_pictures_refuses_what_is_not_a_port() -> None:
    with pytest.raises(ConfigError, match="70000 is not a port"), serve_pictures(70000):
        pass


def test_serve_pictures_frees_its_port_at_the_end() -> None:
    with serve_pictures() as url:
        port = int(url.rsplit(":", 1)[1])
    with serve_pictures(port) as again:
        assert again == url


def test_serve_pictures_dies_with_a_killed_parent() -> None:
    program = (
        "import time\nfrom pipeline.shapes.server import serve_pictures\n"
        "with serve_pictures() as url:\n    print(url, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        url = parent.stdout.readline().strip()
        with get(url + "/") as response:
            assert response.read() == b"ok\n"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            get(url + "/", timeout_s=1).close()
        except (urllib.error.URLError, ConnectionError):
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent by 20 s")
