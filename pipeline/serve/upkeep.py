"""What is known of the replicas: for Prometheus, for ``/readyz``, and for the requests that wait for one."""

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge


class Upkeep:
    """How many replicas run, which have died, and what was begun again because of that.

    Args:
        registry: Where its metrics are; None: one of its own.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        registry = registry or CollectorRegistry()
        self._running = Gauge("unclip_replicas", "Replicas that run.", ["part"], registry=registry)
        self.deaths = Counter("unclip_replica_deaths", "Replicas that died.", ["part"], registry=registry)
        self.begun_again = Counter(
            "unclip_begun_again", "Requests that were begun once more because a replica died.", registry=registry
        )
        self._absent_since_s: float | None = None
        self.has_ended = False
        """Whether no replica will run again, because Ray is gone: no request waits for one."""

    @property
    def absent_s(self) -> float:
        """For how long no replica of some part has run, in seconds; 0 while there is one of each."""
        return 0.0 if self._absent_since_s is None else time.monotonic() - self._absent_since_s

    def note_running(self, running: Mapping[str, int]) -> None:
        """Learn how many replicas of each part run."""
        for part, number in running.items():
            self._running.labels(part).set(number)
        if all(running.values()):
            self._absent_since_s = None
        elif self._absent_since_s is None:
            self._absent_since_s = time.monotonic()
