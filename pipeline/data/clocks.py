"""Deadlines that stand still: the time that a URL waits for its host's turn is not its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Generator


class Clock:
    """The time that a URL has left.

    Args:
        deadline: Its deadline, entered.
    """

    def __init__(self, deadline: asyncio.Timeout) -> None:
        self._deadline = deadline
        self._num_stops = 0
        self._left_s = self._stopped_at = 0.0
        """When it was stopped."""
        self.stopped_s = 0.0
        """Seconds in which it stood still, until it was started last."""

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        when = self._deadline.when()
        return self._left_s if when is None else when - asyncio.get_running_loop().time()

    def stop(self, times: int = 1) -> None:
        """Stand still until it was started as many times as it was stopped."""
        if times and not self._num_stops:
            self._stopped_at = asyncio.get_running_loop().time()
            if not self._deadline.expired():
                self._left_s = self.left_s
                self._deadline.reschedule(None)
        self._num_stops += times

    def start(self, times: int = 1) -> None:
        """Take stops back."""
        self._num_stops -= times
        if times and not self._num_stops:
            now = asyncio.get_running_loop().time()
            self.stopped_s += now - self._stopped_at
            if not self._deadline.expired():
                self._deadline.reschedule(now + self._left_s)

    @contextlib.contextmanager
    def stopped(self) -> Generator[None]:
        """Stand still inside ``with``."""
        self.stop()
        try:
            yield
        finally:
            self.start()


class SharedStops:
    """Stops the clocks of all that wait for the same thing while that thing waits."""

    def __init__(self) -> None:
        self._clocks: defaultdict[str, set[Clock]] = defaultdict(set)
        self._num_stops: Counter[str] = Counter()

    @contextlib.contextmanager
    def joined(self, key: str, clock: Clock) -> Generator[None]:
        """Inside ``with``, the clock stands still while those of ``key`` do."""
        self._clocks[key].add(clock)
        clock.stop(self._num_stops[key])
        try:
            yield
        finally:
            clock.start(self._num_stops[key])
            self._clocks[key].remove(clock)
            self._forget(key)

    @contextlib.contextmanager
    def stopped(self, key: str) -> Generator[None]:
        """Inside ``with``, the clocks of ``key`` stand still."""
        self._num_stops[key] += 1
        for clock in self._clocks[key]:
            clock.stop()
        try:
            yield
        finally:
            self._num_stops[key] -= 1
            for clock in self._clocks[key]:
                clock.start()
            self._forget(key)

    def _forget(self, key: str) -> None:
        if not self._clocks[key]:
            del self._clocks[key]
        if not self._num_stops[key]:
            del self._num_stops[key]
