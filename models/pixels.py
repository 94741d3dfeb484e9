"""Pictures in the two forms that this code uses.

uint8 (B, H, W, 3) is what files, pages and people have; float (B, 3, H, W) in [-1, 1] is what networks have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor


def to_pixels(images: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pictures to network values: 0 becomes -1, 255 becomes 1 (a channels-last view, no copy to reorder)."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def to_uint8(pixels: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """Network values to pictures, clipped and rounded to the nearest level; inverse of ``to_pixels``."""
    levels = pixels.detach().float().clamp(-1, 1).add(1).mul_(127.5).round_()
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def resize_crop(pixels: Float[Tensor, "B C H W"], side_px: int) -> Float[Tensor, "B C side side"]:
    """Scale the shorter side to ``side_px`` (bicubic, antialiased), then cut the centre square, as CLIP does."""
    height, width = pixels.shape[-2:]
    if height != width:
        scale = side_px / min(height, width)
        size = (max(side_px, round(height * scale)), max(side_px, round(width * scale)))
        pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False).clamp_(-1, 1)
        top, left = (size[0] - side_px) // 2, (size[1] - side_px) // 2
        return pixels[..., top : top + side_px, left : left + side_px]
    return resize(pixels, side_px)


def bicubic(image: Tensor, size_px: int) -> Tensor:
    """Bicubic with antialiasing to (B, C, size_px, size_px), up or down; edges overshoot [-1, 1].

    Antialiased also upwards, where it changes the kernel alone (a = -0.5, as Pillow): diffusers' ``UnCLIPPipeline``
    does so, and a network must see the same kernel in training and sampling.
    """
    size = (size_px, size_px)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)


def resize(image: Tensor, size_px: int) -> Tensor:
    """``bicubic`` with the overshoot clipped to [-1, 1]."""
    return bicubic(image, size_px).clamp(-1, 1)


def quantise_8bit(image: Tensor) -> Tensor:
    """Round to the 256 grey levels of a stored picture, still in [-1, 1]: the network sees what a file would hold."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
