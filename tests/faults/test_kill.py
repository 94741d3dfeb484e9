"""``kill -9`` of a worker, of the driver and of the whole Ray cluster in the middle of every step.

One workspace is taken through all the kills, step after step; in the end its bytes are those of a run that nobody
disturbed, and no commit was made twice.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.plan import Step, artifact_of, make_plan
from pipeline.progress import read_progress
from pipeline.recipe import load_recipe
from pipeline.store import Workspace
from tests.tiny import free_port, start_unclip, tiny_recipe, unclip

_STEPS = ("download", "clip", "embed", "index", "prior", "decoder", "upsampler_1", "upsampler_2", "evaluate")
_CONTENT = {
    "embed": ".parquet",
    "clip": "open_clip_model.safetensors",
    "prior": "model.safetensors",
    "decoder": "model.safetensors",
    "upsampler_1": "model.safetensors",
    "upsampler_2": "model.safetensors",
}


def _children(process: "psutil.Process") -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _kill_worker(driver: psutil.Process) -> None:
    """The Ray worker that has used the most processor time: whoever does the step's work."""
    workers: list[tuple[float, psutil.Process]] = []
    for child in _children(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ray::" in part and "IDLE" not in part for part in child.cmdline()):
                workers.append((sum(child.cpu_times()[:2]), child))
    if workers:
        max(workers, key=lambda pair: pair[0])[1].kill()


def _kill_driver(driver: psutil.Process) -> None:
    driver.kill()


def _kill_cluster(driver: psutil.Process) -> None:
    for child in _children(driver):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _wait_for(step: Step, workspace: Workspace, driver: psutil.Process) -> None:
    """Until the step is in the middle: started, not committed, and its worker at work."""
    artifact = artifact_of(workspace, step)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and driver.is_running() and driver.status() != psutil.STATUS_ZOMBIE:
        state = read_progress(artifact)
        if artifact.manifest() is not None or (state and state.unit):
            return
        time.sleep(0.05)


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_kill_anywhere_ends_in_the_same_bytes(tmp_path: Path) -> None:
    port = free_port()
    calm_folder, wild_folder = tmp_path / "calm", tmp_path / "wild"
    calm_folder.mkdir()
    wild_folder.mkdir()
    calm = tiny_recipe(calm_folder, port=port, num_steps=12)
    wild = tiny_recipe(wild_folder, port=port, num_steps=12)
    steps = {step.name: step for step in make_plan(load_recipe(wild))}
    workspace = Workspace(load_recipe(wild).workspace)
    kills: dict[str, Callable[[psutil.Process], None]] = {
        "worker": _kill_worker,
        "driver": _kill_driver,
        "cluster": _kill_cluster,
    }
    committed: dict[str, float] = {}
    hit: set[tuple[str, str]] = set()
    for name in _STEPS:
        for kind, kill in kills.items():
            if artifact_of(workspace, steps[name]).manifest() is not None:
                continue
            with start_unclip("run", str(wild), "--set", "tracking.uri=off", "--until", name) as process:
                driver = psutil.Process(process.pid)
                _wait_for(steps[name], workspace, driver)
                family = _children(driver)
                if artifact_of(workspace, steps[name]).manifest() is None:
                    hit.add((name, kind))
                kill(driver)
                if kind == "worker":
                    process.communicate(timeout=280)
                else:
                    process.wait(timeout=120)
                _, alive = psutil.wait_procs(family, timeout=30)
                assert not alive, f"{name}: {kind}: left behind {alive}"
            for step in steps.values():
                manifest = artifact_of(workspace, step).manifest()
                if manifest is not None:
                    assert committed.setdefault(step.name, manifest.created) == manifest.created, step.name
    done = unclip("run", str(wild), "--set", "tracking.uri=off")
    assert done.returncode == 0, done.stdout
    assert len(hit) >= len(_STEPS), hit
    done = unclip("run", str(calm), "--set", "tracking.uri=off")
    assert done.returncode == 0, done.stdout
    other = Workspace(load_recipe(calm).workspace)
    for name, suffix in _CONTENT.items():
        one, two = (artifact_of(where, steps[name]).manifest() for where in (workspace, other))
        assert one is not None
        assert two is not None
        assert {file: info for file, info in one.files.items() if file.endswith(suffix)} == {
            file: info for file, info in two.files.items() if file.endswith(suffix)
        }, name


@pytest.mark.e2e
def test_interrupt_is_one_line_and_exit_code_130(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, port=free_port(), num_steps=2000)
    workspace = Workspace(load_recipe(recipe).workspace)
    step = next(step for step in make_plan(load_recipe(recipe)) if step.name == "upsampler_1")
    with start_unclip("run", str(recipe), "--set", "tracking.uri=off", "--until", "upsampler_1") as process:
        _wait_for(step, workspace, psutil.Process(process.pid))
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "run the same command again" in output
    assert "Traceback" not in output
