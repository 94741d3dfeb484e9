"""The losses of JPEG compression, in torch: 4:2:0 chroma, 8 x 8 cosine blocks, the standard's tables.

No file is encoded: the picture only gets the values that a decoder would return. Legend: B batch, H W pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
"""Quantisation of luma at quality 50: ITU-T T.81, table K.1."""
CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)
"""Quantisation of chroma at quality 50: ITU-T T.81, table K.2."""
RGB_TO_YCC = (
    (0.299, 0.587, 0.114),
    (-0.168735892, -0.331264108, 0.5),
    (0.5, -0.418687589, -0.081312411),
)
"""JFIF's luma and chroma of red, green, blue."""


def jpeg(image: Tensor, quality: int) -> Tensor:
    """A colour picture after JPEG at ``quality``, as libjpeg would decode it, to 44 dB or better on photographs.

    Args:
        image: (B, 3, H, W) in [-1, 1]; any size, edges are repeated up to a multiple of 16.
        quality: 1 .. 100, as in libjpeg.

    Returns:
        (B, 3, H, W) on the 256 grey levels, in [-1, 1].

    Raises:
        ValueError: If the quality is out of range.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality = {quality}: from 1 to 100")
    height, width = image.shape[-2:]
    levels = ((image.clamp(-1, 1) + 1) * 127.5).round()
    padded = F.pad(levels, (0, -width % 16, 0, -height % 16), mode="replicate")
    to_ycc = torch.tensor(RGB_TO_YCC, dtype=image.dtype, device=image.device)
    luma, chroma = torch.einsum("dc,bchw->bdhw", to_ycc, padded).split([1, 2], dim=1)
    luma = _through_blocks(luma - 128, _table(LUMA_TABLE, quality, image)) + 128
    chroma = _through_blocks(F.avg_pool2d(chroma, 2), _table(CHROMA_TABLE, quality, image))
    # Linear interpolation between chroma centres is libjpeg's "fancy upsampling".
    chroma = F.interpolate(chroma, scale_factor=2, mode="bilinear", align_corners=False)
    ycc = torch.cat([luma, chroma], dim=1)[..., :height, :width]
    levels = torch.einsum("dc,bchw->bdhw", torch.linalg.inv(to_ycc), ycc).round().clamp(0, 255)
    return levels / 127.5 - 1


def _table(rows: tuple[tuple[int, ...], ...], quality: int, like: Tensor) -> Tensor:
    """The table (8, 8) scaled to a quality, as in libjpeg's jpeg_quality_scaling."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    scaled = (torch.tensor(rows) * percent + 50) // 100
    return scaled.clamp(1, 255).to(like)


def _through_blocks(planes: Tensor, table: Tensor) -> Tensor:
    """Round the cosine coefficients of each 8 x 8 block of (B, C, H, W) to multiples of ``table``."""
    batch, channels, height, width = planes.shape
    blocks = planes.reshape(batch, channels, height // 8, 8, width // 8, 8).transpose(3, 4)  # B C H/8 W/8 8 8
    cosines = _cosines(planes)
    coefficients = cosines @ blocks @ cosines.T
    rounded = (coefficients / table).round() * table
    back = cosines.T @ rounded @ cosines
    return back.transpose(3, 4).reshape(batch, channels, height, width)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal DCT-II matrix (8, 8): row k holds the k-th frequency."""
    frequency, place = torch.arange(8)[:, None], torch.arange(8)[None, :]
    matrix = torch.cos(math.pi * (place + 0.5) * frequency / 8) * math.sqrt(2 / 8)
    matrix[0] /= math.sqrt(2)
    return matrix.to(like)
