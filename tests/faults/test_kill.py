"""``kill -9`` of the workers, of the driver and of the whole Ray cluster in the middle of every step, and a Ctrl-C.

One workspace is taken through all the kills, step after step; in the end its bytes are those of a run that nobody
disturbed, and no commit was made twice. A cluster that stands sees its workers and drivers die, step after step; what they
leave there must not disturb the next. Between them the whole Ray of a driver that started its own is killed, and in the
first step such a driver alone.
"""

import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.plan import artifact_of, make_plan
from pipeline.progress import read_progress
from pipeline.recipe import load_recipe
from pipeline.store import Workspace
from tests.ray_head import ray_head
from tests.tiny import ROOT, free_port, start_unclip, tiny_recipe, unclip

_STEPS = ("download", "clip", "embed", "index", "prior", "decoder", "upsampler_1", "upsampler_2", "evaluate")
_CONTENT = {
    "embed": ".parquet",
    "clip": "open_clip_model.safetensors",
    "prior": "model.safetensors",
    "decoder": "model.safetensors",
    "upsampler_1": "model.safetensors",
    "upsampler_2": "model.safetensors",
}


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _kill_workers(_driver: psutil.Process, cluster: psutil.Process) -> None:
    """Every Ray worker that is at work."""
    for child in _children(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith("ray::") and "IDLE" not in part and "Agent" not in part for part in child.cmdline()):
                child.kill()


def _kill_cluster(_driver: psutil.Process, cluster: psutil.Process) -> None:
    for child in _children(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _kill_driver(driver: psutil.Process, _cluster: psutil.Process) -> None:
    driver.kill()


def _interrupt(driver: psutil.Process, _cluster: psutil.Process) -> None:
    """Ctrl-C."""
    driver.send_signal(signal.SIGINT)


_KILLS: dict[str, tuple[Callable[[psutil.Process, psutil.Process], None], int]] = {
    "workers": (_kill_workers, 0),  # the run goes on
    "cluster": (_kill_cluster, 4),
    "driver": (_kill_driver, -signal.SIGKILL),
    "interrupt": (_interrupt, 130),
}
"""How, and the exit code of the driver."""


@pytest.mark.e2e
@pytest.mark.timeout(1800)
def test_kill_anywhere_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    calm_folder, wild_folder = tmp_path / "calm", tmp_path / "wild"
    calm_folder.mkdir()
    wild_folder.mkdir()
    calm = tiny_recipe(calm_folder, port=port, num_steps=30, save_every=3)
    wild = tiny_recipe(wild_folder, port=port, num_steps=30, save_every=3)
    steps = {step.name: step for step in make_plan(load_recipe(wild))}
    artifacts = {name: artifact_of(Workspace(load_recipe(wild).workspace), step) for name, step in steps.items()}
    todo = {(name, kind) for name in _STEPS for kind in ("workers", "cluster", "driver")} | {("prior", "interrupt")}
    committed: dict[str, float] = {}
    started: list[psutil.Process] = []

    def in_the_middle(since: float) -> list[str]:
        states = {name: read_progress(artifacts[name]) for name in _STEPS if artifacts[name].manifest() is None}
        return [name for name, state in states.items() if state and state.has_begun and state.updated > since]

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    target = _STEPS[0]
    with ray_head(num_cpus=1, environment={"PYTHONPATH": str(ROOT)}) as head:
        at_head = ["--address", head.address]
        while target:
            kinds = ["workers", "driver", "interrupt"]
            if not any((target, kind) in todo for kind in kinds):
                kinds = ["cluster"]
            on_own_ray = kinds == ["cluster"] or target == _STEPS[0]
            command = ["run", str(wild), "--set", "tracking.uri=off", "--until", target]
            with start_unclip(*command, *([] if on_own_ray else at_head)) as process:
                driver = psutil.Process(process.pid)
                cluster = driver if on_own_ray else psutil.Process(head.pid)
                since, wanted = driver.create_time() + 4, ""  # what a driver before left may write for a moment longer
                while process.poll() is None and wanted in {"", "workers"}:
                    names = in_the_middle(since)
                    wanted = next((kind for kind in kinds if any((name, kind) in todo for name in names)), "")
                    if wanted:
                        todo -= {(name, wanted) for name in names}
                        started += _children(driver)
                        _KILLS[wanted][0](driver, cluster)
                        since = time.time() + 1
                    time.sleep(0.02)
                output, _ = process.communicate(timeout=120)
            assert process.returncode == (_KILLS[wanted][1] if wanted else 0), output
            assert ("run the same command again" in output) == (wanted in {"cluster", "interrupt"}), output
            assert "Traceback" not in output
            for name, artifact in artifacts.items():
                manifest = artifact.manifest()
                if manifest is not None:
                    assert committed.setdefault(name, manifest.created) == manifest.created, name
            left = [name for name in _STEPS if any((name, kind) in todo for kind in _KILLS) and name not in committed]
            target = left[0] if left else "evaluate" if "evaluate" not in committed else ""
        done = unclip("run", str(calm), "--set", "tracking.uri=off", *at_head)
    print(f"over before it could be killed: {todo or 'none'}")
    assert len(todo) <= 3
    assert done.returncode == 0, done.stdout
    other = Workspace(load_recipe(calm).workspace)
    for name, suffix in _CONTENT.items():
        one, two = artifacts[name].manifest(), artifact_of(other, steps[name]).manifest()
        assert one is not None
        assert two is not None
        assert {file: info for file, info in one.files.items() if file.endswith(suffix)} == {
            file: info for file, info in two.files.items() if file.endswith(suffix)
        }, name
    _, alive = psutil.wait_procs(started, timeout=100)  # Ray's agents look for their cluster for a minute
    assert not alive, f"left behind: {alive}"
