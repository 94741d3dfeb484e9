"""A local S3 server in a process of its own, with faults on request, that counts what is asked of it.

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
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_FAULTS: list[dict[str, Any]] = []
_ERRORS = {
    "500": ("500 Internal", b"<Error><Code>InternalError</Code></Error>"),
    "throttled": ("503 Slow", b"<Error><Code>SlowDown</Code></Error>"),
    "skewed": ("403 Forbidden", b"<Error><Code>RequestTimeTooSkewed</Code></Error>"),
}
_REQUESTS: list[tuple[str, str, int, str]] = []
_DISTURBANCE: dict[str, Any] = {"every": 0, "kinds": [], "number": 0}
_SLOW_S = 0.2
_EVERY = 23
"""Of a faulty server one request of so many fails."""
_CUT_S = 3.0


def _application(inner: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
    lock = threading.Lock()

    def answer(environ: dict[str, Any], start: Callable[..., Any], status: str, body: bytes) -> list[bytes]:
        start(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
        return [body]

    def control(path: str, environ: dict[str, Any]) -> bytes:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        if path == "/-/faults":
            _FAULTS[:] = json.loads(environ["wsgi.input"].read(size))
            return b"{}"
        if path == "/-/disturbance":
            _DISTURBANCE.update(json.loads(environ["wsgi.input"].read(size)))
            return b"{}"
        body = json.dumps(_REQUESTS).encode()
        _REQUESTS.clear()
        return body

    def application(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path.startswith("/-/"):
            return answer(environ, start, "200 OK", control(path, environ))
        with lock:
            fault = _next_fault(method, path)
        kind = _kind(environ)
        if fault is None or fault["kind"] == "slow":
            time.sleep(fault["seconds"] if fault else 0)
            pieces = inner(environ, start)
            body = b"".join(pieces)
            _REQUESTS.append((method, path + "?" + environ.get("QUERY_STRING", ""), len(body), kind))
            return [body]
        _REQUESTS.append((method, f"{path}!{fault['kind']}", 0, kind))
        if fault["kind"] in _ERRORS:
            status, body = _ERRORS[fault["kind"]]
            return answer(environ, start, status, b"" if method == "HEAD" else body)
        # A reset, before the answer or in the middle of it.
        if fault["kind"] == "half" and method == "GET":
            body = b"".join(inner(environ, lambda *_: None))
            start("200 OK", [("Content-Length", str(len(body))), ("ETag", '"half"')])
            return _half(environ, body)
        if fault["kind"] == "lost":
            b"".join(inner(environ, lambda *_: None))
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer(environ, start, "500 Gone", b"")

    return application


def _next_fault(method: str, path: str) -> dict[str, Any] | None:
    """What happens to a request; None: nothing."""
    fault = next((one for one in _FAULTS if one["method"] == method and one["in_path"] in path), None)
    if fault is not None:
        fault["times"] -= 1
        if not fault["times"]:
            _FAULTS.remove(fault)
    elif _DISTURBANCE["every"]:
        number = _DISTURBANCE["number"] = _DISTURBANCE["number"] + 1
        turn, rest = divmod(number, _DISTURBANCE["every"])
        if not rest:
            kinds = _DISTURBANCE["kinds"]
            return {"kind": kinds[turn % len(kinds)], "seconds": _SLOW_S}
    return fault


def _kind(environ: dict[str, Any]) -> str:
    """What a request is, by the words of a store's price list."""
    method, query = environ["REQUEST_METHOD"], urllib.parse.parse_qs(environ.get("QUERY_STRING", ""), True)
    if query.keys() & {"uploads", "uploadId", "partNumber"}:
        return "LIST" if method == "GET" else "multipart"
    if method == "GET":
        return "LIST" if "list-type" in query else "ranged GET" if "HTTP_RANGE" in environ else "GET"
    if method == "POST":
        return "DELETE"  # of many
    return "COPY" if "HTTP_X_AMZ_COPY_SOURCE" in environ else method


def _half(environ: dict[str, Any], body: bytes) -> Generator[bytes]:
    yield body[: len(body) // 2]
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)


@dataclass(frozen=True)
class Request:
    """One request that a server has answered."""

    kind: str
    """GET, ranged GET, HEAD, PUT, LIST, DELETE, COPY or multipart."""
    name: str
    """Bucket and key; of a LIST, what the keys begin with."""
    num_bytes: int
    """Of the answer's body."""


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
        """Let the next requests fail: 500, throttled, skewed, reset, lost (done, without an answer), half, or slow."""
        fault = {"kind": kind, "method": method, "in_path": in_path, "times": times, "seconds": seconds}
        self._ask("POST", "/-/faults", [fault])

    def requests(self) -> list[tuple[str, str, int]]:
        """Method, path and bytes of the answer of every request since the last call."""
        return [(method, path, size) for method, path, size, _ in self._log()]

    def counted(self) -> list[Request]:
        """Every request since the last call."""
        requests: list[Request] = []
        for _, path, size, kind in self._log():
            key, _, query = path.partition("?")
            prefix = urllib.parse.parse_qs(query).get("prefix", [""])[0]
            requests.append(Request(kind, f"{key}/{prefix}".strip("/") if prefix else key.strip("/"), size))
        return requests

    def disturb(self, every: int, kinds: Sequence[str] = ()) -> None:
        """Let each request of that number fail, in one way after the other; 0: none."""
        self._ask("POST", "/-/disturbance", {"every": every, "kinds": list(kinds), "number": 0})

    def _log(self) -> list[tuple[str, str, int, str]]:
        return json.loads(self._ask("GET", "/-/requests", None))

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


@contextlib.contextmanager
def proxy(port: int, server: S3Server) -> Generator[None]:
    """Forwards a port to the server; at the end nothing answers there, and what was open is closed."""
    opened: list[socket.socket] = []

    def cut(*ends: socket.socket) -> None:
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # closing alone would leave a thread that reads from it waiting
            end.close()

    def pump(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            pass
        finally:
            cut(source, target)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            other = socket.create_connection(("127.0.0.1", server.port))
            opened.extend((client, other))
            for ends in ((client, other), (other, client)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    with socket.create_server(("127.0.0.1", port), reuse_port=True) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield
        cut(listener, *opened)


def _serve_with_cuts(server: S3Server, port: int, steps: Sequence[str], cuts: list[str], done: threading.Event) -> None:
    """Forward the port to the server, but for a while after the first output of some steps."""
    while not done.is_set():
        with proxy(port, server):
            while not done.is_set():
                written = [request.name for request in server.counted() if request.kind == "PUT"]
                outputs = [name for name in written if not name.endswith(("inputs.json", "progress.json"))]
                new = [step for step in steps if step not in cuts and any(f"/{step}/" in name for name in outputs)]
                if new:
                    cuts.append(new[0])
                    break
                time.sleep(0.3)
        done.wait(_CUT_S)


@contextlib.contextmanager
def faulty(server: S3Server, port: int, steps: Sequence[str]) -> Generator[list[str]]:
    """Let requests fail in every way, and the server be gone for a while in the middle of each step.

    Yields:
        The steps in which it was gone so far.
    """
    done, cuts = threading.Event(), list[str]()
    thread = threading.Thread(target=_serve_with_cuts, args=(server, port, steps, cuts, done))
    thread.start()
    server.disturb(_EVERY, ("500", "slow", "reset", "throttled", "half"))
    try:
        yield cuts
    finally:
        server.disturb(0)
        done.set()
        thread.join()


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
