"""Where the first weights of a training come from stands in its manifest, whatever becomes of them."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import StepError
from pipeline.recipe.lineage import write_origin
from pipeline.recipe.plan import artifact_of, make_plan, manifest_of
from pipeline.recipe.recipe import Recipe
from pipeline.train import origin
from pipeline.train.assemble import TrainJob
from pipeline.train.job import run_job
from pipeline.train.origin import note_begun_with, origin_of
from pipeline.train.resume import checkpoint_name
from pipeline.workspace.store import INPUTS, MANIFEST, Artifact, Workspace
from tests.tiny.training import no_watch, tiny_inputs, training_recipe

STEP = "upsampler_1"
INPUTS_OF_FIRST = {"download": "1"}


@pytest.fixture
def first(tmp_path: Path) -> TrainJob:
    """A training that has published its weights and is not committed yet."""
    recipe = dataclasses.replace(training_recipe(), workspace=str(tmp_path / "workspace"))
    step = next(step for step in make_plan(recipe) if step.name == STEP)
    output = artifact_of(Workspace(recipe.workspace), step)
    job = TrainJob(STEP, recipe, tiny_inputs(tmp_path), output, step.key, torch.device("cpu"))
    output.write_json(INPUTS, INPUTS_OF_FIRST)
    run_job(job, no_watch)
    return job


def _begin(first: TrainJob, init_from: Path | str, output: Path) -> TrainJob:
    section = dataclasses.replace(first.recipe.trained()[STEP], init_from=str(init_from))
    recipe: Recipe = dataclasses.replace(first.recipe, **{STEP: section})
    return dataclasses.replace(first, recipe=recipe, digest="begun", output=Artifact(str(output)))


def _source(first: TrainJob, **more: Any) -> dict[str, Any]:
    return {"begun_with": {"name": STEP, "key": first.digest, **more}}


def _commit(first: TrainJob, **metrics: Any) -> None:
    step = next(step for step in make_plan(first.recipe) if step.name == STEP)
    manifest = manifest_of(step, first.output)
    first.output.write_json(
        MANIFEST, dataclasses.replace(manifest, input_contents=INPUTS_OF_FIRST, metrics=metrics).to_dict()
    )


def test_a_training_that_began_with_a_checkpoint_says_with_whose_when_that_is_gone(
    first: TrainJob, tmp_path: Path
) -> None:
    second = _begin(first, first.output.path(checkpoint_name(4)), tmp_path / "begun")

    def kill(done: int, total: int, message: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(second, kill)
    first.output.clear()
    metrics = run_job(second, no_watch)
    assert metrics["begun_with"] == _source(first, input_contents=INPUTS_OF_FIRST)["begun_with"]


def test_the_network_of_a_folder_is_known_by_its_manifest_with_where_its_own_weights_come_from(
    first: TrainJob, tmp_path: Path
) -> None:
    former = {"name": STEP, "key": "former", "input_contents": {"download": "0"}}
    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(first.output.uri)
    _commit(first, begun_with=former)
    shutil.copytree(first.output.uri, copy)
    for folder in (first.output.uri, link, copy, f"file://{first.output.uri}"):
        job = _begin(first, folder, tmp_path / "begun")
        assert origin_of(job) == _source(first, input_contents=INPUTS_OF_FIRST, begun_with=former)
    first.output.write_bytes(MANIFEST, b"damaged")
    assert origin_of(_begin(first, first.output.uri, tmp_path / "begun")) == _source(first)
    (copy / MANIFEST).write_text('{"made by": "another program"}')
    assert origin_of(_begin(first, copy, tmp_path / "begun")) == {}


def test_the_copy_of_a_checkpoint_is_known_by_the_key_in_it(first: TrainJob, tmp_path: Path) -> None:
    copy = tmp_path / "copy.safetensors"
    shutil.copyfile(first.output.path(checkpoint_name(4)), copy)
    assert origin_of(_begin(first, copy, tmp_path / "begun")) == _source(first)
    copy.unlink()
    assert origin_of(_begin(first, copy, tmp_path / "begun")) == {}


def test_a_network_of_an_exported_folder_is_known_by_that(first: TrainJob, tmp_path: Path) -> None:
    _commit(first)
    folder = tmp_path / "exported" / STEP
    shutil.copytree(first.output.uri, folder)
    (folder / MANIFEST).unlink()
    write_origin(folder.parent, first.recipe, {STEP: first.output})
    assert origin_of(_begin(first, folder, tmp_path / "begun")) == _source(first, input_contents=INPUTS_OF_FIRST)
    first.output.write_bytes("model.safetensors", b"made anew")
    _commit(first)
    assert origin_of(_begin(first, folder, tmp_path / "begun")) == _source(first)
    (folder.parent / "unclip.json").write_text("damaged")
    assert origin_of(_begin(first, folder, tmp_path / "begun")) == {}


def test_a_storage_that_does_not_answer_at_the_end_of_a_training_is_not_asked_or_no_failure(
    first: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, questions = tmp_path / "of another program", list[str]()
    folder.mkdir()
    job = _begin(first, folder, tmp_path / "begun")
    note_begun_with(job)

    def fail(folder: str, *_: Any) -> None:
        questions.append(folder)
        raise StepError("it does not answer")

    monkeypatch.setattr(origin, "_of_files", fail)
    assert (origin_of(job), questions) == ({}, [])
    job.output.clear()  # as an earlier release has begun it
    assert (origin_of(job), questions) == ({}, [str(folder)])
