"""The head of a cluster is killed in the middle of a training, and started again: the run that is followed ends.

Ray keeps what it knows in the head's memory (without a Redis beside it), so the cluster that comes back is another one:
its jobs are forgotten, and a machine that was in it gives up after a while and joins the new one as its supervisor
starts it again. Until then its worker trains on, beside the one that was started in its place.
"""

import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port, free_ports
from tests.ray_head import RayHead, end_with_children, ray_head
from tests.tiny.command import ROOT, start_unclip, unclip
from tests.tiny.recipe import write_recipe
from tests.tiny.shards import drawn_sample
from tests.tiny.workspace import finish_workspace

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(900)]

_NUM_STEPS, _SAVE_EVERY, _NUM_PAIRS = 3000, 50, 96
_TIMED = (".done.json", "metrics.jsonl")
"""Ends of the names of files that hold times."""
_SETTINGS = ("--until", "prior", "--set", "tracking.uri=off", "--set", "job.max_outage_s=240")


class _Machine:
    """A machine that joins a head, with files of its own, and is started again whenever its Ray ends, as by systemd."""

    def __init__(self, address: str, folder: Path) -> None:
        self.num_starts = 0
        self._files = tempfile.mkdtemp(prefix="m", dir="/tmp")  # sockets: short paths
        self._address, self._folder = address, folder
        self._process: subprocess.Popen[bytes] | None = None
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._supervise, daemon=True)
        self._thread.start()

    def _supervise(self) -> None:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", f"--address={self._address}",
            "--node-ip-address=127.0.0.1", "--num-cpus=2", f"--temp-dir={self._files}",
            "--object-store-memory=80000000", "--disable-usage-stats",
        ]  # fmt: skip
        environment = {"RAY_AUTH_MODE": "disabled", "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        # Without a head it trains on for 20 s, not for 60.
        environment["RAY_gcs_rpc_server_reconnect_timeout_s"] = "20"
        while not self._ends.is_set():
            with (self._folder / "machine.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.num_starts += 1
            while self._process.poll() is None and not self._ends.wait(0.5):
                pass
            end_with_children(self._process)

    def end(self) -> None:
        """Take it away."""
        self._ends.set()
        self._thread.join(30)
        shutil.rmtree(self._files, ignore_errors=True)


@contextmanager
def _machine(head: RayHead, folder: Path) -> Generator[_Machine]:
    machine = _Machine(head.address, folder)
    try:
        yield machine
    finally:
        machine.end()


def _wait(process: subprocess.Popen[str], what: str, until: Callable[[], bool], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not until():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.05)


def _prior(recipe: Recipe) -> Artifact:
    return artifact_of(Workspace(recipe.workspace), next(step for step in make_plan(recipe) if step.name == "prior"))


def _contents(recipe: Recipe) -> dict[str, Any]:
    manifest = _prior(recipe).manifest()
    assert manifest is not None
    return {file: info for file, info in manifest.files.items() if not file.endswith(_TIMED)}


def _kill(head: RayHead) -> None:
    """kill -9 of all that runs on a head: its servers, its dashboard, and the drivers of its jobs."""
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with the ones before it
            process.kill()
    psutil.wait_procs(family, timeout=10)


def test_a_head_that_is_killed_and_started_again_costs_time_and_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir()
    path = write_recipe(calm, port=free_port(), num_steps=_NUM_STEPS, save_every=_SAVE_EVERY, long_trainings={"prior"})
    samples = (drawn_sample(number, is_validation=number % 8 == 0) for number in range(_NUM_PAIRS))
    finish_workspace(load_recipe(path), samples, "png")
    _prior(load_recipe(path)).destroy()
    shutil.copytree(calm, wild)
    recipe_file = wild / path.name
    recipe_file.write_text(path.read_text().replace(str(calm), str(wild)))
    recipe = load_recipe(recipe_file)
    once = ("--set", f"prior.resources.save_every_steps={_NUM_STEPS}")
    alone = unclip("run", str(path), *_SETTINGS, *once, cwd=tmp_path, timeout_s=400)
    assert alone.returncode == 0, alone.stdout

    first = random.randrange(_NUM_STEPS // 10, _NUM_STEPS // 2)
    print(f"killed after step {first}")

    def is_under_way() -> bool:
        state = read_progress(_prior(recipe))
        return state is not None and state.unit == "steps" and first < state.done < _NUM_STEPS

    ports = free_ports(6)
    with ray_head(num_cpus=0, ports=ports) as head, _machine(head, tmp_path) as machine:
        process = start_unclip(
            "submit", str(recipe_file), *_SETTINGS, "--address", head.dashboard, "--follow", cwd=ROOT
        )
        try:
            _wait(process, "the training was under way", is_under_way)
            _kill(head)
            with ray_head(num_cpus=0, ports=ports):
                output, _ = process.communicate(timeout=500)
        finally:
            process.kill()
        assert machine.num_starts > 1
    assert process.returncode == 0, output
    assert "went away while job" in output
    assert "submitted again when the cluster answers (1 of 3), within 4 min" in output
    assert output.count(": submitted to http://127.0.0.1:") == 2
    assert "prior: done in" in output
    assert "Traceback" not in output
    assert _contents(load_recipe(path)) == _contents(recipe)
    assert _contents(recipe)
