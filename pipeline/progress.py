"""Where a running step stands: a small file under ``live/`` that `unclip status` reads, with no Ray in between."""

import time
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.store import LIVE, Artifact

PROGRESS = f"{LIVE}progress.json"
METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class ProgressState:
    """One reading."""

    done: int
    total: int
    unit: str
    rate: float
    """Units per second since this start of the step."""
    eta_s: float
    """Seconds to go at that rate; 0 while unknown."""
    message: str
    wall_s: float
    """Seconds spent on the step by all its starts."""
    updated: float
    """Seconds since the epoch."""


class Progress:
    """Writes the reading of one step, at most once per ``every_s`` seconds.

    Args:
        artifact: The step's artifact.
        every_s: Least time between two writes, in seconds.
    """

    def __init__(self, artifact: Artifact, *, every_s: float = 1.0) -> None:
        self._artifact = artifact
        self._every_s = every_s
        self._start = time.monotonic()
        self._written = float("-inf")
        self._first_done: int | None = None
        previous = read_progress(artifact)
        self._earlier_s = previous.wall_s if previous else 0.0

    @property
    def wall_s(self) -> float:
        """Seconds spent on the step by all its starts."""
        return self._earlier_s + time.monotonic() - self._start

    def update(self, done: int, total: int, unit: str, message: str = "", *, force: bool = False) -> None:
        """Say that ``done`` of ``total`` units are finished."""
        now = time.monotonic()
        if self._first_done is None:
            self._first_done = done
        if now - self._written < self._every_s and not force and done < total:
            return
        rate = (done - self._first_done) / max(now - self._start, 1e-9)
        eta_s = (total - done) / rate if rate > 0 else 0.0
        state = ProgressState(done, total, unit, rate, eta_s, message, self.wall_s, time.time())
        self._artifact.write_json(PROGRESS, asdict(state))
        self._written = now


def read_progress(artifact: Artifact) -> ProgressState | None:
    """The newest reading of a step, or None."""
    if not artifact.exists(PROGRESS):
        return None
    data: dict[str, Any] = artifact.read_json(PROGRESS)
    return ProgressState(**data)
