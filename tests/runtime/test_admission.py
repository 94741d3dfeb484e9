"""Which steps may start: those that have room now; what can never run here is refused before the first one begins."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline.errors import StepError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.runtime.admission import at_once, fits_now, require_room
from pipeline.runtime.context import StepContext
from pipeline.runtime.placement import DISK
from pipeline.workspace.progress import Progress
from tests.ports import free_port
from tests.runtime.demo import DEMO, demo_contexts
from tests.tiny.command import unclip
from tests.tiny.recipe import write_recipe

_HAS = {"CPU": 2.0, "memory": 4e9, DISK: 50.0}


def _require_room(monkeypatch: pytest.MonkeyPatch, *changes: str, **more: float) -> None:
    """For all steps of the demo, on a machine like ``_HAS`` that may have more."""
    node: dict[str, Any] = {"Alive": True, "Resources": _HAS | more, "Labels": {"zone": "a"}}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    monkeypatch.setattr(ray, "cluster_resources", lambda: node["Resources"])
    recipe = load_recipe(DEMO, changes)
    require_room(recipe, [step.name for step in make_plan(recipe)])


def _works(context: StepContext) -> StepContext:
    Progress(context.output).update(1, 10, "steps", force=True)
    return context


def _free(monkeypatch: pytest.MonkeyPatch, **resources: float) -> None:
    monkeypatch.setattr(ray, "available_resources", lambda: resources)


def test_a_step_waits_for_room_on_this_machine_but_not_where_the_cluster_may_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = demo_contexts(tmp_path)
    running = [_works(steps["clip"]), _works(steps["upsampler_1"])]
    _free(monkeypatch, memory=1.0)
    assert not fits_now(steps["upsampler_2"], running)
    assert at_once(steps["upsampler_2"], running)
    _free(monkeypatch, CPU=1.0)
    assert fits_now(steps["upsampler_2"], running)


def test_a_step_lets_the_one_before_it_take_its_room_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = demo_contexts(tmp_path)
    _free(monkeypatch, CPU=1.0)
    Progress(steps["decoder"].output, waits=True).update(0, 1, "", "waiting for 1 x 1 CPU", force=True)
    assert not fits_now(steps["prior"], [steps["decoder"]])
    assert not fits_now(steps["prior"], [_works(steps["upsampler_1"]), steps["decoder"]])
    later = time.time() + 21.0
    with monkeypatch.context() as clock:
        clock.setattr(time, "time", lambda: later)
        assert fits_now(steps["prior"], [steps["decoder"]])  # it had its head start
    assert fits_now(steps["prior"], [_works(steps["decoder"])])


def test_all_workers_of_a_training_and_their_gpus_must_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = demo_contexts(tmp_path, "decoder.resources.num_workers=2", "decoder.resources.accelerator=cuda")
    running = [_works(steps["upsampler_1"])]
    for cpus, gpus, fits in ((2.0, 1.0, False), (1.0, 2.0, False), (2.0, 2.0, True)):
        _free(monkeypatch, CPU=cpus, GPU=gpus)
        assert fits_now(steps["decoder"], running) is fits


def test_a_step_that_never_fits_is_handed_over_when_nothing_else_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _free(monkeypatch)
    assert fits_now(demo_contexts(tmp_path)["decoder"], [])  # Ray's own words then say what is missing


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["prior.resources.num_workers=20", "prior.resources.cpus_per_worker=0.1"],
        ["decoder.resources.num_workers=[2,8]"],
        ["index.resources.num_workers=64"],
        ["download.resources.memory_gb_per_worker=4", "download.resources.disk_gb_per_worker=50"],
        ["embed.resources.label_selector.zone=in(a,b)"],
        ["pairs.resources.cpus_per_worker=64"],
        ["clip.source=pretrained", "clip.resources.accelerator=cuda"],
    ],
)
def test_what_would_run_is_not_refused(changes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _require_room(monkeypatch, *changes)


@pytest.mark.parametrize(
    ("changes", "needs", "fields"),
    [
        (["accelerator=cuda"], "1 x 1 CPU and 1 GPU", ["accelerator"]),
        (["accelerator=cuda", "cpus_per_worker=4"], "1 x 4 CPU and 1 GPU", ["cpus_per_worker", "accelerator"]),
        (["num_workers=3"], "3 x 1 CPU", ["num_workers"]),
        (["num_workers=[3,4]"], "3 x 1 CPU", ["num_workers"]),
        (["num_workers=21", "cpus_per_worker=0.1"], "21 x 0.1 CPU", ["num_workers"]),
        (["label_selector.zone=b"], "1 x 1 CPU on a machine with zone=b", ["label_selector"]),
    ],
)
def test_what_would_wait_without_end_is_refused_with_the_fields_that_ask_for_it(
    changes: list[str], needs: str, fields: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ", ".join(f"prior.resources.{field}" for field in fields)
    sentence = (
        f"prior needs {needs}: this machine has 2 CPU and 0 GPU, and no other joins it. Change {names}, or run on"
    )
    with pytest.raises(StepError, match=re.escape(sentence)):
        _require_room(monkeypatch, *(f"prior.resources.{change}" for change in changes))


def test_all_steps_and_amounts_that_lack_are_in_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    changes = ["embed.resources.memory_gb_per_worker=5", "clip.resources.disk_gb_per_worker=60"]
    with pytest.raises(StepError, match="clip needs") as refusal:
        _require_room(monkeypatch, *changes)
    assert str(refusal.value) == (
        "clip needs 1 x 1 CPU, 60 GB of disk; embed needs 1 x 1 CPU, 5 GB: this machine has 2 CPU, 0 GPU, 4 GB and "
        "50 GB of disk, and no other joins it. Change clip.resources.disk_gb_per_worker, "
        "embed.resources.memory_gb_per_worker, or run on a cluster with --address"
    )
    _require_room(monkeypatch, *changes, memory=5e9, disk_gb=60.0)


@pytest.mark.ray
def test_a_run_that_can_never_end_here_begins_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "150")
    recipe = write_recipe(tmp_path, port=free_port())
    changes = ("--set", "prior.resources.cpus_per_worker=4096", "--set", "tracking.uri=off")
    for command in ("run", "evaluate"):
        done = unclip(command, str(recipe), *changes)
        assert done.returncode == 4, done.stdout
        assert "error: prior needs 1 x 4096 CPU: this machine has " in done.stdout.splitlines()[-1]
    assert not list(tmp_path.glob("workspace/pairs/*"))
    assert not list(tmp_path.glob("workspace/recipes/*"))
