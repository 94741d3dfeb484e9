"""The cascade: what a picture depends on."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import DIMS, UNET, make_text, randomise

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.cascade import Cascade, CascadeSettings, StageStep, decoder_denoiser, prior_denoiser
from models.clip_config import ClipDims
from models.decoder.config import DecoderConfig
from models.decoder.network import Decoder
from models.diffusion.config import SamplerConfig
from models.layers.config import UNetConfig
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import to_uint8
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.text import TextEncoding
from models.upsampler.config import UpsamplerConfig
from models.upsampler.network import Upsampler

CONVOLUTION = replace(UNET, attention_resolutions=())
PROMPTS = ["abc", "abcde", "abc", "ab"]


class Captions:
    """Stands for a CLIP: a caption of n letters is encoded as n random tokens."""

    def __init__(self, dims: ClipDims = DIMS) -> None:
        self.dims = dims

    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        parts = [make_text((len(caption),)) for caption in captions]
        return TextEncoding(
            torch.cat([part.pooled for part in parts]),
            torch.cat([part.hidden for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.tokens for part in parts]),
        )


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
    return Cascade(Captions(), prior, decoder, [make_upsampler(8, 16), make_upsampler(16, 32)])


def difference(one: torch.Tensor, other: torch.Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


def test_sample_returns_every_resolution_and_the_embeddings(cascade: Cascade) -> None:
    result = cascade.sample(PROMPTS, [1, 2, 3, 4])
    assert [tuple(stage.shape) for stage in result.stages] == [(4, 8, 8, 3), (4, 16, 16, 3), (4, 32, 32, 3)]
    assert result.images.dtype == torch.uint8
    assert result.z_image.shape == (4, DIMS.embed_dim)


def test_sample_depends_on_seed_and_caption_and_not_on_the_batch(cascade: Cascade) -> None:
    result = cascade.sample(PROMPTS, [1, 1, 2, 1])
    alone = cascade.sample(PROMPTS[1:2], [1])
    assert difference(result.images[1:2], alone.images) <= 1
    assert difference(result.images[0], result.images[2]) > 8
    assert difference(result.images[0], result.images[1]) > 8


def test_sample_in_micro_batches_is_the_same(cascade: Cascade) -> None:
    settings = cascade.default_settings()
    whole = cascade.sample(PROMPTS, [1, 2, 3, 4], settings)
    parts = cascade.sample(PROMPTS, [1, 2, 3, 4], replace(settings, micro_batch=3))
    assert difference(whole.images, parts.images) <= 1


def test_sample_stops_at_the_settings_resolution(cascade: Cascade) -> None:
    settings = cascade.default_settings()
    result = cascade.sample(PROMPTS[:1], [1], replace(settings, upsamplers=settings.upsamplers[:1]))
    assert result.images.shape == (1, 16, 16, 3)


def test_watch_is_told_of_every_step_and_of_what_it_comes_to(cascade: Cascade) -> None:
    settings, steps = cascade.default_settings(), list[StageStep]()
    fewer = replace(settings.upsamplers[1], num_steps=2)
    result = cascade.sample(
        PROMPTS[:2], [1, 2], replace(settings, upsamplers=(settings.upsamplers[0], fewer)), steps.append
    )
    totals = {"prior": 3, "decoder": 4, "upsampler_1": 3, "upsampler_2": 2}
    assert [(step.stage, step.done, step.total) for step in steps] == [
        (stage, done, total) for stage, total in totals.items() for done in range(1, total + 1)
    ]
    assert all(step.x0.abs().max() <= 1 for step in steps if step.stage != "prior")  # clipped, unlike what is noised
    assert difference(to_uint8(steps[-1].x0), result.images) == 0


def test_upsamplers_draw_from_streams_of_their_own(cascade: Cascade) -> None:
    one, other = make_upsampler(8, 16), make_upsampler(16, 32)
    other.load_state_dict(one.state_dict())
    twice = Cascade(cascade.clip, cascade.prior, cascade.decoder, [one, other])
    pixels, settings = torch.zeros(1, 3, 8, 8), twice.default_settings()
    first, second = (twice.upsample(pixels, number, [1], settings) for number in (0, 1))
    assert first.shape == second.shape
    assert not torch.allclose(first, second)


def test_prior_draws_in_its_scale_and_from_its_measured_variance(cascade: Cascade) -> None:
    torch.manual_seed(1)
    prior = Prior(PriorConfig(width=16, depth=1, num_heads=2, dropout=0.5), DIMS)
    randomise(prior)
    torch.nn.init.zeros_(prior.out.weight)  # it always predicts its bias
    prior.z_mean.fill_(0.25)
    prior.z_std.mul_(2)
    fixed = Cascade(cascade.clip, prior, cascade.decoder)
    assert not any(module.training for module in (*prior.modules(), *fixed.decoder.modules()))
    text = cascade.clip.encode_text(PROMPTS[:1])
    settings = replace(fixed.default_settings(), num_candidates=1)
    settings = replace(settings, prior=SamplerConfig(method="analytic", num_steps=3, clip_x0=False))
    with pytest.raises(ValueError, match="needs x0_variance"):
        fixed.sample_prior(text, [1], settings)
    prior.x0_variance.fill_(0.1)
    torch.testing.assert_close(fixed.sample_prior(text, [1], settings)[0], prior.unscale(prior.out.bias))


def test_decoder_is_led_by_the_noisy_clip_towards_each_caption(cascade: Cascade) -> None:
    torch.manual_seed(2)
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=8, tower=CONVOLUTION), DIMS)
    randomise(noisy_clip)
    led = Cascade(cascade.clip, cascade.prior, cascade.decoder, noisy_clip=noisy_clip)
    text, seeds = cascade.clip.encode_text(PROMPTS[:3]), [1, 2, 3]
    z_image = torch.nn.functional.normalize(torch.randn(3, DIMS.embed_dim), dim=-1)

    def drawn(scale: float, micro_batch: int = 64) -> torch.Tensor:
        settings = replace(led.default_settings(), micro_batch=micro_batch)
        settings = replace(settings, decoder=replace(settings.decoder, clip_guidance_scale=scale))
        return led.decode(z_image, text, seeds, settings)

    pictures = [drawn(scale) for scale in (0.0, 1.0, 4.0)]
    assert (pictures[0] - pictures[1]).abs().max() > 1e-3
    assert (pictures[1] - pictures[2]).abs().max() > 1e-3
    torch.testing.assert_close(drawn(4.0, micro_batch=2), pictures[2], rtol=0, atol=1e-4)
    settings = cascade.default_settings()
    asked = replace(settings, decoder=replace(settings.decoder, clip_guidance_scale=1.0))
    with pytest.raises(ValueError, match="clip_guidance_scale is above 0, and there is no noise-aware CLIP"):
        cascade.decode(z_image, text, seeds, asked)


def test_sample_prior_keeps_the_candidate_nearest_the_caption(cascade: Cascade) -> None:
    text = cascade.clip.encode_text(PROMPTS)
    settings = replace(cascade.default_settings(), num_candidates=1)
    scores = [
        (cascade.sample_prior(text, [7] * 4, replace(settings, num_candidates=count)) * text.z_text).sum(1)
        for count in (1, 8)
    ]
    assert (scores[1] >= scores[0] - 1e-5).all()
    assert (scores[1] > scores[0] + 1e-3).any()


def test_stages_called_apart_are_those_of_sample(cascade: Cascade) -> None:
    settings, seeds = cascade.default_settings(), [1, 2, 3, 4]
    result = cascade.sample(PROMPTS, seeds)
    text = cascade.clip.encode_text(PROMPTS)
    z_image = cascade.sample_prior(text, seeds, settings)
    pixels = cascade.upsample(cascade.decode(z_image, text, seeds, settings), 0, seeds, settings)
    assert torch.equal(z_image, result.z_image)
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert difference(levels, result.stages[1]) == 0


def test_an_autoregressive_prior_draws_in_a_cascade_as_the_other_does(cascade: Cascade) -> None:
    config = ArPriorConfig(
        width=16, depth=2, num_heads=4, num_components=6, num_buckets=32, sampler=TokenSamplerConfig(guidance_scale=2.0)
    )
    torch.manual_seed(0)
    prior = ArPrior(config, DIMS)
    randomise(prior)
    autoregressive = Cascade(cascade.clip, prior, cascade.decoder, cascade.upsamplers)
    result = autoregressive.sample(PROMPTS, [1, 1, 2, 1])
    alone = autoregressive.sample(PROMPTS[1:2], [1])
    torch.testing.assert_close(result.z_image[1:2], alone.z_image, rtol=0, atol=1e-5)
    assert (result.z_image[0] - result.z_image[2]).abs().max() > 0.01
    settings, text = autoregressive.default_settings(), cascade.clip.encode_text(PROMPTS)
    scores = [
        (autoregressive.sample_prior(text, [7] * 4, replace(settings, num_candidates=count)) * text.z_text).sum(1)
        for count in (1, 8)
    ]
    assert (scores[1] >= scores[0] - 1e-5).all()
    assert (scores[1] > scores[0] + 1e-3).any()
    with pytest.raises(TypeError, match="takes a SamplerConfig, the settings hold a TokenSamplerConfig"):
        cascade.sample(PROMPTS, [1, 2, 3, 4], settings)


def test_guidance_of_one_is_the_conditional_network(cascade: Cascade) -> None:
    text, t = make_text((3, 7)), torch.tensor([5, 900])
    x, pixels = torch.randn(2, DIMS.embed_dim), torch.randn(2, 3, 8, 8)
    z_image = torch.nn.functional.normalize(torch.randn(2, DIMS.embed_dim), dim=-1)
    per_item = torch.tensor([1.0, 3.0])
    with torch.no_grad():
        plain = prior_denoiser(cascade.prior, text)(x, t)
        guided = prior_denoiser(cascade.prior, text, per_item)(x, t)
        torch.testing.assert_close(guided[0], plain[0], rtol=0, atol=1e-5)
        assert (guided[1] - plain[1]).abs().max() > 1e-3
        plain = decoder_denoiser(cascade.decoder, z_image, text)(pixels, t)
        guided = decoder_denoiser(cascade.decoder, z_image, text, per_item)(pixels, t)
        torch.testing.assert_close(guided[0], plain[0], rtol=0, atol=1e-5)
        assert (guided[1] - plain[1]).abs().max() > 1e-3


def test_guidance_goes_away_from_the_null_condition(cascade: Cascade) -> None:
    text, t, x = make_text((3, 7)), torch.tensor([5, 900]), torch.randn(2, DIMS.embed_dim)
    with torch.no_grad():
        null = cascade.prior(x, t, cascade.prior.null_condition(2))
        plain = prior_denoiser(cascade.prior, text)(x, t)
        guided = prior_denoiser(cascade.prior, text, 3.0)(x, t)
    torch.testing.assert_close(guided, null + 3.0 * (plain - null), rtol=0, atol=1e-4)


def test_cascade_refuses_pieces_that_do_not_fit(cascade: Cascade) -> None:
    with pytest.raises(ValueError, match="upsampler 1 starts from 16 px, but the stage before it draws 8 px"):
        Cascade(cascade.clip, cascade.prior, cascade.decoder, [make_upsampler(16, 32)])
    with pytest.raises(ValueError, match="upsampler 2 starts from 16 px, but the stage before it draws 32 px"):
        Cascade(cascade.clip, cascade.prior, cascade.decoder, [make_upsampler(8, 32), make_upsampler(16, 32)])
    noisy_clip = NoisyClip(NoisyClipConfig(image_px=16, tower=CONVOLUTION), DIMS)
    with pytest.raises(ValueError, match="sees 16 px, but the decoder draws 8 px"):
        Cascade(cascade.clip, cascade.prior, cascade.decoder, noisy_clip=noisy_clip)
    with pytest.raises(ValueError, match="the prior was made for"):
        Cascade(Captions(replace(DIMS, embed_dim=99)), cascade.prior, cascade.decoder)


def test_sample_refuses_prompts_without_their_seeds(cascade: Cascade) -> None:
    with pytest.raises(ValueError, match="2 prompts and 1 seeds"):
        cascade.sample(PROMPTS[:2], [1])


def test_default_settings_are_those_of_the_configurations(cascade: Cascade) -> None:
    settings = cascade.default_settings()
    assert isinstance(settings, CascadeSettings)
    assert settings.prior.guidance_scale == 2.0
    assert [sampler.num_steps for sampler in settings.upsamplers] == [3, 3]


def test_networks_compile_in_one_graph(cascade: Cascade) -> None:
    text, t = make_text((3, 7)), torch.tensor([5, 900])
    x, pixels = torch.randn(2, DIMS.embed_dim), torch.randn(2, 3, 8, 8)

    def forward(x: torch.Tensor, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_image = cascade.prior(x, t, cascade.prior.encode_condition(text))
        return z_image, cascade.decoder(pixels, t, cascade.decoder.encode_condition(z_image, text))

    compiled = torch.compile(forward, backend="eager", fullgraph=True)
    for ours, expected in zip(compiled(x, pixels), forward(x, pixels), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
