"""Machines of a cluster that lack packages, or the workspace: named before a step begins, or when they come."""

import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from pipeline.errors import ConfigError, StepError
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import machines as looking
from pipeline.runtime.machines import SEEN, VERDICTS, Machines, machine_verdicts
from pipeline.workspace.progress import ERROR, read_progress
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port
from tests.tiny.cluster import cluster_without_cpus, joined_cluster
from tests.tiny.command import ROOT, start_unclip, unclip
from tests.tiny.recipe import tiny_tables, write_recipe
from tests.tiny.workspace import served_workspace

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# Python reads this at its start: an interpreter in which packages are not installed, for those who ask and import.
_HIDES = """
import importlib.abc, importlib.metadata, sys

HIDDEN = {}

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)

def version(name, real=importlib.metadata.version):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Hidden())
importlib.metadata.version = version
"""
_LACKS = rf"{sys.executable} of \S+ lacks pyarrow, safetensors"


def _add_unfit(cluster: Cluster, folder: Path, *absent: str, num_cpus: int = 2, **options: Any) -> Any:
    """A machine comes whose Python lacks packages: two, and ``absent``."""
    names = {"pyarrow", "safetensors", *absent}
    (folder / "sitecustomize.py").write_text(_HIDES.replace("HIDDEN = {}", f"HIDDEN = {names}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        return cluster.add_node(num_cpus=num_cpus, **options)


def _no_warning(words: str) -> None:
    raise AssertionError(words)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with joined_cluster() as cluster:
        yield cluster


def test_a_machine_with_a_workspace_of_its_own_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_tables(tmp_path))
    Machines(recipe, make_plan(recipe), _no_warning)
    # As on a machine whose disk has another folder of this name: what is written here does not come there.
    monkeypatch.setattr(looking, "_SHOWS_WITHIN_S", 0.0)
    monkeypatch.setattr(Artifact, "write_json", lambda *_: None)
    home = Workspace(recipe.workspace).artifact("recipes", recipe.name)
    assert {*home.names()} == {SEEN, VERDICTS}  # the same recipe has been run there
    with pytest.raises(ConfigError, match=rf"^{platform.node()}: {recipe.workspace} .* name a bucket"):
        Machines(recipe, make_plan(recipe), _no_warning)
    home.clear()
    with pytest.raises(ConfigError, match=rf"^{platform.node()}: {recipe.workspace} .* name a bucket"):
        Machines(recipe, make_plan(recipe), _no_warning)


def test_a_machine_that_comes_later_and_lacks_packages_is_a_warning_and_named_by_a_failure(
    cluster: Cluster, tmp_path: Path
) -> None:
    recipe, warnings, error = parse_recipe(tiny_tables(tmp_path)), list[str](), StepError("embed: it has failed")
    # The one that is there lacks nothing; the head, which has no CPU, is not asked.
    machines = Machines(recipe, make_plan(recipe), warnings.append)
    unfit = _add_unfit(cluster, tmp_path)
    assert [*(machine_verdicts(recipe) or {}).values()] == [""]
    machines.look(wait_s=60)
    assert re.search(_LACKS, (machine_verdicts(recipe) or {})[unfit.node_id])
    [warning] = warnings
    assert re.search(rf": {_LACKS}: no step can run there", warning)
    assert re.search(
        rf"^embed: it has failed; perhaps it ran on an unfit machine: {_LACKS}$", str(machines.explain(error))
    )
    cluster.remove_node(unfit)
    # One on which nothing of the recipe fits is nobody's business.
    _add_unfit(cluster, tmp_path, num_cpus=0)
    assert str(machines.explain(error)) == str(error)
    assert len(warnings) == 1
    Machines(recipe, (), _no_warning)  # of a run on a Ray of its own
    assert machine_verdicts(recipe) is None


def test_the_first_machine_of_a_cluster_is_judged_when_it_comes(tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_tables(tmp_path))
    with cluster_without_cpus() as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        machines = Machines(recipe, make_plan(recipe), _no_warning)
        _add_unfit(cluster, tmp_path)
        with pytest.raises(ConfigError, match=f"^{_LACKS}: no step can run there"):
            machines.look(wait_s=60)
        ray.shutdown()


def test_a_machine_that_cannot_even_be_asked_is_unfit(tmp_path: Path) -> None:
    recipe = parse_recipe(tiny_tables(tmp_path))
    with cluster_without_cpus() as cluster:
        ray.init(address=cluster.address, log_to_driver=False)
        machines = Machines(recipe, make_plan(recipe), _no_warning)
        _add_unfit(cluster, tmp_path, "pipeline")  # as one with Ray alone
        with pytest.raises(ConfigError, match=r"^\S+: ModuleNotFoundError: pipeline: no step can run there"):
            machines.look(wait_s=60)
        ray.shutdown()


def test_a_run_goes_on_when_an_unfit_machine_comes_and_names_it_when_a_step_fails_there(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    outputs = {step.name: artifact_of(Workspace(recipe.workspace), step) for step in make_plan(recipe)}
    for name in ("index", "upsampler_1"):
        outputs[name].clear()
    zones = {"index": "unfit", "upsampler_1": "fit"}
    places = [
        word for name, zone in zones.items() for word in ("--set", f"{name}.resources.label_selector.zone={zone}")
    ]
    with cluster_without_cpus() as cluster:
        cluster.add_node(num_cpus=2, labels={"zone": "fit"})
        run = start_unclip(
            "run", str(tmp_path / "tiny.toml"), "--address", cluster.address, "--set", "tracking.uri=off", *places
        )
        while read_progress(outputs["index"]) is None:
            assert run.poll() is None, run.communicate()[0]
            time.sleep(0.1)
        _add_unfit(cluster, tmp_path, labels={"zone": "unfit"})
        text, _ = run.communicate(timeout=200)
    assert run.returncode == 4, text
    assert re.search(rf"a machine has come on which steps fail, take it out of the cluster: {_LACKS}", text), text
    words = (
        rf"index: ModuleNotFoundError: \w+; details in \S+/error\.txt; perhaps it ran on an unfit machine: {_LACKS}$"
    )
    assert re.search(words, text.splitlines()[-1]), text
    assert "Traceback" not in text
    assert "Traceback" in outputs["index"].path(ERROR).read_text()
    assert outputs["upsampler_1"].manifest() is not None


def test_a_run_starts_nothing_on_such_a_cluster(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, port=free_port())
    with cluster_without_cpus() as cluster:
        _add_unfit(cluster, tmp_path)
        done = unclip("run", str(recipe), "--address", cluster.address, "--set", "tracking.uri=off")
    assert done.returncode == 2, done.stdout
    assert "lacks pyarrow, safetensors: no step can run there" in done.stdout
    assert ": starts" not in done.stdout
    assert "Traceback" not in done.stdout
