"""The socket of a server, the thread that answers on it, and the end of connections that stand still."""

import asyncio
import ipaddress
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from pipeline.errors import StepError
from pipeline.serve.web import ApiError, add_headers

_BACKLOG = 2048
_KEEP_ALIVE_S = 65
_END_S = 5
_LONGEST_STILL_S = 70.0
"""How long a client may take nothing of its answer, or send no request; above uvicorn's own time between requests."""
_LOOK_EVERY_TICKS = 10
"""Of uvicorn, ten a second."""


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
            http=_protocol(),
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()


def _protocol() -> type[asyncio.Protocol]:
    """Uvicorn's protocol, which would answer in plain text what it cannot read."""

    def send_400_response(connection: Any, _message: str) -> None:
        error = ApiError(400, "this is no HTTP request that can be read", code="invalid_request").response()
        add_headers(error.headers, uuid.uuid4().hex)
        error.headers["Connection"] = "close"
        lines = (b"%b: %b\r\n" % header for header in error.raw_headers)
        connection.transport.write(b"HTTP/1.1 400 Bad Request\r\n%b\r\n%b" % (b"".join(lines), error.body))
        connection.transport.close()

    return type("Protocol", (AutoHTTPProtocol,), {"send_400_response": send_400_response})


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
