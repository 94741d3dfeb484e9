"""A checkpoint is continued, sampled from, and begun with."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pipeline.errors import ConfigError, DataError
from pipeline.networks.files import load_network
from pipeline.recipe.plan import artifact_of, make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.sampling.at import checkpoint_networks
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.job import run_job
from pipeline.train.resume import (
    checkpoint_name,
)
from pipeline.workspace.store import Artifact, Workspace
from tests.tiny.training import no_watch, tiny_inputs, training_recipe


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, TrainJob, list[str]]:
    """An upsampler's training under its recipe, of which the newest checkpoint was flipped, and what it said then."""
    folder = tmp_path_factory.mktemp("training")
    recipe = dataclasses.replace(training_recipe(), workspace=str(folder / "workspace"))
    step = next(step for step in make_plan(recipe) if step.name == "upsampler_1")
    output = artifact_of(Workspace(recipe.workspace), step)
    job = TrainJob(step.name, recipe, tiny_inputs(folder), output, step.key, torch.device("cpu"))
    run_job(job, no_watch)
    weights = output.path("model.safetensors").read_bytes()
    path = output.path(checkpoint_name(4))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    messages: list[str] = []

    def note(done: int, total: int, message: str) -> None:
        messages.append(f"{done} {message}")

    metrics = run_job(job, note)
    assert metrics["num_damaged_checkpoints"] == 1
    assert output.path("model.safetensors").read_bytes() == weights
    return recipe, job, messages


def test_a_training_says_that_it_continues_from_an_older_checkpoint(
    training: tuple[Recipe, TrainJob, list[str]],
) -> None:
    _, _, messages = training
    assert messages[0].startswith("2 training; continued from step 2: the checkpoint of step 4 is damaged")
    assert "the checkpoint of step 4 is damaged" in messages[-1]


@pytest.mark.parametrize("number", ["4", "last"])
def test_a_network_in_training_is_read_from_its_checkpoint(
    training: tuple[Recipe, TrainJob, list[str]], number: str
) -> None:
    recipe, job, _ = training
    with checkpoint_networks(recipe, [f"upsampler_1@{number}"]) as live:
        network = load_network(live["upsampler_1"], requested=recipe.trained()["upsampler_1"].model)
        assert live["upsampler_1"].uri.endswith(f"/{job.digest}@4")
    with safe_open(job.output.path(checkpoint_name(4)), "pt") as file:
        for name, weight in network.state_dict().items():
            assert torch.equal(weight, file.get_tensor(f"ema.{name}"))


def test_a_checkpoint_that_is_not_there_is_refused_by_those_that_are(
    training: tuple[Recipe, TrainJob, list[str]],
) -> None:
    recipe, job, _ = training
    refused = {
        "upsampler_1@3": "upsampler_1 has the checkpoints at 2, 4",
        "prior@last": "prior has no checkpoint",
        "clip@4": "write STEP@NUMBER",
        "upsampler_1@": "write STEP@NUMBER",
    }
    for text, words in refused.items():
        with pytest.raises(ConfigError, match=words), checkpoint_networks(recipe, [text]):
            pass
    path = job.output.path(checkpoint_name(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="take another checkpoint"), checkpoint_networks(recipe, ["upsampler_1@2"]):
        pass


def _from(recipe: Recipe, init_from: Path, **train: int) -> Recipe:
    section = recipe.upsampler_1
    assert section is not None
    changed = dataclasses.replace(section, init_from=str(init_from), train=dataclasses.replace(section.train, **train))
    return dataclasses.replace(recipe, upsampler_1=changed)


def test_a_training_starts_from_a_checkpoint_of_another(
    training: tuple[Recipe, TrainJob, list[str]], tmp_path: Path
) -> None:
    recipe, job, _ = training
    whole = job.output.path(checkpoint_name(4)).read_bytes()
    file, other = tmp_path / "kept.safetensors", tmp_path / "other.safetensors"
    file.write_bytes(whole)
    started = _from(recipe, file, num_steps=0)
    new = dataclasses.replace(job, recipe=started, output=Artifact(str(tmp_path / "new")))
    run_job(new, no_watch)
    with safe_open(file, "pt") as tensors:
        for name, weight in load_network(new.output).state_dict().items():
            assert torch.equal(weight, tensors.get_tensor(f"ema.{name}"))
    assert not started.trained()["upsampler_1"].finished_network  # its weights are those of no folder

    other.write_bytes(whole)
    keys = [_key(each) for each in (recipe, started, _from(recipe, other, num_steps=0))]
    assert keys[0] != keys[1] == keys[2]
    other.write_bytes(whole[:-1])
    assert _key(_from(recipe, other, num_steps=0)) != keys[1]
    with pytest.raises(DataError, match=r"init_from .*other\.safetensors: .* name another checkpoint, or the folder"):
        assemble(dataclasses.replace(new, recipe=_from(recipe, other)))
    wide = _from(recipe, file)
    unet = dataclasses.replace(wide.upsampler_1.model.unet, channels=2 * wide.upsampler_1.model.unet.channels)
    model = dataclasses.replace(wide.upsampler_1.model, unet=unet)
    wide = dataclasses.replace(wide, upsampler_1=dataclasses.replace(wide.upsampler_1, model=model))
    with pytest.raises(DataError, match=r"init_from .*kept\.safetensors: a Upsampler of another shape"):
        assemble(dataclasses.replace(new, recipe=wide))


def test_a_training_goes_on_inside_its_run_when_the_checkpoint_that_it_started_from_is_gone(
    training: tuple[Recipe, TrainJob, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run needs a copy: see tests/recipe/test_user_files.py."""
    recipe, job, _ = training
    file = tmp_path / "kept.safetensors"
    file.write_bytes(job.output.path(checkpoint_name(4)).read_bytes())
    calm, wild = (
        dataclasses.replace(job, recipe=_from(recipe, file), output=Artifact(str(tmp_path / name)))
        for name in ("calm", "wild")
    )
    run_job(calm, no_watch)

    def kill(done: int, total: int, message: str) -> None:
        if done == 5:
            file.unlink()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(wild, kill)
    run_job(wild, no_watch)
    weights = [each.output.path("model.safetensors").read_bytes() for each in (calm, wild)]
    assert weights[0] == weights[1]
    with pytest.raises(DataError, match=r"init_from .*kept\.safetensors: no such file; name another checkpoint"):
        assemble(dataclasses.replace(wild, output=Artifact(str(tmp_path / "new"))))

    with monkeypatch.context() as patch:  # it has gone since it was looked for
        patch.setattr(Artifact, "exists", lambda *_: True)
        with pytest.raises(DataError, match=r"init_from .*kept\.safetensors: no such file; name another checkpoint"):
            assemble(dataclasses.replace(wild, output=Artifact(str(tmp_path / "new"))))


def _key(recipe: Recipe) -> str:
    return next(step.key for step in make_plan(recipe) if step.name == "upsampler_1")
