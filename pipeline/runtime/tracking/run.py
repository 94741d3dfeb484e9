"""What a run says to its tracking server: one parent run, and a child for each step, with its curves and its inputs.

The driver alone speaks, and only to an ``Outbox`` in the workspace; a thread delivers it. Steps write their curves to
``metrics.jsonl`` beside their weights, and the driver forwards new points from there.
"""

import base64
import contextlib
import hashlib
import json
import sqlite3
import threading
import uuid
from collections.abc import Callable
from typing import Any

from pipeline.addresses import values_without_secrets
from pipeline.errors import UnclipError
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.tables import flatten
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking.aliases import CHAMPION
from pipeline.runtime.tracking.delivery import Delivery
from pipeline.runtime.tracking.outbox import Outbox
from pipeline.runtime.tracking.place import OFF, Place, check_scheme
from pipeline.runtime.tracking.records import (
    begun_at,
    code_tags,
    datasets_of,
    model_record,
    new_points,
    params_of,
    tracked,
    version_record,
)
from pipeline.runtime.tracking.tracker import now_ms
from pipeline.train.results import grid_name
from pipeline.workspace.disk import content_of, facts_of
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Workspace

Json = dict[str, Any]

CANDIDATE = "candidate"
_DATABASE_WAIT_S = 60.0
"""A local database is waited for: mlflow's import and the first migration take seconds, and no network."""
_SERVER_WAIT_S = 5.0


