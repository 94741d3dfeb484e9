"""What Ray Serve's proxies answer by themselves, in the API's form.

With `serve deploy` the HTTP interface runs behind Ray Serve's proxies. They answer 500 in plain text when its process
dies, and 404 while the application starts. A proxy that finds ``middlewares`` in its environment
(RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH) passes such a request on once more, or answers 503 as the API does.
"""

import logging

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.serve.guards import BODY_LIMIT_BYTES
from pipeline.serve.web import ApiError, add_headers, error_event, request_id_of

_log = logging.getLogger(__name__)

_PROXYS_OWN = "/-/"
"""Beginning of the paths that proxies answer themselves: /-/healthz, /-/routes."""
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

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["path"].startswith(_PROXYS_OWN):
            await self._app(scope, receive, send)
            return
        body = _Body(receive)
        for _ in range(2):
            answer = _Answer(send)
            await self._app({**scope}, body.reader(), answer.send)
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

    def __init__(self, send: Send) -> None:
        self._send = send
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
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._is_open_stream = False
        await self._send(message)

    async def end_stream(self) -> None:
        """End a stream of events that broke off, with an event that says so."""
        if self._is_open_stream:
            event = error_event("the server's HTTP process has died; ask again", "overloaded_error", "not_ready")
            await self._send({"type": "http.response.body", "body": event.encode(), "more_body": False})
