"""The socket of a server, and the thread that answers on it."""

import ipaddress
import socket
import threading
from types import TracebackType

import uvicorn
from starlette.types import ASGIApp

from pipeline.errors import StepError

_BACKLOG = 2048
_KEEP_ALIVE_S = 65
_END_S = 5


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
            log_config=None,
            log_level="critical",  # the gate logs what fails
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,  # above the 60 s of common proxies, so that these close first
            timeout_graceful_shutdown=_END_S,
        )
        self._server = uvicorn.Server(config)
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
