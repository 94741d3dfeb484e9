"""A machine whose network fails in embed, and one in a training: the run goes on without it, and ends in the same bytes.

The machines are network namespaces. They share their files, so a worker that is cut off is not dead: it writes on, beside
the one that was started in its place, until its own Ray gives up.
"""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe, load_recipe
from pipeline.workspace.progress import read_progress
from pipeline.workspace.store import MANIFEST, Artifact, Workspace
from tests.ports import free_port
from tests.tiny.command import ROOT, unclip
from tests.tiny.namespaces import Machines, machines, why_not
from tests.tiny.recipe import write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(1200)]

_SETTINGS = (
    "tracking.uri=off",
    'embed.resources.label_selector={"unclip-role"="far"}',
    "embed.resources.num_workers=2",
    'prior.resources.label_selector={"unclip-role"="far"}',
)
_NUM_STEPS, _SAVE_EVERY = 4000, 50
_TIMED = (".done.json", "metrics.jsonl")
"""Ends of the names of files that hold times."""


def _run(recipe: Path, *words: str) -> list[str]:
    return ["run", str(recipe), "--until", "prior", *(word for one in _SETTINGS for word in ("--set", one)), *words]


def _artifact(recipe: Recipe, name: str) -> Artifact:
    return artifact_of(Workspace(recipe.workspace), next(step for step in make_plan(recipe) if step.name == name))


def _contents(recipe: Recipe, name: str) -> dict[str, dict[str, object]]:
    manifest = _artifact(recipe, name).manifest()
    assert manifest is not None
    return {file: info for file, info in manifest.files.items() if not file.endswith(_TIMED)}


def _wait(process: subprocess.Popen[str], what: str, until: Callable[[], bool], timeout_s: float = 240) -> None:
    end = time.monotonic() + timeout_s
    while not until():
        assert process.poll() is None, f"ended before {what}: {process.communicate()[0]}"
        assert time.monotonic() < end, f"never {what}"
        time.sleep(0.05)


def _cut_off_in_embed(process: subprocess.Popen[str], cluster: Machines, output: Artifact) -> int:
    """Cut off a machine that makes shards while another does, too; its number."""

    def both_work() -> bool:
        state = read_progress(output)
        return state is not None and len(state.workers) == 2 and bool(output.shard_records())

    _wait(process, "two machines embed", both_work)
    cluster.cut(1)
    return 1


def _cut_off_in_training(process: subprocess.Popen[str], cluster: Machines, output: Artifact, num_steps: int) -> int:
    """Cut off the machine that trains once it has made some steps; its number."""

    def trained() -> bool:
        state = read_progress(output)
        return state is not None and state.unit == "steps" and num_steps < state.done < _NUM_STEPS

    _wait(process, "the training was under way", trained)
    number = next(number for number in (1, 2) if cluster.workers(number, "prior: train"))
    cluster.cut(number)
    return number


def test_a_machine_that_is_cut_off_costs_what_it_was_doing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    calm, wild = tmp_path / "calm", tmp_path / "wild"
    calm.mkdir()
    path = write_recipe(
        calm, port=free_port(), num_steps=_NUM_STEPS, num_pairs=2400, save_every=_SAVE_EVERY, long_trainings={"prior"}
    )
    alone = unclip("run", str(path), "--until", "prior", "--set", "tracking.uri=off", cwd=tmp_path, timeout_s=400)
    assert alone.returncode == 0, alone.stdout
    shutil.copytree(calm, wild)
    recipe_file = wild / path.name
    recipe_file.write_text(path.read_text().replace(str(calm), str(wild)))
    recipes = [load_recipe(one) for one in (path, recipe_file)]
    for name in ("embed", "prior"):
        _artifact(recipes[1], name).destroy()
    embed, prior = (_artifact(recipes[1], name) for name in ("embed", "prior"))
    with machines(2) as cluster:
        words = [sys.executable, "-m", "jobs.cli", *_run(recipe_file, "--address", cluster.address)]
        with subprocess.Popen(
            cluster.command(0, words),
            cwd=ROOT,
            env=cluster.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                lost = _cut_off_in_embed(process, cluster, embed)
                _wait(process, "the embeddings were there", lambda: embed.exists(MANIFEST))
                cluster.mend(lost)  # its Ray was given up meanwhile, and is started again
                cluster.end(lost)
                cluster.start(lost)
                last = _cut_off_in_training(process, cluster, prior, _NUM_STEPS // 10)
                output, _ = process.communicate(timeout=400)
            finally:
                process.kill()
    assert process.returncode == 0, output
    assert f"embed: a worker on far-{lost} was lost" in output
    assert "prior: a machine was lost" in output
    assert "Traceback" not in output
    assert last in {1, 2}
    for name in ("embed", "prior"):
        assert _contents(recipes[0], name) == _contents(recipes[1], name), name
        assert _contents(recipes[0], name)
