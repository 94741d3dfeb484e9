"""What the HTTP interface of a recipe says of its networks."""

import json
from dataclasses import replace
from pathlib import Path

from models.request import SampleRequest
from pipeline.recipe.picture_card import made_with, model_card
from pipeline.recipe.plan import recipe_key
from pipeline.runtime.served import served_artifacts
from tests.tiny.workspace import served_workspace


def test_a_picture_names_its_recipe_its_networks_and_the_runs_that_trained_them(tmp_path: Path) -> None:
    recipe = served_workspace(tmp_path, overrides=("decoder.model.diffusion.num_timesteps=300",))
    artifacts, _ = served_artifacts(recipe)
    manifest = artifacts["decoder"].manifest()
    assert manifest is not None
    artifacts["decoder"].commit(replace(manifest, tracking_run_id="0123abcd"))
    card = model_card(recipe, artifacts)
    facts = json.loads(made_with(card, SampleRequest("a", (1,)), 1, 32)["unclip"])
    assert facts["recipe_key"] == recipe_key(recipe)
    assert facts["mlflow_runs"] == {"decoder": "0123abcd"}
    assert facts["networks"].keys() == {"clip", "prior", "decoder", "upsampler_1", "upsampler_2"}
    assert facts["networks"]["decoder"] == artifacts["decoder"].key
    assert card.num_timesteps == 300
