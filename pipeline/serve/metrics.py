"""What a server measures, for Prometheus: each replica of the networks has a registry, and the HTTP process one more.

``GET /metrics`` shows all of them: the samples of a replica have its name as the label ``replica``.
"""

from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any, Protocol

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

prometheus_client.disable_created_metrics()  # a second sample for each counter, which nobody reads

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_PICTURES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_CAUSES = {
    400: "invalid",
    401: "key",
    404: "unknown",
    408: "slow body",
    413: "too large",
    429: "queue",
    499: "client left",
    500: "error",
    503: "not ready",
    504: "deadline",
}
"""Of an answer that no guard refused."""


class Measured(Protocol):
    """An engine, as far as it is counted."""

    def counts(self) -> dict[str, int]:
        """``engine_loop.EngineStats`` as plain numbers."""
        ...

    def num_unfinished(self) -> int:
        """Pictures that wait or are in progress."""
        ...


class EngineMetrics:
    """What the engines of a process measure: the one of what is served, and those of before that finish beside it."""

    def __init__(self) -> None:
        self._engines: list[Measured] = []
        self._ended = Counts[str]()
        self.registry = CollectorRegistry()
        here: dict[str, Any] = {"registry": self.registry}
        self.queue = Histogram(
            "unclip_queue_seconds", "From a request to the admission of its first picture.", buckets=_SECONDS, **here
        )
        self.admission = Histogram(
            "unclip_admission_seconds",
            "Encoding the captions of a request when it is admitted.",
            buckets=_SECONDS,
            **here,
        )
        self.step = Histogram("unclip_step_seconds", "One step of a stage.", ["stage"], buckets=_SECONDS, **here)
        self.batch = Histogram(
            "unclip_batch_pictures", "Pictures in one step of a stage.", ["stage"], buckets=_PICTURES, **here
        )
        self.stage = Histogram("unclip_stage_seconds", "A picture in a stage.", ["stage"], buckets=_SECONDS, **here)
        self.sampling = Histogram(
            "unclip_sampling_seconds",
            "From a request to its last picture; in a chain the time in all its parts.",
            buckets=_SECONDS,
            **here,
        )
        self.requests = Counter(
            "unclip_requests",
            "Requests, by how they ended: answered, refused, cancelled, expired, failed.",
            ["outcome"],
            **here,
        )
        self.pictures = Counter("unclip_pictures", "Pictures that were finished.", **here)
        self.wasted_steps = Counter(
            "unclip_wasted_steps",
            "Steps of pictures whose request was cancelled, expired or failed.",
            ["outcome"],
            **here,
        )
        self.waiting = Gauge("unclip_waiting_requests", "Requests that wait for admission.", **here)
        self.active = Gauge("unclip_active_pictures", "Pictures in progress.", **here)

    @cached_property
    def spans(self) -> Counter:
        """Spans of the traces, which are shown once there are traces."""
        return span_counter(self.registry)

    def begin(self, engine: Measured) -> None:
        """Count an engine from now on."""
        self._engines.append(engine)

    def end(self, engine: Measured) -> None:
        """Keep the counts of an engine that has ended, and let go of it."""
        if engine in self._engines:
            self._engines.remove(engine)
            self._ended.update(engine.counts())

    def counts(self) -> dict[str, int]:
        """The sums over all engines, those that have ended too; not with the lock of one of them held."""
        counts = self._ended.copy()
        for engine in [*self._engines]:
            counts.update(engine.counts())
        return dict(counts)

    def num_beside(self, engine: Measured) -> int:
        """Pictures that wait or are in progress in the other engines, on the same device; as ``counts``."""
        return sum(other.num_unfinished() for other in [*self._engines] if other is not engine)

    def text(self) -> str:
        """All of it, as Prometheus reads it."""
        counts = self.counts()
        self.waiting.set(counts.get("waiting", 0))
        self.active.set(counts.get("active", 0))
        return generate_latest(self.registry).decode()


def search_times(registry: CollectorRegistry) -> Histogram:
    """What is measured where the index is read."""
    return Histogram("unclip_neighbours_seconds", "One search of the index.", buckets=_SECONDS, registry=registry)


def span_counter(registry: CollectorRegistry | None = None) -> Counter:
    """Counts spans by outcome.

    Args:
        registry: Where it is shown; None: nowhere yet.
    """
    return Counter("unclip_spans", "Spans of traces: sent to the collector, or lost.", ["outcome"], registry=registry)


class HttpMetrics:
    """What the HTTP process measures."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._duration = Histogram(
            "unclip_http_seconds",
            "From the head of a request to the end of its answer.",
            ["route", "status"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._refusals = Counter(
            "unclip_refusals", "Answers with an error status, by cause.", ["cause"], registry=self.registry
        )
        self.neighbours = search_times(self.registry)

        self.encoding = Histogram(
            "unclip_encode_seconds",
            "Making the files of an answer's pictures, or of a preview.",
            buckets=_SECONDS,
            registry=self.registry,
        )

    @cached_property
    def spans(self) -> Counter:
        """Spans of the traces, which are shown once there are traces."""
        return span_counter(self.registry)

    def note(self, route: str, status: int, duration_s: float, refused_by: str) -> None:
        """Count an answer.

        Args:
            route: Pattern of its route.
            status: HTTP status; 499: the client left.
            duration_s: Its time, in seconds.
            refused_by: The guard that refused it, if one did.
        """
        self._duration.labels(route, str(status)).observe(duration_s)
        if status >= 400:
            self._refusals.labels(refused_by or _CAUSES.get(status, "other")).inc()

    def own_text(self) -> str:
        """Its samples alone, for another HTTP process."""
        return generate_latest(self.registry).decode()

    def text(self, replicas: Mapping[str, str], *, with_own: bool = True) -> str:
        """Its samples, and those of the replicas.

        Args:
            replicas: ``EngineMetrics.text`` of each, by name.
            with_own: Whether its own samples are shown, without a name; no: they are among the others.
        """
        own = self.registry.collect() if with_own else ()
        merged: dict[str, Metric] = {metric.name: metric for metric in own}
        for replica, text in sorted(replicas.items()):
            for family in text_string_to_metric_families(text):
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {**sample.labels, "replica": replica}, sample.value)
        registry = CollectorRegistry()
        registry.register(_Fixed(merged.values()))
        return generate_latest(registry).decode()


class _Fixed(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        """The metrics as they are."""
        return self._metrics
