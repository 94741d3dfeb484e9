"""MLflow: writes the records of a run to one tracking server. The only module that imports mlflow.

Every record can be written twice with the effect of once. A run is found again by its tags: a random name of the
pipeline run, which is new in every workspace, and the step.
"""

import base64
import contextlib
import io
import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.workspace.store import Artifact

Json = dict[str, Any]

_MAX_BATCH = 1000
_MAX_PARAMS = 100
_MAX_VALUE_CHARS = 500
_PARENT = "pipeline"
_CHILD = "unclip.child"
_MEASURED = "unclip.measured_ms"
"""When a candidate was measured, in milliseconds since the epoch."""
_PASSING = {401, 403, 408, 425, 429}
"""Refusals that a person or time may lift: a password, too many requests."""
_MOST_TRIES = 3
_WAIT_S = 1.0
# mlflow reads these at import: no telemetry, and no waiting inside of it, because the outbox is tried again anyway.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")


def prepare() -> None:
    """Import mlflow: seconds that say nothing about a server."""
    import mlflow.tracking  # noqa: F401  # pyright: ignore[reportUnusedImport]

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints what it also raises, with a traceback; the run says what was raised in a sentence.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def make_database(path: Path) -> None:
    """Make the sqlite database of a tracker, whole or not at all, if it is not there.

    MLflow makes it by dozens of migrations, and could never go on from one that a full disk or a kill cut off.

    Raises:
        Exception: If the disk is full or cannot be written.
    """
    if path.exists():
        return
    prepare()
    from mlflow.tracking import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        MlflowClient(tracking_uri=f"sqlite:///{new}").search_experiments(max_results=1)
        with contextlib.suppress(FileExistsError):  # another process was faster
            os.link(new, path)


class NoAliasError(Exception):
    """The server has no version with this alias."""


def tags_by_alias(uri: str, name: str, alias: str) -> tuple[str, dict[str, str]]:
    """The version of a registered model that has an alias, and its tags.

    Raises:
        NoAliasError: If the server has no such version.
        Exception: If it does not answer, or not well.
    """
    prepare()
    from mlflow.tracking import MlflowClient

    return _tags_by_alias(MlflowClient(tracking_uri=uri, registry_uri=uri), name, alias)


def _tags_by_alias(client: Any, name: str, alias: str) -> tuple[str, dict[str, str]]:
    from mlflow.exceptions import MlflowException

    try:
        version: Any = client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            raise NoAliasError(alias) from None
        raise
    return str(version.version), dict(version.tags)


class RefusedError(Exception):
    """The server will never accept this record."""


