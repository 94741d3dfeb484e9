"""The exported folder in diffusers' own UnCLIPPipeline, release 0.37.1 and the installed one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny.networks import export_cascade, make_cascade, save_cascade

ROOT = Path(__file__).parents[2]
PINNED = Path(sys.prefix) / "oracles"
"""Where `make test` puts diffusers 0.37.1: its pins do not go with the project's, its code does."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("export")
    cascade = make_cascade()
    export_cascade(cascade, base / "diffusers")
    save_cascade(cascade, base / "ours")
    return base / "diffusers", base / "ours"


def compare(folders: tuple[Path, Path], release: str) -> dict[str, Any]:
    if release == "pinned":
        assert (PINNED / "diffusers").is_dir(), f"{PINNED} holds no diffusers: make test puts it there"
    path = f"{ROOT}{os.pathsep}{PINNED}" if release == "pinned" else str(ROOT)
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("compare_pipeline.py")), *map(str, folders)],
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("release", ["pinned", "installed"])
def test_exported_cascade_samples_the_same_pictures_in_diffusers(folders: tuple[Path, Path], release: str) -> None:
    errors = compare(folders, release)
    exact, own = errors["float64"], errors["own"]
    assert exact["diffusers"].startswith("0.37.1") == (release == "pinned")
    assert exact["mask"] == 0
    assert exact["spread"] > 0.1
    for name in ("pooled", "hidden", "z_image", "small", "pictures"):
        assert exact[name] < 1e-4, (name, exact)
    # UnCLIPScheduler keeps beta_0 = 4e-5 and 1 - alpha_bar_0 in float32, whose ratio should be 1 and is 1.0005
    for name in ("z_image", "small", "pictures"):
        assert own[name] < 3e-3, (name, own)
