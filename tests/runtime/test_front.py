"""What the HTTP interface of a recipe says of its networks."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from models.request import RawPicture, SampleRequest, TextDiff, Variation
from pipeline.errors import DataError
from pipeline.networks.diffusers import export_native
from pipeline.networks.files import verified_files
from pipeline.recipe.keys import recipe_key
from pipeline.recipe.lineage import weights_of, write_origin
from pipeline.recipe.picture_card import ModelCard, made_with, model_card
from pipeline.recipe.recipe import load_recipe
from pipeline.recipe.steps import CASCADE_STEPS
from pipeline.runtime.served import served_artifacts
from tests.tiny.workspace import served_workspace

REQUEST = SampleRequest("a", (1,))
PICTURE = RawPicture(1, 1, bytes(3))


def test_a_picture_names_its_recipe_its_networks_and_the_runs_that_trained_them(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path, overrides=("decoder.model.diffusion.num_timesteps=300",))
    artifacts, _ = served_artifacts(recipe)
    manifest = artifacts["decoder"].manifest()
    assert manifest is not None
    artifacts["decoder"].commit(replace(manifest, tracking_run_id="0123abcd"))
    card = model_card(recipe, artifacts)
    facts = json.loads(made_with(card, REQUEST, 1, 32)["unclip"])
    assert facts["recipe_key"] == recipe_key(recipe)
    assert facts["mlflow_runs"] == {"decoder": "0123abcd"}
    assert facts["networks"].keys() == {"clip", "prior", "decoder", "upsampler_1", "upsampler_2"}
    assert facts["networks"]["decoder"] == artifacts["decoder"].key
    assert facts["weights"].keys() == facts["networks"].keys()
    for name, weights in facts["weights"].items():
        file = "open_clip_model.safetensors" if name == "clip" else "model.safetensors"
        assert weights == hashlib.sha256(artifacts[name].path(file).read_bytes()).hexdigest()
    assert f"Model hash: {facts['weights']['decoder'][:10]}, " in made_with(card, REQUEST, 1, 32)["parameters"]
    assert card.num_timesteps == 300


def test_networks_of_an_exported_folder_have_the_digests_with_which_they_are_compared(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    networks = {name: artifacts[name] for name in CASCADE_STEPS if name in artifacts}
    export_native(networks, tmp_path / "folder")
    write_origin(tmp_path / "folder", recipe, networks)
    folder = load_recipe(tmp_path / "folder")
    exported, _ = served_artifacts(folder)
    digests = {name: weights_of(manifest) for name, one in networks.items() if (manifest := one.manifest())}
    card = model_card(folder, exported)
    assert dict(card.weights) == digests
    assert f"Model hash: {digests['decoder'][:10]}, " in made_with(card, REQUEST, 1, 32)["parameters"]
    for name in networks:
        verified_files(exported[name])
    exported["prior"].path("model.safetensors").write_bytes(b"other weights")
    with pytest.raises(DataError, match=r"prior/model\.safetensors: does not match its checksum"):
        verified_files(exported["prior"])


def test_networks_of_a_folder_from_elsewhere_have_no_digests(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path)
    artifacts, _ = served_artifacts(recipe)
    export_native({name: artifacts[name] for name in CASCADE_STEPS if name in artifacts}, tmp_path / "folder")
    folder = load_recipe(tmp_path / "folder")
    for artifact in served_artifacts(folder)[0].values():
        verified_files(artifact)
    card = model_card(folder, served_artifacts(folder)[0])
    texts = made_with(card, REQUEST, 1, 32)
    assert json.loads(texts["unclip"])["weights"] == {}
    assert "Model hash" not in texts["parameters"]


@pytest.mark.parametrize("edit", [Variation(PICTURE, 0.5), TextDiff(PICTURE, "a", "b", (0.0,))])
def test_a_picture_from_the_noise_of_another_says_how_ddim_made_it(edit: Variation | TextDiff) -> None:
    recipes = {"method": "ddpm", "num_steps": 7, "guidance_scale": 3.0, "eta": 1.0, "clip_guidance_scale": 2.0}
    card = ModelCard("tiny", 32, sampling={"decoder": recipes}, num_timesteps=40)
    sampler = json.loads(made_with(card, replace(REQUEST, edit=edit), 1, 32)["unclip"])["sampling"]["decoder"]
    assert (sampler["method"], sampler["num_steps"], sampler["guidance_scale"]) == ("ddim", 40, 1.0)
    assert sampler["eta"] == (0.5 if isinstance(edit, Variation) else 0.0)
    assert sampler["clip_guidance_scale"] == 0.0
