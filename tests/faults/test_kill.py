"""``kill -9`` of the workers, of the driver and of the whole Ray cluster in the middle of a step, and a Ctrl-C.

One workspace is taken through all the kills, step after step; in the end its bytes are those of a run that nobody
disturbed, and no commit was made twice. The whole Ray of a driver that started its own is killed in a step, and in the
first step such a driver alone. A cluster that stands sees its workers and drivers die, step after step; what they leave
there must not disturb the next.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.ports import free_port
from tests.ray_head import RayHead, ray_head
from tests.tiny.command import ROOT, start_unclip, unclip
from tests.tiny.recipe import write_recipe
from tests.tiny.workspace import finish_workspace, plain_samples

_STEPS = ("pairs", "download", "clip", "embed", "index", "prior", "decoder", "upsampler_1", "upsampler_2", "evaluate")
_CONTENT = {
    "download": (".tar", ".parquet"),
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


def _kill_workers(_driver: psutil.Process, cluster: psutil.Process) -> bool:
    """Every Ray worker that is at work; whether there was one."""
    num_killed = 0
    for child in _children(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any(part.startswith("ray::") and "IDLE" not in part and "Agent" not in part for part in child.cmdline()):
                child.kill()
                num_killed += 1
    return num_killed > 0


def _kill_cluster(_driver: psutil.Process, cluster: psutil.Process) -> bool:
    for child in _children(cluster):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    return True


def _kill_driver(driver: psutil.Process, _cluster: psutil.Process) -> bool:
    driver.kill()
    return True


def _interrupt(driver: psutil.Process, _cluster: psutil.Process) -> bool:
    """Ctrl-C."""
    driver.send_signal(signal.SIGINT)
    return True


_KILLS: dict[str, tuple[Callable[[psutil.Process, psutil.Process], bool], int]] = {
    "workers": (_kill_workers, 0),  # the run goes on
    "cluster": (_kill_cluster, 4),
    "driver": (_kill_driver, -signal.SIGKILL),
    "interrupt": (_interrupt, 130),
}
"""How, which says whether anything was killed, and the exit code of the driver."""
_SOME = {("decoder", kind) for kind in ("workers", "interrupt")}
"""Download, embed, filter and searches have quick kill tests of their own."""
_ALL = {(name, kind) for name in _STEPS for kind in _KILLS if kind != "interrupt"} - {
    *_SOME,
    ("decoder", "driver"),  # as the upsampler's
    *(("upsampler_2", kind) for kind in _KILLS),  # the other upsampler is alike
    *((name, "driver") for name in ("download", "embed", "index")),  # often enough in test_kill_drivers.py
}


class _Walk:
    """One workspace on its way through the kills."""

    def __init__(self, recipe: Path, kills: set[tuple[str, str]], last: str) -> None:
        self.command = ["run", str(recipe), "--set", "tracking.uri=off"]
        self.artifacts = _artifacts(recipe)
        self.todo = set(kills)
        self.last = last
        self.started: list[psutil.Process] = []
        self._committed: dict[str, float] = {}

    def target(self) -> str:
        """The step to run up to next."""
        left = [name for name in _STEPS if any((name, kind) in self.todo for kind in _KILLS)]
        return next((name for name in [*left, self.last] if name not in self._committed), "")

    def run(self, target: str, kinds: list[str], head: RayHead | None) -> None:
        """One driver, from its start to the kill that ends it, or to its own end."""
        command = [*self.command, "--until", target, *(["--address", head.address] if head else [])]
        with start_unclip(*command) as process:
            driver = psutil.Process(process.pid)
            cluster = psutil.Process(head.pid) if head else driver
            next_kill, since = "", driver.create_time() + 2.5  # what a driver before left may write for a moment longer
            while process.poll() is None and next_kill in {"", "workers"}:
                names = self._in_the_middle(since)
                next_kill = next((kind for kind in kinds if any((name, kind) in self.todo for name in names)), "")
                if next_kill:
                    self.started += _children(driver)
                    if _KILLS[next_kill][0](driver, cluster):  # or the next look tries again
                        self.todo -= {(name, next_kill) for name in names}
                        since = time.time()
                time.sleep(0.02)
            output, _ = process.communicate(timeout=120)
        assert process.returncode == (_KILLS[next_kill][1] if next_kill else 0), output
        assert ("run the same command again" in output) == (next_kill in {"cluster", "interrupt"}), output
        assert "Traceback" not in output
        for name, artifact in self.artifacts.items():
            manifest = artifact.manifest()
            if manifest is not None:
                assert self._committed.setdefault(name, manifest.created) == manifest.created, name

    def _in_the_middle(self, since: float) -> list[str]:
        open_steps = [name for name in _STEPS if not self.artifacts[name].exists(MANIFEST)]
        states = {name: read_progress(self.artifacts[name]) for name in open_steps}
        # The list of pairs is drawn in a moment: it is killed as soon as it is under way.
        begun = {name: state for name, state in states.items() if state and (state.has_begun or name == "pairs")}
        return [name for name, state in begun.items() if state.updated > since]


def _artifacts(recipe: Path) -> dict[str, Artifact]:
    loaded = load_recipe(recipe)
    return {step.name: artifact_of(Workspace(loaded.workspace), step) for step in make_plan(loaded)}


@pytest.mark.e2e
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("kills", "steps"),
    [
        pytest.param(_SOME, ("decoder",), id="some"),  # the steps before it are finished
        pytest.param(_ALL | {("prior", "interrupt")}, _STEPS, id="all", marks=pytest.mark.slow),
    ],
)
def test_kill_anywhere_ends_in_the_same_bytes(
    kills: set[tuple[str, str]], steps: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipes = {}
    port, is_short = free_port(), steps != _STEPS
    for name in ("calm", "wild"):
        (tmp_path / name).mkdir()
        recipes[name] = write_recipe(tmp_path / name, port=port, num_steps=60 if is_short else 30, save_every=3)
    if is_short:
        recipe = load_recipe(recipes["calm"])
        finish_workspace(recipe, plain_samples(), "jpg")
        for name in steps:
            _artifacts(recipes["calm"])[name].clear()
        shutil.copytree(recipe.workspace, load_recipe(recipes["wild"]).workspace)
    last = steps[-1]
    walk = _Walk(recipes["wild"], kills, last)
    with ray_head(num_cpus=1, environment={"PYTHONPATH": str(ROOT)}) as head:
        while target := walk.target():
            if (target, "cluster") in walk.todo:  # first: the other kinds of kill let the step come to its end
                walk.run(target, ["cluster"], None)
            else:
                walk.run(target, ["workers", "driver", "interrupt"], None if target == _STEPS[0] else head)
        command = ["run", str(recipes["calm"]), "--until", last, "--set", "tracking.uri=off"]
        done = unclip(*command, "--address", head.address)
    print(f"over before it could be killed: {walk.todo or 'none'}")
    assert len(walk.todo) <= len(kills) // 7
    assert done.returncode == 0, done.stdout
    calm = _artifacts(recipes["calm"])
    made = [name for name in _CONTENT if name in steps]
    assert made
    for name in made:
        suffix = _CONTENT[name]
        one, two = walk.artifacts[name].manifest(), calm[name].manifest()
        assert one is not None
        assert two is not None
        files = {file: info for file, info in one.files.items() if file.endswith(suffix)}
        assert files == {file: info for file, info in two.files.items() if file.endswith(suffix)}, name
        assert files, name
    _, alive = psutil.wait_procs(walk.started, timeout=100)  # Ray's agents look for their cluster for a minute
    assert not alive, f"left behind: {alive}"
