"""The way of spans to a collector, by OTLP over HTTP. No other file imports opentelemetry.

Ended spans wait in memory for a thread that sends them, so that no request waits for the collector. Spans that find no
room, or that the collector does not take, are counted as lost. OpenTelemetry's own variables hold, too: for example
OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER and OTEL_RESOURCE_ATTRIBUTES.
"""

import logging
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter

from pipeline.serve.metrics import span_counter

_log = logging.getLogger(__name__)

_PATH = "/v1/traces"
_MOST_WAITING = 4096
"""Spans."""
_DELAY_MS = 1000.0
"""Longest time in which an ended span waits to be sent with others."""
_CLOSE_S = 2.0
"""Longest time in which the last spans are sent at the end."""
_PROPAGATOR = TraceContextTextMapPropagator()

Attributes = Mapping[str, str | int | float]


class Traces:
    """Records spans and sends them to a collector.

    Args:
        endpoint: URL of the collector; without a path, it is that of OTLP's traces.
        service: Name of the server.
        spans: Counts them by outcome; None: a counter of its own.
    """

    def __init__(self, endpoint: str, service: str, spans: Counter | None = None) -> None:
        place = urlsplit(endpoint)
        if not place.path.strip("/"):
            endpoint = place._replace(path=_PATH).geturl()
        # It logs every try; the exporter below says once when the collector fails, and once when it is back.
        logging.getLogger("opentelemetry.exporter.otlp.proto.http").setLevel(logging.CRITICAL)
        self.spans = span_counter() if spans is None else spans
        exporter = _CountingExporter(OTLPSpanExporter(endpoint), endpoint, self.spans)
        instance = {"service.name": service, "service.instance.id": f"{socket.gethostname()}:{os.getpid()}"}
        self._provider = TracerProvider(resource=Resource.create(instance), shutdown_on_exit=False)
        self._provider.add_span_processor(_BoundedProcessor(exporter))
        self._tracer = self._provider.get_tracer("unclip")

    def begin(self, headers: Mapping[str, str]) -> Span:
        """Begin the span of a request; ``headers`` may name the client's span, of which it is a child."""
        return self._tracer.start_span("HTTP", _PROPAGATOR.extract(headers, Context()), SpanKind.SERVER)

    def traceparent_of(self, span: Span) -> str:
        """The W3C's ``traceparent`` of a span; empty if it is not sampled."""
        carrier: dict[str, str] = {}
        if span.is_recording():
            _PROPAGATOR.inject(carrier, set_span_in_context(span, Context()))
        return carrier.get("traceparent", "")

    def end(self, span: Span, name: str, attributes: Attributes, *, is_error: bool) -> None:
        """End the span of a request."""
        span.update_name(name)
        span.set_attributes(dict(attributes))
        if is_error:
            span.set_status(StatusCode.ERROR)
        span.end()

    def add(
        self, traceparent: str, name: str, start_ns: int, end_ns: int, attributes: Attributes, error: str = ""
    ) -> None:
        """Record a span that has ended.

        Args:
            traceparent: Its parent, a W3C ``traceparent``.
            name: What was done.
            start_ns: When it began, since the epoch.
            end_ns: When it ended.
            attributes: What else is known.
            error: Type of the error that ended it.
        """
        context = _PROPAGATOR.extract({"traceparent": traceparent}, Context())
        span = self._tracer.start_span(name, context, attributes=dict(attributes), start_time=start_ns)
        if error:
            span.set_attribute("error.type", error)
            span.set_status(StatusCode.ERROR)
        span.end(end_ns)

    def close(self) -> None:
        """Send what waits, for a short time at most."""
        thread = threading.Thread(target=self._provider.shutdown, name="unclip-traces-end", daemon=True)
        thread.start()
        thread.join(_CLOSE_S)


class _CountingExporter(SpanExporter):
    """Sends spans and counts what becomes of them.

    Args:
        exporter: Sends a batch.
        endpoint: Where to.
        counter: Of spans, by outcome.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, counter: Counter) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._counter = counter
        self._num_waiting = 0
        self._lock = threading.Lock()
        self._fails = False

    def takes_one(self) -> bool:
        """Whether there is room for one more span; if not, it is lost."""
        with self._lock:
            has_room = self._num_waiting < _MOST_WAITING
            self._num_waiting += has_room
        if not has_room:
            self._counter.labels("lost").inc()
        return has_room

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send a batch."""
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:  # the processor goes on after an error, too
            self._note(len(spans), is_sent=result is SpanExportResult.SUCCESS)
        return result

    def _note(self, count: int, *, is_sent: bool) -> None:
        with self._lock:
            self._num_waiting -= count
        self._counter.labels("sent" if is_sent else "lost").inc(count)
        if is_sent == self._fails:
            self._fails = not is_sent
            state = "takes spans again" if is_sent else "takes no spans; they are lost until it does"
            _log.warning("serve.traces: %s %s", self._endpoint, state)

    def shutdown(self) -> None:
        """Give up a batch that cannot be sent now."""
        self._exporter.shutdown()


class _BoundedProcessor(BatchSpanProcessor):
    """Hands ended spans to a thread that sends them, as long as there is room."""

    def __init__(self, exporter: _CountingExporter) -> None:
        delay_ms = float(os.environ.get("OTEL_BSP_SCHEDULE_DELAY", _DELAY_MS))
        super().__init__(exporter, max_queue_size=_MOST_WAITING, schedule_delay_millis=delay_ms)
        self._exporter = exporter

    def on_end(self, span: ReadableSpan) -> None:
        """Called when a span has ended."""
        if self._exporter.takes_one():
            super().on_end(span)
