"""Inpainting: what the decoder reads of the known part of a picture, and how that part is preserved.

Legend: B items, H W pixels. A mask is True where a picture is resampled, False where it is known.
Two methods, for decoders trained with and without inpainting channels:

    channels     the network reads the known part beside the noised picture (arXiv:2112.10741, section 4.3)
    replacement  after each step the known part, noised to that step, replaces what was sampled there
                 (arXiv:2201.09865, equation 8, without its resampling)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.diffusion.noise import NoiseSource
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.steps import SamplerState, Step
from models.pixels import resize_crop, to_pixels
from models.sample_random import SampleRandom

PICTURE, MASK = "picture", "mask"
"""Values of a batch that is inpainted: square pictures, uint8 (B, H, W, 3), and masks, bool (B, h, w)."""
NUM_KNOWN_CHANNELS = 4
"""Three colours, zero where the picture is unknown, and a plane that is 1 where it is known."""
_SIDE_SHARE = (0.25, 0.9)
"""Least and largest side of a random rectangle, as a share of the picture's."""


def known_part(
    values: Mapping[str, Tensor], side_px: int
) -> tuple[Float[Tensor, "B 3 side side"], Bool[Tensor, "B 1 side side"]] | None:
    """Pictures and masks of a batch, resized; None if it has none."""
    if MASK not in values:
        return None
    return resize_crop(to_pixels(values[PICTURE]), side_px), resize_mask(values[MASK], side_px)


def resize_mask(mask: Bool[Tensor, "B h w"], side_px: int) -> Bool[Tensor, "B 1 side side"]:
    """The mask, resized; a pixel is masked if any part of it is."""
    planes = mask[:, None].float()
    if planes.shape[-1] >= side_px:
        return F.adaptive_max_pool2d(planes, side_px) > 0
    return F.interpolate(planes, (side_px, side_px), mode="nearest") > 0


def keep_known(values: Mapping[str, Tensor], pixels: Float[Tensor, "B 3 side side"]) -> Float[Tensor, "B 3 side side"]:
    """``pixels``, in which the known part of a batch is restored."""
    part = known_part(values, pixels.shape[-1])
    return pixels if part is None else torch.where(part[1].to(pixels.device), pixels, part[0].to(pixels))


def known_planes(pixels: Float[Tensor, "B 3 H W"], mask: Bool[Tensor, "B 1 H W"]) -> Float[Tensor, "B 4 H W"]:
    """Input of a decoder with inpainting channels: the known part, and a plane that marks it."""
    keep = (~mask).to(pixels)
    return torch.cat([pixels * keep, keep], dim=1)


def random_masks(random: SampleRandom, side_px: int, unknown_prob: float) -> Bool[Tensor, "B 1 side side"]:
    """Random masks, one per sample: everything, a rectangle, or everything but a rectangle.

    Args:
        random: Random numbers of B samples.
        side_px: Side of the pictures, in pixels.
        unknown_prob: Probability of everything; otherwise rectangles (inpainting) and their surroundings (outpainting)
            are equally frequent.
    """
    kind, sides, corners = random.uniform("mask", 3, 2).unbind(1)
    least, largest = _SIDE_SHARE
    lengths = ((least + (largest - least) * sides) * side_px).round().clamp(min=1)
    starts = (corners * (side_px - lengths + 1)).floor()
    place = torch.arange(side_px)
    inside = (place >= starts[..., None]) & (place < (starts + lengths)[..., None])  # (B, 2, side)
    rectangle = inside[:, 0, :, None] & inside[:, 1, None, :]
    outside = kind[:, 1] < 0.5
    region = rectangle ^ outside[:, None, None]
    return (region | (kind[:, 0] < unknown_prob)[:, None, None])[:, None]


def replacing(
    step: Step,
    pixels: Float[Tensor, "K 3 H W"],
    mask: Bool[Tensor, "K 1 H W"],
    noise: NoiseSource,
    rows: Sequence[int] | None = None,
) -> Step:
    """``step``, after which the known part of ``pixels`` is restored, noised to the step reached.

    Args:
        step: A step of B items.
        pixels: Pictures of K of them.
        mask: Their masks.
        noise: K sources.
        rows: Which of the B items they are; None: all.
    """

    def replaced(
        denoise: Denoise, state: SamplerState, t: Tensor, t_prev: Tensor, diffusion: Diffusion
    ) -> SamplerState:
        after = step(denoise, state, t, t_prev, diffusion)
        some = torch.tensor(range(len(t)) if rows is None else rows, device=t.device)
        noised = diffusion.q_sample(pixels, t_prev[some], noise.normal_like(pixels))
        return after._replace(x=after.x.index_copy(0, some, torch.where(mask, after.x[some], noised)))

    return replaced
