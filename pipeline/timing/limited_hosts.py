"""The hosts of a rehearsal's rows where a recipe limits requests to each: few rows of a host say what all of them wait.

A host's share of the rows stands in the list, so only the time of its requests is measured. Where few of the few come
through, others of the same hosts are fetched, too.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

from pipeline.data.causes import FetchError
from pipeline.data.hosts import NO_LEASE, HostLimits
from pipeline.data.urls import parse_url
from pipeline.recipe.sections import DownloadConfig

_REQUESTS_S = 5.0
"""How long the requests to a host go on whose rate is limited."""
_TURNS = 16
"""Requests to a host, one after another, of which only so many may run at once."""
_FEWEST_ROWS = 16
"""Rows that are fetched at least, however few the hosts are: some may fail, and the next steps read the others."""


class LimitedHosts(HostLimits):
    """The limits of a recipe, and what they hold up, which more workers do not shorten.

    Args:
        config: The recipe's section.
        urls: The URLs of the rehearsal's rows, in their order.
    """

    def __init__(self, config: DownloadConfig, urls: Sequence[str]) -> None:
        super().__init__(config.resources.max_per_host, config.resources.max_rate_per_host)
        self._num_policies = config.robots_txt + config.tdm_reservation
        self._host_of_row = [_host_of(url) for url in urls]
        self._num_rows = Counter(self._host_of_row)
        self.rows = list[int]()
        """Numbers of the rows to fetch, in the order in which they were chosen."""
        self._num_fetched = Counter[str]()
        by_rate = max(1, int(_REQUESTS_S * self._max_rate)) if self._max_rate else math.inf
        self._most = min(by_rate, _TURNS * self._max_per_host if self._max_per_host else math.inf)
        """Rows of a host that are fetched."""
        self.choose(_FEWEST_ROWS)
        self._starts = dict[int, float]()
        self._times = defaultdict[str, list[float]](list)

    def choose(self, num_rows: int) -> None:
        """Add rows of all hosts alike, until there are ``num_rows`` in all, or no others."""
        while self._num_chosen(self._most) < min(num_rows, len(self._host_of_row)):
            self._most += 1
        chosen, taken = {*self.rows}, Counter[str]()
        for row, host in enumerate(self._host_of_row):
            taken[host] += 1
            if row not in chosen and (not host or taken[host] <= self._most):
                self.rows.append(row)
                self._num_fetched[host] += 1

    async def start(self, host: str, reservation: int = NO_LEASE) -> int:
        """See ``HostLimits``."""
        lease = await super().start(host, reservation)
        if lease != NO_LEASE:
            self._starts[lease] = time.monotonic()
        return lease

    async def release(self, host: str, lease: int) -> None:
        """See ``HostLimits``."""
        await super().release(host, lease)
        if lease in self._starts:
            self._times[host].append(time.monotonic() - self._starts.pop(lease))

    @property
    def wait_s(self) -> float:
        """Seconds that ``rows`` take at least for the rate of a host."""
        if not self._max_rate:
            return 0.0
        most = max((count for host, count in self._num_fetched.items() if host), default=0)
        return (most - 1 + self._num_policies) / self._max_rate if most else 0.0

    def num_good(self, is_good: Sequence[bool]) -> float:
        """How many of all rows come through.

        Args:
            is_good: Whether each of ``rows`` did.
        """
        good = Counter(self._host_of_row[row] for row, came in zip(self.rows, is_good, strict=True) if came)
        return sum(good[host] / count * self._num_rows[host] for host, count in self._num_fetched.items())

    def row_s(self) -> float:
        """Seconds of each row of a list, if the host with the most rows decides; 0 without limits."""
        seconds = max((self._host_s(host, times) for host, times in self._times.items()), default=0.0)
        return seconds / max(1, len(self._host_of_row) - 1)

    def _num_chosen(self, most: float) -> float:
        return sum(min(count, most) if host else count for host, count in self._num_rows.items())

    def _host_s(self, host: str, times: Sequence[float]) -> float:
        """Seconds that the limits ask for the rows of a host beyond its first, which says nothing of its share."""
        by_rate_s = 1 / self._max_rate if self._max_rate else 0.0
        by_count_s = sum(times) / len(times) / self._max_per_host if self._max_per_host else 0.0
        # A host that is in no URL is one to which others redirect.
        num_rows, num_fetched = self._num_rows[host], self._num_fetched[host]
        times_all = num_rows / num_fetched if num_fetched else len(self._host_of_row) / len(self.rows)
        return max(0.0, (len(times) - self._num_policies) * times_all - 1) * max(by_rate_s, by_count_s)


def _host_of(url: str) -> str:
    """The host of a URL; empty if it names none, as a file does."""
    try:
        return parse_url(url).host
    except FetchError:
        return ""
