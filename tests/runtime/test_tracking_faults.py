"""Trackers, disks and storage that fail: the run goes on, and what the tracker should get is kept."""

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import StepError
from pipeline.runtime.context import StepResult
from pipeline.runtime.tracking import delivery, run, tracker
from pipeline.runtime.tracking.delivery import Delivery
from pipeline.runtime.tracking.outbox import RECORDS, SENT, Outbox
from pipeline.runtime.tracking.place import Place
from pipeline.runtime.tracking.run import Tracking, send_waiting
from pipeline.train.results import grid_name
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.runtime.tracked import client_of, context_of, history_of, recipe_of, runs_of, write_rows
from tests.tiny.storage import fail_calls, files_of_at_most

Json = dict[str, Any]


def test_a_full_disk_loses_nothing_of_a_curve_and_is_said_once(tmp_path: Path) -> None:
    recipe, warnings = recipe_of(f"http://127.0.0.1:{free_port()}"), list[str]()
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        write_rows(context, 40)
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        with files_of_at_most(records.stat().st_size):
            tracking.started(context)
            tracking.forward(context)
            tracking.forward(context)
        full = [warning for warning in warnings if "gets what follows when there is room again" in warning]
        assert len(full) == 1
        tracking.forward(context)
    said = [json.loads(line) for line in records.read_text().splitlines()]
    of_step = [(record["op"], len(record.get("points", ()))) for record in said if record["run"][1] == "prior"]
    assert of_step == [("start", 0), ("inputs", 0), ("metrics", 40)]


def test_a_full_disk_that_takes_no_note_of_what_is_sent_is_not_the_server(database: str, tmp_path: Path) -> None:
    recipe, warnings = recipe_of(database, "noted"), list[str]()
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        outbox = Outbox(records.parent)
        while outbox.num_bytes:
            time.sleep(0.02)
        note = records.with_name(f"{SENT}.new")
        note.symlink_to("/dev/full")
        tracking.started(context)
        assert tracking.run_id(context, 60)
        while not warnings:
            time.sleep(0.02)
        note.unlink()
    [warning] = warnings
    assert warning.startswith(f"{records.parent}: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}; the tracker gets")
    assert {one.info.status for one in runs_of(database, "noted")} == {"FINISHED", "RUNNING"}
    assert outbox.num_bytes == 0


def test_a_full_disk_at_the_end_hides_no_error_of_the_run(database: str, tmp_path: Path) -> None:
    messages = list[str]()
    tracking = Tracking(recipe_of(database, "full"), Workspace(str(tmp_path)), messages.append)
    tracking.__enter__()
    (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
    outbox = Outbox(records.parent)
    while outbox.num_bytes:
        time.sleep(0.02)
    with files_of_at_most(0):
        tracking.__exit__(StepError, StepError("the disk is full"), None)
    assert "does not get 1 records" in messages[-1]


def test_a_folder_that_cannot_be_made_costs_the_curves_and_no_run(tmp_path: Path) -> None:
    recipe, workspace, messages = recipe_of("http://127.0.0.1:1"), Workspace(str(tmp_path)), list[str]()
    (tmp_path / "tracking").write_text("a file in the place of the folder")
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, workspace, messages.append) as tracking:
        tracking.started(context)
        write_rows(context, 2)
        tracking.forward(context)
        assert tracking.finished(context, StepResult()) == ""
        tracking.failed(context)
    send_waiting(recipe, workspace, messages.append, {"op": "alias"})
    assert len(messages) == 2
    assert all("the tracker gets nothing" in message for message in messages)


@pytest.mark.parametrize("end", ["metrics.jsonl", ".png"])
def test_curves_and_grids_that_cannot_be_read_for_a_moment_are_read_again(
    tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(f"http://127.0.0.1:{free_port()}")
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), lambda _: None) as tracking:
        row = {"step": 4, "time": 1004, "loss": 0.5, "val_loss": 0.5}
        context.output.write_bytes("metrics.jsonl", json.dumps(row).encode())
        context.output.write_bytes(grid_name(4), b"png")
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        with monkeypatch.context() as patch:
            failed = fail_calls(patch, "open", times=2, ends=(end,))
            tracking.forward(context)
            assert len(failed) == 2
    said = [json.loads(line) for line in records.read_text().splitlines()]
    assert [record["op"] for record in said if record["run"][1] == "prior"] == ["metrics", "image"]


