"""Edits of pictures: arXiv:2204.06125, sections 3 and 4; inpainting (arXiv:2112.10741, section 4.3) and SDEdit.

A picture is encoded as (z_image, x_T): its CLIP embedding, and the noise from which the decoder makes it by DDIM. Every
edit changes one of the two, or the sampling, and ends in ``Editor.run``: the cascade's stages from the decoder on.

Legend: F frames (items made), D joint space, H W pixels. Each frame depends on its own seed only.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from models.cascade import Cascade, CascadeResult, TextEncoder
from models.decoder.inpainting import MASK, PICTURE
from models.decoder.network import DecoderCondition
from models.decoder.stage import START, STRENGTH, X_T, DecoderStage
from models.diffusion.noise import NoiseSource
from models.diffusion.samplers import config_timesteps, make_limit
from models.diffusion.steps import Step, ddim_invert_step, ddim_step
from models.pixels import resize_crop, to_pixels, to_uint8
from models.request import WALK_STEPS, EditError
from models.stage import Z_IMAGE, Batch, Chain, Watch
from models.text import TextEncoding

_PARALLEL = 1e-6
"""Below this angle, in radians, slerp is a straight line; this close to half a turn it has no direction."""


@runtime_checkable
class ImageEncoder(TextEncoder, Protocol):
    """A CLIP with its image tower (pipeline.clip.frozen.FrozenClip)."""

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed pictures, uint8 (B, H, W, 3): (B, D) of length one."""
        ...


@dataclass(frozen=True)
class EditSettings:
    """How the decoder samples and inverts."""

    num_steps: int = WALK_STEPS
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


X_0 = "x0"
"""Value that an inversion starts from: pictures of the decoder's size, (B, 3, H, W) in [-1, 1]."""
ETA = "eta"
"""Value of a walk: the noise of DDIM of each item, (B,); without it, that of the stage's sampler."""


@dataclass(frozen=True, eq=False)
class WalkStage(DecoderStage):
    """The decoder sampled by DDIM from an edit's noised pictures, ``X_T``; its noise has a stream of its own."""

    def noise(self, seeds: Sequence[int]) -> NoiseSource:
        """See ``DiffusionStage``."""
        return NoiseSource.from_seeds(seeds, "edit")

    def step(self, chains: Sequence[Chain], noise: NoiseSource) -> Step:
        """See ``DiffusionStage``."""
        if not any(ETA in chain.batch.values for chain in chains):
            return super().step(chains, noise)
        usual = torch.tensor([self.sampler.eta])
        etas = [chain.batch.values.get(ETA, usual.expand(len(chain.noise))) for chain in chains]
        eta = torch.cat([one.to(chain.state.x.device) for one, chain in zip(etas, chains, strict=True)])
        return partial(ddim_step, noise=noise, eta=eta, limit=make_limit(self.sampler))


