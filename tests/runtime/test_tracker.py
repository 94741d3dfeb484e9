"""Tracking on a real sqlite store, and trackers that fail; tests/runtime/test_tracking_server.py has a real server."""

import contextlib
import json
import resource
import shutil
import threading
import time
from collections.abc import Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.champion import Promotion
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe, parse_recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking import delivery, run, tracker
from pipeline.runtime.tracking.delivery import Delivery
from pipeline.runtime.tracking.outbox import RECORDS, SENT, Outbox
from pipeline.runtime.tracking.place import Place
from pipeline.runtime.tracking.records import new_points, version_record
from pipeline.runtime.tracking.run import Tracking, send_champion, send_waiting
from pipeline.train.results import grid_name
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port
from tests.tiny.recipe import tiny_tables
from tests.tiny.storage import fail_calls

Json = dict[str, Any]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


def _recipe(uri: str, experiment: str = "") -> Recipe:
    return parse_recipe({"name": "tracked", "tracking": {"uri": uri, "experiment": experiment}})


def _context(recipe: Recipe, root: Path, name: str = "prior", inputs: dict[str, str] | None = None) -> StepContext:
    return StepContext(recipe, Step(name, 1, {"train": {"num_steps": 1}}, inputs or {}), str(root))


def _write_rows(context: StepContext, num_rows: int, *, begun: int = 1000) -> None:
    rows = [{"step": step, "time": begun + step, "loss": 1 / (step + 1)} for step in range(num_rows)]
    rows[0]["begun"] = begun
    context.output.write_bytes("metrics.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def _client(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _runs(uri: str, experiment: str = "tracked") -> list[Any]:
    client = _client(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def _history(uri: str, run_id: str) -> list[tuple[int, float, int]]:
    return sorted((p.step, p.value, p.timestamp) for p in _client(uri).get_metric_history(run_id, "loss"))


@contextlib.contextmanager
def _stopped(recipe: Recipe, workspace: Workspace) -> Generator[Tracking]:
    """A run that stops with an error at the end of the block."""
    tracking = Tracking(recipe, workspace, pytest.fail)
    yield tracking.__enter__()
    tracking.__exit__(StepError, StepError("stopped"), None)


def test_a_stopped_run_is_continued_in_its_parent_without_doubles(database: str, tmp_path: Path) -> None:
    recipe, workspace = _recipe(database), Workspace(str(tmp_path))
    embed = Artifact(f"{tmp_path}/embed/abc")
    embed.write_bytes("00000.parquet", b"rows")
    embed.commit(Manifest(step="embed", key="abc", step_version=1, section={}, inputs={}, counts={"in": 3, "ok": 3}))
    context = _context(recipe, tmp_path, inputs={"embed": "abc"})
    with _stopped(recipe, workspace) as tracking:
        tracking.started(context)
        _write_rows(context, 3)
        tracking.forward(context)
        tracking.failed(context)
    with Tracking(recipe, workspace, pytest.fail) as tracking:
        tracking.started(context)
        _write_rows(context, 5)
        validated = json.dumps({"step": 4, "time": 1004, "val_loss": 0.5})
        context.output.write_bytes(
            "metrics.jsonl", context.output.path("metrics.jsonl").read_bytes() + validated.encode()
        )
        for name in ("grid.png", grid_name(4)):
            with context.output.write(name) as path:
                Image.new("RGB", (8, 8)).save(path, "PNG")
        tracking.forward(context)
        context.output.remove(grid_name(4))  # as the commit does, before it is delivered
        result = StepResult(
            counts={"in": 2, "ok": 2}, metrics={"quality": {"colour": 0.5}, "failures": {"<urlopen [Errno 111]>": 3}}
        )
        run_id = tracking.finished(context, result)
    parent, child = sorted(_runs(database), key=lambda run: run.data.tags["unclip.step"] != "pipeline")
    assert [parent.info.status, child.info.status] == ["FINISHED", "FINISHED"]
    assert child.info.run_id == run_id
    assert child.info.artifact_uri.startswith(f"file://{Path(database.removeprefix('sqlite:///')).parent}/mlflow/")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert _history(database, run_id) == [(step, 1 / (step + 1), 1000 * (1000 + step)) for step in range(5)]
    assert child.data.metrics["final.quality.colour"] == 0.5
    assert child.data.metrics["final.rows.ok"] == 2
    assert child.data.metrics["final.failures._urlopen _Errno 111__"] == 3
    assert child.data.params["train.num_steps"] == "1"
    assert parent.data.tags["unclip.workspace"] == str(tmp_path)
    assert len(parent.data.tags["mlflow.source.git.commit"]) == 40
    manifest = embed.manifest()
    assert manifest is not None
    (used,) = child.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("embed", content_of(manifest))
    client = _client(database)
    images = [Path(file.path).name for file in client.list_artifacts(run_id, "images")]
    assert len(images) == 4  # MLflow adds a small copy of each
    assert sum(name.startswith("validation+step+4+") for name in images) == 2
    (model,) = client.search_logged_models([parent.info.experiment_id])
    assert model.tags["unclip.key"] == context.step.key
    assert str(model.status) == "READY"
    text = client.download_artifacts(parent.info.run_id, "recipe.json", str(tmp_path))
    assert json.loads(Path(text).read_text())["name"] == "tracked"


def test_no_secret_of_an_address_goes_to_the_tracker(database: str, tmp_path: Path) -> None:
    path, workspace = "https://me:hush@lists/a.csv?X-Signature=hush", Workspace(str(tmp_path))
    tables = {"name": "signed", "tracking": {"uri": database}, "pairs": {"source": "list", "path": path}}
    recipe = parse_recipe(tables)
    context = StepContext(recipe, Step("pairs", 1, {"path": path, "lists": [{"path": path}]}, {}), str(tmp_path))
    with _stopped(recipe, workspace) as tracking:
        tracking.started(context)
    runs, client = _runs(database, "signed"), _client(database)
    parent, child = sorted(runs, key=lambda run: run.data.tags["unclip.step"] != "pipeline")
    assert parent.data.params["pairs.path"] == child.data.params["path"] == "https://me:***@lists/a.csv?***"
    [used] = child.inputs.dataset_inputs
    assert json.loads(used.dataset.source)["path"] == "https://me:***@lists/a.csv?***"
    text = Path(client.download_artifacts(parent.info.run_id, "recipe.json", str(tmp_path))).read_text()
    assert "hush" not in f"{text} {parent.to_dictionary()} {child.to_dictionary()}"


def test_a_training_that_begins_again_at_its_first_step_has_another_child(database: str, tmp_path: Path) -> None:
    """Its inputs have changed, or somebody has removed a checkpoint that did not fit: the old curve is not its own."""
    recipe, workspace = _recipe(database, "again"), Workspace(str(tmp_path))
    context = _context(recipe, tmp_path)
    with _stopped(recipe, workspace) as tracking:
        tracking.started(context)
        _write_rows(context, 50)
        tracking.forward(context)
        tracking.failed(context)
    for num_rows in (2, 4):  # the run is stopped once more, and goes on in the new child
        with _stopped(recipe, workspace) as tracking:
            tracking.started(context)
            _write_rows(context, num_rows, begun=2000)
            tracking.forward(context)
            run_id = tracking.run_id(context, 60)
            tracking.failed(context)
    runs = {run.info.run_name: run for run in _runs(database, "again")}
    assert runs.keys() == {"tracked", "prior", "prior (2)"}
    assert runs["prior (2)"].info.run_id == run_id
    assert runs["prior (2)"].data.params == runs["prior"].data.params
    assert {run.data.tags["unclip.step"] for run in runs.values()} == {"pipeline", "prior"}
    assert (runs["prior"].info.status, runs["prior (2)"].info.status) == ("KILLED", "FAILED")
    assert [step for step, _, _ in _history(database, runs["prior"].info.run_id)] == list(range(50))
    assert _history(database, run_id) == [(step, 1 / (step + 1), 1000 * (2000 + step)) for step in range(4)]


def test_a_full_disk_loses_nothing_of_a_curve_and_is_said_once(tmp_path: Path) -> None:
    recipe, warnings = _recipe(f"http://127.0.0.1:{free_port()}"), list[str]()
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        _write_rows(context, 40)
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        with _files_of_at_most(records.stat().st_size):
            tracking.started(context)
            tracking.forward(context)
            tracking.forward(context)
        full = [warning for warning in warnings if "gets what follows when there is room again" in warning]
        assert len(full) == 1
        tracking.forward(context)
    said = [json.loads(line) for line in records.read_text().splitlines()]
    of_step = [(record["op"], len(record.get("points", ()))) for record in said if record["run"][1] == "prior"]
    assert of_step == [("start", 0), ("inputs", 0), ("metrics", 40)]


def test_a_full_disk_at_the_end_hides_no_error_of_the_run(database: str, tmp_path: Path) -> None:
    messages = list[str]()
    tracking = Tracking(_recipe(database, "full"), Workspace(str(tmp_path)), messages.append)
    tracking.__enter__()
    (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
    outbox = Outbox(records.parent)
    while outbox.num_bytes:
        time.sleep(0.02)
    with _files_of_at_most(0):
        tracking.__exit__(StepError, StepError("the disk is full"), None)
    assert "does not get 1 records" in messages[-1]


def test_a_folder_that_cannot_be_made_costs_the_curves_and_no_run(tmp_path: Path) -> None:
    recipe, workspace, messages = _recipe("http://127.0.0.1:1"), Workspace(str(tmp_path)), list[str]()
    (tmp_path / "tracking").write_text("a file in the place of the folder")
    context = _context(recipe, tmp_path)
    with Tracking(recipe, workspace, messages.append) as tracking:
        tracking.started(context)
        _write_rows(context, 2)
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
    recipe = _recipe(f"http://127.0.0.1:{free_port()}")
    context = _context(recipe, tmp_path)
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


@contextlib.contextmanager
def _files_of_at_most(num_bytes: int) -> Generator[None]:
    """A disk that is full when a file has this size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_readings_of_the_machine_are_curves_of_the_pipeline_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_SYSTEM_EVERY_S", 0.1)
    recipe = _recipe(database, "readings")
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(_context(recipe, tmp_path))
        time.sleep(1.5)
    metrics = {run.data.tags["unclip.step"]: run.data.metrics for run in _runs(database, "readings")}
    assert metrics["pipeline"]["system/system_memory_usage_megabytes"] > 100
    assert 0 <= metrics["pipeline"]["system/cpu_utilization_percentage"] <= 100
    assert not metrics["prior"]


def test_two_workspaces_and_a_copied_one_have_runs_of_their_own(database: str, tmp_path: Path) -> None:
    recipe = _recipe(database, "shared")
    for name in ("one", "two"):
        with _stopped(recipe, Workspace(f"{tmp_path}/{name}")) as tracking:
            tracking.started(_context(recipe, tmp_path / name))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with Tracking(recipe, Workspace(f"{tmp_path}/copy"), pytest.fail) as tracking:
        tracking.started(_context(recipe, tmp_path / "copy"))
    runs = _runs(database, "shared")
    assert len({run.data.tags["unclip.run"] for run in runs}) == 3
    assert len(runs) == 6


def test_an_evaluation_is_a_version_of_the_registered_model(database: str, tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "registry", "workspace": str(tmp_path), "tracking": {"uri": database}})
    for key in ("a", "b"):
        context = _context(recipe, tmp_path, "evaluate", {"prior": key})
        with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
            tracking.started(context)
            tracking.finished(context, StepResult())
    _choose(recipe, _evaluation("a"))
    send_champion(recipe, _evaluation("a"), "it is sharper", pytest.fail)
    client = _client(database)
    version = client.get_model_version_by_alias("registry", "candidate")
    assert version.tags["unclip.prior"] == "b"
    assert version.version == 2
    champion = client.get_model_version_by_alias("registry", "champion")
    assert (champion.version, champion.description) == (1, "it is sharper")


def _choose(recipe: Recipe, step: Step) -> None:
    """The step's evaluation is the recipe's champion."""
    choice = Promotion(step.key, {}, {}, {}, "", "", 0.0)
    home = Workspace(recipe.workspace).artifact("recipes", recipe.name)
    home.write_json("champion.json", {"promotions": [asdict(choice)]})


def _evaluation(prior: str) -> Step:
    return Step("evaluate", 1, {"train": {"num_steps": 1}}, {"prior": prior})


def test_the_alias_stays_where_a_later_choice_has_put_it(database: str, tmp_path: Path) -> None:
    """Each machine has an outbox of its own: one that has waited is delivered after a later one of another machine."""
    recipe = parse_recipe({"name": "stale", "workspace": str(tmp_path), "tracking": {"uri": database}})
    first, second = _evaluation("a"), _evaluation("b")
    _choose(recipe, second)
    send_champion(recipe, second, "sharper", pytest.fail)
    send_champion(recipe, first, "of yesterday", pytest.fail)
    client = _client(database)
    assert client.get_model_version_by_alias("stale", "champion").tags["unclip.prior"] == "b"
    assert {one.description for one in client.search_model_versions("name = 'stale'")} == {"sharper", "of yesterday"}
    for step, time_ms, candidate in ((second, 20, "b"), (first, 10, "b"), (first, 20, "a"), (second, 30, "b")):
        record = version_record(recipe, StepContext(recipe, step, str(tmp_path)), [], "candidate")
        send_waiting(recipe, Workspace(str(tmp_path)), pytest.fail, record | {"time_ms": time_ms})
        assert client.get_model_version_by_alias("stale", "candidate").tags["unclip.prior"] == candidate


def test_a_champion_that_was_measured_without_a_tracker_is_registered(database: str, tmp_path: Path) -> None:
    recipe = parse_recipe({"name": "late", "workspace": str(tmp_path), "tracking": {"uri": database}})
    _choose(recipe, _evaluation("a"))
    send_champion(recipe, _evaluation("a"), "the first", pytest.fail)
    assert _client(database).get_model_version_by_alias("late", "champion").tags["unclip.prior"] == "a"


def test_a_tracker_that_is_not_there_touches_nothing_and_gets_everything_later(database: str, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    recipe, warnings = _recipe(uri, "later"), list[str]()
    context, workspace = _context(recipe, tmp_path), Workspace(str(tmp_path))
    with Tracking(recipe, workspace, warnings.append) as tracking:
        begun = time.monotonic()
        tracking.started(context)
        _write_rows(context, 3)
        tracking.forward(context)
        assert tracking.finished(context, StepResult()) == ""
        assert time.monotonic() - begun < 1
    assert len(warnings) == 2
    assert "does not answer" in warnings[0]
    assert "records wait in" in warnings[1]
    # The server is back: here the same records, in the outbox of a tracker that answers.
    (folder,) = (tmp_path / "tracking").iterdir()
    answered = _recipe(database, "later")
    Place(answered, workspace).open()
    other = next(path for path in (tmp_path / "tracking").iterdir() if path != folder)
    shutil.copy(folder / RECORDS, other / RECORDS)
    send_waiting(answered, workspace, pytest.fail)
    child = next(run for run in _runs(database, "later") if run.data.tags["unclip.step"] == "prior")
    assert child.info.status == "FINISHED"
    assert len(_history(database, child.info.run_id)) == 3
    assert (other / RECORDS).read_bytes() == b""


def test_what_the_server_refuses_is_left_out_and_said(database: str, tmp_path: Path) -> None:
    recipe, warnings = _recipe(database, "refused"), list[str]()
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.forward(_context(recipe, tmp_path, "decoder"))
        _write_rows(context, 2)
        tracking.forward(context)  # of a run that was never started
        tracking.started(context)
        assert tracking.finished(context, StepResult())
    assert [warning for warning in warnings if "refuses metrics" in warning]
    assert len(_runs(database, "refused")) == 2


def test_a_run_that_somebody_deleted_takes_no_points_of_others_along(database: str, tmp_path: Path) -> None:
    recipe, workspace, warnings = _recipe(database, "deleted"), Workspace(str(tmp_path)), list[str]()

    def record(step: str, op: str, **fields: Any) -> Json:
        return {"op": op, "run": ["attempt", step], **fields}

    names = ("", "prior", "decoder")
    start = {"params": {}, "tags": {}, "time_ms": 1}
    send_waiting(recipe, workspace, pytest.fail, *(record(name, "start", name=name, **start) for name in names))
    run_ids = {one.data.tags["unclip.step"]: one.info.run_id for one in _runs(database, "deleted")}
    _client(database).delete_run(run_ids["prior"])
    points = [
        record(name, "metrics", points=[["loss", 0.5, 1000, step]])
        for step in range(3)
        for name in ("decoder", "prior")
    ]
    send_waiting(recipe, workspace, warnings.append, *points)
    assert [step for step, _, _ in _history(database, run_ids["decoder"])] == [0, 1, 2]
    assert len(warnings) == 1
    assert "does not have the run of prior any more" in warnings[0]


@pytest.mark.parametrize("end", ["delivery.lock", SENT])
def test_storage_that_fails_for_a_moment_ends_no_delivery(
    database: str, tmp_path: Path, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_UNREADABLE_WAIT_S", 0.01)
    name = f"stale {end}"
    recipe, warnings = _recipe(database, name), list[str]()
    failed = fail_calls(monkeypatch, "open", times=2, ends=(f"/{end}",))
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        context = _context(recipe, tmp_path)
        tracking.started(context)
        assert tracking.run_id(context, 60)
    assert len(failed) == 2
    assert [warning.partition(" (")[0] for warning in warnings] == [
        f"what waits for the tracker {database} cannot be read"
    ]
    assert "FINISHED" in {one.info.status for one in _runs(database, name)}


def test_storage_that_fails_to_the_end_fails_no_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, workspace, warnings = _recipe(database, "gone"), Workspace(str(tmp_path)), list[str]()
    with monkeypatch.context() as patch:
        patch.setattr(run, "_DATABASE_WAIT_S", 0.1)
        with Tracking(recipe, workspace, warnings.append) as tracking:
            tracking.started(_context(recipe, tmp_path))
            fail_calls(patch, "open", times=10**9, ends=(f"/{SENT}",))
        (records,) = (tmp_path / "tracking").glob(f"*/{RECORDS}")
        assert [one for one in warnings if f"records may wait in {records}, which fails" in one]
        warnings.clear()
        (records.parent / SENT).touch()
        send_waiting(recipe, workspace, warnings.append)
        assert [warning.partition(": ")[0] for warning in warnings] == [str(records)]
    send_waiting(recipe, workspace, pytest.fail)
    assert {one.info.status for one in _runs(database, "gone")} == {"FINISHED", "RUNNING"}


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


def test_a_run_whose_steps_are_all_done_sends_what_waits(database: str, tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tiny_tables(tmp_path / "w", tracking={"uri": database, "experiment": "done"})))
    recipe = load_recipe(str(path))
    workspace = Workspace(recipe.workspace)
    for step in make_plan(recipe):
        artifact = artifact_of(workspace, step)
        artifact.commit(manifest_of(step, artifact))
    place = Place(recipe, workspace)
    start = {"op": "start", "run": ["attempt", ""], "name": "late", "params": {}, "tags": {}, "time_ms": 1}
    place.open().append([start])
    assert place.num_waiting() == 1
    done = CliRunner().invoke(app, ["run", str(path)])
    assert "nothing to do" in done.stdout
    assert place.num_waiting() == 0
    assert [one.info.run_name for one in _runs(database, "done")] == ["late"]


@pytest.mark.parametrize("uri", ["mlruns", "htp://host", "host:5000"])
def test_an_address_that_no_tracker_has_is_refused_before_anything_runs(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"), Tracking(_recipe(uri), Workspace(str(tmp_path)), print):
        pytest.fail("entered")


def test_tracking_off_writes_nothing(tmp_path: Path) -> None:
    recipe = _recipe("off")
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        assert tracking.finished(context, StepResult()) == ""
    assert not list(tmp_path.iterdir())


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
    recipe, warnings = _recipe(database, "files"), list[str]()
    context = _context(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), warnings.append) as tracking:
        tracking.started(context)
        _write_rows(context, 2)
        run_id = tracking.finished(context, StepResult())
    assert len(_history(database, run_id)) == 2
    assert [warning for warning in warnings if "refuses text (no password for the bucket)" in warning]


def test_a_404_of_a_proxy_whose_server_is_away_drops_nothing(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND

    recipe, warnings = _recipe(database, "proxy"), list[str]()
    context, workspace = _context(recipe, tmp_path), Workspace(str(tmp_path))
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
    assert {one.info.status for one in _runs(database, "proxy")} == {"FINISHED"}
    assert Place(recipe, Workspace(str(moved))).num_waiting() == 0


def test_a_kill_between_two_files_that_are_published_makes_nothing_count_as_sent(tmp_path: Path) -> None:
    """The bytes of an older file that were sent must not meet the records of a newer one."""
    published: list[str] = []

    class Recorder(Workspace):
        def publish(self, name: str) -> str:
            published.append(name.rpartition("/")[2])
            return name

    Place(_recipe("http://127.0.0.1:1"), Recorder(str(tmp_path))).publish()
    assert published.index(SENT) < published.index(RECORDS) < published.index("state.json")


def test_outbox_keeps_records_through_kills_at_every_place(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.append([{"n": 1}, {"n": 2}])
    (_, first), (_, second) = outbox.read(10)
    outbox.mark_sent(first)
    with (tmp_path / RECORDS).open("ab") as file:
        file.write(b'{"n": 3')  # killed in the middle of a line
    assert [record for record, _ in Outbox(tmp_path).read(10)] == [{"n": 2}]
    outbox.append([{"n": 4}])
    assert [record for record, _ in outbox.read(10)] == [{"n": 2}, None, {"n": 4}]
    assert outbox.num_records == 3
    outbox.mark_sent(outbox.read(10)[-1][1])
    outbox.compact()
    assert outbox.num_bytes == 0
    outbox.append([{"n": 5}])
    assert [record for record, _ in outbox.read(10)] == [{"n": 5}]
    assert second > first


def test_outbox_is_delivered_by_one_process(tmp_path: Path) -> None:
    with Outbox(tmp_path).delivering() as first, Outbox(tmp_path).delivering() as second:
        assert (first, second) == (True, False)


def test_points_are_new_by_curve_because_a_step_writes_its_validation_later() -> None:
    last: dict[str, int] = {}
    assert new_points(['{"step": 2, "time": 7.5, "loss": 1.0, "begun": 5}'], last) == [["loss", 1.0, 7500, 2]]
    lines = ['{"step": 2, "time": 7.5, "loss": 1.0}', '{"step": 2, "time": 8, "val_loss": 3}']
    assert new_points(lines, last) == [["val_loss", 3.0, 8000, 2]]
