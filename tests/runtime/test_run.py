"""A run of a recipe: which steps start at once, and how SIGTERM ends it."""

import contextlib
import re
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import ray

from pipeline.data.pairs import Part, write_index
from pipeline.data.retries import NONE, waiting_retries
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.last_run import read_last_run
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.recipe.status import plan_status
from pipeline.runtime import run, step_task
from pipeline.runtime.admission import at_once, fits_now
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext, StepResult
from pipeline.runtime.tracking.run import Tracking
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.lock import in_use, locked_workspace
from pipeline.workspace.manifest import ShardRecord, content_of
from pipeline.workspace.progress import Progress, read_progress
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.ports import free_port
from tests.recipe.finished import commit_index
from tests.tiny.command import ROOT, start_unclip, unclip, unclip_here
from tests.tiny.recipe import write_recipe
from tests.tiny.workspace import served_workspace

_DEMO = ROOT / "configs" / "demo.toml"


def _contexts(workspace: Path, *overrides: str) -> dict[str, StepContext]:
    recipe = load_recipe(_DEMO, [f"workspace={workspace}", *overrides])
    return {step.name: StepContext(recipe, step, recipe.workspace) for step in make_plan(recipe)}


def _works(context: StepContext) -> StepContext:
    Progress(context.output).update(1, 10, "steps", force=True)
    return context


def _free(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: resources)


def test_a_step_waits_for_room_on_this_machine_but_not_where_the_cluster_may_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = _contexts(tmp_path)
    running = [_works(steps["clip"]), _works(steps["upsampler_1"])]
    _free(monkeypatch, memory=1.0)
    assert not fits_now(steps["upsampler_2"], running)
    assert at_once(steps["upsampler_2"], running)
    _free(monkeypatch, CPU=1.0)
    assert fits_now(steps["upsampler_2"], running)


def test_a_step_lets_the_one_before_it_take_its_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _contexts(tmp_path)
    _free(monkeypatch, CPU=1.0)
    Progress(steps["decoder"].output, waits=True).update(0, 1, "", "waiting for 1 x 1 CPU", force=True)
    assert not fits_now(steps["prior"], [steps["decoder"]])
    assert not fits_now(steps["prior"], [_works(steps["upsampler_1"]), steps["decoder"]])
    later = time.time() + 21.0
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: later)
        assert fits_now(steps["prior"], [steps["decoder"]])  # it had its head start
    assert fits_now(steps["prior"], [_works(steps["decoder"])])


def test_the_machine_time_of_a_training_is_that_of_the_workers_it_had(tmp_path: Path) -> None:
    steps = _contexts(tmp_path, "tracking.uri=off")
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


def test_all_workers_of_a_training_and_their_gpus_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _contexts(tmp_path, "decoder.resources.num_workers=2", "decoder.resources.accelerator=cuda")
    running = [_works(steps["upsampler_1"])]
    for cpus, gpus, fits in ((2.0, 1.0, False), (1.0, 2.0, False), (2.0, 2.0, True)):
        _free(monkeypatch, CPU=cpus, GPU=gpus)
        assert fits_now(steps["decoder"], running) is fits


def test_a_step_that_never_fits_is_handed_over_when_nothing_else_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch)
    assert fits_now(_contexts(tmp_path)["decoder"], [])  # Ray's own words then say what is missing


def test_what_is_forced_stays_until_its_step_starts_and_partial_work_goes_on(tmp_path: Path) -> None:
    steps = _contexts(tmp_path)
    names = ("clip", "decoder", "prior")
    for name in ("clip", "prior"):
        steps[name].output.commit(manifest_of(steps[name].step, steps[name].output))
    steps["decoder"].output.write_bytes("live/checkpoint-5.safetensors", b"5")
    workspace = Workspace(steps["clip"].recipe.workspace)
    before = plan_status(workspace, [steps[name].step for name in names])
    after = run._to_make_anew(workspace, before, {"decoder", "prior"})
    assert [status.state for status in after] == [before[0].state, before[1].state, "todo"]
    assert steps["prior"].output.manifest() is not None
    assert steps["decoder"].output.exists("live/checkpoint-5.safetensors")
    step_task.forget_if_inputs_changed(steps["prior"])  # its start
    assert steps["prior"].output.manifest() is None


def test_what_is_read_is_not_made_anew(tmp_path: Path) -> None:
    steps = _contexts(tmp_path)
    for name in ("clip", "prior"):
        steps[name].output.commit(manifest_of(steps[name].step, steps[name].output))
    workspace = Workspace(steps["clip"].recipe.workspace)
    statuses = plan_status(workspace, [steps[name].step for name in ("clip", "prior")])
    with (
        in_use(workspace, [f"prior/{steps['prior'].step.key}"]),  # and with it the CLIP that it was made from
        pytest.raises(ConfigError, match="--force: clip is in use by process"),
    ):
        run._to_make_anew(workspace, statuses, {"clip"})


