"""A pool of Ray actors, for every data step, that makes the shards that are not committed yet.

It uses plain actors, not Ray Data. Ray Data's blocks are not our shards, so a lost worker would lose several shards,
and its own checkpoint commits by written block (650 of 800 rows done, none saved). Here the worker that made a shard
commits it, and a lost worker costs one shard.
"""

import platform
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import ray
import ray.exceptions

from pipeline.errors import StepError, UnclipError, first_line
from pipeline.recipe.sections import TaskResources
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import cluster_has_roles, describe, unoffered, worker_options
from pipeline.runtime.worker_logs import failures_logged, logged
from pipeline.workspace.manifest import ShardRecord, add_counts
from pipeline.workspace.progress import Progress, duration
from pipeline.workspace.store import LIVE, Artifact

_POLL_S = 1.0
_SLOW_START_S = 20.0
_LONGEST_LOOK = 0.25
"""Most that counts between two looks at a shard, as a share of the limit."""


class ShardWorker(Protocol):
    """Built once in each worker; then makes, publishes and commits one shard after another."""

    def __init__(self, context: StepContext) -> None: ...

    def __call__(self, shard: str) -> ShardRecord:
        """Make one shard and commit it."""
        ...


@dataclass(frozen=True)
class ShardReading:
    """How far a shard is that a worker is making; a worker whose readings stay equal hangs."""

    rows: int = 0
    """Rows that are finished."""
    beat: int = 0
    """Grows while the worker waits for something that may take any time."""


@dataclass(frozen=True)
class ShardJob:
    """The shards to make, and how."""

    worker: type[ShardWorker]
    shards: Sequence[str]
    num_rows: int
    """Rows of all shards, for the progress."""
    resources: TaskResources
    num_at_once: int = 1
    """Shards that one worker makes at a time, in threads; above 1, ``worker`` is called from several at once."""
    limit_s: float | None = None
    """Longest time without a new reading of a shard before its worker counts as lost, in seconds."""
    read: Callable[[Sequence[str]], Mapping[str, ShardReading]] = field(
        default=lambda shards: dict.fromkeys(shards, ShardReading())
    )
    """How far the shards are that workers are making. It is called again and again, with all of them, and looks at them
    together; a shard that it did not look at since its last call is not in the answer, and is not silent meanwhile."""
    on_loss: Callable[[str, int], bool] | None = None
    """Called when a shard lost its worker, with how often it did; returns whether it is tried again. None: it is up to
    ``max_retries`` times."""
    on_records: Callable[[list[ShardRecord]], None] = field(default=lambda _records: None)
    """Called with each record once: first with those that were committed before, then with the new ones as they come;
    may raise to end the step. What it does must not grow with the records so far: there are a hundred thousand."""
    unit: str = "rows"
    """What ``num_rows`` counts, for the progress."""
    note: Callable[[], str] = field(default=lambda: "")
    """What the progress says, asked at each of its readings."""
    output: Artifact | None = None
    """Where the shards are committed; None: the step's artifact."""


@ray.remote(max_restarts=0, max_task_retries=0)
class _Actor:
    def __init__(self) -> None:
        self._worker: ShardWorker | None = None

    def start(self, worker: type[ShardWorker], context: StepContext, number: int) -> tuple[float, str]:
        """Build the worker; not in __init__, where Ray would hide the error's class.

        Returns:
            How long it took, in seconds, and the name of the machine.
        """
        start = time.monotonic()
        with logged(context.step.name, str(number)):
            self._worker = worker(context)
        return time.monotonic() - start, platform.node()

    def make(self, shard: str) -> ShardRecord:
        assert self._worker is not None
        with failures_logged():
            return self._worker(shard)


