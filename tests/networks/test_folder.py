"""A folder of networks as a recipe: sampled at once, without a run and without pairs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.networks.cascade import network_configs
from pipeline.recipe.plan import finished_artifacts
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from tests.tiny.networks import DECODER, make_cascade, save_cascade


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_cascade(make_cascade(), tmp_path / "mine")
    return Path("mine")


def test_folder_is_a_recipe_that_samples_its_networks_as_they_are(folder: Path) -> None:
    recipe = load_recipe(folder, ["decoder.model.sampler.num_steps=3"])
    artifacts = finished_artifacts(recipe, CASCADE_STEPS)
    assert {name: artifact.uri for name, artifact in artifacts.items()} == {
        name: str(folder.resolve() / name) for name in ("clip", "prior", "decoder", "upsampler_1")
    }
    decoder = network_configs(recipe)["decoder"]
    assert decoder == replace(DECODER, sampler=replace(DECODER.sampler, num_steps=3))


def test_network_that_is_to_be_trained_further_is_not_finished(folder: Path) -> None:
    with pytest.raises(ConfigError, match="decoder is not finished under this recipe; first: unclip run"):
        finished_artifacts(load_recipe(folder, ["decoder.train.num_steps=10"]), CASCADE_STEPS)
    with pytest.raises(ConfigError, match="pairs is not finished"):
        finished_artifacts(load_recipe(folder), ("pairs",))


def test_folders_that_are_no_cascade_are_refused_with_what_to_do(folder: Path) -> None:
    (folder / "noisy_clip").mkdir()
    with pytest.raises(ConfigError, match="noisy_clip elsewhere"):
        load_recipe(folder)
    (folder / "noisy_clip").rmdir()
    (folder / "decoder/config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"neither a recipe nor a folder of networks.*decoder/config.json: KeyError"):
        load_recipe(folder)
    (folder / "decoder/config.json").unlink()
    with pytest.raises(ConfigError, match=rf"writes it: there is no {folder}/decoder/config\.json$"):
        load_recipe(folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "UnCLIPPipeline"}))
    with pytest.raises(ConfigError, match="first: unclip import"):
        load_recipe(folder)
