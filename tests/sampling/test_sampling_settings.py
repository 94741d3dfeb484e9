"""How a network is sampled is part of no training: the recipe says it, of the same weights."""

from pathlib import Path

import numpy as np
import pytest

from models.decoder.network import Decoder
from models.editor import EditSettings
from models.prior.network import Prior
from pipeline.networks.files import load_network, save_network
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.sampling.edit_options import EditOptions
from pipeline.sampling.edit_pictures import edit_recipe
from pipeline.sampling.sample import sample_recipe
from tests.tiny.shards import pixels, plain_picture
from tests.tiny.workspace import served_workspace

PROMPT = "a red circle on a white background"
SETTINGS = (
    "decoder.model.sampler.num_steps=4",
    "decoder.model.sampler.guidance_scale=4.0",
    "prior.model.sampler.num_steps=7",
    "prior.model.sampler.guidance_scale=4.0",
    "prior.model.num_candidates=6",
    "upsampler_2.model.sampler.num_steps=4",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of random weights, and its recipe beside it."""
    folder = tmp_path_factory.mktemp("settings")
    artifacts = finished_artifacts(served_workspace(folder), CASCADE_STEPS)
    prior, decoder = (load_network(artifacts[name]) for name in ("prior", "decoder"))
    assert isinstance(prior, Prior)
    assert isinstance(decoder, Decoder)
    prior.image_in.weight.mul_(30)  # else what it predicts hardly depends on where its chain stands
    decoder.image_to_embedding.weight.mul_(40)  # else embeddings of length one hardly change its pictures
    for network, name in ((prior, "prior"), (decoder, "decoder")):
        save_network(artifacts[name], network.config, network.dims, network.state_dict())
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return sampled(folder, tmp_path_factory.mktemp("plain"))


def sampled(folder: Path, out: Path, *overrides: str) -> np.ndarray:
    """Pictures of `unclip sample` under a changed recipe."""
    recipe = load_recipe(folder / "tiny.toml", overrides)
    rows = sample_recipe(recipe, [PROMPT], num_images=4, seed=5, out_dir=out)
    return np.stack([pixels((out / row["file"]).read_bytes()) for row in rows]).astype(int)


def test_the_same_settings_give_the_same_pictures(folder: Path, plain: np.ndarray, tmp_path: Path) -> None:
    assert np.array_equal(sampled(folder, tmp_path, "decoder.model.sampler.num_steps=3"), plain)  # as the recipe says


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_setting_gives_other_pictures_of_the_same_weights(
    folder: Path, plain: np.ndarray, tmp_path: Path, setting: str
) -> None:
    assert np.abs(sampled(folder, tmp_path, setting) - plain).max() > 2


def test_an_edit_of_a_prompt_takes_the_settings_of_the_recipe(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(plain_picture("red"))
    options = EditOptions(prompt=PROMPT, strength=0.7, num_images=1)
    walk = EditSettings(num_steps=4, num_refinements=0)
    pictures: list[np.ndarray] = []
    for number, overrides in enumerate(((), ("decoder.model.sampler.guidance_scale=4.0",))):
        recipe, out = load_recipe(folder / "tiny.toml", overrides), tmp_path / str(number)
        [row] = edit_recipe(recipe, "sdedit", [str(tmp_path / "a.png")], options, walk, out_dir=out)
        pictures.append(pixels((out / row["file"]).read_bytes()).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() > 2
