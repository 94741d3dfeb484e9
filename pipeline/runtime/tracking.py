"""MLflow: one run for each step, continued when the step is continued. The only module that imports mlflow.

Steps write their curves to ``metrics.jsonl`` beside their weights; the driver forwards new lines from there, in a
thread of its own, since mlflow's import and first migration take seconds. If a tracker fails, only its
own copy of the numbers is lost.
"""

import json
import logging
import os
import re
import socket
import time
import urllib.parse
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.errors import ConfigError, StepError, UnclipError
from pipeline.recipe.recipe import Recipe, flatten
from pipeline.runtime.context import StepContext, StepResult
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Workspace

OFF = "off"
_DATABASE = "mlflow.db"
_START_TIMEOUT_S = 60.0
_MAX_BATCH = 1000
_MAX_PARAMS = 100
_MAX_VALUE_CHARS = 500
# mlflow reads these once, at import: no telemetry, and an unreachable server is an error in seconds, not minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


class Tracker:
    """One experiment on one tracking server.

    Args:
        uri: MLflow tracking URI (``sqlite:///...`` or ``http://...``).
        experiment: Experiment name; made when missing.

    Raises:
        StepError: If the store cannot be opened.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        try:
            self._client = MlflowClient(tracking_uri=uri)
            existing = self._client.get_experiment_by_name(experiment)
            self._experiment_id: str = (
                existing.experiment_id if existing else self._client.create_experiment(experiment)
            )
        except MlflowException as error:
            raise StepError(f"tracking.uri {uri}: {error.message}") from error

    def start(self, step: str, key: str, params: dict[str, Any]) -> str:
        """Begin, or continue, the run of one step; returns its run id."""
        runs = self._client.search_runs(
            [self._experiment_id], filter_string=f"tags.`unclip.key` = '{key}' and tags.`unclip.step` = '{step}'"
        )
        if runs:
            run_id: str = runs[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        from mlflow.entities import Param

        tags = {"unclip.step": step, "unclip.key": key}
        run_id = self._client.create_run(self._experiment_id, run_name=f"{step}-{key[:6]}", tags=tags).info.run_id
        entries = [
            Param(name, (json.dumps(value) if isinstance(value, list) else str(value))[:_MAX_VALUE_CHARS])
            for name, value in flatten(params).items()
        ]
        for start in range(0, len(entries), _MAX_PARAMS):
            self._client.log_batch(run_id, params=entries[start : start + _MAX_PARAMS])
        return run_id

    def last_step(self, run_id: str, metric: str = "loss") -> int:
        """The last training step whose loss is logged; -1 if there is none."""
        history = self._client.get_metric_history(run_id, metric)
        return max((point.step for point in history), default=-1)

    def log(self, run_id: str, rows: Sequence[dict[str, Any]], time_ms: int) -> None:
        """Log rows of ``metrics.jsonl``; each has ``step`` and numbers.

        Args:
            run_id: From ``start``.
            rows: The rows to log.
            time_ms: Time of the reading, in milliseconds since the epoch.
        """
        from mlflow.entities import Metric

        metrics = [
            Metric(name, float(value), time_ms, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        ]
        for start in range(0, len(metrics), _MAX_BATCH):
            self._client.log_batch(run_id, metrics=metrics[start : start + _MAX_BATCH])

    def finish(self, run_id: str, metrics: dict[str, Any], tags: dict[str, str], time_ms: int) -> None:
        """Log what the step measured and close its run."""
        from mlflow.entities import Metric, RunTag

        # Under a name of its own, so that no point is added to a curve.
        flat = {_metric_name(name): float(v) for name, v in flatten(metrics).items() if isinstance(v, int | float)}
        entries = [Metric(name, value, time_ms, 0) for name, value in flat.items()][:_MAX_BATCH]
        self._client.log_batch(run_id, metrics=entries, tags=[RunTag(name, value) for name, value in tags.items()])
        self._client.set_terminated(run_id, "FINISHED", end_time=time_ms)

    def fail(self, run_id: str) -> None:
        """Close a run as failed."""
        self._client.set_terminated(run_id, "FAILED")


class Tracking:
    """One recipe's runs on its tracking server; a context manager.

    After the first failure of the tracker, one warning is given and tracking stops: the curves are in ``metrics.jsonl``
    and the numbers in the manifests. A continued step sends the rows that its run lacks.

    Args:
        recipe: Its ``tracking`` table names the server.
        workspace: Holds the sqlite database where no server is named, published at each commit to an object store.
        warn: Called with a message when the tracker fails.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, warn: Callable[[str], None]) -> None:
        self._uri = recipe.tracking.uri or f"sqlite:///{workspace.local_root}/{_DATABASE}"
        self._workspace = workspace
        self._owns_database = not recipe.tracking.uri
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
        if self._owns_database:
            self._workspace.restore(_DATABASE)
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.submit(self._close)
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

    def _close(self) -> None:
        try:
            self._publish()  # also what a failed or interrupted run has tracked
        except UnclipError as error:
            self._warn(f"the tracker's database is not in the workspace: {error}")

    def _publish(self) -> None:
        if self._owns_database:
            self._workspace.publish(_DATABASE)

    def _submit(self, action: Callable[[Tracker], None]) -> Future[None]:
        return self._thread.submit(self._act, action)

    def _act(self, action: Callable[[Tracker], None]) -> None:
        if not self._on:
            return
        try:
            if self._tracker is None:
                self._tracker = Tracker(self._uri, self._experiment)
            action(self._tracker)
        except Exception as error:  # noqa: BLE001  (whatever a tracker throws must not stop a training)
            self._on = False
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._warn(f"tracker {self._uri} failed ({reason}); the run goes on; curves stay in metrics.jsonl")

    def _start(self, tracker: Tracker, context: StepContext) -> None:
        step = context.step
        run_id = tracker.start(step.name, step.key, step.section)
        self._run_ids[step.name] = run_id
        self._num_sent[step.name] = tracker.last_step(run_id) + 1

    def _send(self, tracker: Tracker, context: StepContext) -> None:
        name, output = context.step.name, context.output
        if not output.exists(METRICS):
            return
        rows: list[dict[str, Any]] = [json.loads(line) for line in output.path(METRICS).read_text().splitlines()]
        new = [row for row in rows if row["step"] >= self._num_sent[name]]
        if new:
            tracker.log(self._run_ids[name], new, _now_ms())
            self._num_sent[name] = new[-1]["step"] + 1

    def _finish(self, tracker: Tracker, context: StepContext, result: StepResult) -> None:
        self._send(tracker, context)
        tags = {"unclip.artifact": context.output.uri} | {
            f"input.{name}": key for name, key in context.step.inputs.items()
        }
        tracker.finish(self._run_ids[context.step.name], result.metrics | {"rows": result.counts}, tags, _now_ms())
        self._publish()


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


def _metric_name(name: str) -> str:
    """A dotted name that MLflow accepts: each other character (of an error or a prompt) becomes an underscore."""
    return "final." + re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
