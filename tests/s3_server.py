"""A local S3 server in a process of its own, with faults on request.

It is moto's server behind one port that this module owns: a list of faults is applied to the next requests, and every
request is noted. A test speaks to it through `S3Server`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Any

_FAULTS: list[dict[str, Any]] = []
_ERRORS = {
    "500": ("500 Internal", b"<Error><Code>InternalError</Code></Error>"),
    "throttled": ("503 Slow", b"<Error><Code>SlowDown</Code></Error>"),
}
_REQUESTS: list[tuple[str, str, int]] = []


def _application(inner: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start: Callable[..., Any], status: str, body: bytes) -> list[bytes]:
        start(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
        return [body]

    def control(path: str, environ: dict[str, Any]) -> bytes:
        if path == "/-/faults":
            size = int(environ.get("CONTENT_LENGTH") or 0)
            _FAULTS[:] = json.loads(environ["wsgi.input"].read(size))
            return b"{}"
        body = json.dumps(_REQUESTS).encode()
        _REQUESTS.clear()
        return body

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.startswith("/-/"):
            return answer(environ, start, "200 OK", control(path, environ))
        with lock:
            fault = next((one for one in _FAULTS if one["method"] == method and one["in_path"] in path), None)
            if fault is not None:
                fault["times"] -= 1
                if not fault["times"]:
                    _FAULTS.remove(fault)
        if fault is None or fault["kind"] == "slow":
            time.sleep(fault["seconds"] if fault else 0)
            pieces = inner(environ, start)
            body = b"".join(pieces)
            _REQUESTS.append((method, path + "?" + environ.get("QUERY_STRING", ""), len(body)))
            return [body]
        _REQUESTS.append((method, f"{path}!{fault['kind']}", 0))
        if fault["kind"] in _ERRORS:
            return answer(environ, start, *_ERRORS[fault["kind"]])
        # A reset, before the answer or in the middle of it.
        if fault["kind"] == "half":
            body = b"".join(inner(environ, lambda *_: None))
            start("200 OK", [("Content-Length", str(len(body))), ("ETag", '"half"')])
            return _half(environ, body)
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer(environ, start, "500 Gone", b"")

    return application


def _half(environ: dict[str, Any], body: bytes) -> Generator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


@dataclass
class S3Server:
    """A running server."""

    port: int

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # what is tested is the project's own patience, not that of botocore
        }

    def make_bucket(self, name: str) -> None:
        """Make a bucket."""
        self._ask("PUT", f"/{name}", None)

    def put(self, path: str, content: bytes) -> None:
        """Write a file as another machine does."""
        # A key in the request makes it one of the bucket's owner; moto does not check its signature.
        key = "AWS4-HMAC-SHA256 Credential=key/20260101/us-east-1/s3/aws4_request"
        headers = {"Content-Type": "application/octet-stream", "Authorization": key}
        request = urllib.request.Request(f"{self.endpoint}/{path}", content, headers, method="PUT")
        with urllib.request.urlopen(request):
            pass

    def fail(self, kind: str, method: str, in_path: str, times: int = 1, seconds: float = 0.0) -> None:
        """Let the next requests fail: 500, throttled, reset, half (of the body), or slow."""
        fault = {"kind": kind, "method": method, "in_path": in_path, "times": times, "seconds": seconds}
        self._ask("POST", "/-/faults", [fault])

    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path and bytes of the answer of every request since the last call."""
        return [(method, path, size) for method, path, size in json.loads(self._ask("GET", "/-/requests", None))]

    def _ask(self, method: str, path: str, data: Any) -> bytes:
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(urllib.request.Request(self.endpoint + path, body, method=method)) as answer:
            return answer.read()


@contextlib.contextmanager
def started() -> Generator[S3Server]:
    """A server that ends with the block."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        try:
            yield S3Server(int(process.stdout.readline()))
        finally:
            process.kill()


def _main() -> None:
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    # Ends with the tests, however they end.
    def watch() -> None:
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
    server = make_server("127.0.0.1", 0, _application(DomainDispatcherApplication(create_backend_app)), threaded=True)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    _main()
