"""A clock for small pieces of work, which other programs on the machine disturb little."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

_LEAST_REPEATS = 3
_MOST_REPEATS = 20


class Clock:
    """Seconds of work on one device.

    One thread on a processor is timed by its processor time, because the wall clock also runs while other programs have
    the core. Several threads, a GPU, and work that waits for other processes have the wall clock.

    Args:
        device: Where the work runs.
        num_threads: Threads of the work.
        waits: Whether it waits for other processes.
    """

    def __init__(self, device: torch.device, num_threads: int, *, waits: bool = False) -> None:
        self._device = device
        self._uses_processor_time = device.type == "cpu" and num_threads == 1 and not waits

    def now(self) -> float:
        """Seconds since some start, after all work on the device."""
        if self._uses_processor_time:
            return time.process_time()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of one call."""
        start = self.now()
        work()
        return self.now() - start

    def repeat(self, work: Callable[[], object], *, least_s: float) -> float:
        """Median seconds of a call, after a first one that is not counted: it reserves memory and chooses kernels."""
        work()
        times: list[float] = []
        while len(times) < _LEAST_REPEATS or (sum(times) < least_s and len(times) < _MOST_REPEATS):
            times.append(self.time(work))
        return statistics.median(times)
