"""Delivers an outbox to its tracking server, in a thread; whatever the server does, nobody waits for it."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline.errors import first_line
from pipeline.runtime.tracking.outbox import Outbox
from pipeline.runtime.tracking.tracker import RefusedError, SystemMetrics, Tracker, prepare

Json = dict[str, Any]

_IDLE_S = 0.25
_MOST_WAIT_S = 60.0
_UNREADABLE_WAIT_S = 1.0
_AT_A_TIME = 500
_MOST_REFUSALS = 3
_AFTER_EVERY_S = 300.0
_SYSTEM_EVERY_S = 10.0
_SYSTEM_BYTES = 16 << 20
"""Readings of the machine are the first thing to go without when this much waits for a server."""


class Delivery:
    """One outbox on its way to one server.

    Args:
        outbox: What is delivered.
        open_tracker: Opens the server.
        uri: The server, for messages.
        warn: Receives one sentence when the server or the disk fails, and one when the server answers again.
        after: Called after each end of a run is delivered, and every five minutes when nothing is left.
    """

    def __init__(
        self,
        outbox: Outbox,
        open_tracker: Callable[[], Tracker],
        uri: str,
        warn: Callable[[str], None],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._outbox, self._open, self._uri, self._warn, self._after = outbox, open_tracker, uri, warn, after
        self._tracker: Tracker | None = None
        self._ready, self._wake, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._delivered_at = self._failed_at = self._after_at = float("-inf")
        self._is_failing = self._is_unreadable = self._is_full = False
        self._num_refusals = 0
        # Daemons: a server that does not answer must not keep the process from ending.
        self._threads = [threading.Thread(target=self._deliver, name="tracking", daemon=True)]

    def start(self, sample: Callable[[dict[str, float]], None] | None = None) -> None:
        """Begin; ``sample`` receives readings of this machine every ten seconds."""
        if sample is not None:
            self._threads.append(threading.Thread(target=self._read_machine, args=(sample,), daemon=True))
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There is something to deliver."""
        self._wake.set()

    def run_id(self, run: tuple[str, ...], wait_s: float) -> str:
        """MLflow's id of a run; waits until it is known, at most ``wait_s`` and not for a server that fails."""
        deadline = time.monotonic() + wait_s
        while True:
            tracker = self._tracker
            run_id = tracker.run_ids.get(run, "") if tracker else ""
            if run_id or self._is_failing or time.monotonic() >= deadline:
                return run_id
            time.sleep(0.02)

    def close(self, patience_s: float) -> None:
        """Wait while something is delivered, and end; storage that fails now is asked again meanwhile.

        Args:
            patience_s: How long it waits for the next delivery; a server that fails now is not waited for.
        """
        if self._outbox.may_wait:
            self._ready.wait(_MOST_WAIT_S)
        start = time.monotonic()
        self._wake.set()
        while self._outbox.may_wait and self._threads[0].is_alive():
            if self._failed_at > start or time.monotonic() - max(start, self._delivered_at) > patience_s:
                break
            time.sleep(0.02)
        self._stop.set()
        self._wake.set()
        if not self._outbox.may_wait:
            self._threads[0].join(patience_s)
        if self._num_refusals > _MOST_REFUSALS:
            self._warn(f"tracker {self._uri} has refused {self._num_refusals} records in all; they are left out")

    def _deliver(self) -> None:
        try:
            prepare()
        except ImportError as error:
            self._warn(f"the tracker gets nothing: mlflow cannot be imported ({first_line(error)})")
            return
        finally:
            self._ready.set()
        while not self._stop.wait(_IDLE_S):
            try:
                with self._outbox.delivering() as is_ours:
                    if is_ours:
                        self._deliver_until_stopped()
            except Exception as error:  # noqa: BLE001  (storage that fails now may answer at the next look)
                if not self._is_unreadable:
                    self._is_unreadable = True
                    self._warn(
                        f"what waits for the tracker {self._uri} cannot be read ({first_line(error)}); the run goes "
                        "on, and it is sent when it can"
                    )
                self._stop.wait(_UNREADABLE_WAIT_S)

    def _deliver_until_stopped(self) -> None:
        wait_s = 0.0
        while not self._stop.is_set():
            if self._outbox.num_bytes:
                groups = _grouped(self._outbox.read(_AT_A_TIME))
                wait_s = 0.0 if self._deliver_some(groups) else min(_MOST_WAIT_S, max(1.0, 2 * wait_s))
            self._wake.wait(max(wait_s, _IDLE_S))
            self._wake.clear()

    def _deliver_some(self, groups: Sequence[tuple[list[Json], int]]) -> bool:
        """Deliver groups of records; whether the server took, or refused, them, and that is noted."""
        is_noted = True
        try:
            if self._tracker is None:
                self._tracker = self._open()
            for records, offset in groups:
                self._deliver_group(self._tracker, records)
                is_noted = self._note_sent(offset)
                if not is_noted:
                    break
                self._delivered_at = time.monotonic()
                is_due = self._delivered_at - self._after_at > _AFTER_EVERY_S and not self._outbox.num_bytes
                if is_due or any(record["op"] == "finish" for record in records):
                    self._after_at = self._delivered_at
                    self._after()
                if self._stop.is_set():
                    break
        except Exception as error:  # noqa: BLE001  (whatever a tracker throws must not stop a training)
            self._failed_at = time.monotonic()
            if not self._is_failing:
                self._is_failing = True
                self._warn(
                    f"tracker {self._uri} does not answer ({first_line(error)}); the run goes on, what it should get "
                    "is kept and sent when it answers"
                )
            return False
        if self._is_failing:
            self._is_failing = False
            self._warn(f"tracker {self._uri} answers again")
        return is_noted

    def _note_sent(self, offset: int) -> bool:
        """Note what the server has; whether the disk takes that."""
        try:
            self._outbox.mark_sent(offset)
        except OSError as error:
            self._failed_at = time.monotonic()
            if not self._is_full:
                self._is_full = True
                self._warn(
                    f"{self._outbox.folder}: {error}; the tracker gets what it has received once more, which changes "
                    "nothing there, until that can be noted"
                )
            return False
        self._is_full = False
        return True

    def _deliver_group(self, tracker: Tracker, records: Sequence[Json]) -> None:
        if not records:
            self._warn("a half-written record for the tracker is left out: a process was killed while it wrote it")
            return
        try:
            tracker.deliver(records)
        except RefusedError as error:
            runs = dict.fromkeys(tuple(record["run"]) for record in records)
            if len(runs) > 1:  # a run that somebody has deleted takes no points of others along
                for run in runs:
                    self._deliver_group(tracker, [record for record in records if tuple(record["run"]) == run])
                return
            self._num_refusals += len(records)
            if self._num_refusals - len(records) < _MOST_REFUSALS:
                self._warn(f"tracker {self._uri} refuses {records[0]['op']} ({first_line(error)}); it is left out")

    def _read_machine(self, sample: Callable[[dict[str, float]], None]) -> None:
        machine, has_failed = None, False
        while not self._stop.wait(_SYSTEM_EVERY_S):
            try:
                if self._outbox.num_bytes < _SYSTEM_BYTES:
                    machine = machine or SystemMetrics()
                    sample(machine.read())
            except Exception as error:  # noqa: BLE001  (it must not stop a training, and the next one may work)
                if not has_failed:
                    has_failed = True
                    self._warn(f"a reading of this machine does not go to the tracker: {first_line(error)}")


def _grouped(records: Sequence[tuple[Json | None, int]]) -> list[tuple[list[Json], int]]:
    """Records with the offset after them: neighbours with metrics together, others alone; a damaged line as nothing."""
    groups: list[tuple[list[Json], int]] = []
    for record, offset in records:
        previous = groups[-1][0] if groups else []
        if record is not None and record["op"] == "metrics" and previous and previous[0]["op"] == "metrics":
            previous.append(record)
            groups[-1] = (previous, offset)
        else:
            groups.append(([] if record is None else [record], offset))
    return groups
