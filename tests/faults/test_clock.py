"""A time of day that jumps a day ahead and an hour back in the middle of a run, in all of its processes."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.ports import free_port
from tests.s3_server import S3Server, started
from tests.tiny.command import ROOT, start_unclip, unclip
from tests.tiny.recipe import write_recipe
from tests.workspace.conftest import use

_DAY_S, _HOUR_S = 86_400, 3600
_JUMPS = {"download": (_DAY_S,), "embed": (_DAY_S - _HOUR_S,), "prior": (2 * _DAY_S, _DAY_S - _HOUR_S)}
"""Seconds by which the clock is off, one value after the other, from the middle of each step on."""
_CONTENT = {
    "download": (".tar", ".parquet"),
    "clip": "open_clip_model.safetensors",
    "embed": ".parquet",
    "prior": "model.safetensors",
}
_LONGEST_S = 600.0


class _Run:
    """A run on an object store whose clock jumps."""

    def __init__(self, recipe: Path, workspace: str, environment: dict[str, str], clock: Path) -> None:
        self.arguments = [str(recipe), "--set", f"workspace={workspace}", "--set", "tracking.uri=off"]
        # Pictures come slowly, so that the clock jumps while they do.
        self.arguments += ["--set", "download.resources.max_rate_per_host=8.0"]
        self.environment = environment
        self._clock = clock
        self._todo = {name: list(jumps) for name, jumps in _JUMPS.items()}
        plan, root = make_plan(load_recipe(recipe)), Workspace(workspace)
        self.artifacts: dict[str, Artifact] = {step.name: artifact_of(root, step) for step in plan}

    def jumps(self) -> Iterator[str]:
        """Let the clock jump in each step that is in its middle; yields the step's name after each jump."""
        for name, jumps in self._todo.items():
            artifact = self.artifacts[name]
            state = None if artifact.exists(MANIFEST) else read_progress(artifact)
            if jumps and state is not None and state.has_begun:
                self._clock.write_text(str(jumps.pop(0)))
                yield name

    def status(self) -> dict[str, dict[str, object]]:
        """What ``unclip status`` says by the same clock, by step."""
        done = unclip("status", *self.arguments, "--json", environment=self.environment)
        assert done.returncode == 0, done.stdout
        return {row["step"]: row for row in json.loads(done.stdout)}


@pytest.fixture(name="server")
def _server() -> Iterator[S3Server]:
    with started() as server:
        yield server


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_clock_that_jumps_in_the_middle_of_steps_changes_nothing(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = tmp_path / "clock"
    recipe = write_recipe(tmp_path, port=free_port(), num_steps=90, save_every=9, long_trainings={"prior"})
    clock.write_text("0")
    server.make_bucket("clock")
    store = server.environment | {"UNCLIP_CACHE": str(tmp_path / "cache"), "UNCLIP_CACHE_GB": "0.00001"}
    use(store, monkeypatch)
    path = os.pathsep.join([str(ROOT / "tests/tiny/jumping_clock"), str(ROOT)])
    run = _Run(recipe, "s3://clock/w", store | {"PYTHONPATH": path, "UNCLIP_TEST_CLOCK": str(clock)}, clock)
    jumped = list[str]()
    command = ["run", *run.arguments, "--until", "prior"]
    with start_unclip(*command, environment=run.environment) as process:
        while process.poll() is None:
            for name in run.jumps():
                jumped.append(name)
                if name == "prior":  # a moment by each time
                    time.sleep(0.5)
                    continue
                rows = run.status()
                assert rows[name]["state"] == "done" or rows[name]["is_running"]
                ages = [row["age_s"] for row in rows.values() if row["age_s"] is not None]
                assert all(0 <= age < _LONGEST_S for age in ages if isinstance(age, float)), rows
            if jumped == ["download"]:
                second = unclip(*command, environment=run.environment)
                assert second.returncode == 4, second.stdout
                assert "another run is using this workspace" in second.stdout
                jumped.append("second run")
            time.sleep(0.1)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "is broken" not in output
    assert sorted(jumped) == ["download", "embed", "prior", "prior", "second run"]

    calm = unclip("run", str(recipe), "--until", "prior", "--set", "tracking.uri=off", timeout_s=600)
    assert calm.returncode == 0, calm.stdout
    loaded = load_recipe(recipe)
    here = {step.name: artifact_of(Workspace(loaded.workspace), step) for step in make_plan(loaded)}
    for name, suffix in _CONTENT.items():
        one, two = run.artifacts[name].manifest(), here[name].manifest()
        assert one is not None
        assert two is not None
        files = {file: info for file, info in one.files.items() if file.endswith(suffix)}
        assert files == {file: info for file, info in two.files.items() if file.endswith(suffix)}, name
        assert files, name
        assert 0 < one.wall_s < _LONGEST_S, name
    stats = [name for name in run.artifacts["download"].names() if name.endswith("_stats.json")]
    assert all(0 <= run.artifacts["download"].read_json(name)["duration"] < _LONGEST_S for name in stats)
