"""A real HTTP server that draws picture {index} when it is requested; it stores nothing.

    with serve_pictures(port=8765) as base_url:   # a child process, on its own core
        ...                                       # GET {base_url}/{seed}/{image_px}/{index}.png

The child ends when its parent ends, for whatever reason. ``python -m pipeline.shapes.server --port 8765``
runs it in the foreground.
"""

import argparse
import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from pipeline.errors import ConfigError, StepError
from pipeline.shapes.draw import draw, encode
from pipeline.shapes.scene import training_scene
from pipeline.shapes.url_list import MAX_IMAGE_PX, MIN_IMAGE_PX

HOST = "127.0.0.1"
SLOW_S = 30.0
DRIP_S = 20.0  # img2dataset has no limit for a whole URL: a drip of 3 minutes would hold its shard for 3 minutes
_DRIP_PAUSE_S = 0.25
_START_TIMEOUT_S = 60.0
_WATCH_EVERY_S = 0.25
_PORT_ERRORS = {errno.EADDRINUSE, errno.EACCES}  # exit statuses of a child that could not get its port
_HEADER_BYTES = 160  # of a JPEG: the cut is inside its tables, before any picture data
_GOOD = re.compile(r"/(\d{1,9})/(\d{1,4})/(\d{1,12})\.png")
_FAULTY = re.compile(r"/faulty/([a-z]+)/(\d{1,12})\.png")


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # a shorter backlog drops SYNs of 256 download threads, which looks like a slow server

    def handle_error(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: tuple[str, int]
    ) -> None:
        """Ignore clients that hang up, as clients of slow URLs do."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers from the URL alone. One request per connection."""

    def do_GET(self) -> None:
        """Draw a picture, or fail in the way that the URL names."""
        if self.path == "/":
            self._send(b"ok\n", "text/plain")
        elif good := _GOOD.fullmatch(self.path):
            seed, image_px, index = (int(number) for number in good.groups())
            if MIN_IMAGE_PX <= image_px <= MAX_IMAGE_PX:
                self._send(encode(draw(training_scene(seed, index), image_px)), "image/png")
            else:
                self.send_error(400, f"image_px must be from {MIN_IMAGE_PX} to {MAX_IMAGE_PX}")
        elif (faulty := _FAULTY.fullmatch(self.path)) and faulty[1] in _FAULTY_ANSWERS:
            _FAULTY_ANSWERS[faulty[1]](self, int(faulty[2]))
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: a line for every picture would bury the pipeline's own log."""

    def _send(self, body: bytes, content_type: str) -> None:
        self._send_head(len(body), content_type)
        self.wfile.write(body)

    def _send_head(self, num_bytes: int, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(num_bytes))
        self.end_headers()

    def answer_missing(self, _index: int) -> None:
        """Answer 404."""
        self.send_error(404)

    def answer_broken(self, _index: int) -> None:
        """Answer 500."""
        self.send_error(500)

    def answer_slow(self, _index: int) -> None:
        """Send nothing for SLOW_S seconds."""
        time.sleep(SLOW_S)

    def answer_drip(self, index: int) -> None:
        """Send a picture byte by byte: each wait is short, and the picture is still incomplete after DRIP_S."""
        body = encode(draw(training_scene(0, index)))
        self._send_head(len(body), "image/png")
        for offset in range(int(DRIP_S / _DRIP_PAUSE_S)):  # a picture has hundreds of bytes
            self.wfile.write(body[offset : offset + 1])
            time.sleep(_DRIP_PAUSE_S)

    def answer_corrupt(self, index: int) -> None:
        """Send the beginning of a JPEG as if it were the whole file."""
        self._send(encode(draw(training_scene(0, index)), "jpeg")[:_HEADER_BYTES], "image/jpeg")

    def answer_html(self, _index: int) -> None:
        """Send a page in place of a picture, with status 200, as parked domains do."""
        self._send(b"<!doctype html><title>This domain is for sale</title>\n", "text/html")


_FAULTY_ANSWERS: dict[str, Callable[[_Handler, int], None]] = {
    "missing": _Handler.answer_missing,
    "broken": _Handler.answer_broken,
    "slow": _Handler.answer_slow,
    "drip": _Handler.answer_drip,
    "corrupt": _Handler.answer_corrupt,
    "html": _Handler.answer_html,
}


@contextmanager
def serve_pictures(port: int = 0) -> Generator[str]:
    """Serve pictures on 127.0.0.1 from a child process until the block ends or this process dies.

    Args:
        port: TCP port; 0 lets the system choose.

    Yields:
        The base URL without a trailing slash; the server is ready.

    Raises:
        ConfigError: If the port is in use or is not a port number.
        StepError: If the child does not start.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"pairs: {port} is not a port; choose one from 1024 to 65535")
    command = [sys.executable, "-m", "pipeline.shapes.server", "--port", str(port), "--parent", str(os.getpid())]
    # A separate program and not multiprocessing, which would import the caller's main module.
    # A new session, so that Ctrl-C reaches the parent alone, whose work can still end in order.
    child = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        yield _base_url(child, port)
    finally:
        child.terminate()
        child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _base_url(child: subprocess.Popen[str], port: int) -> str:
    """Wait for the child's only line, its base URL."""
    killer = threading.Timer(_START_TIMEOUT_S, child.kill)  # ends the wait if no line ever comes
    killer.start()
    line = child.stdout.readline().strip() if child.stdout is not None else ""
    killer.cancel()
    if line:
        return line
    if child.wait() in _PORT_ERRORS:
        reason = os.strerror(child.returncode)
        raise ConfigError(f"pairs: cannot serve on {HOST}:{port}: {reason}; free the port or choose another")
    raise StepError(f"pairs: the picture server did not start (exit status {child.returncode})")


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_EVERY_S)
    os._exit(0)  # the threads that still answer slow URLs must not keep the process alive


def main() -> int:
    """Serve in the foreground; print the base URL once the socket listens."""
    parser = argparse.ArgumentParser(description="Draw and serve the demo's pictures on 127.0.0.1.")
    parser.add_argument("--port", type=int, default=8765, help="0 lets the system choose")
    parser.add_argument("--parent", type=int, default=0, help="process id of the parent; end when it ends")
    arguments = parser.parse_args()
    try:
        server = _Server((HOST, arguments.port), _Handler)
    except OSError as error:
        sys.stderr.write(f"{HOST}:{arguments.port}: {error}\n")
        return error.errno or 1
    if arguments.parent:
        threading.Thread(target=_end_with, args=(arguments.parent,), daemon=True).start()
    sys.stdout.write(f"http://{HOST}:{server.server_address[1]}\n")
    sys.stdout.flush()
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
