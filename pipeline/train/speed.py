"""How fast a training goes, and how much of its time waits for data."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator, Iterator

import torch

from pipeline.data.batches import Batch
from pipeline.errors import ConfigError
from pipeline.train.assemble import TrainJob

_COUNT_AFTER_S = 30.0
"""Arithmetic is counted, and the peak measured, once a training has run for so long: both take about a second."""
_PRODUCT_S = 0.1
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
        self._share_of_peak: float | None = None

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """The same batches; the time that the loop waits for them is added up."""
        self._read_at = self._clock()
        while True:
            begun = self._clock()
            batch = next(batches)
            self._stalled_s += self._clock() - begun
            yield batch

    def read(self, step: int) -> dict[str, float]:
        """The numbers since the last reading.

        Args:
            step: Steps done.

        Returns:
            ``samples_per_s`` of all workers, ``stalled_share`` of the time in which rank 0 waited for data,
            ``peak_memory_gb`` of its GPU, or of its process; after a while ``mfu``: counted arithmetic over that of a
            large matrix product in the same precision on the same device.
        """
        now = self._clock()
        seconds = max(now - self._read_at, 1e-9)
        samples_per_s = (step - self._step) * self._job.section.train.batch_size / seconds
        numbers = {"samples_per_s": samples_per_s, "stalled_share": min(1.0, self._stalled_s / seconds)}
        numbers["peak_memory_gb"] = _peak_memory_gb(self._job.device)
        if self._share_of_peak is None and now >= self._count_at:
            self._share_of_peak = self._count(step)
        if self._share_of_peak:
            numbers["mfu"] = samples_per_s * self._share_of_peak
        self._step, self._read_at, self._stalled_s = step, self._clock(), 0.0
        return numbers

    def _count(self, step: int) -> float:
        """Seconds that one sample would take all workers at their peak; 0 if this cannot be counted.

        A GPU that the training fills has no room for the product: the training goes on without the number.
        """
        from pipeline.networks.costs import training_flops  # loads open_clip, which few trainings need

        job = self._job
        try:
            flops = training_flops(job.recipe, job.name)
            precision = job.section.train.at(min(step, job.section.train.total_steps - 1)).precision
            return flops / (measure_peak(job.device, precision) * job.world_size)
        except (ConfigError, torch.OutOfMemoryError):
            return 0.0


def describe_speed(numbers: dict[str, float]) -> str:
    """The numbers in words, for the progress line."""
    mfu = f", MFU {100 * numbers['mfu']:.0f} %" if "mfu" in numbers else ""
    return (
        f"{numbers['samples_per_s']:.3g} samples/s, {100 * numbers['stalled_share']:.0f} % waiting for data{mfu}, "
        f"{numbers['peak_memory_gb']:.1f} GB"
    )


def measure_peak(device: torch.device, precision: str) -> float:
    """Operations per second of a large matrix product on a device: a multiplication and an addition are two."""
    side = _PRODUCT_SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    _wait(device, matrix @ matrix)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < _PRODUCT_S:
        _wait(device, matrix @ matrix)
        count += 1
    return 2.0 * side**3 * count / (time.perf_counter() - begun)


def _wait(device: torch.device, _: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory_gb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
