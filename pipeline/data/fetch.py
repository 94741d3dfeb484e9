"""Limits that img2dataset does not set on what it fetches, put around it without changing it.

img2dataset calls ``urllib.request.urlopen``, whose ``timeout`` bounds one socket operation: a server that sends a byte
a second holds a shard for as long as it likes, and a body has no largest size. ``limited_urlopen`` installs an opener
that bounds the whole of a URL, redirects included, in seconds and in bytes, and the connections to one host; it answers
a repeated request for what is gone for good (404 and the like) from memory, since img2dataset retries those too.

A connection takes its place at the host before it is made and gives it back when its socket is closed: with the answer,
or where no answer came of it. One that a redirect leads to follows that close, so nobody waits for a place in one.
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
_GONE = frozenset({400, 401, 403, 404, 405, 410, 451})


@contextlib.contextmanager
def limited_urlopen(deadline_s: float, max_bytes: int = MAX_BODY_BYTES, *, max_per_host: int = 0) -> Generator[None]:
    """Make ``urllib.request.urlopen`` obey the limits, in this process, inside the block.

    Args:
        deadline_s: Longest time for one URL from its first byte sent to its last received, in seconds; time that it
            waits for a place at its host is not counted.
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
        urllib.request.install_opener(cast("urllib.request.OpenerDirector", None))  # urlopen builds its own again


class LimitedOpener(urllib.request.OpenerDirector):
    """An opener that gives each URL one deadline, whatever it redirects to."""

    def __init__(self, deadline_s: float, max_per_host: int = 0) -> None:
        super().__init__()
        self._deadline_s = deadline_s
        self._max_per_host = max_per_host
        self._hosts: dict[str, threading.BoundedSemaphore] = {}
        self._lock = threading.Lock()
        self._thread = threading.local()
        self._gone: dict[str, tuple[int, str]] = {}

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        """As the base's; a redirect comes back here and keeps the deadline of the URL that it started from."""
        if getattr(self._thread, "ends", None) is not None:
            return super().open(fullurl, data, timeout)
        url = fullurl if isinstance(fullurl, str) else fullurl.full_url
        if url in self._gone:
            code, reason = self._gone[url]
            raise urllib.error.HTTPError(url, code, reason, http.client.HTTPMessage(), None)
        self._thread.ends = time.monotonic() + self._deadline_s
        try:
            return super().open(fullurl, data, timeout)
        except urllib.error.HTTPError as error:
            error.close()  # its answer holds a connection, and nobody reads it
            if error.code in _GONE:
                self._gone[url] = (error.code, error.reason)
            raise
        finally:
            self._thread.ends = None

    @property
    def ends(self) -> float:
        """When the URL that this thread is opening must be done, on the monotonic clock."""
        return self._thread.ends

    def take_place(self, host: str) -> Callable[[], None]:
        """Wait until this thread may connect to ``host``; what gives the place back, to be called once."""
        if not self._max_per_host:
            return _nothing
        with self._lock:
            places = self._hosts.setdefault(host, threading.BoundedSemaphore(self._max_per_host))
        start = time.monotonic()
        places.acquire()
        self._thread.ends += time.monotonic() - start
        return places.release


def _nothing() -> None:
    """Nothing is given back."""


def _host(request: urllib.request.Request) -> str:
    return urllib.parse.urlsplit(request.full_url).hostname or ""


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req, site=_host(req))


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req, site=_host(req))


class _Connection(http.client.HTTPConnection):
    """A connection that waits for its place at ``site``: the URL's host, also where a proxy is connected to."""

    def __init__(self, host: str, *, opener: LimitedOpener, max_bytes: int, site: str, **options: Any) -> None:
        super().__init__(host, **options)
        self._opener = opener
        self._max_bytes = max_bytes
        self._site = site
        self._give_back = _nothing
        self.response_class = cast("Any", self._respond)

    def connect(self) -> None:
        give_back = self._opener.take_place(self._site)
        try:
            super().connect()
        except BaseException:  # whatever kept the connection from being made, its place is free again
            give_back()
            raise
        self._give_back = give_back

    def close(self) -> None:
        super().close()
        self._take_give_back()()

    def _respond(self, sock: socket.socket, *args: Any, **options: Any) -> "_Response":
        """The answer, which holds the place from here on: http.client closes the connection before it is read."""
        ends, give_back = self._opener.ends, self._take_give_back()
        return _Response(sock, *args, ends=ends, max_bytes=self._max_bytes, give_back=give_back, **options)

    def _take_give_back(self) -> Callable[[], None]:
        give_back, self._give_back = self._give_back, _nothing
        return give_back


class _SecureConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS."""


class _Response(http.client.HTTPResponse):
    def __init__(
        self,
        sock: socket.socket,
        *args: Any,
        ends: float,
        max_bytes: int,
        give_back: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(sock, *args, **options)
        raw: io.RawIOBase = cast("Any", self.fp).detach()
        self.fp = io.BufferedReader(_TimedReader(raw, sock, ends, give_back))
        self._max_bytes = max_bytes

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None:
            return super().read(amt)
        # Without a length the body is read one byte too far at most; with one, the base notices a body cut short.
        body = super().read(None if self.length is not None and self.length <= self._max_bytes else self._max_bytes + 1)
        if len(body) > self._max_bytes:
            raise ValueError(f"body is larger than {self._max_bytes} bytes")
        return body


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, ends: float, give_back: Callable[[], None]) -> None:
        self._raw = raw
        self._sock = sock
        self._ends = ends
        self._give_back = give_back
        self._operation_s = sock.gettimeout()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        left_s = max(self._ends - time.monotonic(), 1e-3)
        self._sock.settimeout(left_s if self._operation_s is None else min(self._operation_s, left_s))
        try:
            return cast("Any", self._raw).readinto(buffer)
        except TimeoutError:
            if time.monotonic() < self._ends:
                raise
            raise TimeoutError("too slow: not finished by its deadline") from None

    def close(self) -> None:
        if self.closed:
            return
        try:
            self._raw.close()
        finally:
            super().close()
            self._give_back()
