import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.cascade import Cascade
from models.stage import StageStep
from pipeline.errors import ConfigError, StepError
from pipeline.recipe.keys import recipe_key
from pipeline.recipe.lineage import trace
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.sampling.sample import PictureFolder, sample_prompts, sample_recipe
from tests.tiny.workspace import evaluated_tables

PROMPTS = ["a red circle", "a small blue star on a white background", "a green square"]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_sample_recipe_writes_pictures_grid_and_rows(tiny: Recipe, tmp_path: Path) -> None:
    rows = sample_recipe(tiny, PROMPTS, num_images=2, seed=3, out_dir=tmp_path)
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, s) for p in PROMPTS for s in (3, 4)]
    assert {path.name for path in tmp_path.iterdir()} == {row["file"] for row in rows} | {"grid.png", "samples.jsonl"}
    assert [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()] == json.loads(
        json.dumps(rows)
    )
    assert rows[0]["settings"]["decoder"]["guidance_scale"] == 1.5
    with Image.open(tmp_path / rows[0]["file"]) as image:
        assert image.size == (32, 32)
        image.load()
        facts, parameters = json.loads(image.info["unclip"]), image.info["parameters"].splitlines()
    assert (facts["prompt"], facts["seed"]) == (PROMPTS[0], 3)
    assert facts["recipe_key"] == recipe_key(tiny)
    assert parameters[0] == PROMPTS[0]
    assert "CFG scale: 1.5, Seed: 3, Size: 32x32" in parameters[1]  # as in the files of a server
    assert facts["networks"] == {step.name: step.key for step in make_plan(tiny) if step.name in facts["networks"]}
    assert {"clip", "prior", "decoder", "upsampler_2"} <= facts["networks"].keys()


def test_sample_grid_has_a_block_for_each_prompt(cascade: Cascade, tmp_path: Path) -> None:
    """Two blocks of two 128 px pictures side by side; three prompts take two rows."""
    sample_prompts(cascade, PROMPTS, num_images=2, seed=3, out=PictureFolder(tmp_path))
    with Image.open(tmp_path / "grid.png") as grid, Image.open(tmp_path / "000-0.png") as first:
        assert grid.width == 3 * 18 + 2 * (2 * 128 + 6)
        assert 2 * 128 < grid.height < 3 * 128
        enlarged = np.asarray(first.resize((128, 128), Image.Resampling.NEAREST))
        np.testing.assert_array_equal(np.asarray(grid)[19:145, 19:145], enlarged[1:-1, 1:-1])


def test_sampling_again_with_the_same_seed_gives_the_same_bytes(cascade: Cascade, tmp_path: Path) -> None:
    for name in ("a", "b"):
        sample_prompts(cascade, PROMPTS, num_images=1, seed=11, out=PictureFolder(tmp_path / name))
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    other = sample_prompts(cascade, PROMPTS, num_images=1, seed=12, out=PictureFolder(tmp_path / "c"))
    assert (tmp_path / "c" / other[0]["file"]).read_bytes() != (tmp_path / "a" / other[0]["file"]).read_bytes()


def test_a_picture_does_not_depend_on_the_rest_of_its_batch(cascade: Cascade, tmp_path: Path) -> None:
    together = sample_prompts(cascade, PROMPTS, num_images=3, seed=0, out=PictureFolder(tmp_path / "all"), batch_size=4)
    alone = sample_prompts(cascade, PROMPTS[1:2], num_images=1, seed=2, out=PictureFolder(tmp_path / "one"))
    same = next(row for row in together if row["prompt"] == PROMPTS[1] and row["seed"] == 2)
    with Image.open(tmp_path / "all" / same["file"]) as a, Image.open(tmp_path / "one" / alone[0]["file"]) as b:
        assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1


def test_sampling_before_training_says_which_step_is_missing(tmp_path: Path) -> None:
    recipe = parse_recipe(evaluated_tables(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="clip is not finished"):
        sample_recipe(recipe, PROMPTS, num_images=1, seed=0, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sampling_where_a_file_is_in_the_way_says_so(cascade: Cascade, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(StepError, match="out: a file is where a folder should be"):
        sample_prompts(cascade, PROMPTS, num_images=1, seed=0, out=PictureFolder(tmp_path / "out"))


def test_what_is_sampled_says_what_made_it_from_the_moment_on(tiny: Recipe, tmp_path: Path) -> None:
    """A run of hours that ends early leaves whole pictures."""

    def end_after_the_first(_: StageStep) -> None:
        if (tmp_path / "000-0.png").exists():
            raise KeyboardInterrupt

    num_images = tiny.evaluate.batch_size
    with pytest.raises(KeyboardInterrupt):
        sample_recipe(tiny, PROMPTS, num_images=num_images, seed=3, out_dir=tmp_path, watch=end_after_the_first)
    assert {path.name for path in tmp_path.iterdir()} == {f"000-{number}.png" for number in range(num_images)}
    for number in range(num_images):
        facts = trace(str(tmp_path / f"000-{number}.png"), tiny.workspace).facts
        assert (facts["prompt"], facts["seed"]) == (PROMPTS[0], 3 + number)


def test_sampling_nothing_is_refused(cascade: Cascade, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to sample"):
        sample_prompts(cascade, [], num_images=1, seed=0, out=PictureFolder(tmp_path / "out"))
