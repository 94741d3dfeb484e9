"""Which networks requests mean: the replicas are told when that changes, and how long those of before are needed.

A part of a chain may have nothing to do for a request that is still in an earlier part. Only the process that speaks
HTTP knows that it will come, so it says so every second until the last such request has its answer. If the process
dies, it says nothing any more, and the networks of before end.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.runtime.remote_model import Handles, tell


@dataclass(frozen=True)
class _Meant:
    served: str
    """Digest of the networks."""
    num_requests: Callable[[], int]
    """How many requests that mean them are under way in this process."""
    ended: Callable[[], object]
    """Called when requests mean others, and the last of these has its answer."""


class Turns:
    """What requests of this process mean, now and before; for several threads.

    Args:
        handles: Of the parts.
        served: Digest of the networks that requests mean now; empty: none yet.
        num_requests: How many of those requests are under way.
        ended: Called once requests mean others and the last of those has its answer.
    """

    def __init__(
        self,
        handles: Handles,
        served: str = "",
        num_requests: Callable[[], int] = lambda: 0,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._handles = handles
        self._now = _Meant(served, num_requests, ended)
        self._before: list[_Meant] = []
        self._lock = threading.Lock()

    def turn_to(self, served: str, num_requests: Callable[[], int], ended: Callable[[], object] = lambda: None) -> None:
        """Let all replicas know what requests mean from now on, so that they end the other networks in time."""
        with self._lock:
            self._before.append(self._now)
            self._now = _Meant(served, num_requests, ended)
        tell(self._handles, "turn_to", served)

    def look(self, *, is_behind: bool = False) -> None:
        """Let the replicas know which networks are still needed.

        Args:
            is_behind: Whether other processes may mean other networks than this one does.
        """
        with self._lock:
            before, self._before, over = self._before, [], list[_Meant]()
            for meant in before:
                (self._before if meant.num_requests() else over).append(meant)
            needed = {meant.served for meant in self._before} - {self._now.served}
            if is_behind:
                needed.add(self._now.served)
        for meant in over:
            meant.ended()
        for served in needed:
            tell(self._handles, "keep", served)
