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
_ASK_EVERY_S = 0.7
_PROBE_S = 10.0
_ABSENT_S = 2.0
"""As long as this without an answer to ``GET /livez``, and new requests are refused: a process that works answers in
milliseconds. So are those that only read, and wait already."""
_STANDSTILL_S = 8.0
"""The same for all that wait: a process that stands still may have taken them, and may go on."""
_AGAIN_S = 30.0
"""The same for those whose process died: they wait for its successor."""
_ABSENT = "no HTTP process takes requests: it starts, is full, or has died and is started again"


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
        body, reads = _Body(receive), scope["method"] in {"GET", "HEAD"}
        for longest_s in (_ABSENT_S if reads else _STANDSTILL_S, _AGAIN_S):
            answer = _Answer(send)
            if longest_s != _AGAIN_S and not self._presence.may_come():
                break
            if not await self._presence.is_taken(scope, body.reader(), answer, longest_s):
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
    """Whether HTTP processes take requests: Ray Serve lets them wait without end while none does.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._taken_s = -math.inf
        """When the latest request came that has been answered: an old one is still answered by a process that takes
        none any more."""
        self._probes = set[asyncio.Task[None]]()
        """At most ``_PROBE_S / _ASK_EVERY_S``, whatever the number of requests: one alone may have met a process that
        hangs, beside others that do not."""
        self._asked_s = -math.inf
        self._silent_since_s = 0.0

    def may_come(self) -> bool:
        """Whether a new request may be passed on, as far as is known; if not, it is asked again."""
        if self._silent_s <= _ABSENT_S:
            return True
        self._ask()
        return False

    async def is_taken(self, scope: Scope, receive: Receive, answer: "_Answer", longest_s: float) -> bool:
        """Pass a request on, to its end; False if it was given up because no process took any for ``longest_s``.

        One that came before another that has been answered is never given up, however long it takes.
        """
        came_s = time.monotonic()

        async def send(message: Message) -> None:
            await answer.send(message)
            if answer.begun:
                self._taken_s = max(self._taken_s, came_s)

        task = asyncio.ensure_future(self._app({**scope}, receive, send))
        try:
            await asyncio.wait({task}, timeout=_PATIENCE_S)
            while not task.done() and self._taken_s < came_s:
                self._ask()
                if self._silent_s > longest_s:
                    return answer.begun
                await asyncio.wait({task}, timeout=_PATIENCE_S)
            await task
        finally:
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        return True

    @property
    def _silent_s(self) -> float:
        """For how long nothing that came has been answered, as far as somebody asked."""
        is_silent = self._probes and self._taken_s < self._silent_since_s
        return time.monotonic() - self._silent_since_s if is_silent else 0.0

    def _ask(self) -> None:
        now_s = time.monotonic()
        if not self._silent_s:
            self._silent_since_s = now_s
        if now_s - self._asked_s >= _ASK_EVERY_S:
            self._asked_s = now_s
            probe = asyncio.create_task(self._ask_once(now_s))
            self._probes.add(probe)
            probe.add_done_callback(self._probes.discard)

    async def _ask_once(self, came_s: float) -> None:
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

        answer = _Answer(send)
        try:
            async with asyncio.timeout(_PROBE_S):
                await self._app(scope, receive, answer.send)
        except Exception as error:  # noqa: BLE001  (whatever a proxy raises: the requests themselves say it)
            _log.debug("no answer to GET /livez: %s", error)
        if answer.begun:
            self._taken_s = max(self._taken_s, came_s)


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
