"""What a network draws while it is trained: against what is known of the networks, with the same seeds each time."""

import errno
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from models.ar_prior.network import ArPrior
from models.decoder.network import Decoder
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from pipeline.clip.frozen import FrozenClip
from pipeline.errors import ConfigError
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.measuring import NUM_EMBEDDINGS
from pipeline.train.assemble import TrainJob, assemble
from pipeline.train.job import MetricsLog, run_job
from pipeline.train.results import BesideState, grid_name, read_result, result_steps, write_beside
from pipeline.train.resume import checkpoint_name, checkpoint_steps
from pipeline.train.validation import Validation, validate_beside
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact
from tests.tiny.storage import fail_calls
from tests.tiny.training import no_watch, tiny_inputs, tiny_job, training_recipe


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return tiny_inputs(tmp_path_factory.mktemp("measures"))


Measures = Callable[[nn.Module], dict[str, float]]


def network_and_measures(name: str, inputs: dict[str, Artifact], folder: Path) -> tuple[nn.Module, Measures]:
    """A network with random weights, and the measures of its training by their own names, the loss left out."""
    job = tiny_job(name, inputs, folder)
    parts = assemble(job)
    for parameter in parts.network.parameters():
        nn.init.normal_(parameter, std=0.1)
    validation = Validation(job, parts.clip, parts.validation)

    def measures(network: nn.Module) -> dict[str, float]:
        values = validation(network)
        assert values.pop("val_loss") > 0
        assert tuple(values) == tuple(f"val_{name}" for name in job.kind.measures)
        return {name.removeprefix("val_"): value for name, value in values.items()}

    return parts.network.eval(), measures


