"""Machines of a cluster that lack packages, or the workspace: named before a step begins, or when they come."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from pipeline.errors import ConfigError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime import machines as looking
from pipeline.runtime.machines import SEEN, Machines
from pipeline.workspace.store import Artifact, Workspace
from tests.ports import free_port
from tests.tiny.cluster import cluster_without_cpus, joined_cluster
from tests.tiny.command import ROOT, unclip
from tests.tiny.recipe import tiny_tables, write_recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

# Python reads this at its start: an interpreter in which two packages are not installed, for those who ask and import.
_HIDES = """
import importlib.abc, importlib.metadata, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pyarrow", "safetensors"}:
            raise ModuleNotFoundError(name)

def version(name, real=importlib.metadata.version):
    if name in {"pyarrow", "safetensors"}:
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)

sys.meta_path.insert(0, Hidden())
importlib.metadata.version = version
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with joined_cluster() as cluster:
        yield cluster


def test_a_machine_with_a_workspace_of_its_own_is_named(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = parse_recipe(tiny_tables(tmp_path))
    Machines(recipe, make_plan(recipe))
    # As on a machine whose disk has another folder of this name: what is written here does not come there.
    monkeypatch.setattr(looking, "_SHOWS_WITHIN_S", 0.0)
    monkeypatch.setattr(Artifact, "write_json", lambda *_: None)
    home = Workspace(recipe.workspace).artifact("recipes", recipe.name)
    assert home.names() == [SEEN]  # the same recipe has been run there
    with pytest.raises(ConfigError, match=rf"^{platform.node()}: {recipe.workspace} .* name a bucket"):
        Machines(recipe, make_plan(recipe))
    home.clear()
    with pytest.raises(ConfigError, match=rf"^{platform.node()}: {recipe.workspace} .* name a bucket"):
        Machines(recipe, make_plan(recipe))


def test_a_machine_that_lacks_packages_is_named_with_its_python_and_them(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HIDES)
    recipe = parse_recipe(tiny_tables(tmp_path))
    # The one that is there lacks nothing; the head, which has no CPU, is not asked.
    machines = Machines(recipe, make_plan(recipe))
    # It comes later.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        cluster.add_node(num_cpus=2)
    with pytest.raises(
        ConfigError, match=rf"^{sys.executable} of \S+ lacks pyarrow, safetensors: no step can run there"
    ):
        machines.look(wait_s=60)
    machines.look(wait_s=60)  # said once
    # One on which nothing of the recipe fits is nobody's business.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
        cluster.add_node(num_cpus=0)
    machines.look(wait_s=60)


def test_a_run_starts_nothing_on_such_a_cluster(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HIDES)
    recipe = write_recipe(tmp_path, port=free_port())
    with cluster_without_cpus() as cluster:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
            cluster.add_node(num_cpus=2)
        done = unclip("run", str(recipe), "--address", cluster.address, "--set", "tracking.uri=off")
    assert done.returncode == 2, done.stdout
    assert "lacks pyarrow, safetensors: no step can run there" in done.stdout
    assert ": starts" not in done.stdout
    assert "Traceback" not in done.stdout
