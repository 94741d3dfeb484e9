"""What the project takes beside the work of a step: a finished step on a warm Ray, and `unclip plan` of many shards.

    python -m benchmarks.overhead [--rounds 3] [--shards 10000] [--artifacts 100] [--parts step plan]

A tiny recipe runs through Ray once to warm it, and then once a round with another seed, one step at a time. The
overhead of a step is the time from its start to its commit, less its own work (`wall_s` of its manifest): the start of
its controller and workers, commit and hand over. `unclip plan` is the whole command, Python's start included; the
object store is a local S3 server.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from benchmarks.scale import finish
from benchmarks.side_by_side import publish
from pipeline.recipe.estimate import Remaining
from pipeline.recipe.plan import Step, artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.status import plan_status
from pipeline.runtime.connection import connect
from pipeline.runtime.run import run_recipe
from pipeline.workspace.manifest import Manifest
from pipeline.workspace.progress import ProgressState
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.s3_server import started
from tests.tiny.recipe import write_recipe
from tests.workspace.conftest import use

_STEP_FLOOR_S, _PLAN_FLOOR_S, _S3_PLAN_FLOOR_S = 2.0, 1.0, 5.0


class Watch:
    """Notes when the steps of a run start and end."""

    def __init__(self) -> None:
        self._starts: dict[str, float] = {}
        self.overheads_s: dict[str, float] = {}

    def started(self, step: Step) -> None:
        """A step was submitted to Ray."""
        self._starts[step.name] = time.monotonic()

    def finished(self, step: Step, manifest: Manifest) -> None:
        """A step was committed."""
        self.overheads_s[step.name] = time.monotonic() - self._starts[step.name] - manifest.wall_s

    def failed(self, step: Step, dependents: Collection[str]) -> None:
        """Not looked at: the run raises the step's error."""

    def progressed(self, step: Step, state: ProgressState) -> None:
        """Not looked at."""

    def remaining(self, rest: Remaining) -> None:
        """Not looked at."""

    def reported(self, message: str) -> None:
        """Not looked at."""

    def warned(self, message: str) -> None:
        """Shown."""
        print(message)


def measure_steps(rounds: int) -> list[dict[str, Any]]:
    """A row for each step of the tiny recipe."""
    overheads: dict[str, list[float]] = {}
    with connect(), tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            place = Path(folder) / str(number)
            place.mkdir()
            recipe = load_recipe(write_recipe(place, port=free_port()), [f"seed={number}"])
            watch = Watch()
            steps = make_plan(recipe)
            for step in steps:
                statuses = plan_status(Workspace(recipe.workspace), steps)
                run_recipe(recipe, [one for one in statuses if one.state == "done" or one.step == step], watch)
            for name, overhead_s in watch.overheads_s.items() if number else ():
                overheads.setdefault(name, []).append(overhead_s)
    return [_row(f"{name}, warm Ray, beside its own work", times, _STEP_FLOOR_S) for name, times in overheads.items()]


def measure_plan(rounds: int, shards: int, artifacts: int) -> list[dict[str, Any]]:
    """A row for a workspace on this disk, and one for a store."""
    with tempfile.TemporaryDirectory() as folder:
        local = _time_plan(Path(folder) / "local", str(Path(folder) / "workspace"), rounds, shards, artifacts)
        with _store(Path(folder) / "cache") as root:
            stored = _time_plan(Path(folder) / "store", root, rounds, shards, artifacts)
    size = f"{shards:,} shards in download and embed, {artifacts} other artifacts"
    return [
        _row(f"unclip plan, {size}, a disk", local, _PLAN_FLOOR_S),
        _row(f"unclip plan, {size}, S3 on loopback", stored, _S3_PLAN_FLOOR_S),
    ]


@contextmanager
def _store(cache: Path) -> Generator[str]:
    with started() as server, pytest.MonkeyPatch.context() as patch:
        server.make_bucket("planned")
        use(server.environment | {"UNCLIP_CACHE": str(cache)}, patch)
        yield "s3://planned/workspace"


def _time_plan(place: Path, root: str, rounds: int, shards: int, artifacts: int) -> list[float]:
    place.mkdir()
    path = place / "recipe.toml"
    path.write_text(tomli_w.dumps({"name": "planned", "workspace": root}))
    recipe = load_recipe(path)
    for step in make_plan(recipe):
        if step.name in {"download", "embed"}:
            finish(artifact_of(Workspace(root), step), shards, 1000, step.name, step.key)
    for number in range(artifacts):
        finish(Workspace(root).artifact("prior", f"{number:016x}"), 0, 0, "prior", f"{number:016x}")
    times: list[float] = []
    for _ in range(rounds + 1):
        start_s = time.monotonic()
        command = [sys.executable, "-m", "jobs.cli", "plan", str(path), "--json"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - start_s)
    return times[1:]


def _row(what: str, times: list[float], floor_s: float) -> dict[str, Any]:
    return {
        "what": what,
        "median_s": statistics.median(times),
        "most_s": max(times),
        "floor_s": floor_s,
        "rounds": len(times),
    }


def main() -> None:
    """Parse, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--artifacts", type=int, default=100)
    parser.add_argument("--parts", nargs="*", choices=("step", "plan"), default=("step", "plan"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if "plan" in options.parts:
        rows += measure_plan(options.rounds, options.shards, options.artifacts)
    if "step" in options.parts:
        rows += measure_steps(options.rounds)
    publish("overhead", rows, vars(options))


if __name__ == "__main__":
    main()