class Tracker:
    """One experiment on one tracking server.

    Args:
        uri: MLflow tracking URI (``sqlite:///...`` or ``http://...``).
        experiment: Experiment name, and name of the registered model; made when missing.
        files: Folder for pictures and small files, where no server keeps them.
        champion_of: The key of the evaluation that is a recipe's champion now, by the recipe's name.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        files: Path | None = None,
        champion_of: Callable[[str], str] | None = None,
    ) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._name, self._champion_of = experiment, champion_of
        self._experiment_id = self._experiment(None if files is None else files.as_uri())
        self.run_ids: dict[tuple[str, ...], str] = {}
        """MLflow's run id of each (pipeline run, step), or (pipeline run, step, "2") of a step whose curves began anew.
        The step of the parent is empty."""
        self._actions: dict[str, Callable[[Json], None]] = {
            "start": self._start,
            "inputs": self._log_inputs,
            "image": self._log_image,
            "text": self._log_text,
            "model": self._log_model,
            "version": self._register,
            "finish": self._finish,
        }

    def deliver(self, records: Sequence[Json]) -> None:
        """Write records of metrics together, or one record of another kind.

        Raises:
            RefusedError: If the server will never accept it.
            Exception: If the server does not answer, or not well: try again later.
        """
        for tries in itertools.count(1):
            error = self._failure(records)
            if error is None:
                return
            # Not the server's failure, if it answers here: one of the store where it keeps files (no driver, no
            # password), or of the record. Curves must not wait for it. Nor a 404 of a proxy whose server is away.
            self._client.get_experiment(self._experiment_id)
            if isinstance(error, RefusedError) or tries == _MOST_TRIES:
                raise RefusedError(str(error) or type(error).__name__) from error
            time.sleep(_WAIT_S)

    def _failure(self, records: Sequence[Json]) -> Exception | None:
        """What has failed that is not the server's own trouble; a ``RefusedError`` if trying again changes nothing.

        Raises:
            MlflowException: If it is the server's own trouble.
        """
        from mlflow.exceptions import MlflowException

        try:
            if records[0]["op"] == "metrics":
                self._log_metrics(records)
            else:
                self._actions[records[0]["op"]](records[0])
        except MlflowException as error:
            status = error.get_http_status_code()
            if not 400 <= status < 500 or status in _PASSING:
                raise
            return RefusedError(str(error))
        except Exception as error:  # noqa: BLE001  (what the drivers of stores for files throw)
            return error
        return None

    def _experiment(self, files: str | None) -> str:
        existing = self._client.get_experiment_by_name(self._name)
        return existing.experiment_id if existing else self._client.create_experiment(self._name, files)

    def _start(self, record: Json) -> None:
        """Begin, or continue, a run: a parent, or the child of one."""
        from mlflow.entities import Param, RunTag

        run = tuple(record["run"])
        attempt, step, *number = run
        own = {"unclip.run": attempt, "unclip.step": step or _PARENT}
        if number:
            own[_CHILD] = number[0]
        parent = {"mlflow.parentRunId": self._run_id([attempt, ""])} if step else {}
        runs = self._search(run)
        if not runs:
            tags = record["tags"] | own | parent
            created = self._client.create_run(self._experiment_id, record["time_ms"], tags, record["name"])
            # A request that went unanswered may have been answered since.
            runs = self._search(run) or [created.info.run_id]
            for double in runs[1:]:
                self._client.delete_run(double)
        self.run_ids[run] = runs[0]
        self._client.update_run(runs[0], status="RUNNING")
        self._client.log_batch(runs[0], tags=[RunTag(name, value) for name, value in record["tags"].items()])
        entries = [Param(name, str(value)[:_MAX_VALUE_CHARS]) for name, value in record["params"].items()]
        for first in range(0, len(entries), _MAX_PARAMS):
            self._client.log_batch(runs[0], params=entries[first : first + _MAX_PARAMS])

    def _log_metrics(self, records: Sequence[Json]) -> None:
        from mlflow.entities import Metric

        by_run: dict[str, list[Metric]] = {}
        for record in records:
            metrics = by_run.setdefault(self._run_id(record["run"]), [])
            metrics += [Metric(_metric_name(name), *rest) for name, *rest in record["points"]]
        for run_id, metrics in by_run.items():
            for first in range(0, len(metrics), _MAX_BATCH):
                self._client.log_batch(run_id, metrics=metrics[first : first + _MAX_BATCH])

    def _log_inputs(self, record: Json) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(
                Dataset(one["name"], one["digest"], "unclip", one["source"], profile=one["profile"]),
                [InputTag("mlflow.data.context", record["run"][1])],
            )
            for one in record["datasets"]
        ]
        self._client.log_inputs(self._run_id(record["run"]), datasets=inputs)

    def _log_image(self, record: Json) -> None:
        from PIL import Image

        run_id, key = self._run_id(record["run"]), record["key"]
        logged = [Path(file.path).name for file in self._client.list_artifacts(run_id, "images")]
        if any(name.startswith(f"{key}+step+{record['step']}+") for name in logged):
            return
        with Image.open(_picture(record)) as image:
            self._client.log_image(run_id, image, key=key, step=record["step"], timestamp=record["time_ms"])

    def _log_text(self, record: Json) -> None:
        self._client.log_text(self._run_id(record["run"]), record["text"], record["file"])

    def _log_model(self, record: Json) -> None:
        """A network as a logged model of its run: what it was made from, not its weights."""
        self._logged_model(record, self._run_id(record["run"]))

    def _logged_model(self, record: Json, run_id: str | None) -> Any:
        where = f"name = '{record['name']}' and tags.`unclip.key` = '{record['tags']['unclip.key']}'"
        existing = self._client.search_logged_models([self._experiment_id], filter_string=where)
        own = [model for model in existing if run_id is None or model.source_run_id == run_id]
        model = own[0] if own else self._create_model(record, run_id)
        if str(model.status) != "READY":
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "unclip.json")
                path.write_text(record["text"], encoding="utf-8")
                self._client.log_model_artifact(model.model_id, str(path))
            model = self._client.finalize_logged_model(model.model_id, "READY")
        return model

    def _create_model(self, record: Json, run_id: str | None) -> Any:
        from mlflow.entities import LoggedModelOutput

        model = self._client.create_logged_model(
            self._experiment_id, record["name"], run_id, tags=record["tags"], model_type="unclip"
        )
        if run_id is not None:
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
        return model

    def _register(self, record: Json) -> None:
        """A cascade as a version of the registered model, under an alias.

        A record may have waited while another machine delivered later ones, whose alias stays.
        """
        key = record["tags"]["unclip.key"]
        version = self._version(key) or self._create_version(record)
        if "reason" in record:
            self._client.update_model_version(self._name, version, record["reason"])
        if "recipe" in record and self._champion_of is not None:
            is_newest = self._champion_of(record["recipe"]) == key
        else:
            is_newest = self._note_time(record, version)
        if is_newest:
            self._client.set_registered_model_alias(self._name, record["alias"], version)

    def _note_time(self, record: Json, version: str) -> bool:
        """Note when a version was measured; whether the one that has its alias was not measured later."""
        time_ms, newest_ms = int(record.get("time_ms", 0)), 0
        with contextlib.suppress(NoAliasError):
            newest_ms = int(_tags_by_alias(self._client, self._name, record["alias"])[1].get(_MEASURED, 0))
        if time_ms < newest_ms:
            return False
        self._client.set_model_version_tag(self._name, version, _MEASURED, str(time_ms))
        return True

    def _create_version(self, record: Json) -> str:
        from mlflow.exceptions import MlflowException

        run_id = self._run_id(record["run"]) if record["run"] else None
        model = self._logged_model(record, run_id)
        try:
            self._client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version: Any = self._client.create_model_version(
            self._name,
            model.artifact_location,
            run_id,
            record["tags"],
            await_creation_for=0,
            # Without a run, mlflow looks for the model at its own default server.
            model_id=None if run_id is None else model.model_id,
        )
        return str(version.version)

    def _version(self, key: str) -> str:
        """The version whose evaluation has this key; empty if there is none."""
        versions = self._client.search_model_versions(f"name = '{self._name}'")
        return next((str(one.version) for one in versions if one.tags.get("unclip.key") == key), "")

    def _finish(self, record: Json) -> None:
        from mlflow.entities import RunTag

        run_id = self._run_id(record["run"])
        self._client.log_batch(run_id, tags=[RunTag(name, value) for name, value in record["tags"].items()])
        self._client.set_terminated(run_id, record["status"], end_time=record["time_ms"])

    def _run_id(self, run: Sequence[str]) -> str:
        """MLflow's id of a run whose start was delivered.

        Raises:
            RefusedError: If the server does not have it any more.
        """
        if tuple(run) not in self.run_ids:
            runs = self._search(run)
            if not runs:
                raise RefusedError(f"the server does not have the run of {run[1] or 'the pipeline'} any more")
            self.run_ids[tuple(run)] = runs[0]
        return self.run_ids[tuple(run)]

    def _search(self, run: Sequence[str]) -> list[str]:
        """Ids of the runs of a step in a pipeline run, the oldest first: one, or more after unanswered requests.

        Of a step whose curves began anew, the first run is the oldest of all; the others have numbers.
        """
        attempt, step, *number = run
        where = f"tags.`unclip.run` = '{attempt}' and tags.`unclip.step` = '{step or _PARENT}'"
        where += "".join(f" and tags.`{_CHILD}` = '{child}'" for child in number)
        runs = self._client.search_runs([self._experiment_id], where, order_by=["attributes.start_time ASC"])
        return [run.info.run_id for run in runs]


class SystemMetrics:
    """MLflow's own readings of this machine: processors, memory, disk, network, and GPUs if their package is there."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except (ImportError, RuntimeError):
            return

    def read(self) -> dict[str, float]:
        """The present readings, by MLflow's names."""
        values: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            readings: dict[str, float] = monitor.aggregate_metrics()
            values |= {f"system/{name}": float(value) for name, value in readings.items()}
            monitor.clear_metrics()
        return values


def _picture(record: Json) -> Path | io.BytesIO:
    """The file of a picture, or its bytes if the record has them.

    Raises:
        RefusedError: If the file is not there any more.
    """
    if "png" in record:
        return io.BytesIO(base64.b64decode(record["png"]))
    artifact = Artifact(record["artifact"])
    if not artifact.exists(record["file"]):
        raise RefusedError(f"{artifact.uri}/{record['file']} is not there any more")
    return artifact.path(record["file"])


def now_ms() -> int:
    """Milliseconds since the epoch, as MLflow's times are."""
    return int(time.time() * 1000)


def _metric_name(name: str) -> str:
    """A dotted name that MLflow accepts: each other character (of an error or a prompt) becomes an underscore."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
