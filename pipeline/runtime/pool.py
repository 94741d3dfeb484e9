"""A pool of Ray actors, for every data step, that makes the shards that are not committed yet.

It uses plain actors, not Ray Data. Ray Data's blocks are not our shards, so a lost worker would lose several shards,
and its own checkpoint commits by written block (650 of 800 rows done, none saved). Here the worker that made a shard
commits it, and a lost worker costs one shard.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import ray
import ray.exceptions

from pipeline.errors import StepError, UnclipError
from pipeline.recipe.sections import TaskResources
from pipeline.runtime.context import StepContext
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.progress import Progress

_POLL_S = 1.0
_SLOW_START_S = 20.0


class ShardWorker(Protocol):
    """Built once in each worker; then makes, publishes and commits one shard after another."""

    def __init__(self, context: StepContext) -> None: ...

    def __call__(self, shard: str) -> ShardRecord:
        """Make one shard and commit it."""
        ...


@dataclass(frozen=True)
class ShardJob:
    """The shards to make, and how."""

    worker: type[ShardWorker]
    shards: Sequence[str]
    num_rows: int
    """Rows of all shards, for the progress."""
    resources: TaskResources
    limit_s: float | None = None
    """Longest time for a shard before its worker counts as lost, in seconds."""
    on_record: Callable[[list[ShardRecord]], None] = field(default=lambda _records: None)
    """Called with all records so far whenever one is added; may raise to end the step."""


@ray.remote(max_restarts=0, max_task_retries=0)
class _Actor:
    def __init__(self) -> None:
        self._worker: ShardWorker | None = None

    def start(self, worker: type[ShardWorker], context: StepContext) -> float:
        """Build the worker; not in __init__, where Ray would hide the error's class. Returns how long it took, in s."""
        start = time.monotonic()
        self._worker = worker(context)
        return time.monotonic() - start

    def make(self, shard: str) -> ShardRecord:
        assert self._worker is not None
        return self._worker(shard)


@dataclass
class _Running:
    actor: Any
    shard: str | None
    """None while the worker starts."""
    start: float


def map_shards(context: StepContext, job: ShardJob) -> list[ShardRecord]:
    """Make every shard that is not committed yet.

    Args:
        context: The step.
        job: The shards and their workers.

    Returns:
        The records of all shards, by name.

    Raises:
        UnclipError: If a worker raised one.
        StepError: If a shard lost its worker ``max_retries + 1`` times, or a worker failed in an unforeseen way.
    """
    records = {name: one for name, one in context.output.shard_records().items() if name in set(job.shards)}
    pool = _Pool(context, job, deque(name for name in job.shards if name not in records))
    progress = Progress(context.output, waits=True)
    try:
        while pool.is_busy:
            if pool.first_start_s is not None:
                progress.begin(ago_s=pool.first_start_s)
            done = sum(record.counts["in"] for record in records.values())
            progress.update(done, job.num_rows, "rows", pool.message())
            for record in pool.poll():
                records[record.shard] = record
                job.on_record(list(records.values()))
    finally:
        pool.close()
    job.on_record(list(records.values()))
    progress.update(job.num_rows, job.num_rows, "rows", force=True)
    return [records[name] for name in job.shards]


def total_counts(records: list[ShardRecord]) -> dict[str, int]:
    """Rows of all shards."""
    return add_counts([record.counts for record in records])


class _Pool:
    """Workers and the shards that wait for them; a worker gets a shard only after it has started."""

    def __init__(self, context: StepContext, job: ShardJob, waiting: deque[str]) -> None:
        self._context = context
        self._job = job
        self._waiting = waiting
        self._losses: Counter[str] = Counter()
        self._running: dict[Any, _Running] = {}
        self._start = time.monotonic()
        self.first_start_s: float | None = None
        """Seconds that the first worker took to start once it had its CPUs or GPUs; None while all wait."""
        self._worker = ray.put(job.worker)
        for _ in range(min(job.resources.num_workers, len(waiting))):
            self._add_worker()

    @property
    def is_busy(self) -> bool:
        """Whether a shard is waiting or being made."""
        return bool(self._waiting) or any(running.shard is not None for running in self._running.values())

    def message(self) -> str:
        """A message if the cluster provides no worker; else empty."""
        if self.first_start_s is not None or time.monotonic() - self._start < _SLOW_START_S:
            return ""
        needs, free = self._job.resources, ray.available_resources()
        amount = f"{needs.cpus_per_worker:g} CPU" + (" and 1 GPU" if needs.accelerator == "cuda" else "")
        return f"waiting for a worker of {amount}; free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU"

    def poll(self) -> list[ShardRecord]:
        """Wait a moment; returns the new records, and replaces lost workers."""
        ready, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        records = [record for reference in ready if (record := self._collect(reference)) is not None]
        limit_s = self._job.limit_s
        for reference, running in list(self._running.items()):
            if limit_s is not None and running.shard is not None and time.monotonic() - running.start > limit_s:
                del self._running[reference]
                ray.kill(running.actor)
                self._handle_loss(running.shard, f"it took longer than {limit_s:.0f} s")
        return records

    def close(self) -> None:
        """End every worker."""
        for running in self._running.values():
            ray.kill(running.actor)

    def _collect(self, reference: Any) -> ShardRecord | None:
        running = self._running.pop(reference)
        try:
            result: ShardRecord | float = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            ray.kill(running.actor)
            raise _explain(error, running.shard) from (None if isinstance(error.cause, UnclipError) else error)
        except ray.exceptions.RayError as error:
            ray.kill(running.actor)
            self._handle_loss(running.shard or "", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
            return None
        self._assign_shard(running.actor)
        if isinstance(result, ShardRecord):
            return result
        self.first_start_s = result if self.first_start_s is None else self.first_start_s
        return None

    def _assign_shard(self, actor: Any) -> None:
        if not self._waiting:
            ray.kill(actor)
            return
        shard = self._waiting.popleft()
        self._running[actor.make.remote(shard)] = _Running(actor, shard, time.monotonic())

    def _handle_loss(self, shard: str, reason: str) -> None:
        self._losses[shard] += 1
        if self._losses[shard] > self._job.resources.max_retries:
            what = f"shard {shard}" if shard else "the start of a worker"
            raise StepError(
                f"{self._context.step.name}: {what} was lost {self._losses[shard]} times; last time {reason}; "
                f"what is finished is kept in {self._context.output.uri}; run again to continue"
            )
        if shard:
            self._waiting.appendleft(shard)
        self._add_worker()

    def _add_worker(self) -> None:
        needs = self._job.resources
        num_gpus = 1 if needs.accelerator == "cuda" else 0
        actor = cast("Any", _Actor).options(num_cpus=needs.cpus_per_worker, num_gpus=num_gpus).remote()
        self._running[actor.start.remote(self._worker, self._context)] = _Running(actor, None, time.monotonic())


def _explain(error: ray.exceptions.RayTaskError, shard: str | None) -> BaseException:
    """The error that a worker raised; an unforeseen one gets a note with the shard's name."""
    cause = error.cause or error
    if not isinstance(cause, UnclipError):
        cause.add_note(f"while making shard {shard}")
    return cause