class Tracking:
    """One recipe's run on its tracking server; a context manager.

    Nothing here waits for a server, or fails by one. What it did not get is kept in the workspace, and sent by the next
    run.

    Args:
        recipe: Its ``tracking`` table names the server.
        workspace: Holds the records.
        warn: Called with a message when the tracker fails.
    """

    def __init__(self, recipe: Recipe, workspace: Workspace, warn: Callable[[str], None]) -> None:
        self._recipe, self._warn = recipe, warn
        self._place = Place(recipe, workspace)
        self._attempt = ""
        self._begun_ms = 0
        self._seen: dict[str, Any] = {}
        self._unwritten: list[Json] = []
        self._is_full = False
        self._lock = threading.Lock()
        self._outbox: Outbox | None = None
        self._delivery: Delivery | None = None

    def __enter__(self) -> "Tracking":
        if self._place.uri == OFF:
            return self
        check_scheme(self._place.uri)
        self._outbox = _opened(self._place, self._warn)
        if self._outbox is None:
            return self
        self._begin_attempt()
        self._delivery = _delivery_of(self._place, self._outbox, self._warn)
        tables = tracked(self._recipe)
        shown = json.dumps(values_without_secrets(tables), indent=1)
        tags = code_tags() | {"unclip.workspace": self._place.root, "unclip.recipe": self._recipe.name}
        self._say(
            self._start_record("", self._recipe.name, params_of(tables), tags),
            {"op": "text", "run": self._run(""), "file": "recipe.json", "text": shown},
        )
        self._delivery.start(self._add_readings)
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._outbox is None or self._delivery is None:
            return
        status = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        if kind is None:
            del self._place.state["attempts"][self._recipe.name]
            self._save()
        self._say(self._finish_record(self._run(""), status))
        if self._unwritten:
            self._warn(f"{self._place.kept_in} has no room: the tracker does not get {len(self._unwritten)} records")
        _close(self._place, self._outbox, self._delivery, self._warn)

    def started(self, context: StepContext) -> None:
        """Begin, or continue, the step's run."""
        if self._outbox is None:
            return
        self._say(*self._child_records(context, self._curves(context.step.name)["number"]))

    def _child_records(self, context: StepContext, number: int) -> list[Json]:
        """The beginning of the step's run: the first one in this pipeline run, or one whose curves began anew."""
        step = context.step
        tags = {"unclip.key": step.key, "unclip.artifact": context.output.uri}
        tags |= {f"input.{name}": key for name, key in step.inputs.items()}
        title = step.name if number == 1 else f"{step.name} ({number})"
        start = self._start_record(step.name, title, params_of(step.section), tags)
        run = self._run(step.name, number)
        return [start | {"run": run}, {"op": "inputs", "run": run, "datasets": datasets_of(context)}]

    def forward(self, context: StepContext, *, is_last: bool = False) -> None:
        """Send the new points of the step's curves; curves that have begun anew, from the first step, as another run.

        What a full disk does not take is read again at the next call.

        Args:
            context: The step.
            is_last: Whether there is no other call.
        """
        if self._outbox is None or not context.output.exists(METRICS):
            return
        path, name = str(context.output.path(METRICS)), context.step.name
        facts = facts_of(path)
        stamp = (path, facts.st_mtime_ns, facts.st_size) if facts else None
        if self._seen.get(name) == stamp:
            return
        curves: Json = self._curves(name)
        lines = (content_of(path) or b"").decode().splitlines()
        begun, records = begun_at(lines), list[Json]()
        if begun and curves["begun"] not in {0.0, begun}:
            records += [
                self._finish_record(self._run(name), "KILLED"),
                *self._child_records(context, curves["number"] + 1),
            ]
            curves.update(number=curves["number"] + 1, begun=begun, last={})
        curves["begun"] = begun or curves["begun"]
        points, run = new_points(lines, curves["last"]), self._run(name, curves["number"])
        if points:
            records += [{"op": "metrics", "run": run, "points": points}, *self._grids(context, run, points)]
            if not self._say(*records, is_kept=is_last):
                return
            self._place.state["curves"][f"{self._attempt}/{name}"] = curves
            self._save()
        self._seen[name] = stamp

    def _curves(self, step: str) -> Json:
        """What was sent of a step's curves: the number of their run, when they began, the last step of each."""
        sent: Json = self._place.state["curves"].get(f"{self._attempt}/{step}", {"number": 1, "begun": 0.0, "last": {}})
        return sent | {"last": dict(sent["last"])}

    def _grids(self, context: StepContext, run: list[str], points: list[list[Any]]) -> list[Json]:
        """The grids of the validations whose losses are new, with their bytes: the commit removes the files."""
        records: list[Json] = []
        for name, _, time_ms, step in points:
            grid = context.output.find_bytes(grid_name(step)) if name == "val_loss" else None
            if grid is not None:
                png = base64.b64encode(grid).decode()
                facts = {"key": "validation", "png": png, "step": step, "time_ms": time_ms}
                records.append({"op": "image", "run": run, **facts})
        return records

    def finished(self, context: StepContext, result: StepResult) -> str:
        """Close the step's run; returns its id as far as it is known, or an empty string."""
        if self._outbox is None or self._delivery is None:
            return ""
        name, now = context.step.name, now_ms()
        self.forward(context, is_last=True)
        # Under a name of its own, so that no point is added to a curve.
        flat = flatten(result.metrics | {"rows": result.counts})
        points = [
            [f"final.{key}", float(value), now, 0] for key, value in flat.items() if isinstance(value, int | float)
        ]
        run = self._run(name)
        pictures = sorted(file for file in context.output.names() if file.endswith(".png") and "/" not in file)
        self._say(
            {"op": "metrics", "run": run, "points": points},
            *(
                {
                    "op": "image",
                    "run": run,
                    "key": file.removesuffix(".png"),
                    "artifact": context.output.uri,
                    "file": file,
                    "step": 0,
                    "time_ms": now,
                }
                for file in pictures
            ),
            *self._model_records(context),
            self._finish_record(run, "FINISHED"),
        )
        return self.run_id(context, _DATABASE_WAIT_S if self._place.is_local else 0.0)

    def run_id(self, context: StepContext, wait_s: float = 0.0) -> str:
        """MLflow's id of a step's run; empty if it is not known after ``wait_s`` seconds."""
        return self._delivery.run_id(tuple(self._run(context.step.name)), wait_s) if self._delivery else ""

    def failed(self, context: StepContext) -> None:
        """Close the step's run as failed."""
        self._say(self._finish_record(self._run(context.step.name), "FAILED"))

    def _model_records(self, context: StepContext) -> list[Json]:
        """A trained network as a model; a measured cascade as a version, the newest candidate."""
        name = context.step.name
        if name == "evaluate":
            return [version_record(self._recipe, context, self._run(name), CANDIDATE)]
        if name not in self._recipe.trained() and name != "clip":
            return []
        return [model_record("model", name, context, self._run(name))]

    def _begin_attempt(self) -> None:
        """Give this pipeline run a random name: that of the last one if it was stopped and had the same recipe."""
        digest = hashlib.sha256(json.dumps(tracked(self._recipe), sort_keys=True).encode()).hexdigest()[:16]
        attempts = self._place.state["attempts"]
        previous = attempts.get(self._recipe.name, {})
        if previous.get("recipe") != digest:
            attempts[self._recipe.name] = previous = {"name": uuid.uuid4().hex, "recipe": digest, "time_ms": now_ms()}
            curves, names = self._place.state["curves"], {attempt["name"] for attempt in attempts.values()}
            self._place.state["curves"] = {run: curves[run] for run in curves if run.partition("/")[0] in names}
            self._save()
        self._attempt, self._begun_ms = str(previous["name"]), int(previous["time_ms"])

    def _run(self, step: str, number: int = 0) -> list[str]:
        """The name of a step's run; 0: the newest, if its curves have begun anew."""
        number = number or self._curves(step)["number"]
        return [self._attempt, step] + ([str(number)] if number > 1 else [])

    def _finish_record(self, run: list[str], status: str) -> Json:
        return {"op": "finish", "run": run, "status": status, "tags": {}, "time_ms": now_ms()}

    def _start_record(self, step: str, title: str, params: Json, tags: dict[str, str]) -> Json:
        run = {"op": "start", "run": self._run(step), "name": title, "params": params, "time_ms": now_ms()}
        return run | {"tags": values_without_secrets({name: value for name, value in tags.items() if value})}

    def _add_readings(self, readings: dict[str, float]) -> None:
        now = now_ms()
        seconds = (now - self._begun_ms) // 1000
        points = [[name, value, now, seconds] for name, value in readings.items()]
        self._say({"op": "metrics", "run": self._run(""), "points": points}, is_kept=False)

    def _say(self, *records: Json, is_kept: bool = True) -> bool:
        """Write what the tracker is to get, and before it what a full disk has not taken; whether it was written.

        Args:
            records: What it is to get.
            is_kept: Whether it is written with a later one if there is no room now.
        """
        if self._outbox is None:
            return False
        with self._lock:
            waiting = [*self._unwritten, *records]
            try:
                self._outbox.append(waiting)
            except OSError as error:
                if not self._is_full:
                    self._warn(
                        f"{self._place.kept_in}: {error}; the tracker gets what follows when there is room again"
                    )
                self._is_full = True
                self._unwritten = waiting if is_kept else self._unwritten
                return False
            self._unwritten, self._is_full = [], False
        if self._delivery is not None:
            self._delivery.wake()
        return True

    def _save(self) -> None:
        try:
            self._place.save()
        except OSError as error:
            self._warn(f"{self._place.kept_in}: {error}; the tracker may get some points twice")


