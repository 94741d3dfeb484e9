"""``kill -9`` of the driver at twenty random moments of each step of the data: the bytes are those of a calm run.

One cluster stands, and what a killed driver leaves on it must not disturb the next one. The drivers are the command
itself, forked from a process that has loaded what it needs, because its imports would take most of the time.
``test_kill_data.py`` and its neighbours kill the processes that do the work as often; ``filter_embeddings``, whose
driver is that of ``filter``, is killed there alone.
"""

import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs.cli import main
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.runtime import run as _run  # noqa: F401  (and Ray with it, before the forks)
from pipeline.workspace.store import MANIFEST, RECORD_SUFFIX, Artifact, Workspace
from tests.ports import free_port
from tests.ray_head import ray_head
from tests.tiny.command import ROOT
from tests.tiny.recipe import write_recipe

_STEPS = ("pairs", "download", "filter", "embed", "index")
_NUM_KILLS = 20
_MOST_TRIES = 3
"""For each kill: a driver may have ended by then."""
_CHANGES = (
    "filter.min_caption_words=2",
    "filter.duplicates=exact",
    "download.samples_per_shard=12",
    "tracking.uri=off",
)


def _start(arguments: Sequence[str], log: Path) -> int:
    """The command in a process of its own; returns its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = (os.fdopen(file, "w", buffering=1) for file in (1, 2))
        sys.argv = ["unclip", *arguments]
        main()
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        os._exit(code)


def _has_ended(process: int) -> bool:
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _wait_for_begin(process: int, artifact: Artifact) -> float:
    """When the step writes its first file."""
    while not artifact.names() and not _has_ended(process):
        time.sleep(0.01)
    return time.monotonic()


def _wait_for_end(process: int, artifact: Artifact) -> float:
    """When the step is committed: its driver then still closes what it has opened."""
    while not artifact.exists(MANIFEST) and not _has_ended(process):
        time.sleep(0.01)
    return time.monotonic()


def _content(artifact: Artifact) -> dict[str, object]:
    """What must not differ: all but times, and what only a running step reads."""
    manifest = artifact.manifest()
    assert manifest is not None
    names = [name for name in artifact.names() if not name.startswith("live/") and name != MANIFEST]
    files = {name: artifact.describe(name) for name in names if not name.endswith((RECORD_SUFFIX, "_stats.json"))}
    return {**files, "counts": manifest.counts}


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_driver_that_is_killed_twenty_times_in_each_step_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    recipe, log, rng = write_recipe(tmp_path, port=free_port()), tmp_path / "log", random.Random(0)
    loaded = load_recipe(recipe, _CHANGES)
    artifacts = {step.name: artifact_of(Workspace(loaded.workspace), step) for step in make_plan(loaded)}
    kills, lost = Counter[str](), Counter[str]()
    with ray_head(num_cpus=1, environment={"PYTHONPATH": str(ROOT)}) as head:
        command = ["run", str(recipe), "--address", head.address, *(w for one in _CHANGES for w in ("--set", one))]
        assert _exit_code(_start([*command, "--until", _STEPS[-1]], log)) == 0, log.read_text()
        for name in _STEPS:
            artifact, arguments = artifacts[name], [*command, "--step", name]
            expected = _content(artifact)
            assert len(expected) > 1
            artifact.clear()
            process = _start(arguments, log)
            begin = _wait_for_begin(process, artifact)
            took_s = _wait_for_end(process, artifact) - begin
            assert _exit_code(process) == 0, log.read_text()
            while kills[name] < _NUM_KILLS and kills[name] + lost[name] < _MOST_TRIES * _NUM_KILLS:
                if artifact.exists(MANIFEST):
                    artifact.clear()
                process = _start(arguments, log)
                _wait_for_begin(process, artifact)
                time.sleep(rng.uniform(0, took_s))
                os.kill(process, signal.SIGKILL)
                assert _exit_code(process) in {0, -signal.SIGKILL}, log.read_text()
                (lost if artifact.exists(MANIFEST) else kills)[name] += 1
            assert _exit_code(_start(arguments, log)) == 0, log.read_text()
            assert _content(artifact) == expected, name
            print(f"{name}: {took_s:.1f} s; killed {kills[name]} times, {lost[name]} times too late")
    assert all(kills[name] == _NUM_KILLS for name in _STEPS), kills
