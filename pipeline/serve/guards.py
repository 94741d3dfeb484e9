"""What stands before the API: names of the server, keys and their limits, slow clients, headers, the access log.

It looks at the head of a request alone, so a refused request costs no parsing.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.errors import ConfigError
from pipeline.recipe.serve_sections import ServeConfig
from pipeline.serve.http_server import is_loopback
from pipeline.serve.keys import Key, KeyRing, Meter
from pipeline.serve.keys import Scope as KeyScope
from pipeline.serve.metrics import HttpMetrics
from pipeline.serve.traces import RequestTrace
from pipeline.serve.web import ApiError, add_headers, request_id_of

if TYPE_CHECKING:
    from pipeline.serve.otlp import Traces

_log = logging.getLogger(__name__)

BODY_LIMIT_BYTES = 64 << 20
"""Of any route; each has a smaller limit of its own."""
_BODY_TIMEOUT_S = 30.0
_OPEN_PATHS = {"/", "/docs", "/healthz", "/livez", "/openapi.json", "/readyz"}
_SCOPES: tuple[tuple[str, KeyScope | None], ...] = (
    ("/metrics", "metrics"),
    ("/v1/images/", "images"),
    ("/v1/models", None),
    ("/v1/embeddings", "search"),
    ("/knn-service", "search"),
    ("/metadata", "search"),
    ("/indices-list", "search"),
)
"""What a key must open, by the beginning of a path; None: any key will do."""


@dataclass
class RequestFacts:
    """What is known of the request that is answered now; parts of the server add to it."""

    request_id: str
    key: Key | None = None
    prompt: str = ""
    pixels: int = 0
    refused_by: str = ""
    """What refused it: host, origin, key, scope, limit, safety."""
    blanked: int = 0
    """Pictures that the safety hook made black."""
    bytes_received: int = 0
    bytes_sent: int = 0


CURRENT: ContextVar[RequestFacts | None] = ContextVar("unclip_request", default=None)


@dataclass(frozen=True)
class GuardSettings:
    """Settings of the guards, from a recipe."""

    hosts: tuple[str, ...] = ()
    """Names of the server, beside localhost and bare addresses."""
    access_log: str = ""
    """File; empty: none."""
    log_prompts: bool = False
    body_timeout_s: float = _BODY_TIMEOUT_S


@dataclass
class Guards:
    """An ASGI application around the API.

    Args:
        app: The API.
        settings: From a recipe.
        keys: Who may come in; None: everybody.
        meter: What the keys have used.
        metrics: What is measured.
        traces: Where the spans of requests go; None: nothing is recorded.
    """

    app: ASGIApp
    settings: GuardSettings = GuardSettings()
    keys: KeyRing | None = None
    meter: Meter = field(default_factory=Meter)
    metrics: HttpMetrics = field(default_factory=HttpMetrics)
    traces: "Traces | None" = None

    def __post_init__(self) -> None:
        """Open the log."""
        self._log = AccessLog(self.settings) if self.settings.access_log else None
        self._hosts = {host.lower() for host in self.settings.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return  # Ray Serve asks for a lifespan, of which there is none; no websockets
        headers = Headers(scope=scope)
        facts = RequestFacts(request_id_of(headers))
        token = CURRENT.set(facts)
        trace = RequestTrace(self.traces, scope["path"], headers)
        started_s, status = time.monotonic(), 499

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                add_headers(answer, facts.request_id)
                self._add_limits(facts.key, answer)
            facts.bytes_sent += len(message.get("body", b""))
            await send(message)

        try:
            try:
                self._check(scope, headers, facts)
            except ApiError as error:
                await error.response()(scope, receive, guarded_send)
            else:
                await self.app(scope, self._timed(receive, facts), guarded_send)
        finally:
            if facts.key:
                self.meter.use(facts.key, "bytes", facts.bytes_received + facts.bytes_sent)
            duration_s = time.monotonic() - started_s
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.note(route, status, duration_s, facts.refused_by)
            trace.end(
                scope["method"],
                route,
                status,
                request_id=facts.request_id,
                refused_by=facts.refused_by,
                pixels=facts.pixels,
            )
            if self._log and scope["path"] != "/livez":  # probes: of Kubernetes, and of Ray Serve's proxies
                self._log.write(scope, facts, status, duration_s)
            CURRENT.reset(token)

    def _check(self, scope: Scope, headers: Headers, facts: RequestFacts) -> None:
        path: str = scope["path"]
        host = headers.get("host", "")
        if not self._is_ours(host):
            facts.refused_by = "host"
            message = f"{host!r} is no name of this server; if it should be, add it to serve.hosts"
            raise ApiError(421, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and not self._is_same(origin, host):
            facts.refused_by = "origin"
            raise ApiError(403, f"requests from pages of {origin} are refused", code="foreign_origin")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > BODY_LIMIT_BYTES:
            raise ApiError(413, f"the body is above {BODY_LIMIT_BYTES} bytes", code="body_too_large")
        if self.keys is not None and path not in _OPEN_PATHS:
            facts.key = self._key(headers, facts)
            self._check_scope(facts.key, path, facts)
            self._check_limits(facts.key, facts)

    def _is_ours(self, host: str) -> bool:
        """Whether a Host is one that no page of another name can have: DNS rebinding sends the page's own."""
        name = _host_of(f"//{host}")
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name == "localhost" or name in self._hosts

    def _is_same(self, origin: str, host: str) -> bool:
        return origin.partition("://")[2].lower() == host.lower() or _host_of(origin) in self._hosts

    def _key(self, headers: Headers, facts: RequestFacts) -> Key:
        header = headers.get("authorization", "")
        kind, _, secret = header.partition(" ")
        try:
            key = self.keys.find(secret.strip()) if self.keys and kind.lower() == "bearer" else None
        except ConfigError as error:
            raise ApiError(503, f"{error}; ask its operator", code="no_keys") from None
        if key is None:
            facts.refused_by = "key"
            message = "wrong API key" if header else "no API key: send the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        return key

    def _check_scope(self, key: Key, path: str, facts: RequestFacts) -> None:
        needed = next((scope for beginning, scope in _SCOPES if path.startswith(beginning)), None)
        if needed is not None and needed not in key.scopes:
            facts.refused_by = "scope"
            message = f"this key does not open {path}: it lacks the scope {needed!r}"
            raise ApiError(403, message, code="insufficient_scope")

    def _check_limits(self, key: Key, facts: RequestFacts) -> None:
        for unit in ("requests", "pixels", "bytes"):
            refuse_above(self.meter, key, unit, 1, facts)
        self.meter.use(key, "requests", 1)

    def _timed(self, receive: Receive, facts: RequestFacts) -> Receive:
        """``receive`` with one deadline for the whole body."""
        deadline_s: float | None = asyncio.get_running_loop().time() + self.settings.body_timeout_s

        async def timed_receive() -> Message:
            nonlocal deadline_s
            if deadline_s is None:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline_s):
                    message = await receive()
            except TimeoutError:
                raise ApiError(408, "the body did not come in time", code="slow_body") from None
            facts.bytes_received += len(message.get("body", b""))
            if not message.get("more_body"):
                deadline_s = None
            return message

        return timed_receive

    def _add_limits(self, key: Key | None, answer: MutableHeaders) -> None:
        """OpenAI's headers of a limit."""
        if key and key.requests:
            answer["x-ratelimit-limit-requests"] = str(key.requests)
            answer["x-ratelimit-remaining-requests"] = str(self.meter.rest(key, "requests"))


