"""A training on one worker that hangs: the worker says that it takes steps, and whoever waits for it ends it if not.

Several workers wait for each other, and their process group has a time limit; a single one waits for nobody. So a
thread of it writes from time to time how many steps have begun, and a thread of the process that waits reads that. They
share nothing but the workspace. The progress would not do: it has readings at log lines alone, and none while a
checkpoint is validated.
"""

import contextlib
import os
import threading
import time
import traceback
from typing import Any, Self

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.runtime.context import StepContext
from pipeline.runtime.restarts import End
from pipeline.workspace.progress import duration
from pipeline.workspace.store import LIVE

Json = dict[str, Any]

_PULSE = f"{LIVE}pulse.json"
_LOOKS = 20
"""Looks, and readings, in the time that a step may take."""
_SLOWER = 2.0
"""A step may take so many times the slowest before it, whatever the recipe says: some trainings on CPUs are slow."""
_LAST_LOOK_S = 5.0
_SLOW_LOOK_S = 1.0
"""A look that takes so much longer than the time between two says nothing: the storage did not answer meanwhile."""
_ENDS_WITHIN_S = 120.0
"""A process that is still there so long after it was to be ended waits for a device or a storage, and cannot end."""
_SAME_PROCESS_S = 5.0
"""Largest difference of two readings of the time at which a process began: they come from clocks of whole seconds."""


class _Repeated:
    """A thread that does something again and again while a ``with`` block runs.

    Args:
        every_s: Seconds between two times.
    """

    def __init__(self, every_s: float) -> None:
        self._every_s, self._ends = every_s, threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join(_LAST_LOOK_S)

    def _repeat(self) -> None:
        while True:
            try:
                self.look()
            except Exception:  # noqa: BLE001  (a store or a head that does not answer is asked again)
                traceback.print_exc()  # into the worker's log
            if self._ends.wait(self._every_s):
                return

    def look(self) -> None:
        """Do it once."""
        raise NotImplementedError


class Pulse(_Repeated):
    """What the only worker of a start says of its steps: it is called with True when one begins.

    With False when something begins that has none: a checkpoint and its validation, or the end of the training. The
    first step of a start does not count either, because a network is compiled in it. Then only a process that stands
    still is missed.

    Args:
        context: The step.
        timeout_s: Longest time for a step.
        num_workers: Most workers of the training; of several, nothing is said.
    """

    def __init__(self, context: StepContext, timeout_s: float, num_workers: int) -> None:
        super().__init__(timeout_s / _LOOKS)
        self._context, self._is_alone = context, num_workers == 1
        self._steps, self._is_step = 0, False
        self._begun_at, self._slowest_s = 0.0, 0.0
        self._looks = 0

    def __call__(self, is_step: bool) -> None:
        """See the class."""
        now = time.monotonic()
        if self._is_step:
            self._slowest_s = max(self._slowest_s, now - self._begun_at)
        self._is_step, self._begun_at = is_step, now
        self._steps += is_step

    def look(self) -> None:
        """Write what the worker is at, and that its process runs."""
        if not self._is_alone or not ray.is_initialized():
            return
        self._looks += 1
        self._context.own_output.write_json(_PULSE, self.state() | _this_process())

    def state(self) -> Json:
        """What the worker is at."""
        return {
            "attempt": self._context.attempt,
            "looks": self._looks,
            "steps": self._steps,
            "may_hang": self._is_step and self._steps > 1,
            "slowest_s": round(self._slowest_s, 3),
        }


def _this_process() -> Json:
    number = os.getpid()
    return {"machine": ray.get_runtime_context().get_node_id(), "process": number, "begun": begun_s(number)}


def begun_s(number: int) -> float:
    """Seconds from the start of this machine to that of one of its processes; no change of the clock changes them.

    The time of day at which a process began is counted from the machine's start, too, and that is reckoned anew from
    each new time of the clock.

    Raises:
        NoSuchProcess: If there is none.
    """
    machine = psutil.boot_time()  # first: older releases of psutil keep it for the process
    return psutil.Process(number).create_time() - machine


class Stillness:
    """For how long a worker has ended no step, or its process has said nothing at all.

    Args:
        limit_s: Longest time for a step.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._steps, self._stepped_at = 0, 0.0
        self._looks, self._seen_at = 0, 0.0

    def is_too_long(self, pulse: Json | None, now: float) -> bool:
        """Whether a pulse (None: there is none) that is read at ``now`` (seconds) is that of a worker which hangs."""
        if pulse is None:
            self._stepped_at = self._seen_at = now
            return False
        if pulse["looks"] != self._looks:
            self._looks, self._seen_at = pulse["looks"], now
        if pulse["steps"] != self._steps or not pulse["may_hang"]:
            self._steps, self._stepped_at = pulse["steps"], now
        limit_s = max(self._limit_s, _SLOWER * pulse["slowest_s"])
        still_s = now - min(self._stepped_at, self._seen_at)
        return still_s > limit_s * (1 + 2 / _LOOKS)  # what is new is written, and read, at most a look late


class HangWatch(_Repeated):
    """Ends the only worker of a start if no step of it ends for too long.

    Args:
        context: The step, with the start's number.
        timeout_s: Longest time for a step.
    """

    def __init__(self, context: StepContext, timeout_s: float) -> None:
        super().__init__(timeout_s / _LOOKS)
        self._context, self._timeout_s = context, timeout_s
        self._stillness = Stillness(timeout_s)
        self._task: Any = None
        self._ended_at: float | None = None
        """When the worker was first ended; None if it has not hung since it was last seen."""
        self.end: End | None = None
        """How the start has ended, if it was ended here."""

    @property
    def is_stuck(self) -> bool:
        """Whether the worker was ended so long ago that it cannot be, given that its process is still there."""
        ended_at = self._ended_at
        return ended_at is not None and time.monotonic() - ended_at > _ENDS_WITHIN_S

    def look(self) -> None:
        """Read the pulse, and end a worker that has none any more; a process that stands still cannot end itself."""
        asked_at = time.monotonic()
        pulse, now = self._read(), time.monotonic()
        if now - asked_at > self._every_s + _SLOW_LOOK_S:
            pulse = None  # it may be that of a worker which has waited for the same storage, and goes on now
        if not self._stillness.is_too_long(pulse, now) or pulse is None:
            self._ended_at = None
            return
        limit = f"{duration(self._timeout_s)} (resources.hang_timeout_s)"
        self.end = End("failed", f"its worker hung: no step has ended for {limit}")
        self._ended_at = now if self._ended_at is None else self._ended_at
        if self._task is None or ray.wait([self._task], timeout=0)[0]:
            there = NodeAffinitySchedulingStrategy(pulse["machine"], soft=False)
            self._task = _kill.options(scheduling_strategy=there).remote(pulse["process"], pulse["begun"])

    def _read(self) -> Json | None:
        """What the worker of this start has written last, if it can be read."""
        with contextlib.suppress(Exception):  # a store that does not answer says nothing of the worker
            pulse: Json | None = self._context.output.find_json(_PULSE)
            if pulse is not None and pulse["attempt"] == self._context.attempt:
                return pulse
        return None


def kill(number: int, begun: float) -> None:
    """End a process of this machine, unless it has ended and another one has its number.

    Args:
        number: Of the process.
        begun: What ``begun_s`` says of it.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        if abs(begun_s(number) - begun) < _SAME_PROCESS_S:
            psutil.Process(number).kill()


_kill: Any = ray.remote(num_cpus=0, max_retries=0)(kill)
