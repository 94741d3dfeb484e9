"""The entrance of a server: what is answered while the networks load, and how the last requests end.

GET /livez   200 while the process answers at all
GET /readyz  200 while pictures can be requested, with a note of what is amiss, if anything is; else 503 with the reason
             (nor can they while the server's keys cannot be read)
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.errors import ConfigError
from pipeline.serve.keys import KeyRing
from pipeline.serve.safety import SafetyCalls
from pipeline.serve.web import ApiError

_log = logging.getLogger(__name__)

_POLL_S = 0.05
_START_S = 10.0
"""How long a process takes to start: a client that comes back sooner would spend its retries (OpenAI's has two)."""


@dataclass(frozen=True)
class _Probe:
    """A route that is answered here, for whoever counts answers by their route; the others are the application's."""

    path: str


class Gate:
    """An ASGI application that passes requests on while it is open, and answers 503 with the reason while it is not.

    Args:
        keys: Those that the guards before it ask for; None: they ask for none.
        safety: Calls of the hook behind it; None: there is none.
    """

    def __init__(self, keys: KeyRing | None = None, safety: SafetyCalls | None = None) -> None:
        self._keys = keys
        self._safety = safety
        self._app: ASGIApp | None = None
        self._reason = "the server starts"
        self.note = ""
        """What is amiss although requests are answered."""
        self._num_requests: dict[ASGIApp, int] = {}
        """Requests under way, by where they were passed."""
        self._lock = threading.Lock()

    @property
    def reason(self) -> str:
        """Why it is closed; empty while it is open."""
        return self._reason

    @property
    def app(self) -> ASGIApp | None:
        """Where requests are passed; None before it is opened first."""
        return self._app

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        with self._lock:
            return sum(self._num_requests.values())

    def requests_of(self, app: ASGIApp | None) -> Callable[[], int]:
        """Counts the requests under way that were passed to ``app``."""

        def count() -> int:
            with self._lock:
                return self._num_requests.get(app, 0) if app is not None else 0

        return count

    def open(self, app: ASGIApp) -> None:
        """Pass new requests to ``app``; those under way stay where they are."""
        self._app, self._reason = app, ""

    def reopen(self) -> None:
        """Pass new requests to the application that it had before it was closed."""
        self._reason = ""

    def close(self, reason: str) -> None:
        """Answer new requests with 503; those under way go on."""
        self._reason = reason

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False if the time runs out first. Not for the thread of the requests."""
        deadline = time.monotonic() + timeout_s
        while self.num_requests and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return not self.num_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # no websockets; uvicorn's lifespan is off
        path = scope["path"]
        if path in {"/livez", "/readyz"}:
            scope["route"] = _Probe(path)
        if path == "/livez":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif self._reason or self._app is None:
            await _refusal(self._reason)(scope, receive, send)
        elif path == "/readyz":
            await self._readiness()(scope, receive, send)
        else:
            await self._pass_on(self._app, scope, receive, send)

    def _readiness(self) -> JSONResponse:
        try:
            notes = [self.note, self._keys.look() if self._keys else "", self._safety.look() if self._safety else ""]
        except ConfigError as error:
            return _refusal(str(error))
        note = "; ".join(filter(None, notes))
        return JSONResponse({"status": "ok"} | ({"note": note} if note else {}))

    async def _pass_on(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        self._count(app, 1)
        try:
            await app(scope, receive, send)
        except Exception:  # the API has answered; uvicorn is quiet, so this is the line of the log
            _log.exception("%s %s failed", scope["method"], scope["path"])
            raise
        finally:
            self._count(app, -1)

    def _count(self, app: ASGIApp, change: int) -> None:
        with self._lock:
            number = self._num_requests.pop(app, 0) + change
            if number:
                self._num_requests[app] = number


def _refusal(reason: str) -> JSONResponse:
    message = f"not ready: {reason}; try again shortly"
    response = ApiError(503, message, code="not_ready", retry_after_s=_START_S).response()
    response.headers["Connection"] = "close"  # a proxy in front then takes another server for the next request
    return response
