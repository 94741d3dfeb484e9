"""The socket of a server, the thread that answers on it, and the end of connections that stand still."""

import ipaddress
import logging
import math
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pipeline.errors import StepError
from pipeline.serve.web import ApiError, add_headers

_log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_S = 65
_END_S = 5
_LONGEST_STILL_S = 70.0
"""How long a client may take nothing of its answer, or send no request; above uvicorn's own time between requests."""
_LOOK_EVERY_TICKS = 10
"""Of uvicorn, ten a second."""
_MAX_HEAD_BYTES = 1 << 16
_MAX_HEAD_FIELDS = 128
"""Apache's limit is 100."""
_SAY_EVERY_S = 60.0
_UVICORN = cast("Any", AutoHTTPProtocol)


class HttpServer:
    """Answers requests in a thread of its own while its ``with`` block runs.

    Args:
        app: What answers.
        listener: What ``listen`` returned.
    """

    def __init__(self, app: ASGIApp, listener: socket.socket) -> None:
        self._socket = listener
        config = uvicorn.Config(
            app,
            http=_BoundedProtocol if hasattr(_UVICORN, "on_headers_complete") else _Protocol,  # h11 has its own bound
            log_config=None,
            log_level="critical",  # the gate logs what fails
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,  # above the 60 s of common proxies, so that these close first
            timeout_graceful_shutdown=_END_S,
        )
        self._server = _Server(config)
        self._thread = threading.Thread(
            target=self._server.run, args=([self._socket],), name="unclip-http", daemon=True
        )

    def __enter__(self) -> "HttpServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


class _Refusals:
    """Says in the log what the guards never see, once a minute for each reason: who sends many must not fill it."""

    def __init__(self) -> None:
        self._numbers = Counter[str]()
        """Since the last line."""
        self._said_s: dict[str, float] = {}

    def note(self, error: ApiError, client: str) -> None:
        """A request was refused before it was read."""
        reason, now_s = str(error), time.monotonic()
        self._numbers[reason] += 1
        if now_s - self._said_s.get(reason, -math.inf) >= _SAY_EVERY_S:
            number, self._said_s[reason] = self._numbers.pop(reason), now_s
            _log.warning(
                "refused before it was read (%d since the last such line), from %s: %s", number, client, reason
            )


_refusals = _Refusals()


class _Protocol(_UVICORN):
    """Uvicorn's protocol, which would answer in plain text what it cannot read."""

    def send_400_response(self, _message: str) -> None:
        """Called by uvicorn."""
        self._refuse(ApiError(400, "this is no HTTP request that can be read", code="invalid_request"))

    def _refuse(self, error: ApiError) -> None:
        """Answer, say so, and end the connection."""
        _refusals.note(error, self.client[0] if self.client else "a client without an address")
        answer = error.response()
        add_headers(answer.headers, uuid.uuid4().hex)
        answer.headers["Connection"] = "close"
        lines = b"".join(b"%b: %b\r\n" % header for header in answer.raw_headers)
        status = f"{error.status} {HTTPStatus(error.status).phrase}".encode()
        self.transport.write(b"HTTP/1.1 %b\r\n%b\r\n%b" % (status, lines, answer.body))
        self.transport.close()


class _BoundedProtocol(_Protocol):
    """A protocol with a bound for the head of a request, and for the fields behind a body in chunks.

    Neither the parser nor uvicorn has one: the parser copies an unfinished field with each piece of it that comes, and
    uvicorn keeps all fields that are whole, before the guards see the request.
    """

    _num_bytes = 0
    """Bytes that have come since the last head was whole, or a piece of its body came."""
    _is_too_large = False

    def data_received(self, data: bytes) -> None:
        """Called by the transport."""
        if self.transport.is_closing():
            return
        self._num_bytes += len(data)
        super().data_received(data)
        if self._num_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
            self._is_too_large = True
            self.send_400_response("")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser, for the fields behind a body, too."""
        self._require(len(self.headers) < _MAX_HEAD_FIELDS)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Called by the parser."""
        self._require(len(self.url) + sum(len(name) + len(value) for name, value in self.headers) <= _MAX_HEAD_BYTES)
        super().on_headers_complete()
        self._num_bytes = 0

    def on_body(self, body: bytes) -> None:
        """Called by the parser."""
        super().on_body(body)
        self._num_bytes = 0

    def send_400_response(self, _message: str) -> None:
        """Called by uvicorn, also for what the parser's callbacks refuse."""
        if self._is_too_large:
            message = f"the head of the request is above {_MAX_HEAD_BYTES} bytes or {_MAX_HEAD_FIELDS} fields"
            self._refuse(ApiError(431, message, code="head_too_large"))
        else:
            super().send_400_response(_message)

    def _require(self, is_small: bool) -> None:
        """End the parser's work on a head that is too large."""
        if not is_small:
            self._is_too_large = True
            raise ValueError  # the parser passes it on to uvicorn as one of its own errors


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._watch = _Watch()

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second; whether the server ends."""
        if counter % _LOOK_EVERY_TICKS == 0:
            self._watch.look(self.server_state.connections)
        return await super().on_tick(counter)


@dataclass(frozen=True)
class _Seen:
    """A connection when it last moved."""

    request: object
    """Its last one, as uvicorn has it."""
    num_bytes: int
    """Of answers that its client has not taken."""
    time_s: float


class _Watch:
    """Ends connections that stand still: a head that does not come, an answer that is not read. uvicorn waits for both.

    The client of a request that is sampled may wait; a body that does not come is refused by the guards.
    """

    def __init__(self) -> None:
        self._seen: dict[Any, _Seen] = {}

    def look(self, connections: Iterable[Any]) -> None:
        """Look at all connections, and end those that have stood still for too long."""
        now_s, before = time.monotonic(), self._seen
        self._seen = {one: _look_at(one, before.get(one), now_s) for one in connections}
        for connection, seen in self._seen.items():
            if now_s - seen.time_s > _LONGEST_STILL_S:
                connection.transport.abort()  # a close would wait until the client has taken its answer


def _look_at(connection: Any, before: _Seen | None, now_s: float) -> _Seen:
    """What is seen of a connection, with the time at which it last moved."""
    request, num_bytes = connection.cycle, connection.transport.get_write_buffer_size()
    if before is None or request is not before.request or num_bytes < before.num_bytes:
        return _Seen(request, num_bytes, now_s)
    is_answered = request is None or request.response_complete
    return _Seen(request, num_bytes, before.time_s if is_answered or num_bytes else now_s)


def listen(host: str, port: int) -> socket.socket:
    """Listen on an address; connections wait until a server answers them.

    Raises:
        StepError: If the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise StepError(
            f"serve: {host}:{port} cannot be listened on ({error.strerror}); choose another port: --port {port + 1}"
        ) from None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def url_of(host: str, port: int) -> str:
    """An address for this machine's browser."""
    if host in {"0.0.0.0", "::"}:  # noqa: S104  (compared, not bound)
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
