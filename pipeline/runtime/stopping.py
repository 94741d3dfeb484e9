"""Why a training should end early: a run that is interrupted, SIGTERM, a drained machine, or room for more workers.

The driver asks through a file beside the training's progress, because it shares nothing but the workspace with the
workers.
"""

import signal
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import ray
from ray._private.state import state as ray_state

from pipeline.workspace.store import LIVE, Artifact

STOP = f"{LIVE}stop"
STOP_WAIT_S = 300.0
"""Longest time for a training to end after it was asked: a step, and writing a checkpoint."""
_POLL_S = 1.0
_DRAIN_POLL_S = 5.0
_LAST_LOOK_S = 5.0
"""Longest wait for a look that is under way when the training has ended."""
ROOM = "there is room for more workers"
"""The reason of a training that ends to begin again with more workers."""
NOTICE_S = 120.0
"""A training on a machine that Ray takes away goes on until so long before that."""


def request_stop(output: Artifact) -> None:
    """Ask the training of an artifact to end after a checkpoint."""
    output.write_bytes(STOP, b"stop\n")


def is_stop_requested(output: Artifact) -> bool:
    """Whether the training was asked to end since it was submitted."""
    return output.exists(STOP)


class _Termination:
    """SIGTERM to this process. During a training the first one is noted; any other one ends the process as before."""

    def __init__(self) -> None:
        self.is_training = self.is_noted = False
        self._before: Any = None

    def install(self) -> None:
        """Handle SIGTERM; only the main thread of a process may call this."""
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def restore(self) -> None:
        """Let the handler of before handle SIGTERM again."""
        signal.signal(signal.SIGTERM, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.is_training and not self.is_noted:
            self.is_noted = True
        elif callable(self._before):
            self._before(number, frame)
        else:
            raise SystemExit(128 + number)


_termination = _Termination()
_has_room = threading.Event()


def handle_sigterm() -> None:
    """Let SIGTERM end the trainings of this process early; for processes whose trainings run in another thread."""
    _termination.install()


def tell_of_room() -> None:
    """Let the training of this process end, so that it begins again with more workers."""
    _has_room.set()


class StopNotice:
    """Whether a worker's training should end early; inside a ``with`` block threads look for reasons.

    Ray is asked by a thread of its own: a look at storage that is away takes minutes, as long as a machine's notice.

    Args:
        output: The artifact of the training.
        reads_requests: Whether this worker looks for what the driver asks; one of a training is enough.
    """

    def __init__(self, output: Artifact, *, reads_requests: bool) -> None:
        self._output = output
        self._reason, self._drain_due = "", 0.0
        self._ends = threading.Event()
        self._threads = [
            threading.Thread(target=self._watch, args=(look,), name="stop notice", daemon=True)
            for look in (self._drain, *([self._request] if reads_requests else []))
        ]
        self._is_main = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._is_main:
            _termination.install()
        _termination.is_training, _termination.is_noted = True, False
        _has_room.clear()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        for thread in self._threads:
            thread.join(_LAST_LOOK_S)
        _termination.is_training = False
        if self._is_main:
            _termination.restore()

    def __call__(self) -> str:
        """Why; empty if it should go on."""
        if _termination.is_noted:
            return "its process got SIGTERM"
        return self._reason or (ROOM if _has_room.is_set() else "")

    def _watch(self, look: Callable[[], str]) -> None:
        failures = set[str]()
        while not self._reason and not self._ends.wait(_POLL_S):
            try:
                if reason := look():
                    self._reason = reason
            except Exception as error:  # noqa: BLE001  (a store or a head that does not answer is asked again)
                if type(error).__name__ not in failures:
                    traceback.print_exc()  # into the worker's log, once for each kind
                failures.add(type(error).__name__)

    def _request(self) -> str:
        return "the run was asked to end" if is_stop_requested(self._output) else ""

    def _drain(self) -> str:
        if not ray.is_initialized() or time.monotonic() < self._drain_due:
            return ""
        self._drain_due = time.monotonic() + _DRAIN_POLL_S
        is_drained = is_leaving(ray.get_runtime_context().get_node_id(), time.time())
        return "its machine is taken away" if is_drained else ""


def is_leaving(node_id: str, now: float) -> bool:
    """Whether Ray takes a machine away within ``NOTICE_S`` of ``now`` (seconds since the epoch), or does not say when.

    Ray has no public call for this; its own trainer asks as we do.
    """
    deadlines_ms: dict[str, int] = ray_state.get_draining_nodes()
    deadline_ms = deadlines_ms.get(node_id)
    return deadline_ms is not None and (deadline_ms == 0 or deadline_ms / 1000 - now <= NOTICE_S)
