"""How fast a training goes, and how much of its time waits for data."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator

import torch

from pipeline.data.batch import Batch
from pipeline.errors import ConfigError
from pipeline.train.assemble import TrainJob

_COUNT_AFTER_S = 30.0
"""Arithmetic is counted, and the peak measured, once a training has run for so long: both take about a second."""
_PEAK_EVERY_S = 30.0
"""The peak of CPUs is measured again so often, in a tenth of a second: whatever else runs on them comes and goes."""
_NUM_PRODUCTS = 3
_PRODUCT_SIDE = {"cpu": 1024, "cuda": 8192}


class Speed:
    """The speed of one training since its last log line, as rank 0 sees it.

    Args:
        job: The training.
        step: Its first step, 0-based.
        count_after_s: Seconds after which arithmetic is counted.
        clock: Seconds, from any beginning.
    """

    def __init__(
        self,
        job: TrainJob,
        step: int,
        *,
        count_after_s: float = _COUNT_AFTER_S,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._job, self._step, self._clock = job, step, clock
        self._start = self._read_at = clock()
        self._count_at = self._start + count_after_s
        self._stalled_s = 0.0
        self._flops_per_sample: float | None = None
        self._peaks: dict[str, float] = {}
        self._peak_at = -math.inf

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """The same batches; the time that the loop waits for them is added up."""
        self._read_at = self._clock()
        while True:
            start = self._clock()
            batch = next(batches)
            self._stalled_s += self._clock() - start
            yield batch

    def read(self, step: int) -> dict[str, float]:
        """The numbers since the last reading.

        Args:
            step: Steps done.

        Returns:
            ``samples_per_s`` of all workers, ``stalled_share`` of the time in which rank 0 waited for data,
            ``peak_memory_gb`` of its GPU, or of its process; ``eta_s``, the time to go at this rate; after a while
            ``mfu``: counted arithmetic over the most that large matrix products have reached so far in the same
            precision on the same device. It is left out where it would be above 1.
        """
        now = self._clock()
        seconds = max(now - self._read_at, 1e-9)
        train, num_steps = self._job.section.train, step - self._step
        samples_per_s = num_steps * train.batch_size / seconds
        numbers = {"samples_per_s": samples_per_s, "stalled_share": min(1.0, self._stalled_s / seconds)}
        numbers["peak_memory_gb"] = _peak_memory_gb(self._job.device)
        if num_steps:
            numbers["eta_s"] = (train.total_steps - step) * seconds / num_steps
        if now >= self._count_at:
            mfu = self._mfu(step, samples_per_s)
            if 0 < mfu <= 1:
                numbers["mfu"] = mfu
        self._step, self._read_at, self._stalled_s = step, self._clock(), 0.0
        return numbers

    def _mfu(self, step: int, samples_per_s: float) -> float:
        """Arithmetic at this rate over the peak of all workers; 0 if it cannot be counted.

        A GPU that the training fills has no room for the product: the training goes on without the number.
        """
        if self._flops_per_sample is None:
            self._flops_per_sample = self._count()
        if not self._flops_per_sample:
            return 0.0
        device, precision = self._job.device, self._job.section.train.at(max(0, step - 1)).precision
        peak, now = self._peaks.get(precision, 0.0), self._clock()
        rate = samples_per_s * self._flops_per_sample / self._job.world_size
        is_in_doubt = device.type == "cpu" or rate > peak  # others may have had the processors when it was measured
        if not peak or (is_in_doubt and now >= self._peak_at + _PEAK_EVERY_S):
            try:
                peak = max(peak, measure_peak(device, precision))
            except torch.OutOfMemoryError:
                self._flops_per_sample = 0.0
                return 0.0
            self._peaks[precision], self._peak_at = peak, now
        return rate / peak

    def _count(self) -> float:
        """Operations of a training step for each sample; 0 if this cannot be counted."""
        from pipeline.networks.costs import training_flops  # loads open_clip, which few trainings need

        try:
            return training_flops(self._job.recipe, self._job.name)
        except ConfigError:
            return 0.0


def describe_speed(numbers: dict[str, float]) -> str:
    """The numbers in words, for the progress line."""
    mfu = f", MFU {100 * numbers['mfu']:.0f} %" if "mfu" in numbers else ""
    return (
        f"{numbers['samples_per_s']:.3g} samples/s, {100 * numbers['stalled_share']:.0f} % waiting for data{mfu}, "
        f"{numbers['peak_memory_gb']:.1f} GB"
    )


def measure_peak(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product on a device: a multiplication and an addition are two.

    The quickest of a few products counts: the first loads its kernel. On CPUs its time is that of the calling thread,
    one of those that compute it: while another program has the processor, it stands still.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    side = _PRODUCT_SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    quickest = math.inf
    for _ in range(_NUM_PRODUCTS):
        _wait(device, matrix)
        start = clock()
        _wait(device, matrix @ matrix)
        quickest = min(quickest, clock() - start)
    return 2.0 * side**3 / quickest


def _wait(device: torch.device, _: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
