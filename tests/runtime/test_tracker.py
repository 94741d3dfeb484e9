"""What a tracker has of a run, on a real sqlite store; tests/runtime/test_tracking_server.py has a real server."""

import json
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.recipe.plan import Step
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking import delivery
from pipeline.runtime.tracking.run import Tracking
from pipeline.train.results import grid_name
from pipeline.workspace.manifest import Manifest, content_of
from pipeline.workspace.store import Artifact, Workspace
from tests.runtime.tracked import client_of, context_of, history_of, recipe_of, runs_of, stopped_run, write_rows


def test_a_stopped_run_is_continued_in_its_parent_without_doubles(database: str, tmp_path: Path) -> None:
    recipe, workspace = recipe_of(database), Workspace(str(tmp_path))
    embed = Artifact(f"{tmp_path}/embed/abc")
    embed.write_bytes("00000.parquet", b"rows")
    embed.commit(Manifest(step="embed", key="abc", step_version=1, section={}, inputs={}, counts={"in": 3, "ok": 3}))
    context = context_of(recipe, tmp_path, inputs={"embed": "abc"})
    with stopped_run(recipe, workspace) as tracking:
        tracking.started(context)
        write_rows(context, 3)
        tracking.forward(context)
        tracking.failed(context)
    with Tracking(recipe, workspace, pytest.fail) as tracking:
        tracking.started(context)
        write_rows(context, 5)
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
    parent, child = sorted(runs_of(database), key=lambda run: run.data.tags["unclip.step"] != "pipeline")
    assert [parent.info.status, child.info.status] == ["FINISHED", "FINISHED"]
    assert child.info.run_id == run_id
    assert child.info.artifact_uri.startswith(f"file://{Path(database.removeprefix('sqlite:///')).parent}/mlflow/")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert history_of(database, run_id) == [(step, 1 / (step + 1), 1000 * (1000 + step)) for step in range(5)]
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
    client = client_of(database)
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
    with stopped_run(recipe, workspace) as tracking:
        tracking.started(context)
    runs, client = runs_of(database, "signed"), client_of(database)
    parent, child = sorted(runs, key=lambda run: run.data.tags["unclip.step"] != "pipeline")
    assert parent.data.params["pairs.path"] == child.data.params["path"] == "https://me:***@lists/a.csv?***"
    [used] = child.inputs.dataset_inputs
    assert json.loads(used.dataset.source)["path"] == "https://me:***@lists/a.csv?***"
    text = Path(client.download_artifacts(parent.info.run_id, "recipe.json", str(tmp_path))).read_text()
    assert "hush" not in f"{text} {parent.to_dictionary()} {child.to_dictionary()}"


def test_a_training_that_begins_again_at_its_first_step_has_another_child(database: str, tmp_path: Path) -> None:
    """Its inputs have changed, or somebody has removed a checkpoint that did not fit: the old curve is not its own."""
    recipe, workspace = recipe_of(database, "again"), Workspace(str(tmp_path))
    context = context_of(recipe, tmp_path)
    with stopped_run(recipe, workspace) as tracking:
        tracking.started(context)
        write_rows(context, 50)
        tracking.forward(context)
        tracking.failed(context)
    for num_rows in (2, 4):  # the run is stopped once more, and goes on in the new child
        with stopped_run(recipe, workspace) as tracking:
            tracking.started(context)
            write_rows(context, num_rows, begun=2000)
            tracking.forward(context)
            run_id = tracking.run_id(context, 60)
            tracking.failed(context)
    runs = {run.info.run_name: run for run in runs_of(database, "again")}
    assert runs.keys() == {"tracked", "prior", "prior (2)"}
    assert runs["prior (2)"].info.run_id == run_id
    assert runs["prior (2)"].data.params == runs["prior"].data.params
    assert {run.data.tags["unclip.step"] for run in runs.values()} == {"pipeline", "prior"}
    assert (runs["prior"].info.status, runs["prior (2)"].info.status) == ("KILLED", "FAILED")
    assert [step for step, _, _ in history_of(database, runs["prior"].info.run_id)] == list(range(50))
    assert history_of(database, run_id) == [(step, 1 / (step + 1), 1000 * (2000 + step)) for step in range(4)]


def test_readings_of_the_machine_are_curves_of_the_pipeline_run(
    database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "_SYSTEM_EVERY_S", 0.1)
    recipe = recipe_of(database, "readings")
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context_of(recipe, tmp_path))
        time.sleep(1.5)
    metrics = {run.data.tags["unclip.step"]: run.data.metrics for run in runs_of(database, "readings")}
    assert metrics["pipeline"]["system/system_memory_usage_megabytes"] > 100
    assert 0 <= metrics["pipeline"]["system/cpu_utilization_percentage"] <= 100
    assert not metrics["prior"]


def test_two_workspaces_and_a_copied_one_have_runs_of_their_own(database: str, tmp_path: Path) -> None:
    recipe = recipe_of(database, "shared")
    for name in ("one", "two"):
        with stopped_run(recipe, Workspace(f"{tmp_path}/{name}")) as tracking:
            tracking.started(context_of(recipe, tmp_path / name))
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    with Tracking(recipe, Workspace(f"{tmp_path}/copy"), pytest.fail) as tracking:
        tracking.started(context_of(recipe, tmp_path / "copy"))
    runs = runs_of(database, "shared")
    assert len({run.data.tags["unclip.run"] for run in runs}) == 3
    assert len(runs) == 6


@pytest.mark.parametrize("uri", ["mlruns", "htp://host", "host:5000"])
def test_an_address_that_no_tracker_has_is_refused_before_anything_runs(uri: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri"), Tracking(recipe_of(uri), Workspace(str(tmp_path)), print):
        pytest.fail("entered")


def test_tracking_off_writes_nothing(tmp_path: Path) -> None:
    recipe = recipe_of("off")
    context = context_of(recipe, tmp_path)
    with Tracking(recipe, Workspace(str(tmp_path)), pytest.fail) as tracking:
        tracking.started(context)
        assert tracking.finished(context, StepResult()) == ""
    assert not list(tmp_path.iterdir())
