"""A person's own pictures: photographs that the project did not draw, from a folder and from a list, through ``init``."""

import csv
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from tests.tiny import unclip, unclip_json

_PHOTOGRAPHS = ("astronaut", "camera", "cat", "coffee", "coins", "rocket", "page", "text", "moon", "clock")
_SHRINK = [
    *("clip.train.num_steps=3", "prior.train.num_steps=3", "decoder.train.num_steps=3"),
    *("upsampler_1.train.num_steps=3", "upsampler_2.train.num_steps=3", "evaluate.num_prompts=4"),
    *("clip.train.batch_size=8", "prior.train.batch_size=8", "decoder.train.batch_size=8"),
    *("upsampler_1.train.batch_size=4", "upsampler_2.train.batch_size=4", "evaluate.num_shown=2"),
    *("decoder.model.sampler.num_steps=2", "evaluate.num_images_per_shown=1", "tracking.uri=off"),
    *(f"{name}.resources.num_workers=1" for name in ("download", "embed", "evaluate")),
    *(f"{name}.train.warmup_steps=0" for name in ("clip", "prior", "decoder", "upsampler_1", "upsampler_2")),
    *("upsampler_1.model.sampler.num_steps=2", "upsampler_2.model.sampler.num_steps=2"),
]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    number = 0
    for name in _PHOTOGRAPHS:
        try:
            picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        except (ModuleNotFoundError, OSError, AttributeError):
            continue  # not among the pictures that come inside the package
        side = min(picture.size) // 2
        for left, top in ((0, 0), (side // 2, side // 2), (side, side)):
            crop = picture.crop((left, top, left + side, top + side)).resize((160, 160))
            crop.save(folder / f"{number:03d}.jpg")
            (folder / f"{number:03d}.txt").write_text(f"a photograph of {name}, part {left}")
            number += 1
    assert number >= 15
    return folder


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_init_and_run_on_a_folder_of_photographs(photographs: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    done = unclip("init", str(photographs), "--out", str(recipe))
    assert done.returncode == 0, done.stdout
    overrides = [part for value in [*_SHRINK, f"workspace={tmp_path / 'w'}"] for part in ("--set", value)]
    done = unclip("run", str(recipe), *overrides, timeout_s=500)
    assert done.returncode == 0, done.stdout
    rows = {row["step"]: row for row in unclip_json("status", str(recipe), *overrides)}
    num_pictures = len(list(photographs.glob("*.jpg")))
    assert rows["download"]["counts"]["ok"] == rows["embed"]["counts"]["ok"] == num_pictures
    found = unclip_json("search", str(recipe), "a photograph of coffee", "-k", "3", *overrides)
    assert all("photograph" in row["caption"] for row in found)
    out = tmp_path / "out"
    assert len(unclip_json("sample", str(recipe), "a cup", "-n", "1", "--out", str(out), *overrides)) == 1
    assert (out / "grid.png").exists()


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_init_and_read_a_list_with_other_column_names(photographs: Path, tmp_path: Path) -> None:
    listed = tmp_path / "pairs.csv"
    with listed.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["id", "URL", "TEXT"])
        for number, picture in enumerate(sorted(photographs.glob("*.jpg"))):
            writer.writerow([number, picture.as_uri(), picture.with_suffix(".txt").read_text()])
    recipe = tmp_path / "listed.toml"
    assert unclip("init", str(listed), "--out", str(recipe)).returncode == 0
    overrides = ["--set", f"workspace={tmp_path / 'w'}", "--set", "tracking.uri=off"]
    done = unclip("run", str(recipe), "--until", "pairs", *overrides)
    assert done.returncode == 0, done.stdout
    rows = {row["step"]: row for row in unclip_json("status", str(recipe), *overrides)}
    assert rows["pairs"]["counts"]["ok"] == len(list(photographs.glob("*.jpg")))
    assert unclip("init", str(listed), "--out", str(recipe)).returncode == 2