@dataclass
class _Running:
    actor: Any
    shard: str | None
    """None while the worker starts."""
    looked: float
    """When its reading was looked at last, on the monotonic clock."""
    silent_s: float = 0.0
    """Time without a new reading, in seconds."""
    reading: ShardReading = ShardReading()

    def is_silent(self, reading: ShardReading, limit_s: float) -> bool:
        """Take note of a reading; whether there was no new one for ``limit_s``.

        A look that itself waited for storage counts for a part of its time: the worker has most likely waited too.
        """
        now = time.monotonic()
        self.silent_s += min(now - self.looked, _LONGEST_LOOK * limit_s)
        self.looked = now
        if reading != self.reading:
            self.reading, self.silent_s = reading, 0.0
        return self.silent_s > limit_s


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
    are_live = any(name.startswith(LIVE) for name in job.shards)
    committed = (job.output or context.output).shard_records(live=are_live)
    records = {name: committed[name] for name in job.shards if name in committed}
    pool = _Pool(context, job, deque(name for name in job.shards if name not in records))
    progress = Progress(context.output, waits=True)
    done = _num_rows(records.values())
    try:
        job.on_records(list(records.values()))
        while pool.is_busy:
            if pool.first_start_s is not None:
                progress.begin(ago_s=pool.first_start_s)
            progress.notice = pool.notice
            message = pool.message() or job.note()
            progress.update(
                done + pool.num_rows_under_way, job.num_rows, job.unit, message, workers=Counter(pool.hosts.values())
            )
            new = pool.poll()
            records |= {record.shard: record for record in new}
            done += _num_rows(new)
            job.on_records(new)
    finally:
        pool.close()
    progress.update(job.num_rows, job.num_rows, job.unit, job.note(), force=True)
    return [records[name] for name in job.shards]


def _num_rows(records: Iterable[ShardRecord]) -> int:
    """Rows of some shards; none of a shard whose record counts nothing."""
    return sum(record.counts.get("in", 0) for record in records)


def total_counts(records: list[ShardRecord]) -> dict[str, int]:
    """Rows of all shards."""
    return add_counts([record.counts for record in records])


