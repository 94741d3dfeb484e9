"""What a training's workers were lost to decides which budget it costs: a machine, memory, or a fault of their own."""

from dataclasses import replace
from pathlib import Path

import pytest
import ray.exceptions
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import lost_workers
from pipeline.runtime.context import StepContext
from pipeline.runtime.lost_workers import Place, end_of, forget_places, note_places
from pipeline.runtime.placement import living_machines
from pipeline.runtime.restarts import End, Restarts, out_of_memory
from tests.tiny.cluster import joined_cluster
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context

_PEER = RuntimeError("[gloo] Connection closed by peer")
# As Ray describes each process that got SIGKILL, whoever has sent it.
_KILLED = ray.exceptions.RayActorError(
    error_msg="Worker unexpectedly exits. There are some potential root causes. (1) The process is killed by SIGKILL by "
    "OOM killer due to high memory usage. (2) ray stop --force is called."
)
_FULL = ray.exceptions.OutOfMemoryError("Task was killed due to the node running low on memory.\nMore words.")
_PLACES = [Place("first", 3), Place("second", 5)]


@pytest.fixture
def context(tmp_path: Path) -> StepContext:
    """A training of which two workers have begun, each with 2 of 4 samples at a time."""
    upsampler = {"train": {"num_steps": 4, "batch_size": 4}, "resources": {"num_workers": 2}}
    context = upsampler_context(parse_recipe(tiny_tables(tmp_path, upsampler_1=upsampler)))
    note_places(context.output, _PLACES)
    return context


def _failed(lost: Exception) -> WorkerGroupError:
    """The first worker loses its peer, the second does not answer Ray Train any more."""
    return WorkerGroupError("words", {0: _PEER, 1: WorkerHealthCheckFailedError("A health check failed.", lost)})


def _answer(monkeypatch: pytest.MonkeyPatch, *answers: Place) -> None:
    monkeypatch.setattr(lost_workers, "_answers", lambda _: {place.machine: place for place in answers})


@pytest.mark.parametrize(
    ("answers", "lost", "kind", "cause"),
    [
        (_PLACES, _KILLED, "failed", "a worker failed ([gloo] Connection closed by peer)"),
        (_PLACES[:1], _KILLED, "preempted", "a machine was lost ([gloo] Connection closed by peer)"),
        (_PLACES, _FULL, "out_of_memory", "Ray has ended a worker: the memory of its machine was used up"),
        ([_PLACES[0], replace(_PLACES[1], oom_kills=6)], _KILLED, "out_of_memory", "perhaps out of memory with 2"),
        ([replace(_PLACES[0], oom_kills=4), _PLACES[1]], _KILLED, "failed", "a worker failed"),  # not where it was
        ([_PLACES[0], replace(_PLACES[1], oom_kills=6)], _PEER, "failed", "a worker failed"),  # not a worker of ours
    ],
)
def test_each_loss_costs_a_budget_of_its_own(
    answers: list[Place],
    lost: Exception,
    kind: str,
    cause: str,
    context: StepContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _answer(monkeypatch, *answers)
    end = end_of(context, _failed(lost), set())
    assert (end.kind, cause in end.cause) == (kind, True), end
    assert end.largest_pass == (2 if kind == "out_of_memory" else 0)


def test_a_kill_for_memory_is_a_failure_where_a_worker_cannot_take_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have used the memory up: a ResNet CLIP begins again as after other failures."""
    clip = {"train": {"batch_size": 4}, "resources": {"num_workers": 2}}
    recipe = parse_recipe(tiny_tables(tmp_path, clip=clip))
    assert recipe.clip.model.vision == "resnet"
    step = next(step for step in make_plan(recipe) if step.name == "clip")
    context = StepContext(recipe, step, recipe.workspace)
    note_places(context.output, _PLACES)
    _answer(monkeypatch, _PLACES[0], replace(_PLACES[1], oom_kills=6))
    restarts = Restarts(context)
    for lost in (_KILLED, _FULL):
        end = end_of(context, _failed(lost), set())
        assert end.kind == "failed"
        assert "memory" in restarts.next(end).notice
    assert restarts.metrics == {"num_failures": 2}
    with pytest.raises(StepError, match=r"out of memory with 2 samples at a time \(CUDA.*less is not possible"):
        restarts.next(out_of_memory(recipe.clip, 2, "CUDA out of memory"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (_FULL, "out_of_memory"),
        (ray.exceptions.WorkerCrashedError(), "failed"),
        (ray.exceptions.ActorDiedError(), "failed"),  # Ray Train's controller
    ],
)
def test_one_worker_and_the_controller_have_no_peers_to_tell(
    error: Exception, expected: str, context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    note_places(context.output, _PLACES[:1])
    _answer(monkeypatch, *_PLACES)
    assert end_of(context, error, set()).kind == expected


@pytest.mark.ray
def test_a_machine_of_the_training_that_does_not_answer_is_lost(
    context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_health_check_failure_threshold", "2")
    with joined_cluster() as cluster:
        leaving = cluster.add_node(num_cpus=1)
        lost: str = leaving.node_id
        (stays, *_) = living_machines() - {lost}
        note_places(context.output, [Place(stays, 0), Place(lost, 0)])
        assert end_of(context, _PEER, set()) == End("failed", f"a worker failed ({_PEER})")
        cluster.remove_node(leaving, allow_graceful=False)
        assert end_of(context, _PEER, set()) == End("preempted", f"a machine was lost ({_PEER})")
        assert lost not in living_machines()  # so that the next workers are not sent there
        note_places(context.output, [Place(stays, 0)])
        assert end_of(context, _PEER, {stays, lost}).kind == "failed"  # it was none of the training's
        forget_places(context.output)
        assert end_of(context, _PEER, {stays, lost}).kind == "preempted"  # no worker had begun
