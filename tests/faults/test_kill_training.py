"""``kill -9`` of workers, machines, drivers, the head and the tracker at ten random steps of one training on two workers.

Between them the driver is interrupted once. The final weights are those of a training that nobody disturbed, and the
tracker has every reading.
"""

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import METRICS, read_progress
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port
from tests.tiny.cluster import cluster_without_cpus
from tests.tiny.command import start_unclip
from tests.tiny.faults import train_workers
from tests.tiny.recipe import write_recipe
from tests.tiny.tracking_server import TrackingServer
from tests.tiny.workspace import finish_download

_NUM_STEPS, _SAVE_EVERY, _AWAY_S = 900, 20, 5
_KILLS = ("worker", "tracker", "machine", "driver", "interrupt", "worker", "machine", "worker", "driver", "head")
"""The head last: until they miss it, the workers train on, perhaps to the end, and nothing is left for other kills."""


class _Disturbed:
    """One training and what happens to it."""

    def __init__(self, recipe: Path, tracker: TrackingServer) -> None:
        self._recipe, self._tracker = recipe, tracker
        self.output = _upsampler(recipe)
        self._run: subprocess.Popen[str] | None = None
        self._since = 0.0
        self._start_of_tracker: threading.Timer | None = None
        self._closing = ExitStack()
        self._begin_cluster()

    def _begin_cluster(self) -> None:
        self._cluster: Cluster = self._closing.enter_context(cluster_without_cpus())
        self._machines: list[Any] = [self._cluster.add_node(num_cpus=1) for _ in range(2)]

    def start(self) -> None:
        """Start a driver if none is there."""
        if self._run is None:
            self._run = self._start(self._recipe, self._tracker.uri)

    def train_calmly(self, recipe: Path) -> None:
        """The same training in a workspace of its own, which has no checkpoint but the last; nothing is killed yet."""
        run = self._start(recipe, "off", f"save_every_steps={_NUM_STEPS}")
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, output

    def _start(self, recipe: Path, tracker: str, *resources: str) -> subprocess.Popen[str]:
        words = ["run", str(recipe), "--step", "upsampler_1", "--address", self._cluster.address]
        words += ["--set", f"tracking.uri={tracker}"]
        # In line: 45 validations beside it would take most of the time.
        for change in ("num_workers=2", "validation=in_line", *resources):
            words += ["--set", f"upsampler_1.resources.{change}"]
        # So that it waits 15 s for a head that is away, in place of 50 s.
        return start_unclip(*words, environment={"RAY_gcs_rpc_server_reconnect_timeout_s": "25"})

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
            self._cluster.remove_node(self._machines.pop(0), allow_graceful=False)
            self._machines.append(self._cluster.add_node(num_cpus=1))
        elif kind == "worker":
            random.choice(train_workers()).kill()
        elif kind == "tracker":
            self._tracker.signal(signal.SIGKILL)
            self._start_of_tracker = threading.Timer(_AWAY_S, self._tracker.start)
            self._start_of_tracker.start()
        elif kind == "head":
            self._cluster.remove_node(self._cluster.head_node, allow_graceful=False)
            output, _ = self._run.communicate(timeout=240)
            assert self._run.returncode == 4, output
            assert "the cluster went away: its head" in output
            self._run = None
            self._closing.close()
            self._begin_cluster()
        else:
            self._run.send_signal(signal.SIGKILL if kind == "driver" else signal.SIGINT)
            output, _ = self._run.communicate(timeout=60)
            assert (kind == "driver") or "ended after step" in output, output
            self._run = None
        self._since = time.time()

    def finish(self) -> None:
        """Let the driver come to its end."""
        assert self._run is not None
        if self._start_of_tracker is not None:
            self._start_of_tracker.join()
        output, _ = self._run.communicate(timeout=400)
        assert self._run.returncode == 0, output
        self._closing.close()


def _upsampler(recipe: Path) -> Artifact:
    loaded = load_recipe(recipe)
    step = next(step for step in make_plan(loaded) if step.name == "upsampler_1")
    return artifact_of(Workspace(loaded.workspace), step)


def _steps(output: Artifact, since: float) -> int:
    """The steps by the newest reading, if it was taken after ``since``."""
    state = read_progress(output)
    return state.done if state is not None and state.unit == "steps" and state.updated > since else 0


def _tracked(tracker: TrackingServer, experiment: str) -> dict[int, float]:
    """The loss at each step that the tracker has of the upsampler, in all runs."""
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient(tracker.uri)
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    of_step = [run.info.run_id for run in runs if run.data.tags["unclip.step"] == "upsampler_1"]
    return {point.step: point.value for run in of_step for point in client.get_metric_history(run, "loss")}


@pytest.fixture
def tracker(tmp_path: Path) -> Iterator[TrackingServer]:
    (tmp_path / "mlflow").mkdir()
    server = TrackingServer(tmp_path / "mlflow")
    yield server
    server.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_kills_at_random_steps_change_no_weight(tracker: TrackingServer, tmp_path: Path) -> None:
    seed, port = random.randrange(1 << 30), free_port()
    random.seed(seed)
    recipes = list[Path]()
    for name in ("wild", "calm"):
        (tmp_path / name).mkdir()
        recipes.append(write_recipe(tmp_path / name, port=port, num_steps=_NUM_STEPS, save_every=_SAVE_EVERY))
        finish_download(load_recipe(recipes[-1]))
    training = _Disturbed(recipes[0], tracker)
    training.train_calmly(recipes[1])
    for number, kind in enumerate(_KILLS):
        training.start()
        part = _NUM_STEPS // (len(_KILLS) + 1)
        step = number * part + random.randrange(part // 4, part)
        training.wait_for(step)
        training.disturb(kind)
        print(f"seed {seed}: {kind} at step {step}, {_steps(training.output, 0)} done, {time.monotonic():.0f} s")
    training.start()
    training.finish()
    trained = [_upsampler(recipe) for recipe in recipes]
    weights = [output.path("model.safetensors").read_bytes() for output in trained]
    assert weights[0] == weights[1], f"seed {seed}"
    manifests = [output.manifest() for output in trained]
    counts = [manifest.metrics.get("num_failures", 0) for manifest in manifests if manifest is not None]
    assert counts == [_KILLS.count("worker"), 0], f"seed {seed}"  # no other kill costs what errors may cost
    rows = [json.loads(line) for line in trained[0].path(METRICS).read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert [row["step"] for row in rows if "loss" in row] == sorted(losses)
    assert _tracked(tracker, load_recipe(recipes[0]).name) == losses
