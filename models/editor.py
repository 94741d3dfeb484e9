"""Edits of pictures: arXiv:2204.06125, sections 3 and 4; inpainting (arXiv:2112.10741, section 4.3) and SDEdit.

A picture is encoded as (z_image, x_T): its CLIP embedding, and the noise from which the decoder makes it by DDIM. Every
edit changes one of the two, or the sampling, and ends in ``Editor.run``: the cascade's stages from the decoder on.

Legend: F frames (items made), D joint space, H W pixels. Each frame depends on its own seed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from models.cascade import Cascade, CascadeResult, TextEncoder
from models.decoder.inpainting import MASK, PICTURE
from models.decoder.stage import X_T, DecoderStage
from models.diffusion.noise import NoiseSource
from models.diffusion.samplers import config_timesteps, iterate_inversion, make_limit
from models.pixels import resize_crop, to_pixels, to_uint8
from models.stage import Z_IMAGE, Batch, Chain, StageStep, Watch
from models.text import TextEncoding

_PARALLEL = 1e-6
"""Below this angle, in radians, slerp is a straight line; this close to half a turn it has no direction."""


class EditError(ValueError):
    """The edit cannot be done with these pictures, texts or networks; says why."""


@runtime_checkable
class ImageEncoder(TextEncoder, Protocol):
    """A CLIP with its image tower (pipeline.clip.FrozenClip)."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures, uint8 (B, H, W, 3): (B, D) of length one."""
        ...


@dataclass(frozen=True)
class EditSettings:
    """How the decoder samples and inverts."""

    num_steps: int = 50
    """DDIM steps from noise to picture."""
    num_refinements: int = 3
    """Extra network calls per step of the inversion; each makes the inversion more exact."""
    latent_guidance: float = 1.0
    """Guidance scale of edits that start from an inverted picture: the inversion is guided as well."""
    prompt_guidance: float | None = None
    """Guidance scale of edits that sample a prompt; the decoder's own if None."""


@dataclass(frozen=True)
class Latents:
    """Pictures as the decoder's two inputs: arXiv:2204.06125, section 3."""

    z_image: Float[Tensor, "F D"]
    """CLIP embeddings of length one."""
    x_T: Float[Tensor, "F 3 H W"]
    """Noise from which DDIM makes the picture under that embedding."""


