"""The ablation of the prior on a cascade that has learned nothing: what is variants, from what, and going on after a kill."""

import copy
import dataclasses
import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from models.cascade import Cascade
from models.decoder.stage import DecoderStage
from models.diffusion.guidance import classifier_free
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample
from models.pixels import to_uint8
from models.prior.stage import PriorStage
from models.rows import concat_rows
from models.stage import Z_IMAGE, Batch
from pipeline.clip.frozen import FrozenClip
from pipeline.clip.model import create_clip
from pipeline.errors import ConfigError
from pipeline.evaluate import metrics as m
from pipeline.evaluate.ablate import AblationRunner, ablate_recipe, ablation_step
from pipeline.evaluate.parts import picture_seed, read_part
from pipeline.evaluate.prompts import Prompt, PromptSet, choose_prompts
from pipeline.evaluate.work import Part, plan_parts
from pipeline.networks.table import kind_of
from pipeline.recipe.plan import artifact_of, inputs_of
from pipeline.recipe.recipe import Recipe, parse_recipe
from pipeline.report.ablation import format_ablation
from pipeline.shapes.draw import draw_array
from pipeline.workspace.store import Artifact, Workspace
from tests.models.tiny_models import randomise
from tests.tiny.workspace import evaluated_tables


class _StopError(Exception):
    pass


def _quiet(variant: str, done: int, total: int) -> None:
    """Nobody watches."""


@pytest.fixture(scope="module")
def ablated(tiny: Recipe) -> tuple[Artifact, dict[str, Any]]:
    return ablate_recipe(tiny, num_prompts=7, num_shown=2, watch=_quiet)


def test_ablation_measures_every_variant_on_the_same_prompts(ablated: tuple[Artifact, dict[str, Any]]) -> None:
    output, result = ablated
    assert set(result["variants"]) == {"caption", "z_text", "prior", "z_image"}
    for numbers in result["variants"].values():
        assert numbers["clip_score"]["count"] == 7
        assert numbers["r_precision"]["total"] == 7
        checks = numbers["pixel_check"]
        assert [checks[group]["background"]["generated"]["total"] for group in ("one object", "two objects")] == [4, 3]
        assert checks["two objects"]["relation"]["guess"]["total"] == 3
        assert numbers["frechet_clip"] > 0
    with Image.open(output.path("ablation.png")) as grid:
        assert grid.width == 2 * 18 + 4 * 160 + 3 * 6
        assert grid.height > 2 * 160
    assert result["order"].keys() >= {"clip_score", "r_precision", "frechet_clip", "two objects: relation"}
    for comparisons in result["order"].values():
        assert set(comparisons) == {"prior over caption", "caption over z_text"}
    text = format_ablation(result)
    assert all(name in text.splitlines()[0] for name in ("caption only", "z_text as z_image", "prior", "true z_image"))
    assert "The paper's order is prior over caption only over z_text." in text


def test_ablation_numbers_agree_with_their_definitions(
    tiny: Recipe, cascade: Cascade, ablated: tuple[Artifact, dict[str, Any]]
) -> None:
    output, result = ablated
    inputs = inputs_of(Workspace(tiny.workspace), ablation_step(tiny, num_prompts=7, num_shown=2))
    prompts = choose_prompts("", inputs["pairs"], inputs["embed"], 7).prompts
    parts = list(plan_parts({"prior": 7}, tiny.evaluate.batch_size))
    z_drawn = np.array([row["z_image"] for part in parts for row in read_part(output, part)], np.float64)
    clip: Any = cascade.clip
    z_text = clip.encode_text([prompt.text for prompt in prompts]).z_text.numpy()
    real = [draw_array(prompt.scene, 32) for prompt in prompts if prompt.scene is not None]
    z_real = clip.encode_image(torch.from_numpy(np.stack(real))).numpy()
    numbers = result["variants"]["prior"]
    assert numbers["clip_score"]["mean"] == pytest.approx((z_drawn * z_text).sum(1).mean(), abs=1e-6)
    expected = m.frechet_distance(m.FeatureSums.of(z_drawn), m.FeatureSums.of(z_real))
    assert numbers["frechet_clip"] == pytest.approx(expected, rel=1e-5)
    differences = [
        (np.array([row["z_image"] for part in plan_parts({name: 7}, 5) for row in read_part(output, part)]) * z_text)
        for name in ("prior", "caption")
    ]
    order = result["order"]["clip_score"]["prior over caption"]
    assert order["difference"] == pytest.approx((differences[0] - differences[1]).sum(1).mean(), abs=1e-6)
    assert order["low"] <= order["difference"] <= order["high"]


