"""The cascade: what a picture depends on."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import CONVOLUTION, DIMS, UNET, Captions, make_text, randomise, with_stages

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.stage import ArPriorStage
from models.cascade import Cascade
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage, decoder_denoiser
from models.diffusion.config import SamplerConfig
from models.layers.config import UNetConfig
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import to_uint8
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage, prior_denoiser
from models.rows import concat_rows, take_rows
from models.stage import PIXELS, Z_IMAGE, Batch, StageStep
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage

PROMPTS = ["abc", "abcde", "abc", "ab"]


def make_upsampler(low_res_px: int, image_px: int, unet: UNetConfig = CONVOLUTION) -> Upsampler:
    config = UpsamplerConfig(
        image_px=image_px,
        low_res_px=low_res_px,
        crop_px=image_px // 2,
        unet=unet,
        sampler=SamplerConfig(method="ddim", num_steps=3, eta=0.5),
    )
    model = Upsampler(config)
    randomise(model)
    return model


@pytest.fixture(scope="module")
def cascade() -> Cascade:
    torch.manual_seed(0)
    prior_sampler = SamplerConfig(num_steps=3, clip_x0=False, guidance_scale=2.0)
    prior = Prior(PriorConfig(width=16, depth=2, num_heads=4, sampler=prior_sampler), DIMS)
    decoder_sampler = SamplerConfig(num_steps=4, guidance_scale=1.5)
    decoder = Decoder(DecoderConfig(image_px=8, context_width=6, unet=UNET, sampler=decoder_sampler), DIMS)
    for network in (prior, decoder):
        randomise(network)
        network.null_text.set(make_text((2,)))
    upsamplers = [UpsamplerStage.of(make_upsampler(8, 16)), UpsamplerStage.of(make_upsampler(16, 32), 1)]
    return Cascade(Captions(), [PriorStage.of(prior), DecoderStage.of(decoder), *upsamplers])


@pytest.fixture(scope="module")
def prior(cascade: Cascade) -> PriorStage:
    return cascade.stage("prior", PriorStage)


@pytest.fixture(scope="module")
def decoder(cascade: Cascade) -> DecoderStage:
    return cascade.stage("decoder", DecoderStage)


def scores(cascade: Cascade, stage: PriorStage | ArPriorStage) -> torch.Tensor:
    """How near the embeddings of a prior are to their captions."""
    text = cascade.clip.encode_text(PROMPTS)
    return (cascade.run_stage(stage, Batch(text, (7,) * 4)) * text.z_text).sum(1)


def difference(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def test_sample_returns_every_resolution_and_the_embeddings(cascade: Cascade) -> None:
    result = cascade.sample(PROMPTS, [1, 2, 3, 4])
    shapes = {name: tuple(pictures.shape) for name, pictures in result.pictures.items()}
    assert shapes == {"decoder": (4, 8, 8, 3), "upsampler_1": (4, 16, 16, 3), "upsampler_2": (4, 32, 32, 3)}
    assert result.images.dtype == torch.uint8
    assert result.z_image.shape == (4, DIMS.embed_dim)


def test_sample_depends_on_seed_and_caption_and_not_on_the_batch(cascade: Cascade) -> None:
    result = cascade.sample(PROMPTS, [1, 1, 2, 1])
    alone = cascade.sample(PROMPTS[1:2], [1])
    assert difference(result.images[1:2], alone.images) <= 1
    assert difference(result.images[0], result.images[2]) > 8
    assert difference(result.images[0], result.images[1]) > 8


def test_sample_in_micro_batches_is_the_same(cascade: Cascade) -> None:
    whole = cascade.sample(PROMPTS, [1, 2, 3, 4])
    parts = Cascade(cascade.clip, cascade.stages, micro_batch=3).sample(PROMPTS, [1, 2, 3, 4])
    assert difference(whole.images, parts.images) <= 1


def test_sample_stops_at_the_last_stage(cascade: Cascade) -> None:
    assert Cascade(cascade.clip, cascade.stages[:3]).sample(PROMPTS[:1], [1]).images.shape == (1, 16, 16, 3)


def test_watch_hears_of_every_step_and_of_what_it_comes_to(cascade: Cascade) -> None:
    steps, last = list[StageStep](), cascade.stage("upsampler_2", UpsamplerStage)
    fewer = replace(last, sampler=replace(last.sampler, num_steps=2))
    result = with_stages(cascade, fewer).sample(PROMPTS[:2], [1, 2], steps.append)
    totals = {"prior": 3, "decoder": 4, "upsampler_1": 3, "upsampler_2": 2}
    assert [(step.stage, step.done, step.total) for step in steps] == [
        (stage, done, total) for stage, total in totals.items() for done in range(1, total + 1)
    ]
    assert all(step.x0.abs().max() <= 1 for step in steps if step.stage != "prior")  # clipped, unlike what is noised
    assert difference(to_uint8(steps[-1].x0), result.images) == 0


def test_upsamplers_sample_from_streams_of_their_own(cascade: Cascade) -> None:
    batch = Batch(cascade.clip.encode_text(["ab"]), (1,), {PIXELS: torch.zeros(1, 3, 8, 8)})
    upsampler = make_upsampler(8, 16)
    first, second = (cascade.run_stage(UpsamplerStage.of(upsampler, number), batch) for number in (0, 1))
    assert not torch.allclose(first, second)


def test_prior_samples_in_its_scale_and_from_its_measured_variance(cascade: Cascade) -> None:
    torch.manual_seed(1)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2, dropout=0.5), DIMS)
    randomise(prior)
    torch.nn.init.zeros_(prior.out.weight)  # it always predicts its bias
    prior.z_mean.fill_(0.25)
    prior.z_std.mul_(2)
    analytic = SamplerConfig(method="analytic", num_steps=3, clip_x0=False)
    fixed = Cascade(cascade.clip, [PriorStage(prior, analytic, "prior"), cascade.stages[1]])
    assert not any(module.training for module in prior.modules())
    batch = Batch(cascade.clip.encode_text(PROMPTS[:1]), (1,))
    with pytest.raises(ValueError, match="needs x0_variance"):
        fixed.run_stage(fixed.stages[0], batch)
    prior.x0_variance.fill_(0.1)
    torch.testing.assert_close(fixed.run_stage(fixed.stages[0], batch)[0], prior.unscale(prior.out.bias))


def test_decoder_is_guided_by_the_noisy_clip_towards_each_caption(cascade: Cascade, decoder: DecoderStage) -> None:
    torch.manual_seed(2)
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=8, tower=CONVOLUTION), DIMS)
    randomise(noisy_clip)
    z_image = torch.nn.functional.normalize(torch.randn(3, DIMS.embed_dim), dim=-1)
    batch = Batch(cascade.clip.encode_text(PROMPTS[:3]), (1, 2, 3), {Z_IMAGE: z_image})

    def pictures(scale: float, micro_batch: int = 64) -> torch.Tensor:
        sampler = replace(decoder.sampler, clip_guidance_scale=scale)
        guided = Cascade(
            cascade.clip, [replace(decoder, sampler=sampler, noisy_clip=noisy_clip)], micro_batch=micro_batch
        )
        return guided.run_stage(guided.stages[0], batch)

    weak, strong = pictures(1.0), pictures(4.0)
    assert (pictures(0.0) - weak).abs().max() > 1e-3
    assert (weak - strong).abs().max() > 1e-3
    torch.testing.assert_close(pictures(4.0, micro_batch=2), strong, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="clip_guidance_scale is above 0, and there is no noise-aware CLIP"):
        replace(decoder, sampler=replace(decoder.sampler, clip_guidance_scale=1.0))


def test_prior_keeps_the_candidate_nearest_the_caption(cascade: Cascade, prior: PriorStage) -> None:
    one, best = (scores(cascade, replace(prior, num_candidates=count)) for count in (1, 8))
    assert (best >= one - 1e-5).all()
    assert (best > one + 1e-3).any()


def test_stages_run_apart_are_those_of_sample(cascade: Cascade) -> None:
    result = cascade.sample(PROMPTS, [1, 2, 3, 4])
    batch = Batch(cascade.clip.encode_text(PROMPTS), (1, 2, 3, 4))
    for stage in cascade.stages:
        batch = batch.with_values(**{stage.makes: cascade.run_stage(stage, batch)})
    assert torch.equal(batch.values[Z_IMAGE], result.z_image)
    assert torch.equal(to_uint8(batch.values[PIXELS]), result.images)


def test_an_autoregressive_prior_samples_in_a_cascade_as_the_other_does(cascade: Cascade) -> None:
    config = ArPriorConfig(
        width=16, depth=2, num_heads=4, num_components=6, num_buckets=32, sampler=TokenSamplerConfig(guidance_scale=2.0)
    )
    torch.manual_seed(0)
    network = ArPrior(config, DIMS)
    randomise(network)
    stage = ArPriorStage.of(network)
    autoregressive = with_stages(cascade, stage)
    result = autoregressive.sample(PROMPTS, [1, 1, 2, 1])
    alone = autoregressive.sample(PROMPTS[1:2], [1])
    torch.testing.assert_close(result.z_image[1:2], alone.z_image, rtol=0, atol=1e-5)
    assert (result.z_image[0] - result.z_image[2]).abs().max() > 0.01
    one, best = (scores(cascade, replace(stage, num_candidates=count)) for count in (1, 8))
    assert (best >= one - 1e-5).all()
    assert (best > one + 1e-3).any()


def test_guidance_scale_is_that_of_each_row(prior: PriorStage, decoder: DecoderStage) -> None:
    """Rows without guidance are the conditional network; the others go away from the null condition."""
    text, t, scales = make_text((3, 7, 5)), torch.tensor([5, 900, 20]), [1.0, 3.0, 2.0]
    z_image = torch.nn.functional.normalize(torch.randn(3, DIMS.embed_dim), dim=-1)

    def check(stage: PriorStage | DecoderStage, x: torch.Tensor, encode: Any) -> None:
        both, channels = encode(guided=True), x.shape[1]
        null, plain = (stage.denoiser(take_rows(both, part), [1.0] * 3)(x, t) for part in (slice(3), slice(3, 6)))
        condition = concat_rows([take_rows(both, slice(1, 3)), take_rows(both, slice(3, 6))])
        guided = stage.denoiser(condition, scales)(x, t)
        torch.testing.assert_close(guided[0], plain[0], rtol=0, atol=1e-5)  # the rounding of another batch
        for row in (1, 2):
            expected = null[row] + scales[row] * (plain[row] - null[row])
            torch.testing.assert_close(guided[row, :channels], expected[:channels], rtol=0, atol=1e-4)
            assert (guided[row] - plain[row])[:channels].abs().max() > 1e-3
            torch.testing.assert_close(guided[row, channels:], plain[row, channels:], rtol=0, atol=1e-5)  # a variance

    with torch.no_grad():
        check(prior, torch.randn(3, DIMS.embed_dim), partial(prior.encode, text))
        check(decoder, torch.randn(3, 3, 8, 8), partial(decoder.encode, text, {Z_IMAGE: z_image}))


def test_denoisers_of_one_network_are_those_of_its_stage(prior: PriorStage, decoder: DecoderStage) -> None:
    text, t, x = make_text((3, 7)), torch.tensor([5, 900]), torch.randn(2, DIMS.embed_dim)
    pixels, z_image = torch.randn(2, 3, 8, 8), torch.nn.functional.normalize(x, dim=-1)
    with torch.no_grad():
        for scale in (1.0, 3.0):
            expected = prior.denoiser(prior.encode(text, guided=scale != 1), [scale] * 2)(x, t)
            assert torch.equal(prior_denoiser(prior.network, text, scale)(x, t), expected)
            condition = decoder.encode(text, {Z_IMAGE: z_image}, guided=scale != 1)
            expected = decoder.denoiser(condition, [scale] * 2)(pixels, t)
            assert torch.equal(decoder_denoiser(decoder.network, z_image, text, scale)(pixels, t), expected)


def test_cascade_refuses_pieces_that_do_not_fit(cascade: Cascade, prior: PriorStage, decoder: DecoderStage) -> None:
    def upsampler(low_res_px: int, image_px: int, number: int = 0) -> UpsamplerStage:
        return UpsamplerStage.of(make_upsampler(low_res_px, image_px), number)

    with pytest.raises(ValueError, match="upsampler_1 starts from 16 px, but gets 8 px"):
        Cascade(cascade.clip, [prior, decoder, upsampler(16, 32)])
    with pytest.raises(ValueError, match="upsampler_2 starts from 16 px, but gets 32 px"):
        Cascade(cascade.clip, [prior, decoder, upsampler(8, 32), upsampler(16, 32, 1)])
    with pytest.raises(ValueError, match="upsampler_1 starts from 16 px, but gets no px"):
        Cascade(cascade.clip, [prior, upsampler(16, 32)])
    with pytest.raises(ValueError, match="two stages have one name"):
        Cascade(cascade.clip, [prior, decoder, upsampler(8, 16), upsampler(16, 32)])
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=16, tower=CONVOLUTION), DIMS)
    with pytest.raises(ValueError, match="sees 16 px, but the decoder makes 8 px"):
        replace(decoder, noisy_clip=noisy_clip)
    with pytest.raises(ValueError, match="the prior was made for"):
        Cascade(Captions(replace(DIMS, embed_dim=99)), [prior, decoder])
    with pytest.raises(ValueError, match="no DecoderStage prior; it has prior"):
        cascade.stage("prior", DecoderStage)
    with pytest.raises(ValueError, match="micro_batch = 0"):
        Cascade(cascade.clip, cascade.stages, micro_batch=0)


def test_sample_refuses_prompts_without_their_seeds(cascade: Cascade) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        cascade.sample(PROMPTS[:2], [1])


def test_settings_are_those_of_the_configurations(cascade: Cascade) -> None:
    settings = cascade.settings
    assert list(settings) == ["prior", "decoder", "upsampler_1", "upsampler_2"]
    assert (settings["prior"]["guidance_scale"], settings["prior"]["num_candidates"]) == (2.0, 2)
    assert settings["upsampler_2"]["num_steps"] == 3
    assert cascade.sides_px == {"decoder": 8, "upsampler_1": 16, "upsampler_2": 32}


def test_networks_compile_in_one_graph(prior: PriorStage, decoder: DecoderStage) -> None:
    text, t = make_text((3, 7)), torch.tensor([5, 900])
    x, pixels = torch.randn(2, DIMS.embed_dim), torch.randn(2, 3, 8, 8)

    def forward(x: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_image = prior.network(x, t, prior.network.encode_condition(text))
        return z_image, decoder.network(pixels, t, decoder.network.encode_condition(z_image, text))

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    for ours, expected in zip(compiled(x, pixels), forward(x, pixels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # norms are written out where they are compiled
