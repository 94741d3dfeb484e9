"""Pictures of a cascade of which some networks are in training, or have not begun."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.errors import ConfigError, DataError
from pipeline.recipe.plan import Step, artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.runtime.context import StepContext
from pipeline.sampling import at as at_module
from pipeline.sampling.at import note_on_left_out
from pipeline.sampling.sample import sample_recipe
from pipeline.train.checkpoint import Checkpoint
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.recipe import training
from tests.tiny.training import train_here
from tests.tiny.workspace import evaluated_workspace

PROMPT = "a red circle"
SHORT = training(2, batch_size=4, save_every_steps=1)


def _step(recipe: Recipe, name: str) -> Step:
    return next(step for step in make_plan(recipe) if step.name == name)


def _artifact(recipe: Recipe, name: str) -> Artifact:
    return artifact_of(Workspace(recipe.workspace), _step(recipe, name))


def _commit(recipe: Recipe, name: str) -> None:
    _artifact(recipe, name).commit(manifest_of(_step(recipe, name), _artifact(recipe, name)))


def _train(recipe: Recipe, name: str) -> None:
    train_here(StepContext(recipe, _step(recipe, name), recipe.workspace))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The decoder has a checkpoint at step 1, and upsampler_1 waits for it; upsampler_2 is there."""
    workspace = tmp_path_factory.mktemp("training") / "workspace"
    recipe = evaluated_workspace(workspace, decoder=SHORT, upsampler_1=SHORT)
    for name in ("decoder", "upsampler_1"):
        shutil.rmtree(_artifact(recipe, name).uri)
    _train(recipe, "decoder")
    return recipe


@pytest.fixture
def recipe(trained: Recipe, tmp_path: Path) -> Recipe:
    """The same in a workspace of the test's own."""
    shutil.copytree(trained.workspace, tmp_path / "workspace")
    return replace(trained, workspace=str(tmp_path / "workspace"))


def _sample(recipe: Recipe, *at: str) -> tuple[tuple[int, int], Any]:
    """Size of a picture, and what it says of itself."""
    out = Path(recipe.workspace).parent / "out"
    rows = sample_recipe(recipe, [PROMPT], num_images=1, seed=3, out_dir=out, at=at)
    with Image.open(out / rows[0]["file"]) as image:
        return image.size, json.loads(image.info["unclip"])


def test_pictures_end_at_the_last_network_that_is_trained(recipe: Recipe) -> None:
    size, facts = _sample(recipe, "decoder@last")
    assert size == (8, 8)
    assert facts["networks"].keys() == {"clip", "prior", "decoder"}
    assert facts["networks"]["decoder"] == f"{_step(recipe, 'decoder').key}@1"
    note = "upsampler_1 is not finished: the pictures are those of decoder, of 8 px"
    assert note_on_left_out(recipe, ["decoder@last"]) == note
    assert not note_on_left_out(recipe, [])


def test_an_upsampler_that_is_named_is_not_left_out_and_needs_those_before_it(recipe: Recipe) -> None:
    assert not note_on_left_out(recipe, ["upsampler_2@last"])
    _train(recipe, "upsampler_1")
    _commit(recipe, "decoder")
    size, facts = _sample(recipe, "upsampler_1@1")
    assert size == (32, 32)
    assert facts["networks"]["upsampler_1"] == f"{_step(recipe, 'upsampler_1').key}@1"


def test_what_cannot_be_sampled_says_what_can(recipe: Recipe) -> None:
    def refused(*at: str) -> str:
        with pytest.raises(ConfigError) as caught:
            _sample(recipe, *at)
        return str(caught.value)

    first = "is not finished under this recipe; first: unclip run RECIPE"
    assert refused() == f"decoder {first}; or take what is trained so far: --at decoder@last"
    assert refused("upsampler_1@last").startswith("--at upsampler_1@last: upsampler_1 has no checkpoint")
    _commit(recipe, "decoder")
    first += " --until upsampler_1"
    assert refused() == f"upsampler_1 {first}; or sample without: --set upsampler_1=false --set upsampler_2=false"
    _train(recipe, "upsampler_1")
    assert refused() == f"upsampler_1 {first}; or take what is trained so far: --at upsampler_1@last"


def test_a_checkpoint_that_the_training_removes_before_it_is_read(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = _artifact(recipe, "decoder")

    def late(artifact: Artifact, name: str) -> Checkpoint:
        """The checkpoint, in whose place the training has written a later one meanwhile."""
        if name == checkpoint_name(1):
            training.path(name).rename(Path(training.uri) / checkpoint_name(5))
        return Checkpoint(artifact, name)

    monkeypatch.setattr(at_module, "Checkpoint", late)
    _, facts = _sample(recipe, "decoder@last")
    assert facts["networks"]["decoder"] == f"{_step(recipe, 'decoder').key}@5"
    (Path(training.uri) / checkpoint_name(5)).rename(Path(training.uri) / checkpoint_name(1))
    with pytest.raises(ConfigError, match="--at decoder@1: decoder has the checkpoints at 5 under this recipe"):
        _sample(recipe, "decoder@1")


def test_a_checkpoint_that_cannot_be_read_is_no_reason_to_move_the_training(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = _artifact(recipe, "decoder")
    file = training.path(checkpoint_name(1))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"00000001\.safetensors: it is cut short .*; take another checkpoint$"):
        _sample(recipe, "decoder@1")
    file.write_bytes(whole)

    def missing(artifact: Artifact, name: str) -> None:
        artifact.path(f"{name} of another machine")  # storage over a network may list what it does not give yet

    monkeypatch.setattr(at_module, "Checkpoint", missing)
    with pytest.raises(DataError, match=r"00000001\.safetensors: it cannot be read; take another checkpoint$"):
        _sample(recipe, "decoder@1")
