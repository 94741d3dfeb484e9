"""What a network draws while it is trained: against what is known of the networks, with the same seeds each time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.ar_prior.network import ArPrior
from models.decoder.network import Decoder
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from pipeline.clip import FrozenClip
from pipeline.networks.clip import load_clip_artifact
from pipeline.networks.measuring import NUM_EMBEDDINGS
from pipeline.train.assemble import assemble
from pipeline.train.job import run_job
from pipeline.train.validation import Validation
from pipeline.workspace.progress import METRICS
from pipeline.workspace.store import Artifact
from tests.tiny.training import no_watch, tiny_inputs, tiny_job


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
    validation = Validation(job, parts)

    def measures(network: nn.Module) -> dict[str, float]:
        values = validation(network)
        assert values.pop("val_loss") > 0
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
