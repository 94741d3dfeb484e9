"""Progress of a running step: a small file under ``live/`` that `unclip status` reads without Ray."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from pipeline.workspace.manifest import read_record
from pipeline.workspace.store import LIVE, Artifact

PROGRESS = f"{LIVE}progress.json"
METRICS = "metrics.jsonl"
ERROR = f"{LIVE}error.txt"
_LONGEST_S = 60.0
"""A tenth of the time after which a step without readings counts as dead."""


@dataclass(frozen=True)
class ProgressState:
    """One reading."""

    done: int
    total: int
    unit: str
    rate: float
    """Units per second since the first reading in this unit of this start, without the time until then."""
    eta_s: float
    """Seconds to go at that rate; 0 while unknown."""
    message: str
    wall_s: float
    """Seconds of work on the step over all its starts, without the waiting for CPUs or GPUs."""
    updated: float
    """Seconds since the epoch."""
    workers: dict[str, int] = field(default_factory=dict[str, int])
    """Workers at work, by the name of their machine; empty while it is not known."""
    notice: str = ""
    """Why the step began again, or which worker was lost last, if any."""
    node_s: float = 0.0
    """``wall_s`` times the workers of each start; only trainings count them."""
    num_workers: int = 1
    """Most workers of one start, counted as for ``node_s``."""

    @property
    def age_s(self) -> float:
        """Seconds since this reading."""
        return max(0.0, time.time() - self.updated)

    @property
    def has_begun(self) -> bool:
        """Whether the step has its CPUs or GPUs and works: only then it has a unit."""
        return bool(self.unit)

    @property
    def text(self) -> str:
        """One line for people: share done, rate and time to go."""
        if not self.unit:
            return self.message
        share = 100 * self.done / max(self.total, 1)
        rest = f", {duration(self.eta_s)} to go" if self.eta_s else ""
        message = f", {self.message}" if self.message else ""
        return f"{self.done}/{self.total} {self.unit} ({share:.0f} %), {self.rate:.1f}/s{rest}{message}"

    @property
    def where(self) -> str:
        """The workers and their machines, as the end of a line; empty while they are not known."""
        machines = ", ".join(f"{number} on {machine}" for machine, number in self.workers.items())
        return f"; workers: {machines}" if machines else ""


class Progress:
    """Writes the reading of one step, at most once per ``every_s`` seconds, and in at most 1 % of the time.

    All workers of a training wait while it is written. Where a write takes longer than .6 s, one a minute is written
    all the same: `unclip status` takes a step without readings for dead. A new notice is written at once, and so is the
    first reading in another unit.

    Args:
        artifact: The step's artifact.
        every_s: Least time between two writes, in seconds.
        waits: Whether the work still waits for its CPUs or GPUs: the clock starts at `begin`.
        notice: Why the step begins again, if it does.
        num_workers: Workers of this start, for ``node_s``.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        every_s: float = 1.0,
        waits: bool = False,
        notice: str = "",
        num_workers: int = 1,
    ) -> None:
        self._artifact, self._num_workers = artifact, num_workers
        self.notice = notice
        """Part of each reading from now on."""
        self._last_notice = notice
        self._every_s = every_s
        self._start = None if waits else time.monotonic()
        self._due = float("-inf")
        self._write_s = 0.0
        self._unit = ""
        self._first: tuple[float, int] | None = None
        previous = read_progress(artifact)
        self._earlier_s = previous.wall_s if previous else 0.0
        # A release that counted no workers may have begun the step.
        self._earlier_node_s = previous.node_s or previous.wall_s if previous else 0.0
        self.num_workers = max(num_workers, previous.num_workers if previous else 1)
        """Most workers of one start."""

    @property
    def wall_s(self) -> float:
        """Seconds of work on the step over all its starts."""
        return self._earlier_s + self._worked_s()

    @property
    def node_s(self) -> float:
        """The same, times the workers of each start."""
        return self._earlier_node_s + self._worked_s() * self._num_workers

    def begin(self, *, ago_s: float = 0.0) -> None:
        """Start the clock of a step that waited; the work began ``ago_s`` seconds before this call."""
        if self._start is None:
            self._start = time.monotonic() - ago_s

    def update(
        self,
        done: int,
        total: int,
        unit: str,
        message: str = "",
        *,
        workers: Mapping[str, int] | None = None,
        force: bool = False,
    ) -> None:
        """Record that ``done`` of ``total`` units are finished, and how many workers are at it on which machine."""
        now = time.monotonic()
        is_other_unit, self._unit = unit != self._unit, unit
        if self._start is not None and (self._first is None or is_other_unit):
            self._first = (now, done)
        is_new = is_other_unit or self.notice != self._last_notice
        if now < self._due and not force and done < total and not is_new:
            return
        first_s, first_done = self._first or (now, done)
        rate = (done - first_done) / max(now - first_s, 1e-9)
        eta_s = (total - done) / rate if rate > 0 else 0.0
        state = ProgressState(
            done=done,
            total=total,
            unit=unit,
            rate=rate,
            eta_s=eta_s,
            message=message,
            wall_s=self.wall_s,
            updated=time.time(),
            workers=dict(workers or {}),
            notice=self.notice,
            node_s=self.node_s,
            num_workers=self.num_workers,
        )
        self._last_notice = self.notice
        start, before_s = time.monotonic(), self._write_s
        self._artifact.write_json(PROGRESS, asdict(state))
        end = time.monotonic()
        self._write_s = end - start
        usual_s = min(before_s, self._write_s)  # one slow write says nothing of the storage
        self._due = end + max(self._every_s, min(_LONGEST_S, 100 * usual_s))

    def _worked_s(self) -> float:
        return 0.0 if self._start is None else time.monotonic() - self._start


def read_progress(artifact: Artifact) -> ProgressState | None:
    """The newest reading of a step, or None.

    Raises:
        DataError: If it is damaged; names the file.
    """
    content = artifact.find_bytes(PROGRESS)
    mend = "remove this file, which says only how far the step was"
    return None if content is None else read_record(ProgressState, content, f"{artifact.uri}/{PROGRESS}", mend)


def last_error(artifact: Artifact) -> str:
    """Why a step stopped at its last start: the last line of what was written then; empty if nothing was."""
    lines = (artifact.find_bytes(ERROR) or b"").decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def duration(seconds: float, *, exact: bool = False) -> str:
    """Seconds in words: 42 s, 7 min, 2 h 05 min.

    Args:
        seconds: The time.
        exact: As measured, not as expected: 4.2 s, 7 min 05 s.
    """
    if exact and seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def clock_time(seconds: float) -> str:
    """Minutes and seconds since the start of a run: 7:05."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def byte_size(num_bytes: float) -> str:
    """Bytes in words, with three digits and units of a thousand: 950 B, 12.3 MB, 1.5 TB."""
    units = ["B", "KB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:,.0f} {units[0]}" if num_bytes >= 999.5 else f"{num_bytes:.3g} {units[0]}"