def test_what_is_read_is_not_made_anew_either_because_its_input_was(tmp_path: Path) -> None:
    steps, failed, warnings = _contexts(tmp_path, "tracking.uri=off"), list[Any](), list[str]()
    prior, clip = steps["prior"], steps["clip"]
    clip.output.commit(manifest_of(clip.step, clip.output))
    manifest = replace(manifest_of(prior.step, prior.output), input_contents={"clip": "other"})
    prior.output.commit(manifest)
    observer: Any = SimpleNamespace(failed=lambda *arguments: failed.append(arguments), warned=warnings.append)
    tracking: Any = SimpleNamespace(failed=lambda _context: None)
    waiting = [steps[name].step for name in ("prior", "decoder", "evaluate")]
    statuses = run._Steps(waiting, {"clip"}, observer, tracking)
    with in_use(prior.workspace, [f"prior/{prior.step.key}"]):
        statuses.start(prior)
    assert prior.output.manifest() == manifest
    assert "prior: it is to be made anew, which would remove what is in use by process" in str(statuses.failures[0])
    assert [step.name for step in statuses.waiting] == ["decoder"]
    assert failed == [(prior.step, {"prior", "evaluate"})]
    assert warnings == [f"{statuses.failures[0]}; the steps that do not read it go on"]
    step_task.forget_if_inputs_changed(prior)  # when nobody reads it any more
    assert prior.output.manifest() is None


def test_an_index_that_is_built_anew_says_how_its_appended_rows_come_back(tmp_path: Path) -> None:
    steps, warnings = _contexts(tmp_path, "tracking.uri=off"), list[str]()
    index = steps["index"]
    own = f"embed/{index.step.inputs['embed']}"
    commit_index(index.output, [own], [own, "/w/embed/more", "s3://b/w/embed/far"])
    step_task.forget_if_inputs_changed(index, warnings.append)
    assert [warning.partition("bring them back afterwards: ")[2] for warning in warnings] == [
        "unclip append RECIPE /w/embed/more",
        "unclip append RECIPE s3://b/w/embed/far",
    ]
    assert index.output.names() == [INPUTS]
    commit_index(index.output, [own], ["/w/embed/more"])
    index.output.remove("segment_00001/segment.json")  # what is damaged is built anew all the same
    step_task.forget_if_inputs_changed(index, warnings.append)
    assert "it is built anew: " in warnings[-1]
    assert "no file segment_00001/segment.json" in warnings[-1]
    assert index.output.names() == [INPUTS]


def _download_of_two_lists(workspace: Path, *, is_new: bool) -> dict[str, StepContext]:
    """A finished download, whose pairs were made anew with other rows since then if ``is_new``."""
    steps = _contexts(workspace, "tracking.uri=off")
    pairs, download = steps["pairs"], steps["download"]
    pairs.output.write_bytes("00000.parquet", b"old")
    manifest = manifest_of(pairs.step, pairs.output)
    pairs.output.commit(manifest)
    download.output.write_bytes("00000.tar", b"old")
    files = {"00000.tar": download.output.describe("00000.tar")}
    download.output.commit_shard(ShardRecord(shard="00000", counts={"in": 1, "ok": 1}, files=files))
    contents = {"pairs": content_of(manifest)}
    download.output.commit(replace(manifest_of(download.step, download.output), input_contents=contents))
    if is_new:
        pairs.output.clear()
        pairs.output.write_bytes("00000.parquet", b"new")
        pairs.output.commit(manifest_of(pairs.step, pairs.output))
    return steps


class _NoTask:
    """In the place of the task of a step."""

    def options(self, **_options: Any) -> "_NoTask":
        return self

    def remote(self, _context: StepContext) -> None:
        """Submit nothing."""


@pytest.mark.parametrize("is_new", [False, True])
def test_a_retry_keeps_shards_of_the_same_list_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_new: bool
) -> None:
    steps = _download_of_two_lists(tmp_path, is_new=is_new)
    context, output = replace(steps["download"], retry_failed="http"), steps["download"].output
    statuses = plan_status(Workspace(context.root), [steps[name].step for name in ("pairs", "download")])
    run._reopened(Workspace(context.root), statuses[1], "http")
    assert waiting_retries(output) == ["http"]
    assert not output.exists(MANIFEST)
    monkeypatch.setattr(step_task, "run_step", _NoTask())
    for name in ("cluster_has_roles", "controller_options"):  # both ask Ray
        monkeypatch.setattr(step_task, name, lambda **_options: {})
    tracking: Any = SimpleNamespace(started=lambda _context: None)
    step_task.start_step(context, tracking, pytest.fail)
    assert [name for name in output.names() if not name.startswith("live/")] == (
        [] if is_new else ["00000.done.json", "00000.tar"]
    )
    pairs = steps["pairs"].output.manifest()
    assert pairs is not None
    assert output.read_json(INPUTS) == {"pairs": content_of(pairs)}
    assert waiting_retries(output) == ["http"]  # of what is downloaded anew, too


