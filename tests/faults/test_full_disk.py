"""A whole run on a disk that is full again and again."""

from collections.abc import Generator
from pathlib import Path

import pytest

from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import load_recipe
from pipeline.workspace.store import Workspace
from tests.ports import free_port
from tests.ray_head import ray_head
from tests.small_disk import SmallDisk, small_disk
from tests.tiny.command import ROOT, unclip
from tests.tiny.recipe import write_recipe

_SIZES_KB = (100, 250, 400, 2_000, 4_800, 64_000)
"""The disk is full in the list of pairs, in its table, in the download, and in trainings; then it is large enough."""
_TIMED = (".done.json", "_stats.json", "metrics.jsonl", "segment.json", "index.json", "report.html")
"""Ends of the names of files that hold times."""


@pytest.fixture(name="disk")
def _disk(tmp_path: Path) -> Generator[SmallDisk]:
    with small_disk(tmp_path / "disk") as disk:
        yield disk


def _checksums(recipe: Path, workspace: Path) -> dict[str, dict[str, str]]:
    """Checksums of the files of each step, without those that hold times."""
    checksums = dict[str, dict[str, str]]()
    for step in make_plan(load_recipe(recipe)):
        manifest = artifact_of(Workspace(str(workspace)), step).manifest()
        assert manifest is not None, step.name
        files = manifest.files.items()
        checksums[step.name] = {name: facts["sha256"] for name, facts in files if not name.endswith(_TIMED)}
    return checksums


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_goes_on_from_a_full_disk_wherever_it_was(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    recipe, workspace = write_recipe(tmp_path, port=free_port()), disk.folder / "w"
    with ray_head(environment={"PYTHONPATH": str(ROOT)}) as head:  # one for all runs: each would start its own
        _run_on_a_full_disk(["run", str(recipe), "--address", head.address], disk, workspace)
    assert _checksums(recipe, workspace) == _checksums(recipe, tmp_path / "workspace")
    assert not [path for path in workspace.rglob("*") if ".tmp-" in path.name]


def _run_on_a_full_disk(run: list[str], disk: SmallDisk, workspace: Path) -> None:
    """Run until the disk is large enough, and once where it is."""
    command = [*run, "--set", f"workspace={workspace}"]
    for size_kb in _SIZES_KB[:-1]:
        disk.grow(size_kb)
        ended = unclip(*command, timeout_s=400)
        assert ended.returncode == 4, ended.stdout
        assert "disk is full" in ended.stdout, ended.stdout
        assert "Traceback" not in ended.stdout, ended.stdout
    disk.grow(_SIZES_KB[-1])
    ended = unclip(*command, timeout_s=400)
    assert ended.returncode == 0, ended.stdout
    assert "download: starts" not in ended.stdout  # what was finished stays finished
    assert "records wait" not in ended.stdout  # the tracker's database has all, too
    calm = unclip(*run, "--set", "tracking.uri=off", timeout_s=400)
    assert calm.returncode == 0, calm.stdout
