"""The decoder as a stage: z_image and captions to the smallest pictures.

Legend: B items, D joint space, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

from models.decoder.inpainting import keep_known, known_part, known_planes, replacing
from models.decoder.network import NUM_COLOURS, Decoder, DecoderCondition
from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise
from models.diffusion.steps import Step, initial_state
from models.noisy_clip.network import NoisyClip, clip_guided
from models.pixels import resize_crop, to_pixels
from models.rows import concat_rows
from models.stage import Z_IMAGE, Batch, Chain, DiffusionStage
from models.text import TextEncoding

X_T = "x_T"
"""Value that an edit starts from: noised small pictures (B, 3, H, W) at the first timestep."""
START, STRENGTH = "start", "strength"
"""Values of SDEdit (arXiv:2108.01073): pictures to start from, uint8 (B, H, W, 3), and the share of the steps that is
taken, (B,), the same for all."""


@dataclass(frozen=True, eq=False)
class DecoderStage(DiffusionStage):
    """Samples pictures from ``z_image`` where the batch has one, else from captions alone.

    Values of an edit: ``X_T``, ``START`` and ``STRENGTH``, and those of models/decoder/inpainting.py.

    Raises:
        ValueError: If guidance by CLIP is requested, and there is no noise-aware CLIP, or one of another size.
    """

    network: Decoder
    noisy_clip: NoisyClip | None = None
    """For guidance by CLIP."""

    def __post_init__(self) -> None:
        side_px = self.network.config.image_px
        if self.sampler.clip_guidance_scale > 0 and self.noisy_clip is None:
            raise ValueError("clip_guidance_scale is above 0, and there is no noise-aware CLIP; train one")
        if self.noisy_clip is not None and self.noisy_clip.config.image_px != side_px:
            clip_px = self.noisy_clip.config.image_px
            raise ValueError(f"the noise-aware CLIP sees {clip_px} px, but the decoder makes {side_px} px")

    @classmethod
    def of(cls, decoder: Decoder, noisy_clip: NoisyClip | None = None, name: str = "decoder") -> DecoderStage:
        """Create the stage with the settings of the network's own configuration."""
        return cls(decoder, decoder.config.sampler, name, noisy_clip)

    def eval(self) -> None:
        """See ``Stage``."""
        self.network.eval()
        if self.noisy_clip is not None:
            self.noisy_clip.eval()

    def begin(self, batch: Batch, noise: NoiseSource, *, guided: bool) -> tuple[Tensor, DecoderCondition]:
        """See ``DiffusionStage``."""
        x, side_px = batch.values.get(X_T), self.network.config.image_px
        if x is None:
            x = noise.normal((NUM_COLOURS, side_px, side_px), device=batch.text.pooled.device)
        return x, self.encode(batch.text, batch.values, guided=guided, negative=batch.negative)

    def enter(self, batch: Batch, noise: NoiseSource | None = None) -> Chain:
        """See ``Stage``; pictures of ``START`` are noised to the timestep of the first step that is taken."""
        chain = super().enter(batch, noise)
        start = batch.values.get(START)
        if start is not None:
            num_steps = max(1, round(float(batch.values[STRENGTH][0]) * len(chain.timesteps)))
            chain.timesteps = chain.timesteps[-num_steps:]
            x0 = resize_crop(to_pixels(start.to(chain.state.x.device)), self.network.config.image_px)
            t = torch.full((len(x0),), chain.timesteps[0], device=x0.device)
            chain.state = initial_state(self.diffusion.q_sample(x0, t, chain.state.x), self.diffusion)
        return chain

    def encode(
        self,
        text: TextEncoding,
        values: Mapping[str, Tensor],
        *,
        guided: bool,
        negative: TextEncoding | None = None,
    ) -> DecoderCondition:
        """Captions and values as the decoder reads them; if guided, after as many rows without ``z_image``.

        Those rows have the captions that guidance leads away from, by default empty ones. Both halves read the known
        part of the pictures.
        """
        decoder, z_image, keep = self.network, values.get(Z_IMAGE), None
        if z_image is None:
            z_image = torch.zeros_like(text.pooled)
            keep = torch.zeros(len(text), dtype=torch.bool, device=text.pooled.device)
        planes = known_planes(*part) if decoder.config.inpainting and (part := self._known_part(values)) else None
        condition = decoder.encode_condition(z_image, text, keep_image=keep, planes=planes)
        if not guided:
            return condition
        uncond = decoder.null_condition(len(text), planes)
        if negative is not None:
            none = torch.zeros(len(negative), dtype=torch.bool, device=negative.pooled.device)
            zeros = torch.zeros(len(negative), decoder.dims.embed_dim, device=negative.pooled.device)
            uncond = decoder.encode_condition(zeros, negative, keep_image=none, planes=planes)
        return concat_rows([uncond, condition])

    def denoiser(self, condition: DecoderCondition, scales: Sequence[float]) -> Denoise:
        """See ``DiffusionStage``; it may also follow the noise-aware CLIP towards the captions."""
        denoise = super().denoiser(condition, scales)
        if self.sampler.clip_guidance_scale == 0 or self.noisy_clip is None:
            return denoise
        z_text = condition.z_text[-len(scales) :]
        return clip_guided(denoise, self.noisy_clip, z_text, self.diffusion, self.sampler.clip_guidance_scale)

    def step(self, chains: Sequence[Chain], noise: NoiseSource) -> Step:
        """See ``DiffusionStage``; without inpainting channels the known part is restored after each step."""
        step = super().step(chains, noise)
        if self.network.config.inpainting:
            return step
        parts, rows = list[tuple[Tensor, Tensor]](), list[int]()
        ends = accumulate(len(chain.noise) for chain in chains)
        for chain, end in zip(chains, ends, strict=True):
            part = self._known_part(chain.batch.values)
            if part is not None:
                parts.append(part)
                rows += range(end - len(chain.noise), end)
        # Only these rows sample noise: what a picture becomes does not depend on whether its neighbours are inpainted.
        sources = NoiseSource(noise.generators[row] for row in rows)
        return replacing(step, *concat_rows(parts), sources, rows) if parts else step

    def finish(self, batch: Batch, x: Tensor) -> Float[Tensor, "B 3 H W"]:
        """See ``DiffusionStage``."""
        return keep_known(batch.values, x)

    def _known_part(self, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        return known_part(values, self.network.config.image_px)


def decoder_denoiser(
    decoder: Decoder, z_image: Float[Tensor, "B D"], text: TextEncoding, guidance_scale: float = 1.0
) -> Denoise:
    """The decoder conditioned on embeddings and captions, guided unless the scale is 1."""
    stage = DecoderStage(decoder, SamplerConfig(), "decoder")
    with torch.no_grad():
        condition = stage.encode(text, {Z_IMAGE: z_image}, guided=guidance_scale != 1.0)
    return stage.denoiser(condition, [guidance_scale] * len(text))
