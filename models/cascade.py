"""The cascade: caption -> z_image -> small picture -> larger pictures. arXiv:2204.06125, section 2.

Legend: B items, D joint space, H W pixels. Every item has its own seed and every stage its own stream of it, so that
a picture depends on its caption, its seed and the settings, and not on what else is drawn with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import iterate_embeddings
from models.clip_config import ClipDims
from models.decoder.network import Decoder, DecoderCondition, concat_decoder_conditions
from models.diffusion.config import SamplerConfig
from models.diffusion.guidance import classifier_free
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import config_timesteps, iterate
from models.diffusion.steps import SamplerState
from models.noisy_clip.network import NoisyClip, clip_guided
from models.pixels import to_uint8
from models.prior.network import Prior
from models.text import TextEncoding, concat_text
from models.upsampler.network import Upsampler

AnyPrior = Prior | ArPrior
PriorSampler = SamplerConfig | TokenSamplerConfig
_Sampler = TypeVar("_Sampler", SamplerConfig, TokenSamplerConfig)


class TextEncoder(Protocol):
    """The part of the frozen CLIP that sampling needs (pipeline.clip.FrozenClip)."""

    @property
    def dims(self) -> ClipDims:
        """Widths of the text tower."""
        ...

    def encode_text(self, captions: Sequence[str]) -> TextEncoding:
        """Encode captions."""
        ...


@dataclass(frozen=True)
class CascadeSettings:
    """How a cascade is sampled."""

    prior: PriorSampler
    """Of z_image; which of the two depends on the kind of the prior."""
    decoder: SamplerConfig
    """Of the smallest picture."""
    upsamplers: tuple[SamplerConfig, ...]
    """Of each larger picture; with fewer than there are upsamplers, the cascade stops early."""
    num_candidates: int = 2
    """Samples of z_image per caption, of which the one nearest the caption is kept."""
    micro_batch: int = 64
    """Most items at a time in one stage, which bounds its memory; guidance and candidates each multiply it."""

    def prior_as(self, kind: type[_Sampler]) -> _Sampler:
        """The settings of the prior, as its kind of prior takes them.

        Raises:
            TypeError: If they are for the other kind.
        """
        if not isinstance(self.prior, kind):
            raise TypeError(f"this prior takes a {kind.__name__}, the settings hold a {type(self.prior).__name__}")
        return self.prior


@dataclass(frozen=True)
class CascadeResult:
    """What came out, item by item."""

    z_image: Float[Tensor, "B D"]
    """Image embeddings that the prior drew."""
    stages: tuple[UInt8[Tensor, "B H W 3"], ...]
    """Pictures of each resolution, smallest first, on the CPU."""

    @property
    def images(self) -> UInt8[Tensor, "B H W 3"]:
        """The largest pictures."""
        return self.stages[-1]


class StageStep(NamedTuple):
    """One step of one stage, for whoever watches a picture come."""

    stage: str
    """prior, decoder, upsampler_1, upsampler_2; inversion in an edit."""
    done: int
    """Steps taken, by this many items at a time."""
    total: int
    """Steps of the stage."""
    x0: Tensor
    """What it comes to, as far as the network sees: (B, 3, H, W) pictures in [-1, 1], (B, D) in the prior."""


Watch = Callable[[StageStep], None]


class Cascade:
    """A prior, a decoder and upsamplers, ready to sample; the stages can be called one by one."""

    def __init__(
        self,
        clip: TextEncoder,
        prior: AnyPrior,
        decoder: Decoder,
        upsamplers: Sequence[Upsampler] = (),
        noisy_clip: NoisyClip | None = None,
    ) -> None:
        """Check that the pieces fit together, and put the networks in evaluation mode.

        Raises:
            ValueError: If a piece was made for another CLIP or another picture size.
        """
        for name, network in (("prior", prior), ("decoder", decoder)):
            if network.dims != clip.dims:
                raise ValueError(f"the {name} was made for {network.dims}, but this CLIP has {clip.dims}")
        side_px = decoder.config.image_px
        for number, upsampler in enumerate(upsamplers, start=1):
            if upsampler.config.low_res_px != side_px:
                raise ValueError(
                    f"upsampler {number} starts from {upsampler.config.low_res_px} px, "
                    f"but the stage before it draws {side_px} px"
                )
            side_px = upsampler.config.image_px
        if noisy_clip is not None and noisy_clip.config.image_px != decoder.config.image_px:
            raise ValueError(
                f"the noise-aware CLIP sees {noisy_clip.config.image_px} px, "
                f"but the decoder draws {decoder.config.image_px} px"
            )
        self.clip = clip
        self.prior = prior.eval()
        self.decoder = decoder.eval()
        self.upsamplers = tuple(upsampler.eval() for upsampler in upsamplers)
        self.noisy_clip = None if noisy_clip is None else noisy_clip.eval()
        """For CLIP guidance of the decoder; None: it cannot be asked for."""

    def default_settings(self) -> CascadeSettings:
        """The settings that the networks' own configurations carry."""
        return CascadeSettings(
            prior=self.prior.config.sampler,
            decoder=self.decoder.config.sampler,
            upsamplers=tuple(upsampler.config.sampler for upsampler in self.upsamplers),
            num_candidates=self.prior.config.num_candidates,
        )

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: CascadeSettings | None = None,
        watch: Watch | None = None,
    ) -> CascadeResult:
        """Draw one picture for each prompt and seed.

        Args:
            prompts: B captions.
            seeds: B seeds; the same prompt with another seed is another picture.
            settings: How; ``default_settings`` if None.
            watch: Called after each step.

        Raises:
            ValueError: If the numbers of prompts and seeds differ, or there are none.
        """
        if not prompts or len(prompts) != len(seeds):
            raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt")
        settings = settings or self.default_settings()
        text = self.clip.encode_text(prompts)
        z_image = self.sample_prior(text, seeds, settings, watch)
        pixels = self.decode(z_image, text, seeds, settings, watch)
        stages = [to_uint8(pixels).cpu()]
        for number in range(len(settings.upsamplers)):
            pixels = self.upsample(pixels, number, seeds, settings, watch)
            stages.append(to_uint8(pixels).cpu())
        return CascadeResult(z_image, tuple(stages))

    def sample_prior(
        self, text: TextEncoding, seeds: Sequence[int], settings: CascadeSettings, watch: Watch | None = None
    ) -> Float[Tensor, "B D"]:
        """Draw image embeddings: of ``num_candidates`` each, the one with the largest product with z_text."""
        count = settings.num_candidates

        def draw(part: slice) -> Tensor:
            texts = concat_text([text[part]] * count)
            noise = prior_noise(seeds[part], count)
            if isinstance(self.prior, ArPrior):
                z_image = _draw_embeddings(self.prior, texts, noise, settings.prior_as(TokenSamplerConfig), watch)
            else:
                z_image = _denoise_embeddings(self.prior, texts, noise, settings.prior_as(SamplerConfig), watch)
            best = (z_image * texts.z_text).sum(1).view(count, -1).argmax(0)
            return z_image.view(count, -1, z_image.shape[1])[best, torch.arange(len(best), device=best.device)]

        return in_parts(draw, len(text), settings.micro_batch)

    def decode(
        self,
        z_image: Float[Tensor, "B D"],
        text: TextEncoding,
        seeds: Sequence[int],
        settings: CascadeSettings,
        watch: Watch | None = None,
        *,
        keep_image: Bool[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Draw the smallest pictures, in [-1, 1], from image embeddings and captions.

        Args:
            z_image: Image embeddings of length one.
            text: The captions.
            seeds: B seeds.
            settings: How.
            watch: Called after each step.
            keep_image: False where z_image is replaced by the decoder's learned null (all are kept if None).
        """
        config, side_px = settings.decoder, self.decoder.config.image_px
        diffusion = Diffusion(self.decoder.config.diffusion)

        def draw(part: slice) -> Tensor:
            noise = NoiseSource.from_seeds(seeds[part], "decoder")
            x = noise.normal((3, side_px, side_px), device=z_image.device)
            keep = None if keep_image is None else keep_image[part]
            condition = self.decoder.encode_condition(z_image[part], text[part], keep_image=keep)
            denoise = self.denoiser(condition, config.guidance_scale, config.clip_guidance_scale)
            states = iterate(denoise, x, diffusion, config, noise)
            return run_stage("decoder", states, len(config_timesteps(config, diffusion)), watch)

        return in_parts(draw, len(text), settings.micro_batch)

    def denoiser(self, condition: DecoderCondition, guidance_scale: float, clip_guidance_scale: float) -> Denoise:
        """The decoder under a condition, with guidance of either kind: what every picture and every edit is drawn by.

        Args:
            condition: z_image, caption and known part of B items.
            guidance_scale: Classifier-free guidance; 1 is none.
            clip_guidance_scale: Guidance by the noise-aware CLIP towards the captions; 0 is none.

        Raises:
            ValueError: If CLIP guidance is asked for, and this cascade has no noise-aware CLIP.
        """
        denoise = guided_decoder(self.decoder, condition, guidance_scale)
        if clip_guidance_scale == 0:
            return denoise
        if self.noisy_clip is None:
            raise ValueError("clip_guidance_scale is above 0, and there is no noise-aware CLIP; train one")
        process = Diffusion(self.decoder.config.diffusion)
        return clip_guided(denoise, self.noisy_clip, condition.z_text, process, clip_guidance_scale)

    def upsample(
        self,
        pixels: Float[Tensor, "B 3 h w"],
        number: int,
        seeds: Sequence[int],
        settings: CascadeSettings,
        watch: Watch | None = None,
    ) -> Float[Tensor, "B 3 H W"]:
        """Enlarge pictures in [-1, 1] with upsampler ``number`` (from 0)."""
        upsampler, config = self.upsamplers[number], settings.upsamplers[number]
        diffusion = Diffusion(upsampler.config.diffusion)

        def draw(part: slice) -> Tensor:
            noise = NoiseSource.from_seeds(seeds[part], f"upsampler-{number}")
            x, condition = upsampler.begin(pixels[part], noise)

            def denoise(x: Tensor, t: Tensor) -> Tensor:
                return upsampler(x, t, condition)

            states = iterate(denoise, x, diffusion, config, noise)
            return run_stage(f"upsampler_{number + 1}", states, len(config_timesteps(config, diffusion)), watch)

        return in_parts(draw, len(pixels), settings.micro_batch)


def prior_noise(seeds: Sequence[int], num_candidates: int) -> NoiseSource:
    """Noise of the prior: of the first candidate of every seed, then of the second, and so on."""
    noise = NoiseSource(())
    for candidate in range(num_candidates):
        noise = noise + NoiseSource.from_seeds(seeds, f"prior-{candidate}")
    return noise


def _denoise_embeddings(
    prior: Prior, text: TextEncoding, noise: NoiseSource, config: SamplerConfig, watch: Watch | None
) -> Float[Tensor, "B D"]:
    x = noise.normal((prior.dims.embed_dim,), device=text.pooled.device)
    denoise = prior_denoiser(prior, text, config.guidance_scale)
    diffusion = Diffusion(prior.config.diffusion)
    measured = prior.x0_variance if prior.x0_variance.any() else None
    states = iterate(denoise, x, diffusion, config, noise, x0_variance=measured)
    return prior.unscale(run_stage("prior", states, len(config_timesteps(config, diffusion)), watch))


def _draw_embeddings(
    prior: ArPrior, text: TextEncoding, noise: NoiseSource, config: TokenSamplerConfig, watch: Watch | None
) -> Float[Tensor, "B D"]:
    z_image = text.z_text
    for done, z_image in enumerate(iterate_embeddings(prior, text, noise, config), start=1):
        if watch is not None:
            watch(StageStep("prior", done, prior.num_components, z_image))
    return z_image


def prior_denoiser(prior: Prior, text: TextEncoding, guidance_scale: float | Tensor = 1.0) -> Denoise:
    """The prior conditioned on captions, guided unless the scale is 1; what no step changes is computed here."""
    with torch.no_grad():
        if isinstance(guidance_scale, Tensor) or guidance_scale != 1.0:
            both = concat_text([prior.null_text.encoding(len(text)), text])
            condition = prior.encode_condition(both, cache=True)
        else:
            condition = prior.encode_condition(text, cache=True)

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return prior(x, t, condition)

    return denoise if len(condition) == len(text) else classifier_free(denoise, guidance_scale)


def decoder_denoiser(
    decoder: Decoder,
    z_image: Float[Tensor, "B D"],
    text: TextEncoding,
    guidance_scale: float | Tensor = 1.0,
) -> Denoise:
    """The decoder conditioned on image embeddings and captions, guided unless the scale is 1."""
    with torch.no_grad():
        condition = decoder.encode_condition(z_image, text)
    return guided_decoder(decoder, condition, guidance_scale)


def guided_decoder(decoder: Decoder, condition: DecoderCondition, guidance_scale: float | Tensor = 1.0) -> Denoise:
    """The decoder under a condition of B items, guided unless the scale is 1; a known part is known to both halves."""
    both = condition
    if isinstance(guidance_scale, Tensor) or guidance_scale != 1.0:
        with torch.no_grad():
            both = concat_decoder_conditions([decoder.null_condition(len(condition), condition.known), condition])

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return decoder(x, t, both)

    return denoise if both is condition else classifier_free(denoise, guidance_scale)


def run_stage(stage: str, states: Iterator[SamplerState], num_steps: int, watch: Watch | None = None) -> Tensor:
    """Take all steps of one stage, telling ``watch`` of each; the sample, (B, ...)."""
    x = None
    for done, state in enumerate(states, start=1):
        x = state.x
        if watch is not None:
            watch(StageStep(stage, done, num_steps, state.x0))
    assert x is not None, "a stage takes at least one step"
    return x


def in_parts(draw: Callable[[slice], Tensor], num_items: int, micro_batch: int) -> Tensor:
    """``draw`` on at most ``micro_batch`` items at a time."""
    if micro_batch < 1:
        raise ValueError(f"micro_batch = {micro_batch}: at least 1")
    starts = range(0, num_items, micro_batch)
    with torch.no_grad():
        return torch.cat([draw(slice(start, start + micro_batch)) for start in starts])
