"""What Ray Serve's proxies answer by themselves, in the API's form.

With `serve deploy` the HTTP interface runs behind Ray Serve's proxies. They answer 500 in plain text when its process
dies, 404 while the application starts, and nothing at all as long as no process takes requests. A proxy that finds
``middlewares`` in its environment (RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH) passes a request whose process died on
once more, and answers 503 as the API does where that is in vain or nobody takes it.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.guards import BODY_LIMIT_BYTES
from pipeline.serve.web import ApiError, add_headers, error_event, request_id_of

_log = logging.getLogger(__name__)

_PROXYS_OWN = "/-/"
"""Beginning of the paths that proxies answer themselves: /-/healthz, /-/routes."""
_PATIENCE_S = 0.2
"""How long a request may be unanswered before the proxy looks whether there is a process that takes it."""
_ABSENT_S = 2.0
"""As long as this without an answer to ``GET /livez``, and there is none: one that works answers in milliseconds."""
_PROBE_S = 60.0
_ABSENT = "the server starts, or its HTTP process has died and is started again"


def middlewares() -> list[Middleware]:
    """What Ray Serve puts around each proxy."""
    return [Middleware(ProxyAnswers)]


class ProxyAnswers:
    """An ASGI application around a proxy.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._presence = _Presence(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith(_PROXYS_OWN):
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        for _ in range(2):
            answer = _Answer(send, self._presence.hear)
            if not await self._presence.is_taken(scope, body.reader(), answer.send):
                break
            if answer.begun or body.client_has_left:
                await answer.end_stream()
                return
            if answer.is_proxys or not body.is_kept:
                break
            _log.warning("the HTTP process has died; passed on once more: %s %s", scope["method"], scope["path"])
        error = ApiError(503, f"not ready: {_ABSENT}; try again shortly", code="not_ready")
        response = error.response()
        add_headers(response.headers, request_id_of(Headers(scope=scope)))
        await response(scope, receive, send)


class _Presence:
    """Whether an HTTP process takes requests: Ray Serve lets them wait without end while none does.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._heard_s = -math.inf
        """When an HTTP process last said anything."""
        self._probe: asyncio.Task[None] | None = None
        """At most one is under way, whatever the number of requests."""
        self._asked_s = 0.0

    def hear(self) -> None:
        """Note that an HTTP process has said something."""
        self._heard_s = time.monotonic()

    async def is_taken(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Pass a request on, to its end; False if it was given up because no process takes any.

        One that has reached a process is never given up, however long it takes: a word from any of them after it came
        says that they take requests.
        """
        if self._unanswered_s() > _ABSENT_S:
            return False
        came_s = time.monotonic()
        task = asyncio.ensure_future(self._app({**scope}, receive, send))
        try:
            await asyncio.wait({task}, timeout=_PATIENCE_S)
            while not task.done() and self._heard_s < came_s:
                self._ask()
                if self._unanswered_s() > _ABSENT_S:
                    return False
                await asyncio.wait({task}, timeout=_PATIENCE_S)
            await task
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        return True

    def _unanswered_s(self) -> float:
        return time.monotonic() - self._asked_s if self._probe is not None else 0.0

    def _ask(self) -> None:
        if self._probe is None:
            self._asked_s = time.monotonic()
            self._probe = asyncio.create_task(self._ask_once())

    async def _ask_once(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "scheme": "http",
            "path": "/livez",
            "raw_path": b"/livez",
            "root_path": "",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
            "client": ("127.0.0.1", 0),
            "server": ("127.0.0.1", 0),
        }
        is_sent = False

        async def receive() -> Message:
            nonlocal is_sent
            if is_sent:
                await asyncio.Future()  # nobody leaves
            is_sent = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(_message: Message) -> None:
            pass

        try:
            async with asyncio.timeout(_PROBE_S):
                await self._app(scope, receive, _Answer(send, self.hear).send)
        except Exception as error:  # noqa: BLE001  (whatever a proxy raises: the requests themselves say it)
            _log.debug("no answer to GET /livez: %s", error)
        finally:
            self._probe = None


class _Body:
    """What a client sends, kept for a second reading."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._kept: list[Message] = []
        self._num_bytes = 0
        self.client_has_left = False

    @property
    def is_kept(self) -> bool:
        """Whether the body can be read once more."""
        return self._num_bytes <= BODY_LIMIT_BYTES

    def reader(self) -> Receive:
        """A ``receive`` that begins with what was read before."""
        read_again = iter(list(self._kept))

        async def receive() -> Message:
            kept = next(read_again, None)
            if kept is not None:
                return kept
            message = await self._receive()
            self.client_has_left |= message["type"] == "http.disconnect"
            self._num_bytes += len(message.get("body", b""))
            if message["type"] == "http.request" and self.is_kept:
                self._kept.append(message)
            return message

        return receive


class _Answer:
    """Passes an answer of the HTTP interface on, and keeps back one of the proxy's own."""

    def __init__(self, send: Send, hear: Callable[[], None]) -> None:
        self._send = send
        self._hear = hear
        self._is_open_stream = False
        self.begun = False
        """Whether something was passed on."""
        self.is_proxys = False

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            kind = headers.get("content-type", "")
            self.is_proxys = message["status"] >= 400 and not kind.startswith("application/json")
            self._is_open_stream = kind.startswith("text/event-stream")
        if self.is_proxys:
            return
        self.begun = True
        self._hear()
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_open_stream = False
        await self._send(message)

    async def end_stream(self) -> None:
        """End a stream of events that broke off, with an event that says so."""
        if self._is_open_stream:
            event = error_event("the server's HTTP process has died; ask again", "overloaded_error", "not_ready")
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