def test_a_prior_is_measured_by_cosines_to_its_own_and_to_other_rows(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    prior, measures = network_and_measures("prior", inputs, tmp_path)
    assert isinstance(prior, Prior)
    nn.init.zeros_(prior.out.weight)  # it always says its bias
    rows = assemble(tiny_job("prior", inputs, tmp_path)).validation.first(NUM_EMBEDDINGS)
    assert rows is not None
    assert len(rows) > 1
    z_text = load_clip_artifact(inputs["clip"]).encode_text(rows.captions).z_text
    embedding = prior.out.bias.detach()[None]
    expected = {"cos_z_image": rows.require_z_image(), "cos_z_text": z_text, "cos_unrelated_text": z_text}
    actual = measures(prior)
    assert actual.keys() == expected.keys()
    for name, vectors in expected.items():
        assert actual[name] == pytest.approx(F.cosine_similarity(embedding, vectors).mean().item(), abs=1e-5)


def test_an_autoregressive_prior_is_measured_alike(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    prior, measures = network_and_measures("prior_2", inputs, tmp_path)
    assert isinstance(prior, ArPrior)
    actual = measures(prior)
    assert actual.keys() == {"cos_z_image", "cos_z_text", "cos_unrelated_text"}
    assert actual["cos_z_text"] != actual["cos_unrelated_text"]
    assert measures(prior) == actual


def test_an_upsampler_that_adds_nothing_is_measured_as_bicubic(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    network, measures = network_and_measures("upsampler_1", inputs, tmp_path)
    assert isinstance(network, Upsampler)
    noisy = measures(network)
    assert noisy["psnr_db"] < noisy["bicubic_psnr_db"] - 3  # random weights
    diffusion = replace(network.config.diffusion, prediction="x0")
    plain = Upsampler(replace(network.config, diffusion=diffusion, residual=True))
    actual = measures(plain.eval())
    assert actual["bicubic_psnr_db"] == noisy["bicubic_psnr_db"]
    assert actual["psnr_db"] == pytest.approx(actual["bicubic_psnr_db"], abs=0.1)


def test_a_decoder_is_measured_by_what_clip_sees_in_its_pictures(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, measures = network_and_measures("decoder", inputs, tmp_path)
    assert isinstance(decoder, Decoder)
    actual = measures(decoder)
    assert actual.keys() == {"cos_z_image", "cos_unrelated_image"}
    assert measures(decoder) == actual  # the same seeds
    rows = assemble(tiny_job("decoder", inputs, tmp_path)).validation.first(8)
    assert rows is not None
    batches: list[torch.Tensor] = []

    def perfect(_clip: FrozenClip, images: torch.Tensor) -> torch.Tensor:
        batches.append(images)
        return rows.require_z_image()

    monkeypatch.setattr(FrozenClip, "encode_image", perfect)
    assert measures(decoder)["cos_z_image"] == pytest.approx(1)
    assert batches[0].shape == (len(rows), 8, 8, 3)
    assert (batches[0][0].int() - batches[0][1].int()).abs().max() > 5


@pytest.mark.parametrize(
    ("name", "measure"), [("prior", "val_cos_z_image"), ("upsampler_1", "val_psnr_db"), ("clip", "val_loss")]
)
def test_measures_stand_beside_the_validation_loss_and_in_the_summary(
    inputs: dict[str, Artifact], tmp_path: Path, name: str, measure: str
) -> None:
    job = tiny_job(name, inputs, tmp_path)
    summary = run_job(job, no_watch)
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    measured = [row[measure] for row in rows if "val_loss" in row]
    assert len(measured) == 3
    assert summary[measure] == measured[-1]


def _beside(name: str, inputs: dict[str, Artifact], output: Path, **resources: object) -> TrainJob:
    """A training of six steps with checkpoints at 2 and 4, which somebody else validates."""
    recipe = training_recipe()
    section = recipe.trained()[name]
    section = replace(section, resources=replace(section.resources, validation="beside", **resources))
    return tiny_job(name, inputs, output, replace(recipe, **{name: section}))


def _measured(job: TrainJob) -> dict[int, dict[str, float]]:
    """Loss and measures of each step in the curves, in their order."""
    rows = [json.loads(line) for line in job.output.path(METRICS).read_text().splitlines()]
    named = {row["step"]: {name: row[name] for name in row if name.startswith("val_")} for row in rows}
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    return {step: measures for step, measures in named.items() if measures}


@pytest.mark.parametrize("name", ["clip", "prior", "prior_2", "decoder", "noisy_clip", "upsampler_1"])
def test_whoever_validates_a_checkpoint_gets_the_numbers_of_the_training(
    inputs: dict[str, Artifact], tmp_path: Path, name: str
) -> None:
    in_line = tiny_job(name, inputs, tmp_path / "in_line")
    run_job(in_line, no_watch)
    expected = _measured(in_line)
    assert list(expected) == [2, 4, 6]
    job = _beside(name, inputs, tmp_path / "beside")
    run_job(job, no_watch)
    assert _measured(job) == {}
    weights = [file for file in in_line.output.names() if file.endswith(".safetensors") and "/" not in file]
    for file in weights:
        assert job.output.path(file).read_bytes() == in_line.output.path(file).read_bytes()
    for step in (6, 4, 2):
        assert validate_beside(job, step)
        grids = [one.output.exists(grid_name(step)) for one in (job, in_line)]
        assert grids == [job.kind.measures_pictures or name == "upsampler_1"] * 2
        if grids[0]:
            with (
                Image.open(job.output.path(grid_name(step))) as ours,
                Image.open(in_line.output.path(grid_name(step))) as theirs,
            ):
                assert ours.size[0] > 4 * 96
                assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    log = MetricsLog(job.output, 6)
    log.flush(6)
    assert _measured(job) == expected
    assert log.summary().keys() >= expected[6].keys()
    job.output.remove(checkpoint_name(2))
    assert not validate_beside(job, 2)


def test_the_finished_network_is_read_again_where_storage_fails_for_a_moment(
    inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = _beside("upsampler_1", inputs, tmp_path)
    run_job(job, no_watch)
    failed = fail_calls(monkeypatch, "open", code=errno.EIO, ends=("model.safetensors",))
    assert validate_beside(job, 6)
    assert len(failed) == 1


def test_a_training_puts_results_from_beside_into_its_curves_and_says_what_was_left_out(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    job, messages = _beside("upsampler_1", inputs, tmp_path), list[str]()

    def watch(done: int, total: int, message: str) -> None:
        messages.append(message)
        if done == 4:
            while not job.output.exists(checkpoint_name(2)):  # it is written in the background
                time.sleep(0.01)
            assert validate_beside(job, 2)
            write_beside(job.output, BesideState(skipped=3, failed=1, reason="only 0 of 1 CPU was free"))

    run_job(job, watch)
    assert list(_measured(job)) == [2]
    assert read_result(job.output, 2).keys() >= _measured(job)[2].keys()
    assert result_steps(job.output) == [2]
    log = MetricsLog(job.output, 6)
    log.flush(6)
    assert log.note == "; validations: 3 skipped, 1 failed (only 0 of 1 CPU was free)"


def test_a_training_that_is_validated_beside_it_loads_no_image_tower(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    in_line, beside = (
        assemble(tiny_job("decoder", inputs, tmp_path)).clip,
        assemble(_beside("decoder", inputs, tmp_path)).clip,
    )
    assert in_line is not None
    assert beside is not None
    assert (in_line.clip.has_images, beside.clip.has_images) == (True, False)


@pytest.mark.parametrize("name", ["prior", "decoder", "upsampler_1", "clip"])
def test_whether_the_best_can_be_kept_is_known_without_a_network(
    name: str, inputs: dict[str, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No worker loads another CLIP for it, or validates while the others wait."""
    monkeypatch.setattr(Validation, "__call__", lambda *_: pytest.fail("it has validated"))
    monkeypatch.setattr("pipeline.train.validation.load_frozen", lambda *_, **__: pytest.fail("it has loaded a CLIP"))
    kind = tiny_job(name, inputs, tmp_path / "kind").kind
    for measure in ("loss", *kind.measures):
        run_job(_beside(name, inputs, tmp_path / measure, keep_best=f"val_{measure}"), no_watch)
    words = ", ".join(f"val_{measure}" for measure in ("loss", *kind.measures))
    with pytest.raises(ConfigError, match=f"keep_best = 'val_beauty': the measures of this training are {words}$"):
        run_job(_beside(name, inputs, tmp_path / "beauty", keep_best="val_beauty"), no_watch)


def test_the_best_of_the_checkpoints_that_are_validated_beside_is_kept(
    inputs: dict[str, Artifact], tmp_path: Path
) -> None:
    job = _beside("upsampler_1", inputs, tmp_path, keep_best="val_psnr_db", num_checkpoints=1, save_every_steps=1)

    def watch(done: int, total: int, message: str) -> None:
        if done == 3:
            job.output.write_json(f"live/validation/{2:08d}.json", {"time": 0.0, "val_psnr_db": 99.0})
            write_beside(job.output, BesideState(running=2))
        if done == 4:
            write_beside(job.output, BesideState())

    run_job(job, watch)
    assert checkpoint_steps(job.output) == [2, 5]
