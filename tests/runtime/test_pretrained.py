"""The clip step of a recipe that takes a CLIP as it is."""

from pathlib import Path

import pytest
import torch

from pipeline.clip import load_clip
from pipeline.errors import ConfigError
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import parse_recipe
from pipeline.runtime.context import StepContext
from pipeline.runtime.train import run_clip
from tests.tiny_shards import make_clip


def _context(folder: Path, name: str, tag: str = "none") -> StepContext:
    clip = {"source": "pretrained", "name": name, "tag": tag}
    recipe = parse_recipe({"workspace": str(folder / "workspace"), "clip": clip})
    step = next(step for step in make_plan(recipe) if step.name == "clip")
    return StepContext(recipe, step, recipe.workspace)


def test_clip_step_takes_over_a_local_folder(tmp_path: Path) -> None:
    context = _context(tmp_path, str(make_clip(tmp_path / "mine", seed=5)))
    result = run_clip(context)
    theirs = load_clip(tmp_path / "mine").model.state_dict()
    ours = load_clip(context.output.path("open_clip_config.json").parent).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert result.metrics["num_parameters"] == sum(
        weight.numel() for weight in load_clip(tmp_path / "mine").model.parameters()
    )


@pytest.mark.parametrize(
    ("name", "tag", "words"),
    [("ViT-Nowhere", "laion", "ViT-Nowhere"), ("ViT-B-32", "no_such_tag", "no_such_tag")],
)
def test_clip_step_names_the_clip_that_it_does_not_find(tmp_path: Path, name: str, tag: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"clip\.name, clip\.tag: CLIP .*{words}"):
        run_clip(_context(tmp_path, name, tag))
