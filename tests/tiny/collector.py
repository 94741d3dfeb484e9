"""A collector of OpenTelemetry: takes OTLP over HTTP, and keeps the spans."""

import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class Span:
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    is_error: bool
    attributes: dict[str, Any]
    resource: dict[str, Any]


@dataclass
class Collector:
    url: str = ""
    bodies: list[bytes] = field(default_factory=list[bytes])

    def spans(self, trace_id: str = "") -> list[Span]:
        """Those of a trace, or all, the earliest first."""
        spans = [span for body in self.bodies for span in _spans(body)]
        return sorted((one for one in spans if trace_id in one.trace_id), key=lambda one: one.start_ns)

    def wait_for(self, trace_id: str, count: int, timeout_s: float = 30) -> dict[str, Span]:
        """The first ``count`` spans of a trace, by name."""
        deadline = time.monotonic() + timeout_s
        while len(spans := self.spans(trace_id)) < count:
            assert time.monotonic() < deadline, f"only {[one.name for one in spans]} came"
            time.sleep(0.02)
        return {span.name: span for span in spans}


def _spans(body: bytes) -> Generator[Span]:
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _values(of_resource.resource.attributes)
        for span in (span for scope in of_resource.scope_spans for span in scope.spans):
            yield Span(
                span.name,
                span.trace_id.hex(),
                span.span_id.hex(),
                span.parent_span_id.hex(),
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                span.status.code == span.status.STATUS_CODE_ERROR,
                _values(span.attributes),
                resource,
            )


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


@contextmanager
def collecting(*, status: int = 200, hangs: bool = False) -> Generator[Collector]:
    """A collector on a free port.

    Args:
        status: What it answers; only with 200 it keeps the spans.
        hangs: Whether it answers nothing before the end.
    """
    collector, ends = Collector(), Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if hangs:
                ends.wait()
            if status == 200 and self.path == "/v1/traces":
                collector.bodies.append(body)
            self.send_response(status if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    collector.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield collector
    finally:
        ends.set()
        server.shutdown()
        server.server_close()
        thread.join()
