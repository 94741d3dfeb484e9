"""Finished steps that a run makes anew or opens again: forced, with another input, or to try rows once more."""

import contextlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.data.retries import NONE, waiting_retries
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.plan import manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.recipe.status import plan_status
from pipeline.runtime import run, step_task
from pipeline.runtime.context import StepContext
from pipeline.workspace.forgotten import Pending
from pipeline.workspace.lock import in_use, locked_workspace
from pipeline.workspace.manifest import ShardRecord, content_of
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.recipe.finished import commit_index
from tests.runtime.demo import demo_contexts


def test_what_is_forced_stays_until_its_step_starts_and_partial_work_goes_on(tmp_path: Path) -> None:
    steps = demo_contexts(tmp_path)
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
    steps = demo_contexts(tmp_path)
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
    steps, failed, warnings = demo_contexts(tmp_path, "tracking.uri=off"), list[Any](), list[str]()
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
    steps, warnings = demo_contexts(tmp_path, "tracking.uri=off"), list[str]()
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
    steps = demo_contexts(workspace, "tracking.uri=off")
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
    steps = demo_contexts(tmp_path, "tracking.uri=off")
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
