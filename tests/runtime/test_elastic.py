"""A training whose machines come and go: it goes on with those that are there, and ends as an undisturbed one."""

import itertools
import json
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table
from safetensors.torch import load_file

from pipeline.errors import ConfigError
from pipeline.recipe.initial_files import num_files
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.recipe.schedule import needs_of
from pipeline.runtime.connection import connect
from pipeline.runtime.context import StepContext
from pipeline.runtime.machines import VERDICTS
from pipeline.runtime.placement import ROLE, controller_options
from pipeline.runtime.train import run_training
from pipeline.train.resume import state_name
from pipeline.workspace.progress import METRICS, read_progress
from pipeline.workspace.store import LIVE, Artifact
from tests.tiny.cluster import cluster_without_cpus, drain
from tests.tiny.faults import FaultyContext, train_controllers, train_workers
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import train_here, upsampler_context

NUM_STEPS, SAVE_EVERY, LOG_EVERY = 1200, 25, 5


def _recipe(workspace: Path, *, num_steps: int = NUM_STEPS, batch_size: int = 3, **resources: Any) -> Recipe:
    upsampler = {
        # With a larger eps the optimizer does not enlarge rounding where gradients are nearly zero.
        "train": {"num_steps": num_steps, "batch_size": batch_size, "eps": 1e-2},
        "resources": {
            "save_every_steps": SAVE_EVERY,
            "log_every_steps": LOG_EVERY,
            "validation": "in_line",  # of so many checkpoints, validations beside it would take most of the time
            **resources,
        },
    }
    return parse_recipe(tiny_tables(workspace, upsampler_1=upsampler))


def _parts(output: Artifact) -> list[tuple[int, int]]:
    """(number of workers, steps) of each part of the training so far."""
    lines = output.path(METRICS).read_text().splitlines() if output.exists(METRICS) else []
    rows = [row for row in map(json.loads, lines) if "workers" in row]
    return [
        (workers, len(list(part)) * LOG_EVERY) for workers, part in itertools.groupby(rows, lambda row: row["workers"])
    ]


def _wait_for_steps(output: Artifact, steps: int) -> None:
    """Until the log has a line of that step or a later one."""
    end = time.monotonic() + 120
    while sum(number for _, number in _parts(output)) < steps:
        assert time.monotonic() < end
        time.sleep(0.05)


def _weights(context: StepContext) -> bytes:
    return context.output.path("model.safetensors").read_bytes()


def _calm_weights(folder: Path, **size: int) -> dict[str, torch.Tensor]:
    """Of a training of one worker that nobody disturbs, neither to save nor to validate."""
    context = upsampler_context(_recipe(folder, save_every_steps=2 * NUM_STEPS, **size))
    train_here(context)
    return load_file(context.output.path("model.safetensors"))