@dataclass(frozen=True, eq=False)
class WalkStage(DecoderStage):
    """The decoder, started from an edit's noised pictures; its noise has a stream of its own."""

    num_last_steps: int | None = None
    """Take only this many of the last steps; None: all steps."""

    def noise(self, seeds: Sequence[int]) -> NoiseSource:
        """See ``DiffusionStage``."""
        return NoiseSource.from_seeds(seeds, "edit")

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``."""
        chain = super().enter(batch, noise)
        if self.num_last_steps is not None:
            chain.timesteps = chain.timesteps[-self.num_last_steps :]
        return chain


class Editor:
    """Edits with the stages of a cascade.

    Args:
        cascade: The stages, with a decoder; its CLIP must have its image tower.
        settings: How the decoder samples and inverts.
        watch: Called after each step of each stage.

    Raises:
        EditError: If CLIP has no image tower, there is no decoder, or there are more steps than its chain has.
    """

    def __init__(self, cascade: Cascade, settings: EditSettings | None = None, watch: Watch | None = None) -> None:
        clip = cascade.clip
        if not isinstance(clip, ImageEncoder):
            raise EditError("this cascade's CLIP has no image tower, and an edit begins with z_image")
        self.cascade = cascade
        self.settings = settings or EditSettings()
        self._clip: ImageEncoder = clip
        self._watch = watch
        decoder = next((stage for stage in cascade.stages if isinstance(stage, DecoderStage)), None)
        if decoder is None:
            raise EditError("this cascade has no decoder, and an edit is made by one")
        self.decoder = decoder
        longest = self.decoder.diffusion.num_timesteps
        if not 1 <= self.settings.num_steps <= longest:
            raise EditError(f"{self.settings.num_steps} steps: this decoder's chain has 1 to {longest}")
        self.timesteps = config_timesteps(self.walk().sampler, self.decoder.diffusion)

    @property
    def side_px(self) -> int:
        """Side of the finished pictures, in pixels."""
        return list(self.cascade.sides_px.values())[-1]

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.decoder.network.parameters()).device

    @property
    def inpaint_method(self) -> Literal["channels", "replacement"]:
        """How this decoder inpaints: see models/decoder/inpainting.py."""
        return "channels" if self.decoder.network.config.inpainting else "replacement"

    # ---- latents -----------------------------------------------------------------------------

    def embed(self, images: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F D"]:
        """z_image of pictures of any size."""
        return self._clip.encode_image(images)

    def encode(self, images: UInt8[Tensor, "F H W 3"]) -> Latents:
        """z_image by CLIP, x_T by DDIM inversion of the decoder under it: section 3, first paragraph."""
        z_image = self.embed(images)
        x0 = resize_crop(to_pixels(images.to(z_image.device)), self.decoder.network.config.image_px)
        size = self.cascade.micro_batch
        spans = [slice(begin, begin + size) for begin in range(0, len(x0), size)]
        return Latents(z_image, torch.cat([self._invert(x0[span], z_image[span]) for span in spans]))

    def _invert(self, x0: Tensor, z_image: Tensor) -> Tensor:
        stage, x = self._latent_walk(), x0
        text, scale = self._no_caption(len(x0)), stage.sampler.guidance_scale
        with torch.no_grad():
            condition = stage.encode(text, {Z_IMAGE: z_image}, guided=scale != 1.0)
        states = iterate_inversion(
            stage.denoiser(condition, [scale] * len(x0)),
            x0,
            stage.diffusion,
            self.timesteps,
            num_refinements=self.settings.num_refinements,
            limit=make_limit(stage.sampler),
        )
        for done, state in enumerate(states, start=1):
            x = state.x
            if self._watch is not None:
                self._watch(StageStep("inversion", done, len(self.timesteps), state.x0))
        return x

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "F 3 H W"]:
        """The x_T from which ``Cascade.sample`` would begin with these seeds."""
        side_px = self.decoder.network.config.image_px
        return self.decoder.noise(seeds).normal((3, side_px, side_px), device=self.device)

    # ---- edits -------------------------------------------------------------------------------

    def reconstruct(self, latents: Latents, seeds: Sequence[int]) -> CascadeResult:
        """Reconstruct pictures from their latents."""
        return self.run(self._latent_walk(), self.frames(latents.z_image, latents.x_T, seeds))

    def vary(self, latents: Latents, seeds: Sequence[int], *, eta: float) -> CascadeResult:
        """One variation of a picture for each seed: DDIM with noise, section 3.1; eta = 0 is the reconstruction."""
        z_image, x_T = (part.expand(len(seeds), *part.shape[1:]) for part in (latents.z_image, latents.x_T))
        return self.run(self._latent_walk(eta), self.frames(z_image, x_T, seeds))

    def interpolate(
        self, a: Latents, b: Latents, shares: Sequence[float], seed: int, *, noise: Literal["slerp", "fixed"] = "slerp"
    ) -> CascadeResult:
        """From one picture (share 0) to another (share 1): section 3.2.

        Args:
            a: Latents of one picture.
            b: Latents of the other.
            shares: Position of each frame, in [0, 1].
            seed: Seed of every frame.
            noise: "slerp" interpolates x_T like z_image, so that the ends are the reconstructions; "fixed" makes all
                frames from the noise of ``seed``.
        """
        x_T = slerp(a.x_T, b.x_T, shares) if noise == "slerp" else self.noise([seed]).expand(len(shares), -1, -1, -1)
        z_image = slerp(a.z_image, b.z_image, shares)
        return self.run(self._latent_walk(), self.frames(z_image, x_T, [seed] * len(shares)))

    def text_diff(
        self, latents: Latents, source: str, target: str, thetas: Sequence[float], seed: int
    ) -> CascadeResult:
        """Rotate a picture's z_image from one text towards another: section 3.3.

        Args:
            latents: Latents of one picture.
            source: What the picture shows.
            target: What it should show.
            thetas: Share of the rotation of each frame, in [0, 1]; 0 is the reconstruction (section 3.3: 0.25-0.50).
            seed: Seed of every frame.

        Raises:
            EditError: If CLIP sees no difference between the texts.
        """
        z_source, z_target = self._clip.encode_text([source, target]).z_text
        difference = z_target - z_source
        if difference.norm() < _PARALLEL:
            raise EditError(f"CLIP reads {source!r} and {target!r} as the same: there is no direction to turn to")
        z_image = slerp(latents.z_image, F.normalize(difference, dim=0)[None], thetas)
        x_T = latents.x_T.expand(len(thetas), -1, -1, -1)
        return self.run(self._latent_walk(), self.frames(z_image, x_T, [seed] * len(thetas)))

    def sample_embeddings(self, z_image: Float[Tensor, "F D"], seed: int) -> CascadeResult:
        """Decode embeddings of length one, all from the noise of ``seed``, to show what each contains: section 4."""
        x_T = self.noise([seed]).expand(len(z_image), -1, -1, -1)
        return self.run(self._latent_walk(), self.frames(z_image, x_T, [seed] * len(z_image)))

    def inpaint(
        self, image: UInt8[Tensor, "1 H W 3"], mask: Bool[Tensor, "1 h w"], prompt: str, seeds: Sequence[int]
    ) -> CascadeResult:
        """Resample the masked part of one picture under a caption of the whole; the rest is unchanged at every size.

        Args:
            image: The picture.
            mask: True where it is resampled.
            prompt: What the finished picture shows.
            seeds: One for each frame.
        """
        values = {PICTURE: image, MASK: mask}
        values = {name: value.expand(len(seeds), *value.shape[1:]) for name, value in values.items()}
        batch = self._prompted(prompt, seeds)
        return self.run(self._prompt_walk(), batch.with_values(**values, **{X_T: self.noise(seeds)}))

    def sdedit(
        self, image: UInt8[Tensor, "1 H W 3"], prompt: str, seeds: Sequence[int], *, strength: float
    ) -> CascadeResult:
        """Noise a picture, then denoise it under a caption: arXiv:2108.01073.

        Args:
            image: The picture.
            prompt: What the finished picture shows.
            seeds: One for each frame.
            strength: Share of the steps to take, in [0, 1]; if it rounds to no step, the picture itself is returned.
        """
        num_steps, batch = round(strength * len(self.timesteps)), self._prompted(prompt, seeds)
        pixels = to_pixels(image.to(self.device)).expand(len(seeds), -1, -1, -1)
        if not num_steps:
            sides = self.cascade.sides_px.items()
            resized = {name: to_uint8(resize_crop(pixels, side)).cpu() for name, side in sides}
            return CascadeResult(batch.values, resized)
        x0 = resize_crop(pixels, self.decoder.network.config.image_px)
        t = torch.full((len(seeds),), self.timesteps[-num_steps], device=x0.device)
        x = self.decoder.diffusion.q_sample(x0, t, self.noise(seeds))
        return self.run(replace(self._prompt_walk(), num_last_steps=num_steps), batch.with_values(**{X_T: x}))

    # ---- what all edits share ----------------------------------------------------------------

    def walk(self, *, eta: float = 0.0, guidance_scale: float = 1.0, clip_guidance_scale: float = 0.0) -> WalkStage:
        """The decoder sampled by DDIM.

        Args:
            eta: Noise of DDIM.
            guidance_scale: Classifier-free guidance.
            clip_guidance_scale: Guidance towards the captions by the cascade's noise-aware CLIP.
        """
        sampler = replace(
            self.decoder.sampler,
            method="ddim",
            num_steps=self.settings.num_steps,
            respacing="",
            eta=eta,
            guidance_scale=guidance_scale,
            clip_guidance_scale=clip_guidance_scale,
        )
        return WalkStage(self.decoder.network, sampler, self.decoder.name, self.decoder.noisy_clip)

    def run(self, walk: WalkStage, batch: Batch) -> CascadeResult:
        """Denoise the noised pictures of a batch, its ``X_T``, and run the upsamplers."""
        larger = self.cascade.stages[self.cascade.stages.index(self.decoder) + 1 :]
        return self.cascade.run(batch, (walk, *larger), self._watch)

    def frames(self, z_image: Float[Tensor, "F D"], x_T: Float[Tensor, "F 3 H W"], seeds: Sequence[int]) -> Batch:
        """A batch without captions.

        Args:
            z_image: Embeddings of length one.
            x_T: Noise from which the sampling starts.
            seeds: One for each frame: of DDIM's noise, and of the upsamplers.
        """
        return Batch(self._no_caption(len(seeds)), tuple(seeds), {Z_IMAGE: z_image, X_T: x_T})

    def _latent_walk(self, eta: float = 0.0) -> WalkStage:
        return self.walk(eta=eta, guidance_scale=self.settings.latent_guidance)

    def _prompt_walk(self) -> WalkStage:
        sampler, scale = self.decoder.sampler, self.settings.prompt_guidance
        return self.walk(
            guidance_scale=sampler.guidance_scale if scale is None else scale,
            clip_guidance_scale=sampler.clip_guidance_scale,
        )

    def _prompted(self, prompt: str, seeds: Sequence[int]) -> Batch:
        """Frames of a prompt, with the results of the stages before the decoder."""
        batch = Batch(self._clip.encode_text([prompt] * len(seeds)), tuple(seeds))
        stages = self.cascade.stages[: self.cascade.stages.index(self.decoder)]
        return batch.with_values(**self.cascade.run(batch, stages, self._watch).values)

    def _no_caption(self, count: int) -> TextEncoding:
        return self.decoder.network.null_text.encoding(count)


def slerp(a: Float[Tensor, "1 ..."], b: Float[Tensor, "1 ..."], shares: Sequence[float]) -> Float[Tensor, "F ..."]:
    """Spherical interpolation, one frame for each share in [0, 1]: 0 is ``a``, 1 is ``b``.

    Raises:
        EditError: If the two point in opposite directions, so that the path is not unique.
    """
    cosine = F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0).clamp(-1, 1)
    angle = cosine.arccos()
    share = torch.tensor(list(shares), dtype=torch.float64, device=a.device).view(-1, *[1] * (a.ndim - 1))
    if torch.pi - angle < _PARALLEL:
        raise EditError("the two ends are opposite to each other: there is no one way between them")
    if angle < _PARALLEL:
        return ((1 - share) * a + share * b).to(a.dtype)
    return ((((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()).to(a.dtype)
