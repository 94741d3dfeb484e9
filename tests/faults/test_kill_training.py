"""``kill -9`` of a worker, a machine and the driver at ten random steps of one training on two workers.

Between them the driver is interrupted once. The final weights are those of a training that nobody disturbed.
"""

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import METRICS, read_progress
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.ports import free_port
from tests.tiny.cluster import cluster_without_cpus
from tests.tiny.command import start_unclip
from tests.tiny.faults import train_workers
from tests.tiny.recipe import write_recipe

_NUM_STEPS, _SAVE_EVERY = 1200, 20
_KILLS = ("worker", "driver", "machine", "worker", "interrupt", "worker", "driver", "machine", "worker", "driver")


class _Disturbed:
    """One training and what happens to it."""

    def __init__(self, recipe: Path, cluster: Cluster) -> None:
        self._recipe, self._cluster = recipe, cluster
        self.machines: list[Any] = [cluster.add_node(num_cpus=1) for _ in range(2)]
        self.output = _upsampler(recipe)
        self._run: subprocess.Popen[str] | None = None
        self._since = 0.0

    def start(self) -> None:
        """Start a driver if none is there."""
        if self._run is None:
            resources = [f"upsampler_1.resources.{field}" for field in ("num_workers=2", "max_failures=10")]
            words = ["run", str(self._recipe), "--step", "upsampler_1", "--address", self._cluster.address]
            for change in (*resources, "tracking.uri=off"):
                words += ["--set", change]
            self._run = start_unclip(*words)

    def wait_for(self, step: int) -> None:
        """Until a step is done."""
        end = time.monotonic() + 240
        while _steps(self.output, self._since) < step:
            assert self._run is not None
            assert self._run.poll() is None, self._run.communicate()[0]
            assert time.monotonic() < end, f"{_steps(self.output, 0)} of {step} steps"
            time.sleep(0.02)

    def disturb(self, kind: str) -> None:
        """Kill something, or interrupt the driver."""
        assert self._run is not None
        if kind == "machine":
            self._cluster.remove_node(self.machines.pop(0), allow_graceful=False)
            self.machines.append(self._cluster.add_node(num_cpus=1))
        elif kind == "worker":
            random.choice(train_workers()).kill()
        else:
            self._run.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGINT)
            output, _ = self._run.communicate(timeout=60)
            assert (kind == "driver") or "ended after step" in output, output
            self._run = None
        self._since = time.time()

    def finish(self) -> None:
        """Let the driver come to its end."""
        assert self._run is not None
        output, _ = self._run.communicate(timeout=400)
        assert self._run.returncode == 0, output


def _upsampler(recipe: Path) -> Artifact:
    loaded = load_recipe(recipe)
    step = next(step for step in make_plan(loaded) if step.name == "upsampler_1")
    return artifact_of(Workspace(loaded.workspace), step)


def _steps(output: Artifact, since: float) -> int:
    """The steps by the newest reading, if it was taken after ``since``."""
    state = read_progress(output)
    return state.done if state is not None and state.unit == "steps" and state.updated > since else 0


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with cluster_without_cpus() as started:
        yield started


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_steps_change_no_weight(cluster: Cluster, tmp_path: Path) -> None:
    seed, port = random.randrange(1 << 30), free_port()
    random.seed(seed)
    trained: list[Artifact] = []
    for name, kills in (("wild", _KILLS), ("calm", ())):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, port=port, num_steps=_NUM_STEPS, save_every=_SAVE_EVERY)
        first = start_unclip("run", str(recipe), "--until", "download", "--set", "tracking.uri=off")
        assert first.wait(120) == 0, first.communicate()[0]
        training = _Disturbed(recipe, cluster)
        for number, kind in enumerate(kills):
            training.start()
            part = _NUM_STEPS // (len(kills) + 1)
            step = number * part + random.randrange(part // 4, part)
            training.wait_for(step)
            training.disturb(kind)
            print(f"seed {seed}: {kind} at step {step}, {_steps(training.output, 0)} done, {time.monotonic():.0f} s")
        training.start()
        training.finish()
        trained.append(training.output)
        for machine in training.machines:
            cluster.remove_node(machine)
    weights = [output.path("model.safetensors").read_bytes() for output in trained]
    assert weights[0] == weights[1], f"seed {seed}"
    assert all(output.exists(MANIFEST) for output in trained)
    rows = [json.loads(line) for line in trained[0].path(METRICS).read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps))
