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
        self._parts = set[str]()
        self._absent_since_s: dict[str, float] = {}
        """Since when no replica of a part has run, by its name."""
        self.has_ended = False
        """Whether no replica will run again, because Ray is gone: no request waits for one."""
        self.served = ""
        """Digest of what new requests mean since the last swap; empty: there was none."""

    def absent_s(self, part: str) -> float:
        """For how long no replica of a part has run, in seconds; 0 while there is one."""
        since_s = self._absent_since_s.get(part)
        return 0.0 if since_s is None else time.monotonic() - since_s

    def note_running(self, running: Mapping[str, int]) -> None:
        """Learn how many replicas of each part run; there are no other parts."""
        for part in self._parts - running.keys():
            self._running.remove(part)
            self._absent_since_s.pop(part, None)
        self._parts = {*running}
        for part, number in running.items():
            self._running.labels(part).set(number)
            if number:
                self._absent_since_s.pop(part, None)
            else:
                self._absent_since_s.setdefault(part, time.monotonic())
