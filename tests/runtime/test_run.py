"""A run of a recipe: what it says and counts, how it waits, fails and is ended by SIGTERM."""

import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.data.pairs import Part, write_index
from pipeline.errors import StepError
from pipeline.recipe.last_run import read_last_run
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.status import plan_status
from pipeline.runtime import run, step_task
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepResult
from pipeline.runtime.tracking.run import Tracking
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.progress import Progress, read_progress
from pipeline.workspace.store import INPUTS, Workspace
from tests.ports import free_port
from tests.runtime.demo import DEMO, demo_contexts
from tests.tiny.command import ROOT, start_unclip, unclip, unclip_here
from tests.tiny.recipe import write_recipe
from tests.tiny.workspace import served_workspace


def test_the_machine_time_of_a_training_is_that_of_the_workers_it_had(tmp_path: Path) -> None:
    steps = demo_contexts(tmp_path, "tracking.uri=off")
    for name, expected_s, most_workers in (("decoder", 25.0, 3), ("embed", 40.0, 4)):
        context = steps[name]
        for num_workers, seconds in ((3, 5), (2, 5)):  # a machine was lost
            start = Progress(context.output, waits=True, num_workers=num_workers)
            start.begin(ago_s=seconds)
            start.update(1, 2, "steps", force=True)
        context.output.write_json(INPUTS, {})
        tracking = Tracking(context.recipe, context.workspace, pytest.fail)
        manifest = step_task.commit_step(context, StepResult(num_workers=4), tracking)
        assert manifest.wall_s == pytest.approx(10, abs=0.2)
        assert manifest.node_s == pytest.approx(expected_s, abs=0.8)
        assert manifest.num_workers == most_workers


def test_a_run_warns_of_a_checkpoint_that_will_be_removed(tmp_path: Path) -> None:
    warnings = list[str]()
    observer: Any = SimpleNamespace(warned=warnings.append)
    for file, is_said in (("live/checkpoints/00000004.safetensors", True), ("kept.safetensors", False)):
        warnings.clear()
        changes = [f"workspace={tmp_path}", "tracking.uri=off", f"decoder.init_from={tmp_path}/{file}"]
        run.run_recipe(load_recipe(DEMO, changes), [], observer)
        assert ["copy it elsewhere and name the copy" in warning for warning in warnings] == [True] * is_said


@pytest.mark.ray
def test_sigterm_ends_a_run_with_one_line_and_keeps_what_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    recipe = write_recipe(tmp_path, port=free_port())
    with start_unclip("run", str(recipe), "--until", "download") as run:
        assert run.stdout is not None
        lines = [next((line for line in run.stdout if "pairs: done" in line), "no step was done")]
        run.send_signal(signal.SIGTERM)
        lines += run.stdout.read().splitlines()
    assert run.returncode == 130, lines
    assert lines[-1].startswith("interrupted; what is finished is kept")
    assert not [line for line in lines if "Traceback" in line or "SIGTERM" in line or "Aborted" in line]
    assert list(tmp_path.rglob("pairs/*/manifest.json"))
    loaded = load_recipe(recipe)
    last = read_last_run(Workspace(loaded.workspace), loaded.name)
    assert last is not None
    assert last.keys == {(step.name, step.key) for step in make_plan(loaded)}  # of all steps


@pytest.mark.slow
@pytest.mark.ray
def test_a_step_made_from_an_input_that_was_made_anew_runs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    recipe = write_recipe(tmp_path, port=free_port())
    command = ["run", str(recipe), "--until", "download", "--set", "tracking.uri=off"]
    assert unclip(*command).returncode == 0
    workspace, steps = Workspace(load_recipe(recipe).workspace), make_plan(load_recipe(recipe), until="download")
    pairs, download = (artifact_of(workspace, step) for step in steps)
    before = download.manifest()
    rows = pq.read_table(pairs.path("00000.parquet")).slice(3)
    pq.write_table(rows, pairs.path("00000.parquet"))
    write_index(pairs, [Part("00000", rows.num_rows)], [rows.schema])
    manifest = pairs.manifest()
    assert before is not None
    assert manifest is not None
    pairs.remove("manifest.json")
    pairs.remove("00000.done.json")
    pairs.commit(replace(manifest, files=pairs.describe_files()))
    [_, status] = plan_status(workspace, steps)
    assert (status.state, status.reasons) == ("todo", ("pairs was made anew, with other content",))
    output = unclip(*command).stdout
    assert "ran 1 step" in output, output
    after = download.manifest()
    assert after is not None
    assert after.counts["in"] == rows.num_rows == before.counts["in"] - 3
    assert "nothing to do" in unclip(*command).stdout


