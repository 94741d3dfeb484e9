"""Limits that img2dataset does not set on what it fetches, put around it without changing it.

img2dataset calls ``urllib.request.urlopen``, whose ``timeout`` bounds one socket operation: a server that sends a byte
a second holds a shard for as long as it likes, and a body has no largest size. ``limited_urlopen`` installs an opener
that bounds the whole of a URL, redirects included, in seconds and in bytes, and answers a repeated request for what is
gone for good (404 and the like) from memory, since img2dataset retries those too.
"""

import contextlib
import functools
import http.client
import io
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Generator
from typing import Any, cast

MAX_BODY_BYTES = 64 << 20
_GONE = frozenset({400, 401, 403, 404, 405, 410, 451})


@contextlib.contextmanager
def limited_urlopen(deadline_s: float, max_bytes: int = MAX_BODY_BYTES) -> Generator[None]:
    """Make ``urllib.request.urlopen`` obey the limits, in this process, inside the block.

    Args:
        deadline_s: Longest time for one URL from its first byte sent to its last received, in seconds.
        max_bytes: Largest body, in bytes.
    """
    opener = LimitedOpener(deadline_s)
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

    def __init__(self, deadline_s: float) -> None:
        super().__init__()
        self._deadline_s = deadline_s
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
            if error.code in _GONE:
                self._gone[url] = (error.code, error.reason)
            raise
        finally:
            self._thread.ends = None

    @property
    def ends(self) -> float:
        """When the URL that this thread is opening must be done, on the monotonic clock."""
        return self._thread.ends


class _HttpHandler(urllib.request.HTTPHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._connection, req)


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, opener: LimitedOpener, max_bytes: int, **options: Any) -> None:
        super().__init__(host, **options)
        self.response_class = cast("Any", functools.partial(_Response, ends=opener.ends, max_bytes=max_bytes))


class _SecureConnection(http.client.HTTPSConnection):
    def __init__(self, host: str, *, opener: LimitedOpener, max_bytes: int, **options: Any) -> None:
        super().__init__(host, **options)
        self.response_class = cast("Any", functools.partial(_Response, ends=opener.ends, max_bytes=max_bytes))


class _Response(http.client.HTTPResponse):
    def __init__(self, sock: socket.socket, *args: Any, ends: float, max_bytes: int, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        raw: io.RawIOBase = cast("Any", self.fp).detach()
        self.fp = io.BufferedReader(_TimedReader(raw, sock, ends))
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
    def __init__(self, raw: io.RawIOBase, sock: socket.socket, ends: float) -> None:
        self._raw = raw
        self._sock = sock
        self._ends = ends
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
        self._raw.close()
        super().close()
