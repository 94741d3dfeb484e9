"""How many workers a training on several has: as many as Ray has room for, and where."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision

from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.machines import VERDICTS
from pipeline.runtime.placement import (
    ROLE,
    cluster_has_roles,
    free_room,
    on_machines,
    packing,
    scaling_options,
    worker_options,
)
from pipeline.runtime.scaling import RoomPolicy
from pipeline.runtime.stopping import tell_of_room
from pipeline.runtime.validate import lacks
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.cluster import cluster_without_cpus, drain
from tests.tiny.recipe import tiny_tables
from tests.tiny.training import upsampler_context

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with cluster_without_cpus() as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        yield cluster
        ray.shutdown()


@ray.remote
class _Holder:
    """Has taken what it asks for when it answers."""

    def is_there(self) -> bool:
        return True


def _hold(**options: Any) -> Any:
    holder = _Holder.options(**options).remote()
    assert ray.get(holder.is_there.remote())
    return holder


def _policy(workspace: Path, **resources: Any) -> tuple[RoomPolicy, Artifact, dict[str, Any]]:
    """The policy of a training, its artifact, and what each worker asks for."""
    upsampler = {"train": {"batch_size": 8}, "resources": {"resize_every_s": 0.001, **resources}}
    context = upsampler_context(parse_recipe(tiny_tables(workspace, upsampler_1=upsampler)))
    needs = context.recipe.trained()["upsampler_1"].resources
    options = worker_options("upsampler_1", needs, has_roles=cluster_has_roles())
    policy = RoomPolicy(ScalingConfig(num_workers=needs.num_workers, **scaling_options(options)), context, options)
    run: Any = SimpleNamespace(run_id="a-run")
    policy.after_controller_start(run)
    return policy, context.output, options


def _next(policy: RoomPolicy) -> tuple[int, str]:
    """Number and placement of the next group."""
    decision = policy.make_decision_for_non_running_worker_group()
    if isinstance(decision, NoopDecision):  # it looks twice
        decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision)
    return decision.num_workers, str(policy.scaling_config.placement_strategy)


def _is_told(policy: RoomPolicy, num_workers: int) -> bool:
    """Whether so many running workers are asked to end, because there is room for more."""
    calls: list[Callable[[], None]] = []
    workers = [SimpleNamespace(execute_async=calls.append)] * num_workers
    group: Any = SimpleNamespace(start_time=float("-inf"), num_workers=num_workers, workers=workers)
    decision = policy.make_decision_for_running_worker_group(group, Any)
    assert isinstance(decision, NoopDecision)  # the group is not ended from outside
    assert calls in ([], [tell_of_room])
    return bool(calls)


def _wait_for_room(options: dict[str, Any], number: int) -> None:
    """Ray says a moment later what is free."""
    while free_room(options) != number:
        time.sleep(0.1)


def test_only_room_that_the_workers_can_have_is_counted(cluster: Cluster, tmp_path: Path) -> None:
    for role in ("train", "train", "train", "embed"):
        cluster.add_node(num_cpus=1, labels={ROLE: role})
    holder = _hold(num_cpus=1, label_selector={ROLE: "train"})
    policy, _, options = _policy(tmp_path, num_workers=[1, 4])
    _wait_for_room(options, 2)
    assert _next(policy) == (2, "PACK")
    group = [_hold(num_cpus=1, label_selector={ROLE: "train"}) for _ in range(2)]
    _wait_for_room(options, 0)
    assert not _is_told(policy, 2)
    cluster.add_node(num_cpus=1, labels={ROLE: "embed"})
    assert not _is_told(policy, 2)
    ray.kill(holder)
    _wait_for_room(options, 1)
    assert _is_told(policy, 2)
    assert not _is_told(_policy(tmp_path, num_workers=[1, 2])[0], 2)
    for worker in group:
        ray.kill(worker)
    _wait_for_room(options, 3)
    assert _next(policy) == (3, "PACK")
    assert _next(_policy(tmp_path, num_workers=[4, 6])[0]) == (4, "PACK")  # so that the autoscaler sees what waits


def test_a_machine_that_is_taken_away_is_no_room(cluster: Cluster) -> None:
    options = {"num_cpus": 1, "num_gpus": 0}
    node = cluster.add_node(num_cpus=3)
    holder = _hold(num_cpus=1)  # so that it is still there
    _wait_for_room(options, 2)
    assert (packing(options, 2), lacks(options)) == ("STRICT_PACK", "")
    drain(cluster, node, seconds=3000)
    _wait_for_room(options, 0)
    assert (packing(options, 2), lacks(options)) == ("PACK", "no machine had 1 CPU free")
    assert ray.get(holder.is_there.remote())


def _judge(workspace: Path, machines: dict[str, str]) -> None:
    """As the process of a run on a cluster, which looks at its machines."""
    recipe = parse_recipe(tiny_tables(workspace))
    Workspace(recipe.workspace).artifact("recipes", recipe.name).write_json(VERDICTS, machines)


def test_a_machine_on_which_steps_fail_is_no_room(cluster: Cluster, tmp_path: Path) -> None:
    fit, unfit = (cluster.add_node(num_cpus=number).node_id for number in (2, 3))
    policy, _, options = _policy(tmp_path, num_workers=[1, 5])
    _wait_for_room(options, 5)
    assert _next(policy) == (5, "PACK")
    _judge(tmp_path, {fit: ""})  # the other one has not answered yet
    assert _next(policy) == (2, "PACK")
    group: Any = {"scaling_config": policy.scaling_config, "num_workers": 2}
    assert policy.on_controller_start_worker_group(**group) is None
    _judge(tmp_path, {fit: "", unfit: "its Python lacks torch"})
    assert _next(policy) == (2, "PACK")
    selector = policy.on_controller_start_worker_group(**group)
    assert selector == policy.scaling_config.label_selector
    assert free_room(options | {"label_selector": selector}) == 2
    workers = [_hold(num_cpus=1, label_selector=selector) for _ in range(2)]
    _wait_for_room(options, 3)
    assert free_room(on_machines(options, [fit])) == 0  # Ray reads the labels as we do
    assert not _is_told(policy, 2)
    ray.kill(workers.pop())
    _wait_for_room(options, 4)
    assert _is_told(policy, 1)

    large, output, _ = _policy(tmp_path / "large", num_workers=2, cpus_per_worker=3)
    _judge(tmp_path / "large", {fit: "", unfit: "its Python lacks torch"})
    assert _next(large) == (2, "PACK")
    state = read_progress(output)
    assert state is not None
    assert state.text == (
        "waiting for 2 x 3 CPU; no machine that is there now has that and is fit: its Python lacks torch"
    )


def test_a_fixed_number_is_placed_anew_at_each_try(cluster: Cluster, tmp_path: Path) -> None:
    large = cluster.add_node(num_cpus=2)
    policy, output, _ = _policy(tmp_path, num_workers=2)
    assert _next(policy) == (2, "STRICT_PACK")
    assert read_progress(output) is None
    cluster.remove_node(large)
    assert _next(policy) == (2, "PACK")
    state = read_progress(output)
    assert state is not None
    assert state.text == "waiting for 2 x 1 CPU; no machine that is there now has that"
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    assert _next(policy) == (2, "PACK")
    state = read_progress(output)
    assert state is not None
    assert state.text == "waiting for 2 x 1 CPU"
