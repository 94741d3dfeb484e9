"""Which checkpoints are validated beside a training, and what becomes of slow, killed and unplaced validations."""

import itertools
import json
import os
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import ray

from pipeline.recipe.recipe import parse_recipe
from pipeline.recipe.train_sections import TrainResources
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import ROLE
from pipeline.runtime.train import run_training
from pipeline.runtime.validate import Task, Validations, lacks, placed, validation_options
from pipeline.train.results import BesideState, read_beside, write_beside, write_result
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact
from tests.tiny.cluster import cluster_without_cpus
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import train_here, upsampler_context


class _Cluster:
    """Starts validations that end when the test says so."""

    def __init__(self, output: Artifact, limit_s: float = 60.0) -> None:
        self.output, self.tasks, self.cancelled = output, dict[int, Future[bool]](), list[int]()
        self.lacks = ""
        self.validations = Validations(output, self.start, lambda: self.lacks, limit_s)

    def start(self, step: int) -> Task:
        self.tasks[step] = Future()
        return Task(step, self.tasks[step], lambda: self.cancelled.append(step), time.monotonic())

    def look_at(self, *steps: int) -> None:
        """The training commits checkpoints, and somebody looks."""
        for step in steps:
            self.output.write_bytes(checkpoint_name(step), b"")
        self.validations.look()

    def end(self, step: int, *, is_there: bool = True) -> None:
        if is_there:
            write_result(self.output, step, {"val_loss": 1.0})
        self.tasks[step].set_result(is_there)

    @property
    def state(self) -> BesideState:
        """What became of them, whatever was looked at."""
        state = read_beside(self.output)
        assert state == self.validations.state
        return replace(state, last_look=None)


def _goes_on() -> bool:
    return False


@pytest.fixture
def cluster(tmp_path: Path) -> _Cluster:
    return _Cluster(Artifact(str(tmp_path)))


def test_each_checkpoint_is_validated_once(cluster: _Cluster) -> None:
    cluster.look_at()
    assert not cluster.tasks
    for step in (2, 4):
        cluster.look_at(step)
        assert cluster.state == BesideState(running=step)
        cluster.end(step)
        cluster.look_at()
        assert cluster.state == BesideState()
    assert list(cluster.tasks) == [2, 4]
    again = _Cluster(cluster.output)  # a driver that was killed
    again.look_at()
    assert not again.tasks
    assert again.state.text == ""