def require_keys(config: ServeConfig) -> None:
    """Refuse to be open to other machines without keys.

    Raises:
        ConfigError: If the server would be.
    """
    if not is_loopback(config.host) and not config.keys:
        raise ConfigError(
            f"serve.host: {config.host} is open to other machines, and every one of them could use the server; make "
            "keys (unclip keys add FILE NAME), and name their file in serve.keys"
        )


def _host_of(url: str) -> str:
    """The name of a URL's host, in lower case; empty if it has none, or none that can be read."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def client_of(request: Request) -> str:
    """Who asks, for equal shares: the key that was checked, or the address without one."""
    facts = CURRENT.get()
    if facts and facts.key:
        return facts.key.sha256[:16]
    return request.client.host if request.client else ""


def opens(scope: KeyScope) -> bool:
    """Whether the key of the request that is answered now has a scope; a server without keys opens everything."""
    facts = CURRENT.get()
    return facts is None or facts.key is None or scope in facts.key.scopes


def note_pixels(count: int) -> None:
    """Note of the request that is answered now how many pixels it asks for at least."""
    facts = CURRENT.get()
    if facts:
        facts.pixels = count


def refuse_above(meter: Meter, key: Key, unit: Any, amount: float, facts: RequestFacts) -> None:
    """Refuse what is above a limit of a key.

    Raises:
        ApiError: 429, with the time until it is allowed.
    """
    wait_s = meter.wait_s(key, unit, amount)
    if wait_s > 0:
        facts.refused_by = "limit"
        message = f"the limit of this key is {getattr(key, unit)} {unit} a minute"
        raise ApiError(429, message, code="rate_limit_exceeded", retry_after_s=wait_s)


class AccessLog:
    """A JSON object a line for each request, without what clients write, unless the recipe asks for prompts.

    Args:
        settings: From a recipe.

    Raises:
        ConfigError: If the file cannot be written.
    """

    def __init__(self, settings: GuardSettings) -> None:
        self._prompts = settings.log_prompts
        self._path = Path(settings.access_log)
        self._num_lost = 0
        """Lines since the file could last be written."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._append(self._beginning())
        except OSError as error:
            raise ConfigError(f"serve.access_log: {self._path} cannot be written: {error.strerror}") from None

    def write(self, scope: Scope, facts: RequestFacts, status: int, duration_s: float) -> None:
        """Write the line of one request; it is left out, and counted, if the file cannot be written."""
        client = scope.get("client")
        line: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": facts.request_id,
            "client": client[0] if client else "",
            "key": facts.key.name if facts.key else "",
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "duration_s": round(duration_s, 4),
            "bytes_received": facts.bytes_received,
            "bytes_sent": facts.bytes_sent,
            "pixels": facts.pixels,
            "refused_by": facts.refused_by,
            "blanked": facts.blanked,
        }
        if self._prompts:
            line["prompt"] = facts.prompt
        try:
            self._append((self._beginning() if self._num_lost else "") + json.dumps(line) + "\n")
        except OSError as error:  # a full disk, for example: requests are answered all the same
            if not self._num_lost:
                _log.error(
                    "serve.access_log: %s cannot be written: %s; its lines are left out", self._path, error.strerror
                )
            self._num_lost += 1
            return
        if self._num_lost:
            _log.warning("serve.access_log: %s is written again; lines left out: %d", self._path, self._num_lost)
            self._num_lost = 0

    def _beginning(self) -> str:
        """What ends a line that a full disk has cut off."""
        with contextlib.suppress(OSError):  # a file that can be written, but not read
            if self._path.is_file() and self._path.stat().st_size:
                with self._path.open("rb") as file:
                    file.seek(-1, os.SEEK_END)
                    return "" if file.read() == b"\n" else "\n"
        return ""

    def _append(self, text: str) -> None:
        with self._path.open("a", encoding="utf-8") as file:  # opened anew each time, so that it can be rotated
            file.write(text)
