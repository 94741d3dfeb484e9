"""Edits of pictures: arXiv:2204.06125, sections 3 and 4; inpainting (arXiv:2112.10741, section 4.3) and SDEdit.

A picture is (z_image, x_T): what CLIP sees of it, and the noise from which the decoder, walked by DDIM, draws it. Every
edit changes one of the two, or the walk, and ends in ``Editor.draw``: decoder, then upsamplers.

Legend: F frames (items drawn), D joint space, H W pixels. Frame by frame the result depends on the frame's seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from models.cascade import Cascade, CascadeResult, TextEncoder, Watch, in_parts, run_stage
from models.decoder.inpainting import PartlyKnown, known_planes, replacing
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import iterate_inversion, iterate_steps, make_limit
from models.diffusion.schedules import strided_timesteps
from models.diffusion.steps import Step, ddim_step
from models.pixels import resize_crop, to_pixels, to_uint8
from models.text import TextEncoding

_PARALLEL = 1e-6
"""Below this angle, in radians, slerp is a straight line; this close to half a turn it has no direction."""


class EditError(ValueError):
    """What was asked for cannot be done with these pictures, texts or networks; says why."""


@runtime_checkable
class ImageEncoder(TextEncoder, Protocol):
    """A CLIP with its image tower (pipeline.clip.FrozenClip)."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures, uint8 (B, H, W, 3): (B, D) of length one."""
        ...


@dataclass(frozen=True)
class EditSettings:
    """How the decoder is walked, there and back."""

    num_steps: int = 50
    """DDIM steps of a whole walk."""
    num_refinements: int = 3
    """Further network calls per step of the inversion, each of which brings it nearer to its inverse."""
    latent_guidance: float = 1.0
    """Guidance scale of edits that start from an inverted picture: the inversion is guided as well."""
    prompt_guidance: float | None = None
    """Guidance scale of edits that draw a prompt; the decoder's own if None."""


@dataclass(frozen=True)
class Latents:
    """Pictures as the decoder's two inputs: arXiv:2204.06125, section 3."""

    z_image: Float[Tensor, "F D"]
    """CLIP embeddings of length one."""
    x_T: Float[Tensor, "F 3 H W"]
    """Noise from which DDIM draws the picture under that embedding."""


@dataclass(frozen=True)
class Walk:
    """How ``Editor.draw`` goes; the defaults are those of a reconstruction."""

    text: TextEncoding | None = None
    """Captions of the frames; None: no caption."""
    num_steps: int | None = None
    """Steps to take, the last of the whole walk; None: all of them."""
    eta: float = 0.0
    """Noise of DDIM."""
    guidance_scale: float = 1.0
    """Classifier-free guidance."""
    clip_guidance_scale: float = 0.0
    """Guidance towards the captions by the cascade's noise-aware CLIP."""
    known: PartlyKnown | None = None
    """What must stay."""


