"""Measures of validation rows and of sets, beside their definitions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.decoder.stage import DecoderStage
from models.diffusion.process import Diffusion
from models.pixels import resize, to_pixels, to_uint8
from pipeline.data.shards import StoredPictures
from pipeline.evaluate.parts import read_part
from pipeline.evaluate.sets import cmmd, precision_recall
from pipeline.evaluate.work import Work
from pipeline.networks.cascade import load_cascade
from pipeline.networks.quality import psnr_db, sharpness
from pipeline.pictures.frame import square
from pipeline.recipe.recipe import Recipe
from pipeline.report.report import format_metrics
from pipeline.report.tables import measure_rows
from pipeline.workspace.store import Artifact
from tests.evaluate.conftest import evaluate_inputs, run_evaluate
from tests.tiny.workspace import evaluated_workspace


def test_both_priors_are_measured_on_the_same_captions(evaluated: tuple[Artifact, Work, dict[str, Any]]) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "validation" for row in read_part(output, part)]
    z_text = np.array([row["z_text"] for row in rows], np.float64)
    z_text /= np.linalg.norm(z_text, axis=1, keepdims=True)
    for name, column, kind in (("prior", "z_prior", "diffusion"), ("prior_2", "z_prior_2", "autoregressive")):
        z_prior = np.array([row[column] for row in rows], np.float64)
        z_prior /= np.linalg.norm(z_prior, axis=1, keepdims=True)
        assert metrics[name]["kind"] == kind
        assert metrics[name]["z_text"]["mean"] == pytest.approx((z_prior * z_text).sum(1).mean(), abs=1e-5)
        unrelated = (z_prior * np.roll(z_text, 1, axis=0)).sum(1).mean()
        assert metrics[name]["unrelated_text"]["mean"] == pytest.approx(unrelated, abs=1e-5)
    assert metrics["prior"]["z_image"]["mean"] != metrics["prior_2"]["z_image"]["mean"]
    titles = [row["name"] for row in measure_rows(metrics)]
    for name in ("Prior (diffusion)", "Prior 2 (autoregressive)"):
        assert [f"{name}: to z_image", f"{name}: to z_text"] == [row for row in titles if row.startswith(name)]


def test_bicubic_psnr_is_that_of_the_stored_picture(
    tiny: Recipe, evaluated: tuple[Artifact, Work, dict[str, Any]]
) -> None:
    """32 -> 16 -> 32 px by Pillow's bicubic filter, an implementation apart from torch's."""
    output, work, _ = evaluated
    part = next(part for part in work.parts if part.kind == "validation")
    row = read_part(output, part)[0]
    with Image.open(output.path("reconstructions/00000-real.png")) as image:
        small = image.resize((16, 16), Image.Resampling.BICUBIC)
        again = np.asarray(small.resize((32, 32), Image.Resampling.BICUBIC))
        expected = psnr_db(again[None], np.asarray(image)[None])[0]
    assert row["bicubic_psnr_db"]["upsampler_2"] == pytest.approx(expected, abs=0.3)


def test_set_measures_and_upsampler_measures_agree_with_their_parts(
    evaluated: tuple[Artifact, Work, dict[str, Any]],
) -> None:
    output, work, metrics = evaluated
    rows = [row for part in work.parts if part.kind == "samples" for row in read_part(output, part)]
    firsts = [row for row in rows if row["image_number"] == 0]
    generated, real = (np.array([row[name] for row in firsts], np.float64) for name in ("z_image", "z_real"))
    assert metrics["cmmd"]["generated"] == pytest.approx(cmmd(generated, real))
    precision, recall = precision_recall(generated, real)
    assert metrics["precision"]["generated"]["hits"] == precision.hits
    assert metrics["recall"]["generated"]["hits"] == recall.hits
    validation = [row for part in work.parts if part.kind == "validation" for row in read_part(output, part)]
    with Image.open(output.path("reconstructions/00000-real.png")) as image:
        assert validation[0]["real_sharpness"]["upsampler_2"] == pytest.approx(
            sharpness(np.asarray(image)[None])[0], rel=1e-6
        )
    bicubic = [row["bicubic_ssim"]["upsampler_2"] for row in validation if row["bicubic_ssim"] is not None]
    assert metrics["upsampler_2"]["bicubic_ssim"]["mean"] == pytest.approx(np.mean(bicubic), rel=1e-6)
    assert (
        metrics["upsampler_2"]["bicubic_ssim"]["mean"] > metrics["upsampler_2"]["ssim"]["mean"]
    )  # nothing was learned


def test_a_network_that_was_trained_with_the_bound_is_measured_in_bits_per_dimension(tmp_path: Path) -> None:
    """The decoder, whose variance is learned, and not the upsamplers."""
    diffusion = {"num_timesteps": 30, "variance": "learned_range"}
    recipe = evaluated_workspace(tmp_path / "workspace", decoder={"model": {"diffusion": diffusion}})
    work, metrics = run_evaluate(recipe, Artifact(str(tmp_path / "output")))
    part = next(part for part in work.parts if part.kind == "validation")
    assert read_part(Artifact(str(tmp_path / "output")), part)[0]["bits_per_dim"].keys() == {"decoder"}
    assert metrics["bits_per_dim"].keys() == {"decoder"}
    measured = metrics["bits_per_dim"]["decoder"]
    assert measured["count"] == min(8, len(work.rows))
    assert "Decoder: bits per dimension" in format_metrics(metrics)

    # Again, with other noise, term by term, as the loss adds them up.
    cascade = load_cascade(evaluate_inputs(recipe))
    decoder = cascade.stage("decoder", DecoderStage).network
    text = cascade.clip.encode_text([row.caption for row in work.rows[:8]])
    z_image = torch.from_numpy(np.stack([row.z_image for row in work.rows[:8]]).astype(np.float32))
    pictures = np.stack([_stored(recipe, row, decoder.config.image_px) for row in work.rows[:8]])
    x0, diffusion = to_pixels(torch.from_numpy(pictures)), Diffusion(decoder.config.diffusion)
    condition = decoder.encode_condition(z_image, text)
    total = diffusion.prior_bpd(x0)
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        t = torch.full((len(x0),), step)
        x_t = diffusion.q_sample(x0, t, torch.randn(x0.shape, generator=generator))
        output = decoder(x_t, t, condition)
        prediction = diffusion.predict(output, x_t, t, t - 1)
        total = total + diffusion.vlb_terms(prediction._replace(x0=prediction.x0.clamp(-1, 1)), x0, x_t, t)
    assert measured["mean"] == pytest.approx(total.mean().item(), rel=0.1)


def _stored(recipe: Recipe, row: Any, side_px: int) -> np.ndarray:
    """The picture of a row, resized to the decoder's side."""
    stored = square(StoredPictures(evaluate_inputs(recipe)["download"]).decode(row.shard, row.key, row.uid), 32)
    return to_uint8(resize(to_pixels(torch.from_numpy(np.array(stored)[None])), side_px))[0].numpy()