def _wait_for(output: Artifact, workers: list[int], done: threading.Event) -> None:
    """Until the last part has written a checkpoint."""
    end = time.monotonic() + 120
    while True:
        parts = _parts(output)
        if [number for number, _ in parts] == workers and parts[-1][1] >= 2 * SAVE_EVERY:
            return
        assert time.monotonic() < end, f"{parts} in place of {workers}"
        assert not done.is_set(), "the training ended before"
        time.sleep(0.1)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    for name, value in {"period_ms": 1000, "timeout_ms": 5000, "failure_threshold": 3}.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", str(value))  # to miss a machine in seconds
    with cluster_without_cpus() as started:
        yield started


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow  # Ray takes a minute to miss a machine
@pytest.mark.parametrize(
    ("fewest", "most", "num_steps", "num_shards"),
    [(1, 2, NUM_STEPS, 1), (3, 4, NUM_STEPS // 2, 1), (2, 3, NUM_STEPS // 3, 0)],
)
def test_a_machine_that_is_lost_and_one_that_comes(
    cluster: Cluster, tmp_path: Path, fewest: int, most: int, num_steps: int, num_shards: int
) -> None:
    size = {"batch_size": most + 1, "num_steps": num_steps}
    workers: dict[str, Any] = {"num_workers": [fewest, most], "num_shards": num_shards, "keep_state": True}
    elastic, done = (
        upsampler_context(_recipe(tmp_path / "elastic", resize_every_s=3.0, **workers, **size)),
        threading.Event(),
    )
    output = elastic.output
    first, *_ = [cluster.add_node(num_cpus=1) for _ in range(most)]
    with connect(cluster.address):
        task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(elastic)
        watcher = threading.Thread(target=lambda: (ray.wait([task]), done.set()), daemon=True)
        watcher.start()
        _wait_for(output, [most], done)
        cluster.remove_node(first, allow_graceful=False)
        _wait_for(output, [most, fewest], done)
        progress = read_progress(output)
        assert progress is not None
        assert progress.notice.startswith("a machine was lost (")
        assert progress.notice.endswith("); it goes on from its newest checkpoint")
        cluster.add_node(num_cpus=1)
        _wait_for(output, [most, fewest, most], done)
        metrics = ray.get(task).metrics
    assert (metrics["num_steps"], metrics["num_preemptions"]) == (num_steps, 1)
    assert "num_failures" not in metrics  # that budget is for workers
    progress = read_progress(output)
    assert progress is not None
    assert fewest * progress.wall_s < progress.node_s < most * progress.wall_s
    words = r"ended after step \d+, with a checkpoint: there is room for more workers; it goes on from its newest checkpoint"
    assert re.fullmatch(words, progress.notice)
    assert [number for number, _ in _parts(output)] == [most, fewest, most]
    assert num_files(str(output.path(state_name(num_steps)))) == (1 if num_shards else most)
    assert sum(steps for _, steps in _parts(output)) == num_steps
    changed = load_file(output.path("model.safetensors"))
    for name, weight in _calm_weights(tmp_path / "alone", **size).items():
        torch.testing.assert_close(changed[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@ray.remote(num_cpus=1)
class _Holder:
    """Has its CPU when it answers."""

    def is_there(self) -> bool:
        return True


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_only_room_that_the_workers_can_have_changes_their_number(cluster: Cluster, tmp_path: Path) -> None:
    never = {"save_every_steps": 2 * NUM_STEPS}  # so that the only checkpoint is that of the change
    elastic, done = (
        upsampler_context(_recipe(tmp_path, num_workers=[1, 3], resize_every_s=3.0, **never)),
        threading.Event(),
    )
    for role in ("train", "train", "train", "embed"):
        cluster.add_node(num_cpus=1, labels={ROLE: role})
    with connect(cluster.address):
        other: Any = _Holder.options(label_selector={ROLE: "train"}).remote()
        ray.get(other.is_there.remote())
        task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(elastic)
        threading.Thread(target=lambda: (ray.wait([task]), done.set()), daemon=True).start()
        _wait_for(elastic.output, [2], done)
        cluster.add_node(num_cpus=1, labels={ROLE: "embed"})
        begun = sum(steps for _, steps in _parts(elastic.output))
        _wait_for_steps(elastic.output, begun + 2 * SAVE_EVERY)
        ray.kill(other)
        _wait_for(elastic.output, [2, 3], done)
        metrics = ray.get(task).metrics
    assert metrics["num_steps"] == NUM_STEPS
    assert not {"num_preemptions", "num_failures"} & metrics.keys()
    assert [number for number, _ in _parts(elastic.output)] == [2, 3]
    assert sum(steps for _, steps in _parts(elastic.output)) == NUM_STEPS


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_training_leaves_out_a_machine_on_which_steps_fail(cluster: Cluster, tmp_path: Path) -> None:
    context = upsampler_context(_recipe(tmp_path, num_steps=6, num_workers=[1, 2]))
    unfit, fit = (cluster.add_node(num_cpus=number).node_id for number in (2, 1))
    home = context.workspace.artifact("recipes", context.recipe.name)
    home.write_json(VERDICTS, {fit: "", unfit: "its Python lacks torch"})
    with connect(cluster.address):
        metrics = ray.get(ray.remote(num_cpus=0, max_retries=0)(run_training).remote(context)).metrics
    assert metrics["num_steps"] == 6
    places = context.output.read_json(f"{LIVE}workers.json")["workers"]
    assert [place["machine"] for place in places] == [fit]


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_training_that_waits_for_a_machine_which_goes_takes_smaller_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    context = upsampler_context(_recipe(tmp_path, num_steps=6, num_workers=2))
    with cluster_without_cpus() as cluster, connect(cluster.address):
        here = controller_options(has_roles=False)
        large = cluster.add_node(num_cpus=2)
        holders: list[Any] = [_Holder.remote() for _ in range(2)]
        ray.get([holder.is_there.remote() for holder in holders])
        small = [cluster.add_node(num_cpus=1) for _ in range(2)]
        task = ray.remote(max_retries=0, **here)(run_training).remote(context)
        while not any(group["strategy"] == "STRICT_PACK" for group in placement_group_table().values()):
            assert not ray.wait([task], timeout=0.1)[0]
        cluster.remove_node(large)
        assert ray.get(task).metrics["num_steps"] == 6
        places = context.output.read_json(f"{LIVE}workers.json")["workers"]
        assert {place["machine"] for place in places} == {node.node_id for node in small}


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_worker_that_hangs_is_missed_and_replaced(tmp_path: Path) -> None:
    num_steps = NUM_STEPS // 2  # more than it takes to suspend a worker, however quick the machine is
    hung, done = (
        upsampler_context(
            _recipe(tmp_path, num_steps=num_steps, num_workers=2, cpus_per_worker=0.5, hang_timeout_s=10)
        ),
        threading.Event(),
    )
    with connect():
        task = ray.remote(num_cpus=0, max_retries=0)(run_training).remote(hung)
        threading.Thread(target=lambda: (ray.wait([task]), done.set()), daemon=True).start()
        _wait_for(hung.output, [2], done)
        workers = train_workers()
        assert len(workers) == 2
        workers[0].suspend()
        assert ray.get(task).metrics["num_steps"] == num_steps
        assert not workers[0].is_running()


def test_a_range_of_workers_is_checked_and_planned_for(tmp_path: Path) -> None:
    resources = _recipe(tmp_path, num_workers=[2, 3]).trained()["upsampler_1"].resources
    assert (resources.fewest_workers, resources.most_workers, resources.shards) == (2, 3, 1)
    needs = needs_of(_recipe(tmp_path, num_workers=[2, 3]).upsampler_1)
    assert (needs.num_workers, needs.most_workers) == (2, 3)
    for fields, words in (
        ({"num_workers": [3, 2]}, r"num_workers is \[3, 2\]: give the fewest first"),
        ({"num_workers": [1, 2], "num_shards": 2}, "with a varying number of workers only 0 or 1"),
        ({"num_workers": [1, 4]}, "too few samples for 4 workers"),
    ):
        with pytest.raises(ConfigError, match=words):
            _recipe(tmp_path, **fields)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_machine_that_is_drained_with_notice(cluster: Cluster, tmp_path: Path) -> None:
    never = {"save_every_steps": 2 * NUM_STEPS}  # so that every checkpoint is one of a notice
    elastic = upsampler_context(_recipe(tmp_path / "elastic", num_workers=[1, 2], resize_every_s=3.0, **never))
    moved = upsampler_context(_recipe(tmp_path / "moved", num_workers=1, **never))
    first, second = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
    with connect(cluster.address):
        start = ray.remote(num_cpus=0, max_retries=0)(run_training).remote
        for context, leaving in ((elastic, first), (moved, second)):
            task, done = start(context), threading.Event()
            threading.Thread(target=lambda task=task, done=done: (ray.wait([task]), done.set()), daemon=True).start()
            _wait_for(context.output, [2 if context is elastic else 1], done)
            if context is moved:
                cluster.add_node(num_cpus=1)
            drain(cluster, leaving, seconds=30)
            metrics = ray.get(task).metrics
            assert (metrics["num_steps"], metrics["num_preemptions"]) == (NUM_STEPS, 1)
    assert [number for number, _ in _parts(elastic.output)] == [2, 1]
    weights = [load_file(context.output.path("model.safetensors")) for context in (elastic, moved)]
    expected = _calm_weights(tmp_path / "calm")
    largest = max(float(weight.abs().max()) for weight in expected.values())
    for name, weight in expected.items():
        assert torch.equal(weights[1][name], weight)
        assert float((weights[0][name] - weight).abs().max()) < 1e-2 * largest


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.slow
def test_workers_that_get_sigterm_are_killed_or_raise_and_a_lost_controller_begin_again(tmp_path: Path) -> None:
    size: dict[str, Any] = {"num_steps": 500, "num_workers": 2, "cpus_per_worker": 0.5}
    disturbed = upsampler_context(_recipe(tmp_path / "wild", **size))
    calm = upsampler_context(_recipe(tmp_path / "calm", save_every_steps=500, **size))
    with connect():
        start = ray.remote(num_cpus=0, max_retries=0)(run_training).remote
        task, done = start(disturbed), threading.Event()
        threading.Thread(target=lambda: (ray.wait([task]), done.set()), daemon=True).start()
        for number, kill in enumerate((signal.SIGTERM, signal.SIGKILL)):
            _wait_for_steps(disturbed.output, 100 * (number + 1))
            train_workers()[number].send_signal(kill)
        _wait_for_steps(disturbed.output, 300)
        (controller,) = train_controllers()
        controller.kill()
        metrics = ray.get(task).metrics
        ray.get(start(calm))
        assert (metrics["num_preemptions"], metrics["num_failures"]) == (1, 2)
        progress = read_progress(disturbed.output)
        assert progress is not None
        assert progress.notice.startswith("a worker failed (")
        assert _weights(disturbed) == _weights(calm)
        for num_workers in (1, 2):
            recipe = _recipe(tmp_path / str(num_workers), num_steps=6, num_workers=num_workers, cpus_per_worker=0.5)
            context = upsampler_context(recipe)
            metrics = ray.get(start(FaultyContext(recipe, context.step, context.root))).metrics
            assert (metrics["num_failures"], metrics["num_out_of_memory"], metrics["num_steps"]) == (1, 1, 6)