def send_waiting(recipe: Recipe, workspace: Workspace, warn: Callable[[str], None], *records: Json) -> None:
    """Send what earlier runs left, and these records after it; a run that goes on at this moment sends them itself.

    Args:
        recipe: Its ``tracking`` table names the server.
        workspace: Holds the records.
        warn: Called with a message when the tracker fails.
        records: More records.
    """
    place = Place(recipe, workspace)
    if place.uri == OFF:
        return
    check_scheme(place.uri)
    try:
        if not records and not place.num_waiting():
            return
    except (OSError, UnclipError) as error:
        warn(f"{place.kept_in}: {error}; the next run sends what waits there")
        return
    outbox = _opened(place, warn)
    if outbox is None:
        return
    if records:
        try:
            outbox.append(records)
        except OSError as error:
            warn(f"{place.kept_in}: {error}; the tracker does not get {records[0]['op']}")
    if not outbox.may_wait:
        place.close()
        return
    delivery = _delivery_of(place, outbox, warn)
    delivery.start()
    _close(place, outbox, delivery, warn)


def send_champion(recipe: Recipe, step: Step, reason: str, warn: Callable[[str], None]) -> None:
    """Move the registered model's alias ``champion`` to a measured cascade; if it is there already, nothing changes.

    A server that does not answer now gets it later, if the cascade is still the champion then.

    Args:
        recipe: Its ``tracking`` table names the server.
        step: The evaluation.
        reason: Becomes the version's description.
        warn: Called with a message when the tracker fails.
    """
    workspace = Workspace(recipe.workspace)
    record = version_record(recipe, StepContext(recipe, step, workspace.root), [], CHAMPION)
    send_waiting(recipe, workspace, warn, record | {"reason": reason, "recipe": recipe.name})


def _opened(place: Place, warn: Callable[[str], None]) -> Outbox | None:
    """The outbox; None, with a warning, if its disk does not take it."""
    try:
        return place.open()
    except (OSError, UnclipError) as error:
        place.close()
        warn(f"{place.kept_in}: {error}; the tracker gets nothing of this run")
        return None


def _delivery_of(place: Place, outbox: Outbox, warn: Callable[[str], None]) -> Delivery:
    def publish() -> None:
        try:
            place.publish()
        except (OSError, sqlite3.Error, UnclipError) as error:  # no failure of the server
            warn(f"the tracker's database is not in the workspace: {error}")

    return Delivery(outbox, place.tracker, place.shown_uri, warn, publish)


def _close(place: Place, outbox: Outbox, delivery: Delivery, warn: Callable[[str], None]) -> None:
    delivery.close(_DATABASE_WAIT_S if place.is_local else _SERVER_WAIT_S)
    sender = "the next `unclip run` of this recipe sends them, also if all its steps are done"
    try:
        if number := outbox.num_records:
            warn(f"tracker {place.shown_uri}: {number} records wait in {place.kept_in}; {sender}")
        else:
            with contextlib.suppress(OSError):  # a full disk; the next run compacts it
                outbox.compact()
    except OSError as error:
        warn(f"tracker {place.shown_uri}: records may wait in {place.kept_in}, which fails ({error}); {sender}")
    try:
        place.publish()  # also what a failed or interrupted run has tracked
    except (OSError, sqlite3.Error, UnclipError) as error:
        warn(f"what the tracker did not get is not in the workspace: {error}")
    place.close()