class Editor:
    """Edits with the networks of a cascade.

    Args:
        cascade: The networks; its CLIP must have its image tower.
        settings: How the decoder is walked.
        watch: Called after each step of each stage.

    Raises:
        EditError: If CLIP has no image tower, or there are more steps than the decoder's chain has.
    """

    def __init__(self, cascade: Cascade, settings: EditSettings | None = None, watch: Watch | None = None) -> None:
        clip = cascade.clip
        if not isinstance(clip, ImageEncoder):
            raise EditError("this cascade's CLIP has no image tower, and an edit begins with z_image")
        self.cascade = cascade
        self.settings = settings or EditSettings()
        self._clip: ImageEncoder = clip
        self._watch = watch
        self._decoder = cascade.decoder
        self._diffusion = Diffusion(self._decoder.config.diffusion)
        longest = self._diffusion.num_timesteps
        if not 1 <= self.settings.num_steps <= longest:
            raise EditError(f"{self.settings.num_steps} steps: this decoder's chain has 1 to {longest}")
        self._limit = make_limit(self._decoder.config.sampler)
        self.timesteps = strided_timesteps(self._diffusion.num_timesteps, self.settings.num_steps)
        self._cascade_settings = cascade.default_settings()
        self._sides_px = [network.config.image_px for network in (cascade.decoder, *cascade.upsamplers)]

    @property
    def side_px(self) -> int:
        """Side of the finished pictures, in pixels."""
        return self._sides_px[-1]

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self._decoder.parameters()).device

    @property
    def inpaint_method(self) -> Literal["channels", "replacement"]:
        """How this decoder inpaints: see models/decoder/inpainting.py."""
        return "channels" if self._decoder.config.inpainting else "replacement"

    # ---- latents -----------------------------------------------------------------------------

    def embed(self, images: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F D"]:
        """z_image of pictures of any size."""
        return self._clip.encode_image(images)

    def encode(self, images: UInt8[Tensor, "F H W 3"]) -> Latents:
        """z_image by CLIP, x_T by DDIM inversion of the decoder under it: section 3, first paragraph."""
        z_image = self.embed(images)
        x0 = resize_crop(to_pixels(images.to(z_image.device)), self._sides_px[0])

        def invert(part: slice) -> Tensor:
            denoise = self._denoiser(z_image[part], Walk(guidance_scale=self.settings.latent_guidance), part)
            refinements = self.settings.num_refinements
            states = iterate_inversion(
                denoise, x0[part], self._diffusion, self.timesteps, num_refinements=refinements, limit=self._limit
            )
            return run_stage("inversion", states, len(self.timesteps), self._watch)

        return Latents(z_image, in_parts(invert, len(x0), self._cascade_settings.micro_batch))

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "F 3 H W"]:
        """The x_T from which ``Cascade.sample`` would begin with these seeds."""
        side_px = self._sides_px[0]
        return NoiseSource.from_seeds(seeds, "decoder").normal((3, side_px, side_px), device=self.device)

    # ---- edits -------------------------------------------------------------------------------

    def reconstruct(self, latents: Latents, seeds: Sequence[int]) -> CascadeResult:
        """The pictures again, from their latents alone."""
        return self.draw(latents.z_image, latents.x_T, seeds, self._latent_walk())

    def vary(self, latents: Latents, seeds: Sequence[int], *, eta: float) -> CascadeResult:
        """One variation of a picture for each seed: DDIM with noise, section 3.1; eta = 0 is the reconstruction."""
        z_image, x_T = (part.expand(len(seeds), *part.shape[1:]) for part in (latents.z_image, latents.x_T))
        return self.draw(z_image, x_T, seeds, self._latent_walk(eta))

    def interpolate(
        self, a: Latents, b: Latents, shares: Sequence[float], seed: int, *, noise: Literal["slerp", "fixed"] = "slerp"
    ) -> CascadeResult:
        """From one picture (share 0) to another (share 1): section 3.2.

        Args:
            a: Latents of one picture.
            b: Latents of the other.
            shares: Where each frame stands, in [0, 1].
            seed: Of every frame.
            noise: "slerp" turns x_T along with z_image, so that the ends are the reconstructions; "fixed" draws all
                frames from the noise of ``seed``.
        """
        x_T = slerp(a.x_T, b.x_T, shares) if noise == "slerp" else self.noise([seed]).expand(len(shares), -1, -1, -1)
        z_image = slerp(a.z_image, b.z_image, shares)
        return self.draw(z_image, x_T, [seed] * len(shares), self._latent_walk())

    def text_diff(
        self, latents: Latents, source: str, target: str, thetas: Sequence[float], seed: int
    ) -> CascadeResult:
        """Turn a picture from what one text says towards what another says: section 3.3.

        Args:
            latents: Of one picture.
            source: What the picture shows.
            target: What it should show.
            thetas: How far each frame is turned, in [0, 1]; 0 is the reconstruction (section 3.3: up to 0.25-0.50).
            seed: Of every frame.

        Raises:
            EditError: If CLIP sees no difference between the texts.
        """
        of_source, of_target = self._clip.encode_text([source, target]).z_text
        difference = of_target - of_source
        if difference.norm() < _PARALLEL:
            raise EditError(f"CLIP reads {source!r} and {target!r} as the same: there is no direction to turn to")
        z_image = slerp(latents.z_image, F.normalize(difference, dim=0)[None], thetas)
        x_T = latents.x_T.expand(len(thetas), -1, -1, -1)
        return self.draw(z_image, x_T, [seed] * len(thetas), self._latent_walk())

    def draw_embeddings(self, z_image: Float[Tensor, "F D"], seed: int) -> CascadeResult:
        """Pictures of embeddings of length one, all from the noise of ``seed``: what each of them holds, section 4."""
        x_T = self.noise([seed]).expand(len(z_image), -1, -1, -1)
        return self.draw(z_image, x_T, [seed] * len(z_image), self._latent_walk())

    def inpaint(self, known: PartlyKnown, prompt: str, seeds: Sequence[int]) -> CascadeResult:
        """Draw a part of one picture anew, as a caption of the whole says; the rest stays as it is at every side.

        Args:
            known: The picture, and the part to draw.
            prompt: What the finished picture shows.
            seeds: One for each frame.
        """
        many = PartlyKnown(*(part.expand(len(seeds), *part.shape[1:]) for part in (known.images, known.drawn)))
        z_image, walk = self._prompted(prompt, seeds, many)
        return self.draw(z_image, self.noise(seeds), seeds, walk)

    def sdedit(
        self, image: UInt8[Tensor, "1 H W 3"], prompt: str, seeds: Sequence[int], *, strength: float
    ) -> CascadeResult:
        """Noise a picture, and draw it from there as a caption says: arXiv:2108.01073.

        Args:
            image: The picture.
            prompt: What the finished picture shows.
            seeds: One for each frame.
            strength: Share of the walk that is walked, in [0, 1]; where that is no step, the picture itself comes back.
        """
        z_image, walk = self._prompted(prompt, seeds, None, num_steps=round(strength * len(self.timesteps)))
        pixels = to_pixels(image.to(self.device)).expand(len(seeds), -1, -1, -1)
        if not walk.num_steps:
            return CascadeResult(z_image, tuple(to_uint8(resize_crop(pixels, side)).cpu() for side in self._sides_px))
        x0 = resize_crop(pixels, self._sides_px[0])
        t = torch.full((len(seeds),), self.timesteps[-walk.num_steps], device=x0.device)
        x = self._diffusion.q_sample(x0, t, self.noise(seeds))
        return self.draw(z_image, x, seeds, walk)

    # ---- the one path ------------------------------------------------------------------------

    def draw(
        self, z_image: Float[Tensor, "F D"], x: Float[Tensor, "F 3 H W"], seeds: Sequence[int], walk: Walk | None = None
    ) -> CascadeResult:
        """Decode by DDIM and enlarge.

        Args:
            z_image: Embeddings of length one.
            x: Noised small pictures where the walk begins.
            seeds: One for each frame: of DDIM's noise, and of the upsamplers.
            walk: How; the default walks all steps without a caption, noise or guidance.
        """
        walk = walk or Walk()
        timesteps = self.timesteps if walk.num_steps is None else self.timesteps[-walk.num_steps :]

        def decode(part: slice) -> Tensor:
            step = self._step(walk, NoiseSource.from_seeds(seeds[part], "edit"), part)
            denoise = self._denoiser(z_image[part], walk, part)
            states = iterate_steps(step, denoise, x[part], self._diffusion, timesteps)
            return run_stage("decoder", states, len(timesteps), self._watch)

        known = walk.known
        pixels = in_parts(decode, len(seeds), self._cascade_settings.micro_batch)
        stages: list[Tensor] = []
        for number in range(-1, len(self.cascade.upsamplers)):
            if number >= 0:
                pixels = self.cascade.upsample(pixels, number, seeds, self._cascade_settings, self._watch)
            pixels = pixels if known is None else known.keep(pixels)
            stages.append(to_uint8(pixels).cpu())
        return CascadeResult(z_image, tuple(stages))

    def _step(self, walk: Walk, noise: NoiseSource, part: slice) -> Step:
        step: Step = partial(ddim_step, noise=noise, eta=walk.eta, limit=self._limit)
        if walk.known is None or self._decoder.config.inpainting:
            return step
        known, drawn = walk.known[part].at(self._sides_px[0])
        return replacing(step, known, drawn, noise)

    def _denoiser(self, z_image: Tensor, walk: Walk, part: slice) -> Denoise:
        text = self._decoder.null_text.encoding(len(z_image)) if walk.text is None else walk.text[part]
        planes = None
        if walk.known is not None and self._decoder.config.inpainting:
            planes = known_planes(*walk.known[part].at(self._sides_px[0]))
        condition = self._decoder.encode_condition(z_image, text, known=planes)
        return self.cascade.denoiser(condition, walk.guidance_scale, walk.clip_guidance_scale)

    def _latent_walk(self, eta: float = 0.0) -> Walk:
        return Walk(eta=eta, guidance_scale=self.settings.latent_guidance)

    def _prompted(
        self, prompt: str, seeds: Sequence[int], known: PartlyKnown | None, num_steps: int | None = None
    ) -> tuple[Tensor, Walk]:
        """z_image of a prompt by the prior, and the walk that draws it."""
        text = self._clip.encode_text([prompt] * len(seeds))
        sampler, scale = self._cascade_settings.decoder, self.settings.prompt_guidance
        z_image = self.cascade.sample_prior(text, seeds, self._cascade_settings, self._watch)
        return z_image, Walk(
            text=text,
            num_steps=num_steps,
            guidance_scale=sampler.guidance_scale if scale is None else scale,
            clip_guidance_scale=sampler.clip_guidance_scale,
            known=known,
        )


def slerp(a: Float[Tensor, "1 ..."], b: Float[Tensor, "1 ..."], shares: Sequence[float]) -> Float[Tensor, "F ..."]:
    """Spherical interpolation, one frame for each share in [0, 1]: 0 is ``a``, 1 is ``b``.

    Raises:
        EditError: If the two point in opposite directions, between which there is no one way.
    """
    cosine = F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).clamp(-1, 1)
    angle = cosine.arccos()
    share = torch.tensor(list(shares), dtype=torch.float64, device=a.device).view(-1, *[1] * (a.ndim - 1))
    if torch.pi - angle < _PARALLEL:
        raise EditError("the two ends are opposite to each other: there is no one way between them")
    if angle < _PARALLEL:
        return ((1 - share) * a + share * b).to(a.dtype)
    return ((((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()).to(a.dtype)
