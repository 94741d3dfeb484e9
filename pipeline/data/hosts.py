"""Limits for each host: connections at once, requests a second, and the pauses that a host asks for (Retry-After).

One object holds them for all that download: inside one process as it is, on a cluster as a Ray actor (its methods are
coroutines that take and return plain values).
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import time
from dataclasses import dataclass, field
from typing import Protocol

NO_LEASE = 0
"""Returned in place of a lease if the host asks to wait for too long."""
LONGEST_PAUSE_S = 3600.0
"""Of what a host asks for: one answer of a host that many pictures share must not end them all for the whole run."""


class Limits(Protocol):
    """Where a request waits for its turn."""

    async def acquire(self, host: str, patience_s: float) -> int:
        """Wait for a slot of the host; returns a lease, or ``NO_LEASE`` if its pause is longer than ``patience_s``."""
        ...

    async def release(self, host: str, lease: int) -> None:
        """Give a slot back."""
        ...

    async def pause(self, host: str, seconds: float) -> None:
        """Start no request to the host for some seconds."""
        ...


@dataclass
class _Host:
    leases: dict[int, float] = field(default_factory=dict[int, float])
    """When each slot is free at the latest, on the monotonic clock."""
    next_start: float = 0.0
    """Earliest start of the next request, on the monotonic clock."""
    waiting: int = 0
    is_listed: bool = False
    """Whether it is among those that are to be forgotten at a time."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class HostLimits:
    """The limits of all hosts.

    Args:
        max_per_host: Most requests to one host at once; 0: no limit.
        max_rate: Most requests to one host, per second; 0: no limit.
        lease_s: Longest time of a request, in seconds: the slot of a worker that is lost is free after it.
    """

    def __init__(self, max_per_host: int = 0, max_rate: float = 0.0, *, lease_s: float = 3600.0) -> None:
        self._max_per_host = max_per_host
        self._max_rate = max_rate
        self._lease_s = lease_s
        self._hosts: dict[str, _Host] = {}
        self._idle: list[tuple[float, str]] = []
        """Heap of the times at which hosts that have no request may be forgotten."""
        self._numbers = itertools.count(NO_LEASE + 1)

    async def acquire(self, host: str, patience_s: float) -> int:
        """See ``Limits``; requests to a host start in the order in which they asked."""
        self._forget_idle()
        state = self._hosts.setdefault(host, _Host())
        state.waiting += 1
        try:
            async with state.turn:
                while wait_s := self._wait_s(state):
                    if state.next_start - time.monotonic() > patience_s:
                        return NO_LEASE
                    state.changed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(state.changed.wait(), wait_s)
                lease, now = next(self._numbers), time.monotonic()
                state.leases[lease] = now + self._lease_s
                if self._max_rate:
                    state.next_start = now + 1 / self._max_rate
                return lease
        finally:
            state.waiting -= 1
            self._forget(host, state)

    async def release(self, host: str, lease: int) -> None:
        """See ``Limits``."""
        state = self._hosts.get(host)
        if state is not None:
            state.leases.pop(lease, None)
            state.changed.set()
            self._forget(host, state)

    async def pause(self, host: str, seconds: float) -> None:
        """See ``Limits``; not for longer than ``LONGEST_PAUSE_S``."""
        state = self._hosts.setdefault(host, _Host())
        state.next_start = max(state.next_start, time.monotonic() + min(seconds, LONGEST_PAUSE_S))
        state.changed.set()
        self._forget(host, state)

    def _wait_s(self, state: _Host) -> float:
        """Seconds until the next request may start, if nothing changes before; 0: now."""
        now = time.monotonic()
        while state.leases and next(iter(state.leases.values())) <= now:  # the oldest ends first
            del state.leases[next(iter(state.leases))]
        if self._max_per_host and len(state.leases) >= self._max_per_host:
            return min(state.leases.values()) - now
        return max(0.0, state.next_start - now)

    def _forget(self, host: str, state: _Host) -> None:
        """Drop a host of which nothing is to be remembered, now or when it may be asked again.

        Lists have millions of hosts, most of which are asked once.
        """
        if state.waiting or state.leases:
            return
        if state.next_start <= time.monotonic():
            self._hosts.pop(host, None)
        elif not state.is_listed:
            state.is_listed = True
            heapq.heappush(self._idle, (state.next_start, host))

    def _forget_idle(self) -> None:
        now = time.monotonic()
        while self._idle and self._idle[0][0] <= now:
            _, host = heapq.heappop(self._idle)
            state = self._hosts.get(host)
            if state is not None:
                state.is_listed = False
                self._forget(host, state)