class _Pool:
    """Workers and the shards that wait for them; a worker gets a shard only after it has started."""

    def __init__(self, context: StepContext, job: ShardJob, waiting: deque[str]) -> None:
        self._context = context
        self._job = job
        self._limit_s = job.limit_s or float("inf")
        self._waiting = waiting
        self._losses: Counter[str] = Counter()
        self._running: dict[Any, _Running] = {}
        self._start = time.monotonic()
        self.first_start_s: float | None = None
        """Seconds that the first worker took to start once it had its CPUs or GPUs; None while all wait."""
        self.hosts: dict[Any, str] = {}
        """Machine of each worker that has started."""
        self.notice = ""
        """Which worker was lost last; empty: none."""
        self._options = worker_options(context.step.name, job.resources, has_roles=cluster_has_roles())
        self._worker = ray.put(job.worker)
        self._num_added = 0
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
        free, waited = ray.available_resources(), duration(time.monotonic() - self._start)
        return (
            f"waiting since {waited} for a worker of {describe(self._options)}; "
            f"free now: {free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU{unoffered(self._options)}"
        )

    def poll(self) -> list[ShardRecord]:
        """Wait a moment; returns the new records, and replaces lost workers."""
        ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
        records = self._collect()
        if silent := self._silent():
            records += self._collect()  # what is finished by now was not silent, however long the look took
        for reference, running in silent.items():
            if reference in self._running:
                self._handle_loss(running, f"nothing came of it for {self._limit_s:.0f} s")
        return records

    @property
    def num_rows_under_way(self) -> int:
        """Rows that are finished in unfinished shards."""
        return sum(running.reading.rows for running in self._running.values())

    def close(self) -> None:
        """End every worker."""
        for running in self._running.values():
            ray.kill(running.actor)

    def _collect(self) -> list[ShardRecord]:
        """Take over all that is ready, give its workers new shards, and replace those that were lost.

        All of it, because a look at the shards under way comes after: its time must not be that of one shard.
        """
        ready, _ = ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        results = {reference: self._result(reference) for reference in ready}
        dead = {self._running[reference].actor for reference, one in results.items() if isinstance(one, str)}
        records, free = list[ShardRecord](), dict[Any, None]()
        for reference, result in results.items():
            if isinstance(result, str):
                continue
            actor = self._running.pop(reference).actor
            if isinstance(result, ShardRecord):
                records.append(result)
            else:
                start_s, self.hosts[actor] = result
                self.first_start_s = start_s if self.first_start_s is None else self.first_start_s
            if actor not in dead:
                free[actor] = None
        for actor in free:
            self._assign_shards(actor)
        for reference, reason in results.items():
            if isinstance(reason, str) and reference in self._running:  # else it went with another of its worker
                self._handle_loss(self._running[reference], reason)
        return records

    def _result(self, reference: Any) -> ShardRecord | tuple[float, str] | str:
        """What a worker returned; why, if it was lost."""
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            shard = self._running[reference].shard
            raise _explain(error, shard) from (None if isinstance(error.cause, UnclipError) else error)
        except ray.exceptions.RayError as error:
            return f"{type(error).__name__}: {first_line(error)}"

    def _silent(self) -> dict[Any, _Running]:
        """The shards of which nothing came for too long, after another look at all."""
        under_way = {one.shard: (reference, one) for reference, one in self._running.items() if one.shard is not None}
        readings = self._job.read(list(under_way))
        return dict(
            under_way[shard] for shard, one in readings.items() if under_way[shard][1].is_silent(one, self._limit_s)
        )

    def _assign_shards(self, actor: Any) -> None:
        """Give a worker as many shards as it makes at once; one that took a worker down before is made alone."""
        shards = [running.shard or "" for running in self._running.values() if running.actor is actor]
        while self._waiting and len(shards) < self._job.num_at_once:
            if shards and any(self._losses[shard] for shard in [*shards, self._waiting[0]]):
                break
            shard = self._waiting.popleft()
            self._running[actor.make.remote(shard)] = _Running(actor, shard, time.monotonic())
            shards.append(shard)
        if not shards:
            self._end(actor)

    def _handle_loss(self, worker: _Running, reason: str) -> None:
        """Replace a worker and put back all that it was making."""
        host = self.hosts.get(worker.actor, "a machine that it had not reached")
        self._end(worker.actor)
        shards = list[str]()
        for reference, running in list(self._running.items()):
            if running.actor is worker.actor:
                del self._running[reference]
                shards += [running.shard] if running.shard else []
                self._put_back(running.shard or "", reason)
        again = f"; made again: {', '.join(shards)}" if shards else ""
        self.notice = f"a worker on {host} was lost ({reason}){again}"
        self._add_worker()

    def _end(self, actor: Any) -> None:
        ray.kill(actor)
        self.hosts.pop(actor, None)

    def _put_back(self, shard: str, reason: str) -> None:
        self._losses[shard] += 1
        if not self._is_tried_again(shard):
            what = f"shard {shard}" if shard else "the start of a worker"
            raise StepError(
                f"{self._context.step.name}: {what} was lost {self._losses[shard]} times; last time {reason}; "
                f"what is finished is kept in {self._context.output.uri}; run again to continue"
            )
        if shard:
            self._waiting.appendleft(shard)

    def _is_tried_again(self, shard: str) -> bool:
        if shard and self._job.on_loss is not None:
            return self._job.on_loss(shard, self._losses[shard])
        return self._losses[shard] <= self._job.resources.max_retries

    def _add_worker(self) -> None:
        self._num_added += 1
        actor = cast("Any", _Actor).options(**self._options, max_concurrency=self._job.num_at_once).remote()
        self._running[actor.start.remote(self._worker, self._context, self._num_added)] = _Running(
            actor, None, time.monotonic()
        )


def _explain(error: ray.exceptions.RayTaskError, shard: str | None) -> BaseException:
    """The error that a worker raised; an unforeseen one gets a note with the shard's name."""
    cause = error.cause or error
    if not isinstance(cause, UnclipError):
        cause.add_note(f"while making shard {shard}")
    return cause
