"""The stages against the plain path: samplers, networks and noise, written out one after the other, to the bit."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gaussian_data import invert_ddim
from test_cascade import make_upsampler
from tiny_models import DIMS, UNET, Pictures, make_text, picture, randomise, right_half
from torch import nn

from models.ar_prior.config import ArPriorConfig, TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import iterate_embeddings
from models.ar_prior.stage import ArPriorStage
from models.cascade import Cascade, CascadeResult
from models.decoder.config import DecoderConfig
from models.decoder.inpainting import known_planes, replacing, resize_mask
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage
from models.diffusion.config import DiffusionConfig, SamplerConfig
from models.diffusion.guidance import classifier_free
from models.diffusion.limits import ClipRange
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Diffusion
from models.diffusion.samplers import sample, sample_along
from models.diffusion.schedules import strided_timesteps
from models.diffusion.steps import ddim_step
from models.editor import Editor, EditSettings
from models.pixels import resize_crop, to_pixels, to_uint8
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage
from models.request import SampleRequest
from models.rows import concat_rows, map_rows
from models.stage import PIXELS, Z_IMAGE, Batch, Chain, DiffusionStage, enter_each, run_stage
from models.text import TextEncoding
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage

PROMPTS, SEEDS, SCALE = ["abc", "abcde", "ab"], (1, 2, 3), 1.7
METHODS = ("ddpm", "ddim", "dpmpp_2m", "heun")


@dataclass(frozen=True)
class Networks:
    prior: Prior
    decoder: Decoder
    upsampler: Upsampler

    def cascade(self, sampler: SamplerConfig) -> Cascade:
        unclipped = replace(sampler, clip_x0=False)
        prior = PriorStage(self.prior, unclipped, "prior", num_candidates=2)
        decoder = DecoderStage(self.decoder, sampler, "decoder")
        upsampler = UpsamplerStage(self.upsampler, sampler, "upsampler_1")
        return Cascade(Pictures(), [prior, decoder, upsampler])


def make_networks(*, inpainting: bool = False) -> Networks:
    torch.manual_seed(0)
    prior = Prior(PriorConfig(width=16, depth=2, num_heads=4), DIMS)
    diffusion = DiffusionConfig(variance="learned_range")
    config = DecoderConfig(image_px=8, context_width=6, unet=UNET, diffusion=diffusion, inpainting=inpainting)
    decoder = Decoder(config, DIMS)
    for network in (prior, decoder):
        randomise(network)
        network.null_text.set(make_text((2,)))
    return Networks(prior.eval(), decoder.eval(), make_upsampler(8, 16).eval())


def plain_z_image(prior: Prior, text: TextEncoding, sampler: SamplerConfig) -> torch.Tensor:
    """Both candidates of every caption in one batch, guided; the nearer is kept."""
    texts = concat_rows([text, text])
    noise = NoiseSource.from_seeds(SEEDS, "prior-0") + NoiseSource.from_seeds(SEEDS, "prior-1")
    condition = prior.encode_condition(concat_rows([prior.null_text.encoding(len(texts)), texts]), cache=True)
    denoise = classifier_free(lambda x, t: prior(x, t, condition), SCALE)
    config = replace(sampler, clip_x0=False)
    x = sample(denoise, noise.normal((DIMS.embed_dim,)), Diffusion(prior.config.diffusion), config, noise)
    first, second = prior.unscale(x).chunk(2)
    nearer = (first * text.z_text).sum(1) >= (second * text.z_text).sum(1)
    return torch.where(nearer[:, None], first, second)


def plain_upsampled(upsampler: Upsampler, pixels: torch.Tensor, sampler: SamplerConfig) -> torch.Tensor:
    noise = NoiseSource.from_seeds(SEEDS[: len(pixels)], "upsampler-0")
    x, condition = upsampler.begin(pixels, noise)
    process = Diffusion(upsampler.config.diffusion)
    return sample(lambda x, t: upsampler(x, t, condition), x, process, sampler, noise)


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_cascade_samples_what_the_samplers_sample(method: Any) -> None:
    networks = make_networks()
    sampler = SamplerConfig(method=method, num_steps=4, guidance_scale=SCALE, eta=0.5)
    text, decoder = Pictures().encode_text(PROMPTS), networks.decoder
    z_image = plain_z_image(networks.prior, text, sampler)
    condition = concat_rows([decoder.null_condition(3), decoder.encode_condition(z_image, text)])
    denoise = classifier_free(lambda x, t: decoder(x, t, condition), SCALE)
    noise = NoiseSource.from_seeds(SEEDS, "decoder")
    small = sample(denoise, noise.normal((3, 8, 8)), Diffusion(decoder.config.diffusion), sampler, noise)
    large = plain_upsampled(networks.upsampler, small, sampler)
    result = networks.cascade(sampler).sample(PROMPTS, SEEDS)
    assert torch.equal(result.z_image, z_image)
    assert torch.equal(result.values[PIXELS], large)
    assert torch.equal(result.pictures["decoder"], to_uint8(small))


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, SCALE])
def test_an_autoregressive_prior_samples_what_its_sampler_does(guidance_scale: float) -> None:
    torch.manual_seed(0)
    prior = ArPrior(ArPriorConfig(width=16, depth=2, num_heads=4, num_components=6, num_buckets=32), DIMS).eval()
    randomise(prior)
    config, text = TokenSamplerConfig(guidance_scale=guidance_scale), Pictures().encode_text(PROMPTS)
    *_, expected = iterate_embeddings(prior, text, NoiseSource.from_seeds(SEEDS, "prior-0"), config)
    cascade = Cascade(Pictures(), [ArPriorStage(prior, config, "prior")])
    assert torch.equal(cascade.sample(PROMPTS, SEEDS).z_image, expected)


@torch.no_grad()
@pytest.mark.parametrize("inpainting", [False, True])
def test_edits_sample_what_the_samplers_sample(inpainting: bool) -> None:
    """A guided reconstruction from an inverted picture, and an inpainted prompt."""
    networks, sampler = make_networks(inpainting=inpainting), SamplerConfig(num_steps=4, guidance_scale=SCALE)
    decoder, process = networks.decoder, Diffusion(networks.decoder.config.diffusion)
    settings = EditSettings(num_steps=6, num_refinements=2, latent_guidance=1.5)
    editor = Editor(networks.cascade(sampler), settings)
    timesteps, image, null = strided_timesteps(1000, 6), picture(0), decoder.null_text.encoding(1)

    z_image = Pictures().encode_image(image)
    condition = concat_rows([decoder.null_condition(1), decoder.encode_condition(z_image, null)])
    denoise = classifier_free(lambda x, t: decoder(x, t, condition), 1.5)
    x0 = resize_crop(to_pixels(image), 8)
    x_T = invert_ddim(denoise, x0, process, timesteps, num_refinements=2, limit=ClipRange())
    step = partial(ddim_step, noise=NoiseSource.from_seeds(SEEDS[:1], "edit"), limit=ClipRange())
    small = sample_along(step, denoise, x_T, process, timesteps)
    latents = editor.encode(image)
    assert torch.equal(latents.x_T, x_T)
    again = editor.reconstruct(latents, SEEDS[:1])
    assert torch.equal(again.values[PIXELS], plain_upsampled(networks.upsampler, small, sampler))

    mask, text = right_half(image), Pictures().encode_text(["abc"] * 3)
    original, redraw = (
        resize_crop(to_pixels(image), 8).expand(3, -1, -1, -1),
        resize_mask(mask, 8).expand(3, -1, -1, -1),
    )
    planes = known_planes(original, redraw) if inpainting else None
    z_image = plain_z_image(networks.prior, text, sampler)
    condition = decoder.encode_condition(z_image, text, planes=planes)
    condition = concat_rows([decoder.null_condition(3, planes), condition])
    denoise = classifier_free(lambda x, t: decoder(x, t, condition), SCALE)
    noise = NoiseSource.from_seeds(SEEDS, "edit")
    step = partial(ddim_step, noise=noise, limit=ClipRange())
    step = step if inpainting else replacing(step, original, redraw, noise)
    x_T = NoiseSource.from_seeds(SEEDS, "decoder").normal((3, 8, 8))
    small = torch.where(redraw, sample_along(step, denoise, x_T, process, timesteps), original)
    large = plain_upsampled(networks.upsampler, small, sampler)
    large = torch.where(mask[:, None], large, to_pixels(image))
    assert torch.equal(editor.inpaint(image, mask, "abc", SEEDS).values[PIXELS], large)


class LatentStage(DecoderStage):
    """A decoder of latents, with an autoencoder behind it."""

    @property
    def side_px(self) -> int:
        return 2 * self.network.config.image_px

    def finish(self, batch: Batch, x: torch.Tensor) -> torch.Tensor:
        del batch
        return decode_latents(x)


def decode_latents(latents: torch.Tensor) -> torch.Tensor:
    """A real layer with fixed weights, (B, 3, h, w) to (B, 3, 2 h, 2 w)."""
    layer = nn.ConvTranspose2d(3, 3, 2, stride=2)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(layer.weight.shape, generator=generator)
    return F.conv_transpose2d(latents, weight, stride=2).tanh()


def test_a_tuple_without_a_prior_is_a_cascade_from_captions_alone() -> None:
    networks, sampler = make_networks(), SamplerConfig(num_steps=4, guidance_scale=SCALE)
    _, decoder, upsampler = networks.cascade(sampler).stages
    result = Cascade(Pictures(), [decoder, upsampler]).sample(PROMPTS, SEEDS)
    with torch.no_grad():
        text, dropped = Pictures().encode_text(PROMPTS), torch.zeros(3, dtype=torch.bool)
        condition = networks.decoder.encode_condition(torch.ones(3, DIMS.embed_dim), text, keep_image=dropped)
        condition = concat_rows([networks.decoder.null_condition(3), condition])
        denoise = classifier_free(lambda x, t: networks.decoder(x, t, condition), SCALE)
        noise = NoiseSource.from_seeds(SEEDS, "decoder")
        process = Diffusion(networks.decoder.config.diffusion)
        small = sample(denoise, noise.normal((3, 8, 8)), process, sampler, noise)
        assert torch.equal(result.pictures["decoder"], to_uint8(small))
    assert result.images.shape == (3, 16, 16, 3)
    assert Z_IMAGE not in result.values


def tensors_of(chain: Chain) -> list[torch.Tensor]:
    """All that its steps read, beside numbers."""
    tensors = [generator.get_state() for generator in chain.noise.generators]
    map_rows((chain.state, chain.condition), lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def test_batches_that_enter_together_are_chains_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    networks = make_networks()
    cascade = networks.cascade(SamplerConfig(method="ddim", num_steps=3, eta=0.5, guidance_scale=SCALE))
    requests = [
        SampleRequest("abc", (1, 2)),
        SampleRequest("ab", (3,), num_candidates=3),
        SampleRequest("abcde", (4,), num_steps={"decoder": 2}),
        SampleRequest("abcde", (5,), negative_prompt="a"),
        SampleRequest("a", (6, 7)),
        SampleRequest("abcd", (8,), guidance_scale={"prior": 1.0, "decoder": 1.0}),
    ]
    calls: list[tuple[str, int]] = []
    enter = DiffusionStage.enter

    def counted(stage: DiffusionStage, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        calls.append((stage.name, len(batch)))
        return enter(stage, batch, noise)

    batches = [cascade.batch_of(request) for request in requests]
    with torch.no_grad():
        for stage in cascade.stages:
            alone = [run_stage(stage, batch) for batch in batches]
            with monkeypatch.context() as patch:
                patch.setattr(DiffusionStage, "enter", counted)
                chains = enter_each(stage, batches)
            for chain, batch in zip(chains, batches, strict=True):
                one = stage.enter(batch)
                torch.testing.assert_close(tensors_of(chain), tensors_of(one), atol=1e-5, rtol=1e-5)
                assert (chain.batch, chain.timesteps, chain.guidance_scale) == (
                    batch,
                    one.timesteps,
                    one.guidance_scale,
                )
            batches = [batch.with_values(**{stage.makes: result}) for batch, result in zip(batches, alone, strict=True)]
    assert sorted(count for name, count in calls if name == "prior") == [1, 1, 1, 5]
    assert sorted(count for name, count in calls if name == "decoder") == [1, 1, 1, 5]
    assert sorted(count for name, count in calls if name == "upsampler_1") == [1, 7]


def test_a_latent_stage_hands_on_what_its_autoencoder_decodes() -> None:
    networks, sampler = make_networks(), SamplerConfig(num_steps=4)
    prior, decoder, _ = networks.cascade(sampler).stages
    latent = LatentStage(networks.decoder, sampler, "latents")
    larger = UpsamplerStage.of(make_upsampler(16, 32))
    cascade = Cascade(Pictures(), [prior, latent, larger])
    result = cascade.sample(PROMPTS, SEEDS)
    assert cascade.sides_px == {"latents": 16, "upsampler_1": 32}
    plain: CascadeResult = Cascade(Pictures(), [prior, decoder]).sample(PROMPTS, SEEDS)
    expected = to_uint8(decode_latents(plain.values[PIXELS]))
    assert result.pictures["latents"].shape == (3, 16, 16, 3)
    # The stage's name is its stream of a seed: only the deterministic part can be compared.
    assert not torch.equal(result.pictures["latents"], expected)
    same = Cascade(Pictures(), [prior, replace(latent, name="decoder"), larger]).sample(PROMPTS, SEEDS)
    assert torch.equal(same.pictures["decoder"], expected)
    assert result.images.shape == (3, 32, 32, 3)