def test_a_slow_validation_makes_the_next_checkpoints_be_skipped(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.look_at(4)
    cluster.look_at(6)
    assert cluster.state == BesideState(running=2, skipped=2, reason="the one before still ran")
    cluster.end(2)
    cluster.look_at(8, 10)  # committed between two looks: the newest counts
    assert list(cluster.tasks) == [2, 10]
    assert cluster.state == BesideState(running=10, skipped=3, reason="a newer checkpoint was there")


def test_a_checkpoint_for_which_nothing_is_free_is_skipped_for_good(cluster: _Cluster) -> None:
    cluster.lacks = "only 0 of 1 CPU was free"
    cluster.look_at(2)
    cluster.lacks = ""
    cluster.look_at()  # what is free now may be what the training waits for
    assert not cluster.tasks
    assert cluster.state.text == "validations: 1 skipped (only 0 of 1 CPU was free)"
    cluster.look_at(4)
    assert list(cluster.tasks) == [4]
    assert read_beside(_Cluster(cluster.output).output).skipped == 1  # counted over all starts


def test_a_start_takes_no_checkpoint_of_the_one_before_for_one_of_its_own(cluster: _Cluster) -> None:
    """A driver that was killed: its next one has the machines free before the workers are placed."""
    cluster.lacks = "only 0 of 1 CPU was free"
    cluster.look_at(2)
    cluster.lacks = ""
    cluster.look_at(4)  # begun, and ended with the driver
    again = _Cluster(cluster.output)
    again.look_at()
    assert not again.tasks
    assert again.state == BesideState(skipped=1, failed=1, reason="the run ended before it")
    again.look_at(6)
    assert list(again.tasks) == [6]


def test_a_checkpoint_that_is_written_again_after_damage_is_validated(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.end(2)
    cluster.lacks = "no machine had 1 CPU free"
    cluster.look_at(4)
    cluster.output.write_bytes(checkpoint_name(4), b"damaged")
    again = _Cluster(cluster.output)  # its training continues from step 2
    again.look_at()
    assert not again.tasks
    again.output.write_bytes(checkpoint_name(2), b"the same")
    again.output.write_bytes(checkpoint_name(4), b"whole")
    again.validations.look()
    assert list(again.tasks) == [4]
    again.end(4)
    again.output.write_bytes(checkpoint_name(4), b"whole again")
    again.validations.look()
    assert list(again.tasks) == [4]  # its result stays true


def test_a_checkpoint_that_nobody_has_looked_at_is_counted(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.end(2)
    cluster.look_at()
    cluster.output.write_bytes(checkpoint_name(4), b"")  # and the driver is killed
    again = _Cluster(cluster.output)
    assert again.state == BesideState(skipped=1, reason="the run ended before it")
    again.look_at()
    assert not again.tasks
    assert _Cluster(cluster.output).state.skipped == 1
    write_beside(cluster.output, BesideState(skipped=3))  # of a release that does not say what was there
    assert _Cluster(cluster.output).state == BesideState(skipped=3)


def test_a_checkpoint_whose_look_fails_is_looked_at_again(cluster: _Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise OSError("no answer")

    with monkeypatch.context() as patch:
        patch.setattr(cluster.validations, "_lacks", fail)
        with pytest.raises(OSError, match="no answer"):
            cluster.look_at(2)
    cluster.look_at()
    assert list(cluster.tasks) == [2]


def test_a_killed_validation_and_one_without_its_checkpoint_change_nothing_but_the_counts(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.tasks[2].set_exception(MemoryError("no\n12 GB left\n"))
    cluster.look_at(4)
    assert cluster.state == BesideState(running=4, failed=1, reason="MemoryError: 12 GB left")
    cluster.end(4, is_there=False)
    cluster.look_at()
    assert cluster.state == BesideState(skipped=1, failed=1, reason="a newer checkpoint had replaced it")


def test_a_validation_that_hangs_is_ended_after_its_time(tmp_path: Path) -> None:
    cluster = _Cluster(Artifact(str(tmp_path)), limit_s=0.05)
    cluster.look_at(2)
    time.sleep(0.06)
    cluster.look_at()
    assert cluster.cancelled == [2]
    assert cluster.state.text == "validations: 1 failed (it took more than 0.05 s)"
    cluster.validations.finish(6, _goes_on)  # the last one hangs, too, and the run ends
    assert cluster.cancelled == [2, 6]
    assert cluster.state.failed == 2


def test_the_end_waits_for_the_running_validation_and_for_the_finished_network(cluster: _Cluster) -> None:
    cluster.look_at(2)
    begun: list[int] = []

    def start(step: int) -> Task:
        begun.append(step)
        task = _Cluster.start(cluster, step)
        cluster.end(step)
        return task

    cluster.validations = Validations(cluster.output, start, lambda: "", 60.0)
    cluster.look_at(4)
    cluster.validations.finish(6, _goes_on)
    assert begun == [4, 6]
    cluster.validations.finish(6, _goes_on)
    assert begun == [4, 6]


def test_a_run_that_is_asked_to_end_does_not_wait_for_a_validation(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.validations.finish(6, lambda: True)
    assert cluster.cancelled == [2]
    assert list(cluster.tasks) == [2]
    assert cluster.state == BesideState(skipped=1, failed=1, reason="the run was asked to end")


def test_a_failed_training_ends_its_validation(cluster: _Cluster) -> None:
    cluster.look_at(2)
    cluster.validations.end()
    assert cluster.cancelled == [2]
    assert cluster.state == BesideState(failed=1, reason="the run ended before it")


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"num_workers": 2, "accelerator": "cuda"}, True),
        ({"num_workers": (1, 2), "accelerator": "cuda"}, True),
        ({"num_workers": 1, "accelerator": "cuda"}, False),
        ({"num_workers": 2}, True),
        ({"num_workers": (1, 2)}, True),
        ({"num_workers": 1}, False),
        ({"num_workers": 1, "validation": "beside"}, True),
        ({"num_workers": 2, "validation": "in_line"}, False),
        ({"num_workers": 2, "accelerator": "cuda", "validation": "in_line"}, False),
    ],
)
def test_a_training_that_may_have_several_workers_is_validated_beside_it(
    resources: dict[str, Any], expected: bool
) -> None:
    section = TrainResources(cpus_per_worker=3.0, **resources)
    assert section.validates_beside == expected
    assert section.cpus_of_validation == 3.0
    assert replace(section, validation_cpus=5.0).cpus_of_validation == 5.0


@pytest.mark.parametrize(
    ("accelerator", "validation_cpus", "free_cpus"), [("cpu", 0.0, 0.0), ("cpu", 2.0, 2.0), ("cuda", 0.0, 3.0)]
)
def test_a_validation_needs_no_free_cpu_where_the_workers_have_them_all(
    accelerator: Literal["cpu", "cuda"], validation_cpus: float, free_cpus: float
) -> None:
    resources = TrainResources(
        num_workers=2, cpus_per_worker=3.0, accelerator=accelerator, validation_cpus=validation_cpus
    )
    options = validation_options("prior", resources, has_roles=False)
    assert options == {"num_cpus": free_cpus, "num_gpus": 0.0}
    with_roles = validation_options("prior", resources, has_roles=True)
    machine = "a" * 56  # as long as Ray's ids
    assert placed(with_roles, machine) == with_roles  # any machine with that role
    assert placed(options, None) == options  # no worker has begun
    assert ("scheduling_strategy" in placed(options, machine)) == (free_cpus == 0.0)


def test_a_fault_of_looking_itself_is_counted_once(cluster: _Cluster) -> None:
    for error in itertools.repeat(OSError("no answer"), 3):
        cluster.validations.fails(error)
    assert cluster.state == BesideState(failed=1, reason="OSError: no answer")


@pytest.mark.ray
def test_a_validation_needs_room_on_one_machine_of_those_for_the_training() -> None:
    resources = TrainResources(num_workers=2, validation_cpus=2.0)
    options = validation_options("prior", resources, has_roles=True)
    assert options == {"num_cpus": 2.0, "num_gpus": 0.0, "label_selector": {ROLE: "train"}}
    alone = validation_options("prior", resources, has_roles=False)
    with cluster_without_cpus() as cluster:
        for _ in range(2):
            cluster.add_node(num_cpus=1, labels={ROLE: "train"})
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            assert ray.available_resources()["CPU"] == 2
            assert lacks(alone) == "no machine had 2 CPU free"
            assert lacks(validation_options("prior", TrainResources(num_workers=2), has_roles=True)) == ""
            cluster.add_node(num_cpus=2, labels={ROLE: "download"})
            assert lacks(alone) == ""
            assert lacks(options) == "no machine had 2 CPU free"
            cluster.add_node(num_cpus=2, labels={ROLE: "train"})
            assert lacks(options) == ""
        finally:
            ray.shutdown()


def _context(workspace: Path, **resources: object) -> StepContext:
    upsampler = {
        "train": {"num_steps": 1000, "batch_size": 4},
        "resources": {"save_every_steps": 125, "log_every_steps": 25, **resources},
    }
    return upsampler_context(parse_recipe(tiny_tables(workspace, upsampler_1=upsampler)))


def _kill_validations(count: int, done: threading.Event) -> None:
    """Kill the first processes of this Ray that validate."""
    killed = set[int]()
    while len(killed) < count and not done.wait(0.05):
        for process in psutil.Process().children(recursive=True):
            try:
                is_one = process.pid not in killed and "validate step" in " ".join(process.cmdline())
            except psutil.Error:
                continue
            if is_one:
                process.kill()
                killed.add(process.pid)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_on_ray_is_validated_beside_it_and_is_what_it_would_be_without(tmp_path: Path) -> None:
    every_cpu = {"num_workers": 2, "cpus_per_worker": max(2, os.cpu_count() or 1) / 2}
    alone, beside, full, shared = (
        _context(tmp_path / name, **resources)
        for name, resources in (
            ("alone", {"validation": "in_line"}),
            ("beside", {"validation": "beside"}),
            ("full", {**every_cpu, "validation_cpus": 1.0}),
            ("shared", every_cpu),
        )
    )
    expected = train_here(alone)
    with connect():
        task = ray.remote(num_cpus=0, max_retries=0)(run_training)
        done = threading.Event()
        killer = threading.Thread(target=_kill_validations, args=(2, done))
        killer.start()
        metrics = ray.get(task.remote(beside)).metrics
        done.set()
        killer.join()
        in_full, in_shared = (ray.get(task.remote(context)).metrics for context in (full, shared))
    assert _weights(alone) == _weights(beside)
    assert _weights(full) == _weights(shared)
    assert metrics["num_failed_validations"] == 1  # the first was begun twice, and killed twice
    assert metrics.items() >= {name: value for name, value in expected.items() if name.startswith("val_")}.items()
    ours, theirs = _validated(alone), _validated(beside)
    assert ours.items() >= theirs.items()
    assert len(theirs) >= 2
    assert in_full["num_skipped_validations"] == 7  # its workers have every CPU
    assert in_shared.get("num_skipped_validations", 0) < 7
    assert "free" not in read_beside(shared.output).reason
    assert len(_validated(shared)) == 8 - in_shared.get("num_skipped_validations", 0)
    assert in_shared["val_loss"] == pytest.approx(in_full["val_loss"], rel=1e-4)  # by other numbers of threads
    assert in_full["val_loss"] == pytest.approx(expected["val_loss"], abs=1e-2)


def _weights(context: StepContext) -> bytes:
    return context.output.path("model.safetensors").read_bytes()


def _validated(context: StepContext) -> dict[int, float]:
    """The validation loss of each step that the curves have."""
    rows = [json.loads(line) for line in context.output.path(METRICS).read_text().splitlines()]
    return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