def test_a_ray_that_was_given_up_is_started_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    starts = list[dict[str, Any]]()

    def start(**options: Any) -> None:
        starts.append(options)
        if len(starts) < 2:
            raise RuntimeError("Failed to start GCS.")

    monkeypatch.setattr(ray, "init", start)
    with connect():
        assert [options["address"] for options in starts] == ["local"] * 2
    starts.clear()
    monkeypatch.setattr(ray, "init", lambda **options: starts.append(options) or 1 / 0)
    with pytest.raises(StepError, match="Ray did not start on this machine: division by zero"), connect():
        pass
    assert len(starts) == 2


@pytest.mark.ray
def test_a_training_waits_for_a_machine_of_a_cluster_as_long_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_head: Any
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipe = served_workspace(tmp_path)
    [output] = [artifact_of(Workspace(recipe.workspace), step) for step in make_plan(recipe) if step.name == "clip"]
    output.remove("manifest.json")
    waiting = ["clip.resources.label_selector.zone=nowhere", "clip.resources.max_wait_s=2", "tracking.uri=off"]
    sets = [part for setting in waiting for part in ("--set", setting)]
    with ray_head(environment={"PYTHONPATH": str(ROOT)}) as head:
        done = unclip("run", str(tmp_path / "tiny.toml"), "--until", "clip", "--address", head.address, *sets)
    assert done.returncode == 4, done.stdout
    assert re.search(
        r"clip: waited \d+ s for 1 x 1 CPU on a machine with zone=nowhere; no machine that is there now has that\. Add",
        done.stdout.splitlines()[-1],
    ), done.stdout
    state = read_progress(output)
    assert state is not None
    assert state.text == "waiting for 1 x 1 CPU on a machine with zone=nowhere; no machine that is there now has that"


@pytest.mark.ray
def test_a_step_that_fails_leaves_its_siblings_to_finish_and_a_finished_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    recipe = served_workspace(tmp_path)
    workspace = Workspace(recipe.workspace)
    outputs = {step.name: artifact_of(workspace, step) for step in make_plan(recipe)}
    for name in ("index", "upsampler_1"):
        outputs[name].clear()
    table = outputs["embed"].path("00000.parquet")
    whole = table.read_bytes()
    table.write_bytes(whole[: len(whole) // 3])
    command = ["run", str(tmp_path / "tiny.toml"), "--set", "tracking.uri=off"]
    done = unclip(*command)
    assert done.returncode == 3, done.stdout
    assert "the steps that do not read it go on" in done.stdout
    assert "00000.parquet" in done.stdout.splitlines()[-1]
    assert outputs["index"].manifest() is None
    assert outputs["upsampler_1"].manifest() is not None
    assert not outputs["evaluate"].names()  # it reads what failed
    status = unclip_here("status", str(tmp_path / "tiny.toml"), "--set", "tracking.uri=off").stdout
    assert [line for line in status.splitlines() if line.startswith("index") and "00000.parquet" in line]
    table.write_bytes(whole)
    workspace.artifact("search", "shown").write_bytes("00000.parquet", b"answers")
    Pending(removals=(("search", "shown"),)).write(workspace.root)
    for is_removed in (True, False):
        again = unclip(*command, "--step", "index", "--force")
        assert "ran 1 step" in again.stdout, again.stdout
        assert outputs["index"].manifest() is not None
        assert ("search/shown is removed" in again.stdout) is is_removed
    assert not workspace.keys("search")
