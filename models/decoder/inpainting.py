"""Pictures of which a part is known: what the decoder is shown of them, and what becomes of the known part.

Legend: B items, H W pixels. ``drawn`` is True where a picture is to be drawn, False where it is known and kept.
Two methods, for decoders trained with and without inpainting channels:

    channels     the network reads the known part beside the noised picture (arXiv:2112.10741, section 4.3)
    replacement  after each step the known part, noised to that step, is put in place of what was drawn there
                 (arXiv:2201.09865, equation 8, without its resampling)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.steps import SamplerState, Step
from models.pixels import resize_crop, to_pixels

NUM_KNOWN_CHANNELS = 4
"""Three colours, zero where nothing is known, and a plane that is 1 where the picture is known."""
_SIDE_SHARE = (0.25, 0.9)
"""Least and largest side of a random rectangle, as a share of the picture's."""


@dataclass(frozen=True)
class PartlyKnown:
    """Square pictures and where they are to be drawn anew; the sides of the two may differ."""

    images: UInt8[Tensor, "B H W 3"]
    drawn: Bool[Tensor, "B h w"]

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: slice) -> PartlyKnown:
        return PartlyKnown(self.images[index], self.drawn[index])

    def at(self, side_px: int) -> tuple[Float[Tensor, "B 3 side side"], Bool[Tensor, "B 1 side side"]]:
        """Both at another side; a pixel of which any part is to be drawn is drawn."""
        drawn = self.drawn[:, None]
        if drawn.shape[-1] >= side_px:
            drawn = F.adaptive_max_pool2d(drawn.float(), side_px) > 0
        else:
            drawn = F.interpolate(drawn.float(), (side_px, side_px), mode="nearest") > 0
        return resize_crop(to_pixels(self.images), side_px), drawn

    def keep(self, pixels: Float[Tensor, "B 3 side side"]) -> Float[Tensor, "B 3 side side"]:
        """``pixels`` with the known part in its place."""
        known, drawn = self.at(pixels.shape[-1])
        return torch.where(drawn.to(pixels.device), pixels, known.to(pixels))


def known_planes(pixels: Float[Tensor, "B 3 H W"], drawn: Bool[Tensor, "B 1 H W"]) -> Float[Tensor, "B 4 H W"]:
    """What a decoder with inpainting channels reads: the known part, and where it is."""
    keep = (~drawn).to(pixels)
    return torch.cat([pixels * keep, keep], dim=1)


def draw_regions(
    size: int, side_px: int, unknown_prob: float, generator: torch.Generator
) -> Bool[Tensor, "B 1 side side"]:
    """Random regions to draw, one per sample: everything, a rectangle, or everything but a rectangle.

    Args:
        size: B.
        side_px: Side of the pictures, in pixels.
        unknown_prob: Probability of everything; the rest is shared by rectangles (inpainting) and what is around them
            (outpainting).
        generator: Source of the draws, on the CPU.
    """
    kind, sides, corners = (torch.rand(size, count, generator=generator) for count in (2, 2, 2))
    least, largest = _SIDE_SHARE
    lengths = ((least + (largest - least) * sides) * side_px).round().clamp(min=1)
    starts = (corners * (side_px - lengths + 1)).floor()
    place = torch.arange(side_px)
    inside = (place >= starts[..., None]) & (place < (starts + lengths)[..., None])  # (B, 2, side)
    rectangle = inside[:, 0, :, None] & inside[:, 1, None, :]
    outside = kind[:, 1] < 0.5
    region = rectangle ^ outside[:, None, None]
    return (region | (kind[:, 0] < unknown_prob)[:, None, None])[:, None]


def replacing(step: Step, known: Float[Tensor, "B 3 H W"], drawn: Bool[Tensor, "B 1 H W"], noise: NoiseSource) -> Step:
    """``step``, after which the known part is put back, noised to the step reached."""

    def replaced(
        denoise: Denoise, state: SamplerState, t: Tensor, t_prev: Tensor, diffusion: Diffusion
    ) -> SamplerState:
        after = step(denoise, state, t, t_prev, diffusion)
        there = diffusion.q_sample(known, t_prev, noise.normal_like(known))
        return after._replace(x=torch.where(drawn, after.x, there))

    return replaced
