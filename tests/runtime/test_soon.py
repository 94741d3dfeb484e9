"""Ray's autoscaler sees what a run needs soon, before the step begins, and not after."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray._private.worker import global_worker
from ray.autoscaler.v2.sdk import get_cluster_resource_state
from ray.cluster_utils import Cluster

from pipeline.recipe.plan import Step, artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe, parse_recipe
from pipeline.runtime.soon import Soon
from pipeline.workspace.progress import ProgressState
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.tiny.cluster import joined_cluster
from tests.tiny.command import start_unclip
from tests.tiny.recipe import tiny_tables, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_FAR = {"zone": "far"}


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with joined_cluster() as cluster:
        yield cluster


def _demand() -> list[list[dict[str, float]]]:
    """Groups of workers for which the autoscaler has to find machines: what each worker takes."""
    client: Any = global_worker.gcs_client
    gangs = get_cluster_resource_state(client).pending_gang_resource_requests
    return [
        [dict(request.resources_bundle) for request in (gang.requests or gang.bundle_selectors[0].resource_requests)]
        for gang in gangs
    ]


def _wait(until: Callable[[], bool], what: str, process: subprocess.Popen[str] | None = None) -> None:
    end = time.monotonic() + 120
    while not until():
        assert process is None or process.poll() is None, process and process.communicate()[0]
        assert time.monotonic() < end, what
        time.sleep(0.1)


def _reading(eta_s: float) -> ProgressState:
    return ProgressState(5, 10, "steps", 1.0, eta_s, "", 1.0, 0.0)


def test_only_what_is_needed_soon_and_is_not_there_is_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    far = {"num_workers": 3, "cpus_per_worker": 2, "label_selector": _FAR}
    recipe = parse_recipe(tiny_tables(tmp_path, prior={"resources": far}, index={"resources": far}))
    steps = [step for step in make_plan(recipe) if step.name in {"prior", "decoder"}]
    assert all("embed" in step.inputs for step in steps)
    done = {name for step in steps for name in step.inputs} - {"embed"}
    soon = Soon(recipe, is_cluster=True)

    def asked(readings: dict[str, ProgressState], waiting: list[Step] = steps) -> list[list[dict[str, float]]]:
        soon.update(waiting, done, readings)
        time.sleep(1)
        return _demand()

    assert asked({"embed": _reading(1000)}) == []  # later than machines take to start
    assert asked({"embed": _reading(0)}) == []  # not known
    assert asked({}) == []
    # The machine that is there has room for the decoder, and no label of the prior.
    assert asked({"embed": _reading(100)}) == [[{"CPU": 2.0}] * 3]
    assert asked({"embed": _reading(50)}) == [[{"CPU": 2.0}] * 3]  # once
    soon.begins("prior")
    _wait(lambda: _demand() == [], "the demand is gone when the step begins")
    # Workers of a data step do not need one another: each is asked for by itself.
    [index] = [step for step in make_plan(recipe) if step.name == "index"]
    assert asked({"embed": _reading(100)}, [index]) == [[{"CPU": 2.0}]] * 3
    soon.end()
    _wait(lambda: _demand() == [], "the demand is gone with the run")
    Soon(recipe, is_cluster=False).update(steps, done, {"embed": _reading(100)})
    assert asked({}) == []


@pytest.mark.slow
@pytest.mark.e2e
def test_a_run_asks_for_the_machines_of_a_step_before_it_begins(cluster: Cluster, tmp_path: Path) -> None:
    path = write_recipe(tmp_path, port=free_port(), num_steps=300, save_every=50)
    settings = ["tracking.uri=off", 'embed.resources.label_selector={"zone"="far"}']
    words = [word for one in settings for word in ("--set", one)]
    process = start_unclip("run", str(path), "--until", "embed", "--address", cluster.address, *words)
    recipe = load_recipe(path, settings)
    [embed] = [step for step in make_plan(recipe) if step.name == "embed"]
    try:
        _wait(lambda: bool(_demand()), "the embed step is asked for", process)
        artifact = artifact_of(Workspace(recipe.workspace), embed)
        assert not artifact.names(), "it has begun"
        cluster.add_node(num_cpus=2, labels=_FAR)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert _demand() == []
