"""A real web server of pictures that fails in the ways of the real web."""

import io
import socket
import threading
import time
from collections import Counter
from collections.abc import Generator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CASES = Path(__file__).parents[1] / "cases"


def make_picture(
    seed: int, *, kind: str = "JPEG", size: tuple[int, int] = (96, 64), mode: str = "RGB", exif: bytes = b""
) -> bytes:
    """A blocky picture, as the bytes of a file."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    options = {"exif": exif} if exif else {}
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = "a camera", "2026:11:26 05:00:00"
    return make_picture(3, exif=exif.tobytes())


def _bomb() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (2000, 2000)).save(buffer, "PNG")
    return buffer.getvalue()


class PictureServer(ThreadingHTTPServer):
    """Answers /KIND/SEED: jpg, png, slow, pause, drip, cut, cutpng, short, html, noai, bomb, moved, big; others are 404.

    /case/NAME is a file of tests/cases.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: Counter[str] = Counter()
        self.now: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on slow answers: no news."""


class _Handler(BaseHTTPRequestHandler):
    server: PictureServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1
        kind, _, seed = self.path.partition("?")[0].strip("/").partition("/")
        if kind == "moved":
            self.send_response(302)
            self.send_header("Location", f"/drip/{seed}")
            self.end_headers()
            return
        bodies = {
            "jpg": lambda: make_picture(int(seed)),
            "png": lambda: make_picture(int(seed), kind="PNG"),
            "slow": lambda: make_picture(int(seed)),
            "pause": lambda: make_picture(int(seed)),
            "drip": lambda: make_picture(int(seed)),
            "cut": lambda: make_picture(int(seed))[:-200],
            "cutpng": lambda: make_picture(int(seed), kind="PNG")[:-200],
            "short": lambda: make_picture(int(seed)),
            "noai": lambda: make_picture(int(seed)),
            "html": lambda: b"<html>for sale</html>",
            "bomb": _bomb,
            "big": lambda: b"x" * 300_000,
            "exif": _with_exif,
            "grey": lambda: make_picture(0, kind="PNG", mode="L"),
            "pixel": lambda: make_picture(0, size=(1, 1)),
            "case": (CASES / seed).read_bytes,
        }
        if kind not in bodies:
            self.send_error(404)
            return
        body = bodies[kind]()
        if kind == "slow":
            time.sleep(8)
        if kind == "pause":
            self._pause(str(self.headers["Host"]).partition(":")[0])
        self.send_response(200)
        if kind == "noai":
            self.send_header("X-Robots-Tag", "noai")
        if kind not in {"big", "drip"}:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if kind == "short":
            body = body[:100]
        if kind == "drip":
            for value in body:
                self.wfile.write(bytes([value]))
                time.sleep(0.2)
        self.wfile.write(body)

    def _pause(self, host: str) -> None:
        """Take 0.15 s, and note how many requests to the same name do so at once."""
        with self.server.lock:
            self.server.now[host] += 1
            self.server.most[host] = max(self.server.most[host], self.server.now[host])
        time.sleep(0.15)
        with self.server.lock:
            self.server.now[host] -= 1


@pytest.fixture(scope="module")
def server() -> Generator[PictureServer]:
    """A running server; ``requests`` counts by path, ``most`` the paused ones at once by the host's name."""
    with PictureServer() as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[float, list[str]]]:
    """Names that resolve to addresses after a time in seconds; fill it in the test. Others fail at once."""
    table: dict[str, tuple[float, list[str]]] = {}

    def look_up(host: str, port: object, *_: object, **__: object) -> list[tuple[object, ...]]:
        if host not in table:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        wait_s, addresses = table[host]
        time.sleep(wait_s)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return table
