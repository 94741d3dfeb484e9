"""Forwards a run to MLflow, in a thread of its own: mlflow's import and first migration take seconds."""

import json
import socket
import time
import urllib.parse
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Workspace

if TYPE_CHECKING:
    from pipeline.runtime.tracker import Tracker

OFF = "off"
_START_TIMEOUT_S = 60.0


class Tracking:
    """One recipe's runs on its tracking server; a context manager.

    A tracker that fails in the middle is warned about once and left: the curves stand in ``metrics.jsonl`` and the
    numbers in the manifests. A step that is continued sends what its run lacks.

    Args:
        recipe: Its ``tracking`` table names the server.
        workspace: Holds the sqlite database where no server is named.
        warn: Told when the tracker fails.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, warn: Callable[[str], None]) -> None:
        self._uri = recipe.tracking.uri or f"sqlite:///{workspace.local_root}/mlflow.db"
        self._experiment = recipe.tracking.experiment or recipe.name
        self._warn = warn
        self._on = self._uri != OFF
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tracking")
        self._tracker: Tracker | None = None
        self._run_ids: dict[str, str] = {}
        self._num_sent: dict[str, int] = {}
        self._pending: Future[None] | None = None

    def __enter__(self) -> "Tracking":
        if self._on:
            _check_reachable(self._uri)
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True)

    def started(self, context: StepContext) -> None:
        """Begin, or continue, the step's run."""
        self._submit(lambda tracker: self._start(tracker, context))

    def forward(self, context: StepContext) -> None:
        """Send the new lines of the step's curves, unless the last sending is still under way."""
        if self._pending is None or self._pending.done():
            self._pending = self._submit(lambda tracker: self._send(tracker, context))

    def finished(self, context: StepContext, result: StepResult) -> str:
        """Close the step's run; returns its id, or an empty string without a tracker."""
        self._submit(lambda tracker: self._finish(tracker, context, result)).result(_START_TIMEOUT_S)
        return self._run_ids.get(context.step.name, "")

    def failed(self, context: StepContext) -> None:
        """Close the step's run as failed."""
        name = context.step.name
        self._submit(lambda tracker: tracker.fail(self._run_ids[name]) if name in self._run_ids else None)

    def _submit(self, action: "Callable[[Tracker], None]") -> Future[None]:
        return self._thread.submit(self._act, action)

    def _act(self, action: "Callable[[Tracker], None]") -> None:
        if not self._on:
            return
        try:
            if self._tracker is None:
                from pipeline.runtime.tracker import Tracker

                self._tracker = Tracker(self._uri, self._experiment)
            action(self._tracker)
        except Exception as error:  # noqa: BLE001  (whatever a tracker throws must not stop a training)
            self._on = False
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._warn(f"tracker {self._uri} failed ({reason}); the run goes on; curves stay in metrics.jsonl")

    def _start(self, tracker: "Tracker", context: StepContext) -> None:
        step = context.step
        run_id = tracker.start(step.name, step.key, step.section)
        self._run_ids[step.name] = run_id
        self._num_sent[step.name] = tracker.last_step(run_id) + 1

    def _send(self, tracker: "Tracker", context: StepContext) -> None:
        name, output = context.step.name, context.output
        if not output.exists(METRICS):
            return
        rows: list[dict[str, Any]] = [json.loads(line) for line in output.path(METRICS).read_text().splitlines()]
        new = [row for row in rows if row["step"] >= self._num_sent[name]]
        if new:
            tracker.log(self._run_ids[name], new, _now_ms())
            self._num_sent[name] = new[-1]["step"] + 1

    def _finish(self, tracker: "Tracker", context: StepContext, result: StepResult) -> None:
        self._send(tracker, context)
        tags = {"unclip.artifact": context.output.uri} | {
            f"input.{name}": key for name, key in context.step.inputs.items()
        }
        tracker.finish(self._run_ids[context.step.name], result.metrics | {"rows": result.counts}, tags, _now_ms())


def _now_ms() -> int:
    return int(time.time() * 1000)


def _check_reachable(uri: str) -> None:
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in {"http", "https"}:
        return
    address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError as error:
        raise ConfigError(
            f"tracking.uri {uri}: the tracking server does not answer ({error}); start it, or go on without one: "
            "--set tracking.uri=off"
        ) from None
