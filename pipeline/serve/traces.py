"""What becomes a span: a request, and what the HTTP process and the engines do of it. Spans hold no prompt.

A request is one trace. ``SampleRequest.traceparent`` carries it to the engines, in whatever process they are.
Without ``serve.traces`` nothing is recorded, and opentelemetry is not imported.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from prometheus_client import Counter

    from pipeline.serve.otlp import Attributes, Traces

_PROBES = {"/livez", "/readyz", "/healthz", "/metrics"}
_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}


def open_traces(endpoint: str, service: str, spans: Counter | None = None) -> Traces | None:
    """The way to a collector; None without an ``endpoint``.

    Args:
        endpoint: See ``otlp.Traces``.
        service: Name of the server; empty: unclip.
        spans: See ``otlp.Traces``.

    Raises:
        ConfigError: If the packages are missing.
    """
    if not endpoint:
        return None
    try:
        from pipeline.serve.otlp import Traces
    except ImportError as error:
        raise ConfigError(
            f"serve.traces: no module {error.name or 'opentelemetry'}: {sys.executable} -m pip install 'unclip[traces]'"
        ) from None
    return Traces(endpoint, service or "unclip", spans)


class RequestTrace:
    """The span of a request, and its children in the HTTP process; nothing is recorded if ``traces`` is None.

    Args:
        traces: Where spans go.
        path: Of the request; probes have no trace.
        headers: Of the request.
    """

    def __init__(self, traces: Traces | None, path: str, headers: Headers) -> None:
        self._traces = None if path in _PROBES else traces
        self.traceparent = ""
        """Names the span for other processes; empty if nothing is recorded."""
        if self._traces is not None:
            self._span = self._traces.begin(headers)
            self.traceparent = self._traces.traceparent_of(self._span)
        self._token = _CURRENT.set(self)

    def add(self, name: str, start_ns: int, attributes: Attributes, error: str = "") -> None:
        """Record a child that ends now."""
        if self._traces is not None and self.traceparent:
            self._traces.add(self.traceparent, name, start_ns, time.time_ns(), attributes, error)

    def end(self, method: str, route: str, status: int, **facts: str | int) -> None:
        """End the span.

        Args:
            method: Of HTTP.
            route: Pattern of the route.
            status: Of the answer; 499: the client left.
            facts: What else is known of the request; what is empty is left out.
        """
        _CURRENT.reset(self._token)
        if self._traces is None:
            return
        method = method if method in _METHODS else "_OTHER"
        attributes: Attributes = {
            "http.request.method": method,
            "http.route": route,
            "http.response.status_code": status,
            **{f"unclip.{name}": value for name, value in facts.items() if value},
        }
        self._traces.end(self._span, f"{method} {route}", attributes, is_error=status >= 500)


_CURRENT: ContextVar[RequestTrace | None] = ContextVar("unclip_trace", default=None)


def current_traceparent() -> str:
    """Names the span of the request that is answered now; empty if nothing is recorded."""
    trace = _CURRENT.get()
    return trace.traceparent if trace else ""


@contextmanager
def span(name: str, **facts: int) -> Generator[None]:
    """A part of the request that is answered now, as a span."""
    trace, start_ns, error = _CURRENT.get(), time.time_ns(), ""
    try:
        yield
    except BaseException as raised:
        error = type(raised).__name__  # its text could quote a prompt
        raise
    finally:
        if trace:
            trace.add(name, start_ns, {f"unclip.{fact}": value for fact, value in facts.items()}, error)


@dataclass
class _StageTime:
    """The steps of a request's pictures in a stage."""

    began_ns: int
    ended_ns: int = 0
    steps: int = 0
    rows: int = 0
    """Pictures in those steps, those of other requests too."""


class EngineSpans:
    """What an engine does of a request, as spans.

    Args:
        traces: Where spans go.
        traceparent: Of the request; empty: nothing is recorded.
    """

    def __init__(self, traces: Traces | None = None, traceparent: str = "") -> None:
        self._traces = traces if traceparent else None
        self._traceparent = traceparent
        self._waits_since_ns = 0
        self._stages: dict[str, _StageTime] = {}

    def wait(self) -> None:
        """The request begins to wait for admission."""
        self._waits_since_ns = time.time_ns()

    def admit(self, error: str = "") -> None:
        """The first picture is admitted, or ``error`` ended the waiting."""
        if self._traces is not None and self._waits_since_ns:
            self._traces.add(self._traceparent, "queue", self._waits_since_ns, time.time_ns(), {}, error)
        self._waits_since_ns = 0

    def step(self, stage: str, began_ns: int, num_pictures: int) -> None:
        """A picture of the request has taken a step.

        Args:
            stage: Its name.
            began_ns: When the step began, since the epoch.
            num_pictures: Pictures in the step.
        """
        if self._traces is None:
            return
        one = self._stages.setdefault(stage, _StageTime(began_ns))
        one.ended_ns = time.time_ns()
        one.steps += 1
        one.rows += num_pictures

    def end(self, future: Future[Any]) -> None:
        """The engine is done with the request, which ``future`` tells."""
        if self._traces is None:
            return
        raised = None if future.cancelled() else future.exception()
        error = "cancelled" if future.cancelled() else type(raised).__name__ if raised else ""
        self.admit(error)
        for name, one in list(self._stages.items()):
            facts = {"unclip.steps": one.steps, "unclip.mean_batch": round(one.rows / one.steps, 2)}
            self._traces.add(self._traceparent, name, one.began_ns, one.ended_ns, facts, error)