def test_a_retry_that_cannot_begin_is_not_left_to_a_later_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _download_of_two_lists(tmp_path, is_new=False)
    workspace, output = Workspace(steps["download"].root), steps["download"].output
    status = plan_status(workspace, [steps[name].step for name in ("pairs", "download")])[1]

    def write(artifact: Artifact, name: str, value: Any) -> None:
        if name == INPUTS:
            raise StepError("the disk is full")
        write_json(artifact, name, value)

    write_json = Artifact.write_json
    monkeypatch.setattr(Artifact, "write_json", write)
    with pytest.raises(StepError, match="the disk is full"):
        run._reopened(workspace, status, "http")
    assert output.exists(MANIFEST)
    assert waiting_retries(output) == []


def _without_ray(monkeypatch: pytest.MonkeyPatch, rooms: list[list[str]], refusal: StepError | None = None) -> None:
    """Let a run connect to nothing; the steps for which it asks for room are noted, and refused if that is said."""

    def require_room(_recipe: Recipe, steps: list[str]) -> None:
        rooms.append(steps)
        if refusal is not None:
            raise refusal

    for name in ("connect", "watched_head"):
        monkeypatch.setattr(run, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(run, "note_run", lambda _root: None)
    monkeypatch.setattr(run, "require_room", require_room)


@pytest.mark.parametrize(
    ("options", "expected"), [({"retry_failed": "http"}, ["download"]), ({"force": ["pairs"]}, ["pairs"])]
)
def test_a_run_that_has_no_room_changes_nothing_that_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], expected: list[str]
) -> None:
    steps = _download_of_two_lists(tmp_path, is_new=False)
    context, both = steps["download"], [steps[name].step for name in ("pairs", "download")]
    _without_ray(monkeypatch, rooms := list[list[str]](), StepError("no room"))
    statuses, observer = plan_status(Workspace(context.root), both), SimpleNamespace(warned=pytest.fail)
    with pytest.raises(StepError, match="no room"):
        run.run_recipe(context.recipe, statuses, cast("Any", observer), **options)
    assert rooms == [expected]
    assert plan_status(Workspace(context.root), both) == statuses
    assert waiting_retries(context.output) == []


@pytest.mark.parametrize("is_own", [True, False])
def test_a_run_that_only_has_a_takedown_to_finish_needs_room_for_its_own_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_own: bool
) -> None:
    steps = _contexts(tmp_path, "tracking.uri=off")
    recipe, workspace = steps["index"].recipe, Workspace(str(tmp_path))
    Pending(indexes=(steps["index"].step.key if is_own else "0" * 16,)).write(workspace.root)
    _without_ray(monkeypatch, rooms := list[list[str]](), StepError("no room"))
    with pytest.raises(StepError, match="no room"):
        run.run_recipe(recipe, [], cast("Any", SimpleNamespace(warned=pytest.fail)))
    assert rooms == [["index"] if is_own else []]
    with locked_workspace(workspace, pytest.fail):
        pending = Pending.read(workspace.root)
    assert pending is not None
    assert not pending.has_begun


def test_a_retry_that_was_stopped_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = _download_of_two_lists(tmp_path, is_new=False)
    context = steps["download"]
    workspace, both = Workspace(context.root), [steps[name].step for name in ("pairs", "download")]
    run._reopened(workspace, plan_status(workspace, both)[1], "http")
    statuses, warnings, started = plan_status(workspace, both), list[str](), list[str]()
    assert [status.state for status in statuses] == ["done", "partial"]
    observer: Any = SimpleNamespace(warned=warnings.append, reported=pytest.fail)
    run._tell_retries(workspace, statuses, "", observer)
    assert "`--retry-failed none` gives that up" in warnings.pop()

    def finish(*arguments: Any) -> None:
        started.append(arguments[-1])
        context.output.commit(manifest_of(context.step, context.output))

    _without_ray(monkeypatch, rooms := list[list[str]]())
    monkeypatch.setattr(run, "_run_steps", finish)
    run.run_recipe(context.recipe, statuses, observer, retry_failed=NONE)
    assert (started, warnings, waiting_retries(context.output)) == ([""], [], [])
    assert plan_status(workspace, both)[1].state == "done"
    assert rooms == [["download"], ["download"]]  # before anything is changed, and before the steps


def test_a_run_warns_of_a_checkpoint_that_will_be_removed(tmp_path: Path) -> None:
    warnings = list[str]()
    observer: Any = SimpleNamespace(warned=warnings.append)
    for file, is_said in (("live/checkpoints/00000004.safetensors", True), ("kept.safetensors", False)):
        warnings.clear()
        changes = [f"workspace={tmp_path}", "tracking.uri=off", f"decoder.init_from={tmp_path}/{file}"]
        run.run_recipe(load_recipe(_DEMO, changes), [], observer)
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
