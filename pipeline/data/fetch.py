"""Limits on img2dataset's downloads, which it lacks; it is not changed for them.

img2dataset calls ``urllib.request.urlopen``, whose ``timeout`` bounds one socket operation: a server that sends a byte
a second delays a shard without limit, and a body may have any size. ``limited_urlopen`` installs an opener that bounds
the time and the bytes of a whole URL, redirects included, and the number of connections to one host. It also answers a
repeated request after a permanent error (404 and the like) from memory, because img2dataset retries those too.

A connection acquires one of its host's slots before it is opened and releases it when its socket is closed: after the
response, or when there is no response. A redirect opens its connection after that, so no thread waits for a slot while
it holds one.
"""

import contextlib
import functools
import http.client
import io
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Generator
from typing import Any, cast

MAX_BODY_BYTES = 64 << 20
_PERMANENT_ERRORS = frozenset({400, 401, 403, 404, 405, 410, 451})


@contextlib.contextmanager
def limited_urlopen(deadline_s: float, max_bytes: int = MAX_BODY_BYTES, *, max_per_host: int = 0) -> Generator[None]:
    """Apply the limits to ``urllib.request.urlopen`` in this process, inside the block.

    Args:
        deadline_s: Longest time for one URL from its first byte sent to its last received, in seconds; the time that it
            waits for a slot of its host is not counted.
        max_bytes: Largest body, in bytes.
        max_per_host: Most connections to one host at once; 0: no limit.
    """
    opener = LimitedOpener(deadline_s, max_per_host)
    connection = functools.partial(_Connection, opener=opener, max_bytes=max_bytes)
    secure = functools.partial(_SecureConnection, opener=opener, max_bytes=max_bytes)
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.FileHandler(),
        urllib.request.DataHandler(),
        _HttpHandler(connection),
        _HttpsHandler(secure),
    ):
        opener.add_handler(handler)
    urllib.request.install_opener(opener)
    try:
        yield
    finally:
        urllib.request.install_opener(cast("urllib.request.OpenerDirector", None))  # urlopen builds its own one again


class LimitedOpener(urllib.request.OpenerDirector):
    """An opener that gives each URL one deadline, which its redirects share."""

    def __init__(self, deadline_s: float, max_per_host: int = 0) -> None:
        super().__init__()
        self._deadline_s = deadline_s
        self._max_per_host = max_per_host
        self._hosts: dict[str, threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._errors: dict[str, tuple[int, str]] = {}

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        """Open a URL; a redirect calls this method again and keeps the deadline of the first URL."""
        if getattr(self._thread, "deadline", None) is not None:
            return super().open(fullurl, data, timeout)
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        if url in self._errors:
            code, reason = self._errors[url]
            raise urllib.error.HTTPError(url, code, reason, http.client.HTTPMessage(), None)
        self._thread.deadline = time.monotonic() + self._deadline_s
        try:
            return super().open(fullurl, data, timeout)
        except urllib.error.HTTPError as error:
            error.close()  # its response holds a connection, and nobody reads it
            if error.code in _PERMANENT_ERRORS:
                self._errors[url] = (error.code, error.reason)
            raise
        finally:
            self._thread.deadline = None

    @property
    def deadline(self) -> float:
        """Time on the monotonic clock by which this thread's current URL must be finished."""
        return self._thread.deadline

    def acquire_slot(self, host: str) -> Callable[[], None]:
        """Wait for a slot of ``host``; returns the function that releases it, to be called once."""
        if not self._max_per_host:
            return _do_nothing
        with self._lock:
            slots = self._hosts.setdefault(host, threading.BoundedSemaphore(self._max_per_host))
        start = time.monotonic()
        slots.acquire()
        self._thread.deadline += time.monotonic() - start
        return slots.release


def _do_nothing() -> None:
    """Release no slot."""


def _host(request: urllib.request.Request) -> str:
    return urllib.parse.urlsplit(request.full_url).hostname or ""


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req, url_host=_host(req))


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req, url_host=_host(req))


class _Connection(http.client.HTTPConnection):
    """A connection that waits for a slot of ``url_host``; ``host`` differs from it if there is a proxy."""

    def __init__(self, host: str, *, opener: LimitedOpener, max_bytes: int, url_host: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._opener = opener
        self._max_bytes = max_bytes
        self._url_host = url_host
        self._release = _do_nothing
        self.response_class = cast("Any", self._respond)

    def connect(self) -> None:
        release = self._opener.acquire_slot(self._url_host)
        try:
            super().connect()
        except BaseException:  # whatever the reason, there is no connection, so its slot is free again
            release()
            raise
        self._release = release

    def close(self) -> None:
        super().close()
        self._pass_on_release()()

    def _respond(self, sock: socket.socket, *args: Any, **options: Any) -> "_Response":
        """The response, which holds the slot from now on: http.client closes the connection before it is read."""
        deadline, release = self._opener.deadline, self._pass_on_release()
        return _Response(sock, *args, deadline=deadline, max_bytes=self._max_bytes, release=release, **options)

    def _pass_on_release(self) -> Callable[[], None]:
        release, self._release = self._release, _do_nothing
        return release


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same connection over TLS."""


class _Response(http.client.HTTPResponse):
    def __init__(
        self,
        sock: socket.socket,
        *args: Any,
        deadline: float,
        max_bytes: int,
        release: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(sock, *args, **options)
        raw: io.RawIOBase = cast("Any", self.fp).detach()
        self.fp = io.BufferedReader(_TimedReader(raw, sock, deadline, release))
        self._max_bytes = max_bytes

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        # Without a length, at most one byte too many is read; with a length, the base class notices a truncated body.
        body = super().read(None if self.length is not None and self.length <= self._max_bytes else self._max_bytes + 1)
        if len(body) > self._max_bytes:
            raise ValueError(f"body is larger than {self._max_bytes} bytes")
        return body


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, deadline: float, release: Callable[[], None]) -> None:
        self._raw = raw
        self._sock = sock
        self._deadline = deadline
        self._release = release
        self._operation_s = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        remaining_s = max(self._deadline - time.monotonic(), 1e-3)
        self._sock.settimeout(remaining_s if self._operation_s is None else min(self._operation_s, remaining_s))
        try:
            return cast("Any", self._raw).readinto(buffer)
        except TimeoutError:
            if time.monotonic() < self._deadline:
                raise
            raise TimeoutError("too slow: not finished by its deadline") from None

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._raw.close()
        finally:
            super().close()
            self._release()
