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
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

NO_LEASE = 0
"""Returned in place of a lease if the host asks to wait for too long."""
RESERVATION_S = 5.0
"""Longest time between ``reserve`` and ``start``. What a lost worker had asked for is reserved all the same, one after
the other: each holds the host up for so long."""
LONGEST_PAUSE_S = 3600.0
"""Of what a host asks for: one answer of a host that many pictures share must not end them all for the whole run."""


class Limits(Protocol):
    """Where a request waits for its turn.

    A request starts in the moment of its lease. What is to be waited for besides (a connection) is waited for between
    ``reserve`` and ``start``: of leases that wait, many requests would start together. If that takes longer than
    ``RESERVATION_S``, the turn is another's.
    """

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        """Start a request now; a reservation is used up.

        Args:
            host: Its host.
            reservation: What ``reserve`` returned; without one, those that wait for the host go first.

        Returns:
            A lease, or ``NO_LEASE`` if the host's turn is not now, or not any more: then it is to be reserved.
        """
        ...

    async def reserve(self, host: str, patience_s: float) -> int:
        """Wait for the host's turn and keep it for ``RESERVATION_S``.

        ``NO_LEASE`` if the host's pause is longer than ``patience_s``.
        """
        ...

    async def release(self, host: str, lease: int) -> None:
        """Give a slot back, or a reservation."""
        ...

    async def pause(self, host: str, seconds: float) -> None:
        """Start no request to the host for some seconds."""
        ...


@dataclass
class _Host:
    leases: dict[int, float] = field(default_factory=dict[int, float])
    """When each slot is free at the latest, on the monotonic clock; also those that are reserved."""
    reserved: int = NO_LEASE
    """The newest reservation."""
    rate_until: float = 0.0
    """Until when the rate lets no request start, on the monotonic clock."""
    pause_until: float = 0.0
    """Until when the host asks for none."""
    waiting: int = 0
    is_listed: bool = False
    """Whether it is among those that are to be forgotten at a time."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def next_start(self) -> float:
        """Earliest start of the next request, on the monotonic clock."""
        return max(self.rate_until, self.pause_until)


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

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        """See ``Limits``."""
        self._forget_idle()
        state = self._hosts.setdefault(host, _Host())
        is_reserved = state.leases.pop(reservation, None) is not None
        lease = NO_LEASE
        if (is_reserved or not state.waiting) and not self._wait_s(state):
            lease = self._lease(state, self._lease_s)
            if self._max_rate:
                now, interval_s = time.monotonic(), 1 / self._max_rate
                # What waited for a connection after its turn delays the next one by no more than it has to.
                since = max(state.next_start, now - interval_s) if is_reserved else now
                state.rate_until = since + interval_s
        state.changed.set()
        self._forget(host, state)
        return lease

    async def reserve(self, host: str, patience_s: float) -> int:
        """See ``Limits``; turns come in the order in which they were asked for."""
        self._forget_idle()
        state = self._hosts.setdefault(host, _Host())
        state.waiting += 1
        try:
            async with state.turn:
                while wait_s := self._wait_s(state):
                    if state.pause_until - time.monotonic() > patience_s:
                        return NO_LEASE
                    state.changed.clear()
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(state.changed.wait(), wait_s)
                state.reserved = self._lease(state, RESERVATION_S)
                return state.reserved
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

    async def start_all(
        self, requests: Sequence[tuple[str, int]], released: Sequence[tuple[str, int]] = ()
    ) -> list[int]:
        """``release`` and then ``start`` of many requests: a call from another process takes far longer than its work.

        Args:
            requests: Host and reservation of each that starts.
            released: Host and lease of each that has ended.

        Returns:
            The leases, in the order of ``requests``.
        """
        for host, lease in released:
            await self.release(host, lease)
        return [await self.start(host, reservation) for host, reservation in requests]

    async def pause(self, host: str, seconds: float) -> None:
        """See ``Limits``; not for longer than ``LONGEST_PAUSE_S``."""
        state = self._hosts.setdefault(host, _Host())
        state.pause_until = max(state.pause_until, time.monotonic() + min(seconds, LONGEST_PAUSE_S))
        state.changed.set()
        self._forget(host, state)

    def _lease(self, state: _Host, seconds: float) -> int:
        lease = next(self._numbers)
        state.leases[lease] = time.monotonic() + seconds
        return lease

    def _wait_s(self, state: _Host) -> float:
        """Seconds until the next request may start, if nothing changes before; 0: now."""
        now = time.monotonic()
        state.leases = {lease: end for lease, end in state.leases.items() if end > now}
        if self._max_per_host and len(state.leases) >= self._max_per_host:
            return min(state.leases.values()) - now
        if self._max_rate and state.reserved in state.leases:  # the next one comes a while after this one has started
            return state.leases[state.reserved] - now
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


class HostPauses:
    """The pauses that hosts ask for, from all that download to all: where hosts have no limits, they share no more."""

    def __init__(self) -> None:
        self._pauses: dict[str, tuple[int, float]] = {}
        """Number and end, on the monotonic clock, of the newest pause of each host; the newest is the last."""
        self._number = time.time_ns()  # a process that starts again does not begin below what others have heard

    async def pause(self, host: str, seconds: float) -> None:
        """See ``Limits``; not for longer than ``LONGEST_PAUSE_S``."""
        now = time.monotonic()
        _, end = self._pauses.pop(host, (0, 0.0))
        self._number += 1
        self._pauses[host] = self._number, max(end, now + min(seconds, LONGEST_PAUSE_S))
        while self._pauses and next(iter(self._pauses.values()))[1] <= now:
            del self._pauses[next(iter(self._pauses))]

    async def since(self, number: int) -> tuple[int, list[tuple[str, float]]]:
        """The pauses after a number that this has returned, or 0: all.

        Returns:
            The number of the newest one; and host and seconds left of each.
        """
        now = time.monotonic()
        news = itertools.takewhile(lambda one: one[1][0] > number, reversed(self._pauses.items()))
        return self._number, [(host, end - now) for host, (_, end) in news if end > now]