@pytest.mark.parametrize("end", ["delivery.lock", SENT])
def test_storage_that_fails_for_a_moment_ends_no_delivery(
    database: str, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_UNREADABLE_WAIT_S", 0.01)
    name = f"stale {end}"
    recipe, warnings = recipe_of(database, name), list[str]()
    failed = fail_calls(monkeypatch, "open", times=2, ends=(f"/{end}",))
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        context = context_of(recipe, tmp_path)
        tracking.started(context)
        assert tracking.run_id(context, 60)
    assert len(failed) == 2
    assert [warning.partition(" (")[0] for warning in warnings] == [
        f"what waits for the tracker {database} cannot be read"
    ]
    assert "FINISHED" in {one.info.status for one in runs_of(database, name)}


def test_storage_that_fails_to_the_end_fails_no_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, workspace, warnings = recipe_of(database, "gone"), Workspace(str(tmp_path)), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(run, "_DATABASE_WAIT_S", 0.1)
        with Tracking(recipe, workspace, warnings.append) as tracking:
            tracking.started(context_of(recipe, tmp_path))
            fail_calls(patch, "open", times=10**9, ends=(f"/{SENT}",))
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        assert [one for one in warnings if f"records may wait in {records}, which fails" in one]
        warnings.clear()
        (records.parent / SENT).touch()
        send_waiting(recipe, workspace, warnings.append)
        assert [warning.partition(": ")[0] for warning in warnings] == [str(records)]
    send_waiting(recipe, workspace, pytest.fail)
    assert {one.info.status for one in runs_of(database, "gone")} == {"FINISHED", "RUNNING"}


def test_a_reading_of_the_machine_that_fails_is_not_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_SYSTEM_EVERY_S", 0.01)
    read, failures, warnings = tracker.SystemMetrics.read, [OSError(5, "no answer")] * 2, list[str]()

    def fail_first(self: tracker.SystemMetrics) -> dict[str, float]:
        if failures:
            raise failures.pop()
        return read(self)

    monkeypatch.setattr(tracker.SystemMetrics, "read", fail_first)
    has_reading = threading.Event()
    one = Delivery(Outbox(tmp_path), lambda: pytest.fail("nothing is to be delivered"), "", warnings.append)
    one.start(lambda _: has_reading.set())
    assert has_reading.wait(60)
    one.close(60)
    assert len(warnings) == 1


def test_a_tracker_that_is_not_there_touches_nothing_and_gets_everything_later(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    recipe, warnings = recipe_of(uri, "later"), list[str]()
    context, workspace = context_of(recipe, tmp_path), Workspace(str(tmp_path))
    open_tracker, threads = Place.tracker, set[str]()

    def open_seen(place: Place) -> tracker.Tracker:
        threads.add(threading.current_thread().name)
        return open_tracker(place)

    monkeypatch.setattr(Place, "tracker", open_seen)
    with Tracking(recipe, workspace, warnings.append) as tracking, monkeypatch.context() as no_waits:
        no_waits.setattr(delivery, "time", SimpleNamespace(monotonic=time.monotonic, sleep=None))
        tracking.started(context)
        write_rows(context, 3)
        tracking.forward(context)
        assert tracking.finished(context, StepResult()) == ""
    assert threads == {"tracking"}  # the run's own thread asks the server for nothing
    assert len(warnings) == 2
    assert "does not answer" in warnings[0]
    assert "records wait in" in warnings[1]
    # The server is back: here the same records, in the outbox of a tracker that answers.
    (folder,) = (tmp_path / "tracking").iterdir()
    answered = recipe_of(database, "later")
    Place(answered, workspace).open()
    other = next(path for path in (tmp_path / "tracking").iterdir() if path != folder)
    shutil.copy(folder / RECORDS, other / RECORDS)
    send_waiting(answered, workspace, pytest.fail)
    child = next(run for run in runs_of(database, "later") if run.data.tags["unclip.step"] == "prior")
    assert child.info.status == "FINISHED"
    assert len(history_of(database, child.info.run_id)) == 3
    assert (other / RECORDS).read_bytes() == b""


def test_what_the_server_refuses_is_left_out_and_said(database: str, tmp_path: Path) -> None:
    recipe, warnings = recipe_of(database, "refused"), list[str]()
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.forward(context_of(recipe, tmp_path, "decoder"))
        write_rows(context, 2)
        tracking.forward(context)  # of a run that was never started
        tracking.started(context)
        assert tracking.finished(context, StepResult())
    assert [warning for warning in warnings if "refuses metrics" in warning]
    assert len(runs_of(database, "refused")) == 2


def test_a_run_that_somebody_deleted_takes_no_points_of_others_along(database: str, tmp_path: Path) -> None:
    recipe, workspace, warnings = recipe_of(database, "deleted"), Workspace(str(tmp_path)), list[str]()

    def record(step: str, op: str, **fields: Any) -> Json:
        return {"op": op, "run": ["attempt", step], **fields}

    names = ("", "prior", "decoder")
    start = {"params": {}, "tags": {}, "time_ms": 1}
    send_waiting(recipe, workspace, pytest.fail, *(record(name, "start", name=name, **start) for name in names))
    run_ids = {one.data.tags["unclip.step"]: one.info.run_id for one in runs_of(database, "deleted")}
    client_of(database).delete_run(run_ids["prior"])
    points = [
        record(name, "metrics", points=[["loss", 0.5, 1000, step]])
        for step in range(3)
        for name in ("decoder", "prior")
    ]
    send_waiting(recipe, workspace, warnings.append, *points)
    assert [step for step, _, _ in history_of(database, run_ids["decoder"])] == [0, 1, 2]
    assert len(warnings) == 1
    assert "does not have the run of prior any more" in warnings[0]


def _fail_between(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """MLflow's client fails at one of its calls, and answers else."""
    from mlflow.tracking import MlflowClient

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(MlflowClient, name, fail)


def test_files_that_nobody_takes_hold_up_no_curve(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server whose files are in a bucket that this machine has no driver or password for."""
    monkeypatch.setattr(tracker, "_WAIT_S", 0.01)
    _fail_between(monkeypatch, "log_text", OSError("no password for the bucket"))
    recipe, warnings = recipe_of(database, "files"), list[str]()
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.started(context)
        write_rows(context, 2)
        run_id = tracking.finished(context, StepResult())
    assert len(history_of(database, run_id)) == 2
    assert [warning for warning in warnings if "refuses text (no password for the bucket)" in warning]


def test_a_404_of_a_proxy_whose_server_is_away_drops_nothing(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    recipe, warnings = recipe_of(database, "proxy"), list[str]()
    context, workspace = context_of(recipe, tmp_path), Workspace(str(tmp_path))
    with monkeypatch.context() as patch:
        for name in ("search_runs", "get_experiment"):
            _fail_between(patch, name, MlflowException("404 page", error_code=ENDPOINT_NOT_FOUND))
        patch.setattr(run, "_DATABASE_WAIT_S", 0.5)
        with Tracking(recipe, workspace, warnings.append) as tracking:
            tracking.started(context)
            tracking.finished(context, StepResult())
    assert "does not answer (404 page)" in warnings[0]
    assert Place(recipe, workspace).num_waiting() > 0
    shutil.move(tmp_path, moved := tmp_path.with_name("moved"))
    send_waiting(recipe, Workspace(str(moved)), pytest.fail)
    assert {one.info.status for one in runs_of(database, "proxy")} == {"FINISHED"}
    assert Place(recipe, Workspace(str(moved))).num_waiting() == 0
