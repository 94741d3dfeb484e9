"""MLflow: one run for each step, continued when the step is continued. The only module that imports mlflow.

Steps write their curves to ``metrics.jsonl`` beside their weights; the driver forwards new lines from there. So a
tracker that goes away costs nothing but its own copy of the numbers.
"""

import json
import logging
import os
import re
from collections.abc import Sequence
from typing import Any

# mlflow reads these once, at import: no telemetry, and an unreachable server is an error in seconds, not minutes.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from pipeline.errors import StepError

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)

_MAX_BATCH = 1000
_MAX_PARAMS = 100
_MAX_VALUE_CHARS = 500


class Tracker:
    """One experiment on one tracking server.

    Args:
        uri: MLflow tracking URI (``sqlite:///...`` or ``http://...``).
        experiment: Experiment name; made when missing.

    Raises:
        StepError: If the store cannot be opened.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            self._experiment_id: str = found.experiment_id if found else self._client.create_experiment(experiment)
        except MlflowException as error:
            raise StepError(f"tracking.uri {uri}: {error.message}") from error

    def start(self, step: str, key: str, params: dict[str, Any]) -> str:
        """Begin, or continue, the run of one step; returns its run id."""
        found = self._client.search_runs(
            [self._experiment_id], filter_string=f"tags.`unclip.key` = '{key}' and tags.`unclip.step` = '{step}'"
        )
        if found:
            run_id: str = found[0].info.run_id
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {"unclip.step": step, "unclip.key": key}
        run_id = self._client.create_run(self._experiment_id, run_name=f"{step}-{key[:6]}", tags=tags).info.run_id
        entries = [Param(name, str(value)[:_MAX_VALUE_CHARS]) for name, value in flatten(params).items()]
        for start in range(0, len(entries), _MAX_PARAMS):
            self._client.log_batch(run_id, params=entries[start : start + _MAX_PARAMS])
        return run_id

    def last_step(self, run_id: str, metric: str = "loss") -> int:
        """The last training step whose loss is logged; -1 where none is."""
        history = self._client.get_metric_history(run_id, metric)
        return max((point.step for point in history), default=-1)

    def log(self, run_id: str, rows: Sequence[dict[str, Any]], time_ms: int) -> None:
        """Log rows of ``metrics.jsonl``; each has ``step`` and numbers.

        Args:
            run_id: From ``start``.
            rows: The rows to log.
            time_ms: Time of the reading, in milliseconds since the epoch.
        """
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
        # Under a name of its own, so that no point is added to a curve.
        flat = {_metric_name(name): float(v) for name, v in flatten(metrics).items() if isinstance(v, int | float)}
        entries = [Metric(name, value, time_ms, 0) for name, value in flat.items()][:_MAX_BATCH]
        self._client.log_batch(run_id, metrics=entries, tags=[RunTag(name, value) for name, value in tags.items()])
        self._client.set_terminated(run_id, "FINISHED", end_time=time_ms)

    def fail(self, run_id: str) -> None:
        """Close a run as failed."""
        self._client.set_terminated(run_id, "FAILED")


def _metric_name(name: str) -> str:
    """A dotted name as MLflow takes it: what people's errors and prompts bring along becomes an underscore."""
    return "final." + re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)


def flatten(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted names; lists as JSON."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = json.dumps(value) if isinstance(value, list) else value
    return flat