@dataclass(frozen=True, eq=False)
class InversionStage(DecoderStage):
    """DDIM backwards: from pictures ``X_0`` and their z_image to the noise ``X_T`` that makes them, section 3.

    Args:
        num_refinements: Further network calls in each step; the reconstruction is nearer with each.
    """

    num_refinements: int = 0

    @property
    def makes(self) -> str:
        """See ``Stage``."""
        return X_T

    @property
    def side_px(self) -> None:
        """See ``Stage``; its result is no picture."""

    def begin(self, batch: Batch, noise: NoiseSource, *, guided: bool) -> tuple[Tensor, DecoderCondition]:
        """See ``DiffusionStage``; the chain begins at the picture."""
        del noise
        return batch.values[X_0], self.encode(batch.text, batch.values, guided=guided)

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``."""
        chain = super().enter(batch, noise)
        first, *others = chain.timesteps
        chain.timesteps, chain.end = (-1, *reversed(others)), first
        return chain

    def step(self, chains: Sequence[Chain], noise: NoiseSource) -> Step:
        """See ``DiffusionStage``."""
        del chains, noise
        return partial(ddim_invert_step, num_refinements=self.num_refinements, limit=make_limit(self.sampler))

    def finish(self, batch: Batch, x: Tensor) -> Tensor:
        """See ``DiffusionStage``."""
        del batch
        return x


class RecentLatents:
    """The latents of the pictures that were inverted last: several edits of one picture then invert it once.

    Args:
        size: Most pictures that are remembered.
    """

    def __init__(self, size: int = 64) -> None:
        self._size = size
        self._latents: dict[Hashable, Latents] = {}
        self._lock = threading.Lock()

    def find(self, keys: Sequence[Hashable]) -> Latents | None:
        """The latents of all pictures of ``keys``, in their order; None if one is not remembered."""
        with self._lock:
            parts = [self._latents[key] for key in keys if key in self._latents]
        if len(parts) < len(keys):
            return None
        return Latents(torch.cat([part.z_image for part in parts]), torch.cat([part.x_T for part in parts]))

    def add(self, keys: Sequence[Hashable], latents: Latents) -> None:
        """Remember latents, one picture for each key; the oldest are forgotten."""
        with self._lock:
            for row, key in enumerate(keys):
                self._latents.pop(key, None)
                self._latents[key] = Latents(latents.z_image[row : row + 1], latents.x_T[row : row + 1])
            for key in list(self._latents)[: -self._size]:
                del self._latents[key]


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
        self.latent_walk = self.walk(guidance_scale=self.settings.latent_guidance)
        self.inversion = InversionStage(
            decoder.network,
            self.latent_walk.sampler,
            "inversion",
            num_refinements=self.settings.num_refinements,
        )
        self.recent = RecentLatents()
        self.timesteps = config_timesteps(self.latent_walk.sampler, self.decoder.diffusion)

    @property
    def side_px(self) -> int:
        """Side of the finished pictures, in pixels."""
        return list(self.cascade.sides_px.values())[-1]

    @property
    def device(self) -> torch.device:
        """Device of the networks; the CPU if the decoder has no weights here."""
        device = next(self.decoder.network.parameters()).device
        return torch.device("cpu") if device.type == "meta" else device

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
        batch = Batch(self.no_caption(len(images)), (0,) * len(images), {Z_IMAGE: z_image, X_0: self.shrink(images)})
        return Latents(z_image, self.cascade.run_stage(self.inversion, batch, self._watch))

    def shrink(self, images: UInt8[Tensor, "F H W 3"]) -> Float[Tensor, "F 3 h w"]:
        """The centre squares of pictures of any size as the decoder would make them."""
        return resize_crop(to_pixels(images.to(self.device)), self.decoder.network.config.image_px)

    def noise(self, seeds: Sequence[int]) -> Float[Tensor, "F 3 H W"]:
        """The x_T from which ``Cascade.sample`` would begin with these seeds."""
        side_px = self.decoder.network.config.image_px
        return self.decoder.noise(seeds).normal((3, side_px, side_px), device=self.device)

    # ---- edits -------------------------------------------------------------------------------

    def reconstruct(self, latents: Latents, seeds: Sequence[int]) -> CascadeResult:
        """Reconstruct pictures from their latents."""
        return self.run(self.latent_walk, self.frames(latents.z_image, latents.x_T, seeds))

    def vary(self, latents: Latents, seeds: Sequence[int], *, eta: float) -> CascadeResult:
        """One variation of a picture for each seed: DDIM with noise, section 3.1; eta = 0 is the reconstruction."""
        z_image, x_T = (part.expand(len(seeds), *part.shape[1:]) for part in (latents.z_image, latents.x_T))
        return self.run(
            self.walk(eta=eta, guidance_scale=self.settings.latent_guidance), self.frames(z_image, x_T, seeds)
        )

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
        return self.run(self.latent_walk, self.frames(z_image, x_T, [seed] * len(shares)))

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
        z_image = self.turned(latents.z_image, source, target, thetas)
        x_T = latents.x_T.expand(len(thetas), -1, -1, -1)
        return self.run(self.latent_walk, self.frames(z_image, x_T, [seed] * len(thetas)))

    def turned(
        self, z_image: Float[Tensor, "1 D"], source: str, target: str, thetas: Sequence[float]
    ) -> Float[Tensor, "F D"]:
        """``z_image`` rotated from one text towards another; arguments and errors as ``text_diff``."""
        z_source, z_target = self._clip.encode_text([source, target]).z_text
        difference = z_target - z_source
        if difference.norm() < _PARALLEL:
            raise EditError(f"CLIP reads {source!r} and {target!r} as the same: there is no direction to turn to")
        return slerp(z_image, F.normalize(difference, dim=0)[None], thetas)

    def sample_embeddings(self, z_image: Float[Tensor, "F D"], seed: int) -> CascadeResult:
        """Decode embeddings of length one, all from the noise of ``seed``, to show what each contains: section 4."""
        x_T = self.noise([seed]).expand(len(z_image), -1, -1, -1)
        return self.run(self.latent_walk, self.frames(z_image, x_T, [seed] * len(z_image)))

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
        batch = self._prompted(prompt, seeds)
        if not self.num_steps_of(strength):
            pixels = to_pixels(image.to(self.device)).expand(len(seeds), -1, -1, -1)
            sides = self.cascade.sides_px.items()
            resized = {name: to_uint8(resize_crop(pixels, side)).cpu() for name, side in sides}
            return CascadeResult(batch.values, resized)
        start, share = image.expand(len(seeds), -1, -1, -1), torch.full((len(seeds),), strength)
        return self.run(
            self._prompt_walk(), batch.with_values(**{START: start, STRENGTH: share, X_T: self.noise(seeds)})
        )

    def num_steps_of(self, strength: float) -> int:
        """Steps that ``sdedit`` takes; none: it returns the picture itself."""
        return round(strength * len(self.timesteps))

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
        return Batch(self.no_caption(len(seeds)), tuple(seeds), {Z_IMAGE: z_image, X_T: x_T})

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

    def no_caption(self, count: int) -> TextEncoding:
        """The empty caption for each of ``count`` frames."""
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
