"""A folder that diffusers wrote, imported and sampled by command, against the pictures of its own pipeline."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.networks.clip import load_clip_artifact
from pipeline.workspace.store import Artifact

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder, and what diffusers and transformers made of it."""
    base = tmp_path_factory.mktemp("karlo")
    (base / "results").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.make_folder", str(base / "folder"), str(base / "results")],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return base / "folder", base / "results"


def unclip(*words: str) -> str:
    done = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("form", ["folder", "recipe", "moved"])
def test_imported_folder_is_sampled_at_once_as_its_own_pipeline_does(
    written: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "note" not in unclip("import", str(written[0]), "--out", "mine")
    source = {"folder": "mine", "recipe": "mine/recipe.toml", "moved": "elsewhere"}[form]
    if form == "moved":
        Path("mine").rename(source)
    # compare_pipeline's first seed: its noise is what the pipeline was given.
    output = unclip("sample", source, "a red circle", "-n", "2", "--seed", "11", "--out", "out")
    assert "unclip lineage" not in output  # its networks are in no workspace
    ours = np.stack([np.array(Image.open(f"out/000-{number}.png")) for number in range(2)]).astype(int)
    theirs = np.load(written[1] / "pictures.npy") * 255
    assert theirs.std() > 20
    assert np.abs(ours - theirs).max() < 0.6  # ours are rounded to 256 levels


def test_image_tower_beside_the_layout_is_the_one_that_pictures_are_embedded_with(
    written: tuple[Path, Path], tmp_path: Path
) -> None:
    unclip("import", str(written[0]), "--out", str(tmp_path / "mine"))
    clip = load_clip_artifact(Artifact(str(tmp_path / "mine/clip")))
    embedding = clip.encode_image(torch.from_numpy(np.load(written[1] / "picture.npy")))
    np.testing.assert_allclose(embedding.numpy(), np.load(written[1] / "embedding.npy"), atol=1e-5)
