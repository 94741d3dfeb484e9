"""Trainings that read token states beside the same trainings that run the text tower."""

import dataclasses
from pathlib import Path

import pytest
import torch

from pipeline.clip.frozen import FrozenText
from pipeline.data.batch import Batch
from pipeline.data.batches import plan_order
from pipeline.data.order import Share
from pipeline.networks.costs import build_clip
from pipeline.recipe.plan import make_plan
from pipeline.recipe.recipe import Recipe
from pipeline.train.assemble import Parts, TrainJob, assemble
from pipeline.train.job import run_job
from pipeline.train.loop import make_step
from pipeline.train.memory import count_memory
from pipeline.train.state import create_state
from pipeline.train.validation import Validation
from pipeline.workspace.store import Artifact
from tests.models.tiny_models import randomise
from tests.tiny.token_states import embed_with_states
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, training_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    folder = tmp_path_factory.mktemp("inputs")
    inputs = tiny_inputs(folder)
    return inputs | {"embed": embed_with_states(folder / "states", inputs["download"], inputs["clip"])}


def _with_states(recipe: Recipe) -> Recipe:
    return dataclasses.replace(recipe, embed=dataclasses.replace(recipe.embed, token_states=True))


def _with_resources(recipe: Recipe, name: str, **resources: object) -> Recipe:
    section = recipe.trained()[name]
    changed = dataclasses.replace(section.resources, **resources)
    return dataclasses.replace(recipe, **{name: dataclasses.replace(section, resources=changed)})


def _refuse_captions(patch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the text tower runs")

    patch.setattr(FrozenText, "encode_tokens", refuse)


def _losses(job: TrainJob, parts: Parts, num_steps: int = 4) -> tuple[list[float], list[Batch]]:
    """The loss of each of the first steps, and their batches."""
    state = create_state(parts.network, job.section.train, job.device)
    share = Share(job.section.train.batch_size)
    step = make_step(parts.objective(state.network).train(), job.section, share, seed=job.seed)
    order = plan_order(parts.train, job.seed, where="test")
    losses, batches = list[float](), list[Batch]()
    for number in range(num_steps):
        batches.append(parts.train.batch(order.locations(number * len(share), (number + 1) * len(share))))
        state.loss_sum.zero_()
        step(state, batches[-1])
        state.step += 1
        losses.append(state.loss_sum[0].item())
    return losses, batches


@pytest.mark.parametrize("micro_batch_size", [0, 1, 3])
@pytest.mark.parametrize("name", ["prior", "prior_2", "decoder"])
def test_a_training_that_reads_token_states_takes_the_same_steps(
    name: str, micro_batch_size: int, inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = _with_resources(training_recipe(), name, micro_batch_size=micro_batch_size)
    jobs = [tiny_job(name, inputs, tmp_path, each) for each in (recipe, _with_states(recipe))]
    encoded, stored = map(assemble, jobs)
    theirs = stored.network.state_dict()
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in encoded.network.state_dict().items())
    randomise(encoded.network, std=0.1)  # else the decoder ends in zeros and reads no caption
    stored.network.load_state_dict(encoded.network.state_dict())
    losses, batches = _losses(jobs[0], encoded)
    _refuse_captions(monkeypatch)
    ours, same = _losses(jobs[1], stored)
    assert [list(batch.uids) for batch in batches] == [list(batch.uids) for batch in same]
    assert ours == pytest.approx(losses, rel=1e-3)
    assert ours != losses  # rounded to float16
    measures = Validation(jobs[1], stored.clip, stored.validation)(stored.network.eval())
    assert measures.keys() > {"val_loss"}


@pytest.mark.parametrize("name", ["prior", "decoder"])
def test_a_whole_training_needs_no_text_tower(
    name: str, inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = training_recipe(4)
    metrics = run_job(tiny_job(name, inputs, tmp_path / "encoded", recipe), no_watch)
    _refuse_captions(monkeypatch)
    ours = run_job(tiny_job(name, inputs, tmp_path / "stored", _with_states(recipe)), no_watch)
    assert ours["val_loss"] == pytest.approx(metrics["val_loss"], rel=5e-3)
    assert Artifact(str(tmp_path / "stored")).read_json("config.json") == Artifact(str(tmp_path / "encoded")).read_json(
        "config.json"
    )


@pytest.mark.parametrize("name", ["prior", "prior_2", "decoder", "noisy_clip"])
def test_no_frozen_clip_is_loaded_or_counted_where_states_are_read(
    name: str, inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    recipe = _with_states(_with_resources(training_recipe(), name, validation="beside"))
    with torch.device("meta"):
        counted = count_memory(name, recipe.trained()[name], recipe, build_clip(recipe))
    clip = assemble(tiny_job(name, inputs, tmp_path, recipe)).clip
    assert (clip is None, counted.clip == 0) == ((name != "noisy_clip",) * 2)  # its rows are pictures, not embeddings


def test_a_decoder_that_measures_pictures_has_the_image_tower_alone(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    recipe = _with_states(training_recipe())
    with torch.device("meta"):
        counted = count_memory("decoder", recipe.decoder, recipe, build_clip(recipe)).clip
    clip = assemble(tiny_job("decoder", inputs, tmp_path, recipe)).clip
    assert clip is not None
    assert {name.partition(".")[0] for name in clip.clip.model.state_dict()} == {"visual", "logit_scale"}
    assert counted == sum(tensor.nbytes for tensor in clip.clip.model.state_dict().values())


def test_the_field_is_part_of_a_key_only_where_it_is_set() -> None:
    recipe = training_recipe()
    steps = {step.name: step for step in make_plan(recipe) if step.name != "pairs"}
    assert "token_states" not in steps["embed"].section
    changed = {step.name: step for step in make_plan(_with_states(recipe)) if step.name != "pairs"}
    others = {name for name, step in steps.items() if step.key != changed[name].key}
    assert others == {"embed", "index", "prior", "prior_2", "decoder", "evaluate"}
