"""The small picture that an upsampler is trained on, spoilt as arXiv:2204.06125 (appendix C) spoils it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.upsampler.bsr import bsr_light
from models.upsampler.degradation import random_blur, resize

Degradation = Literal["blur", "bsr", "none"]


def spoilt_low_res(image: Tensor, small_px: int, kind: Degradation, generator: torch.Generator) -> Tensor:
    """Shrink pictures and corrupt each in its own way, (B, 3, small_px, small_px).

    Args:
        image: Large pictures or crops of them, (B, 3, H, H) in [-1, 1].
        small_px: Side of the result, in pixels; H is a multiple of it.
        kind: "blur" for 64 -> 256, "bsr" for 256 -> 1024, "none" to shrink alone.
        generator: Source of the draws, on the CPU.

    Raises:
        ValueError: If the sizes do not fit ``bsr``.
    """
    # A training's bfloat16 would leave 8 of the pictures' bits where these filter them.
    with torch.autocast(image.device.type, enabled=False):
        if kind == "bsr":
            return bsr_light(image, small_px, generator)
        small = resize(image, small_px)
        return random_blur(small, generator) if kind == "blur" else small