def test_variants_are_drawn_from_what_they_say(tiny: Recipe, cascade: Cascade, tmp_path: Path) -> None:
    """Each against another way to draw it; the decoder is made to listen to its embedding."""
    inputs = inputs_of(Workspace(tiny.workspace), ablation_step(tiny, num_prompts=7, num_shown=2))
    prompts, number = choose_prompts("", inputs["pairs"], inputs["embed"], 7), 1
    prompt, seed = prompts.prompts[number], picture_seed(tiny.seed, number, 0)
    prior, stage = cascade.stages[:2]
    decoder = copy.deepcopy(stage.network)
    decoder.image_to_embedding.weight.mul_(40)
    decoder.unet.conv_out.weight.mul_(0.3)  # what it predicts is a picture that is not clipped everywhere
    decoder.config = replace(decoder.config, diffusion=replace(decoder.config.diffusion, prediction="x0"))
    listening = Cascade(cascade.clip, [prior, dataclasses.replace(stage, network=decoder)])
    sampler, clip = stage.sampler, cast("FrozenClip", cascade.clip)
    text = clip.encode_text([prompt.text])

    def decoded(z_image: torch.Tensor) -> torch.Tensor:
        return listening.run(Batch(text, (seed,), {Z_IMAGE: z_image}), listening.after(Z_IMAGE)).images[0]

    with torch.no_grad():
        condition = decoder.encode_condition(torch.ones(1, 16), text, keep_image=torch.tensor([False]))
        null = decoder.null_condition(1)

        def both(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return torch.cat([decoder(x[:1], t[:1], null), decoder(x[1:], t[1:], condition)])

        noise = NoiseSource.from_seeds([seed], "decoder")
        x = noise.normal((3, 8, 8))
        denoise = classifier_free(both, sampler.guidance_scale)
        pixels = sample(denoise, x, Diffusion(decoder.config.diffusion), sampler, noise)
        assert prompt.scene is not None
        real = clip.encode_image(torch.from_numpy(np.array(draw_array(prompt.scene, 8)))[None])
        expected = {
            "caption": to_uint8(pixels)[0],
            "z_text": decoded(text.z_text),
            "prior": listening.sample([prompt.text], [seed]).images[0],
            "z_image": decoded(real),
        }
    output = Artifact(str(tmp_path))
    runner = AblationRunner(listening, prompts, output)
    assert set(runner.variants) == set(expected)
    for variant, picture in expected.items():
        runner.run(Part(variant, 0, 0, 3), tiny.seed, 2)
        with Image.open(output.path(f"samples/{variant}/00001.png")) as image:
            assert np.abs(np.asarray(image).astype(int) - picture.numpy().astype(int)).max() <= 1
        assert not output.exists(f"samples/{variant}/00002.png")
    for one, other in itertools.combinations(expected.values(), 2):
        assert (one.int() - other.int()).abs().max() > 3


def test_caption_alone_means_the_decoders_own_null_at_every_width(tiny: Recipe, tmp_path: Path) -> None:
    """At D = 16 the square root of D and the decoder's factor are one number; at 512 they differ by 29 %."""
    torch.manual_seed(0)
    clip = FrozenClip(create_clip(replace(tiny.clip.model, embed_dim=512)))
    networks: list[Any] = [
        kind_of(config.model).create(config.model, clip.dims) for config in (tiny.prior, tiny.decoder)
    ]
    for network in networks:
        randomise(network)
    prior, decoder = networks
    stage, prompt = DecoderStage.of(decoder), "a red circle"
    listening = Cascade(clip, [PriorStage.of(prior), stage])
    AblationRunner(listening, PromptSet((Prompt(prompt),), "file"), Artifact(str(tmp_path))).run(
        Part("caption", 0, 0, 1), tiny.seed, 1
    )
    with torch.no_grad():
        text, seed = clip.encode_text([prompt]), picture_seed(tiny.seed, 0, 0)
        condition = decoder.encode_condition(torch.ones(1, 512), text, keep_image=torch.tensor([False]))
        both = concat_rows([decoder.null_condition(1), condition])
        denoise = stage.denoiser(both, [stage.sampler.guidance_scale])
        noise = NoiseSource.from_seeds([seed], "decoder")
        pixels = sample(denoise, noise.normal((3, 8, 8)), Diffusion(decoder.config.diffusion), stage.sampler, noise)
    expected = to_uint8(pixels)[0].numpy()
    with Image.open(tmp_path / "samples/caption/00000.png") as image:
        assert (np.asarray(image) == expected).all()
    assert np.ptp(expected) > 100  # a picture in which something is to be seen


def test_a_killed_ablation_goes_on_and_ends_in_the_same_bytes(
    tiny: Recipe, ablated: tuple[Artifact, dict[str, Any]]
) -> None:
    output, result = ablated
    files = {name: output.describe(name) for name in output.names() if name.endswith((".png", ".parquet"))}
    variants: list[str] = []

    def stop(variant: str, done: int, total: int) -> None:
        variants.append(variant)
        if variant == "prior":
            raise _StopError

    other = parse_recipe(evaluated_tables(Path(tiny.workspace), name="other"))
    again = artifact_of(Workspace(tiny.workspace), ablation_step(other, num_prompts=7, num_shown=2))
    assert again.uri == output.uri  # the name of a recipe changes nothing
    assert ablate_recipe(other, num_prompts=7, num_shown=2, watch=stop)[1] == result
    assert variants == []
    for name in ["manifest.json", *(name for name in output.names() if "prior" in name or "z_image-" in name)]:
        output.remove(name)
    with pytest.raises(_StopError):
        ablate_recipe(tiny, num_prompts=7, num_shown=2, watch=stop)
    assert output.manifest() is None
    assert ablate_recipe(tiny, num_prompts=7, num_shown=2, watch=_quiet)[1] == result
    assert {name: output.describe(name) for name in files} == files


def test_prompts_without_real_pictures_have_no_true_embedding(cascade: Cascade, tmp_path: Path) -> None:
    prompts = PromptSet((Prompt("a red circle"), Prompt("a blue star")), "file")
    runner = AblationRunner(cascade, prompts, Artifact(str(tmp_path)))
    assert runner.variants == ("caption", "z_text", "prior")
    assert runner.references()[1] is None
    runner.run(Part("z_text", 0, 0, 2), 0, 1)
    assert math.isclose(
        np.linalg.norm(read_part(Artifact(str(tmp_path)), Part("z_text", 0, 0, 2))[0]["z_image"]), 1, rel_tol=1e-5
    )


def test_ablation_before_training_says_what_is_missing(tmp_path: Path) -> None:
    recipe = parse_recipe(evaluated_tables(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="pairs is not finished"):
        ablate_recipe(recipe, num_prompts=2, num_shown=1, watch=_quiet)
