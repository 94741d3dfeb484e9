"""Pictures of noise as files, and the comparison of sampled pictures."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from models.request import RawPicture
from tests.tiny.shards import pixels


def noisy_picture(seed: int, side_px: int = 32) -> bytes:
    """A PNG of random squares."""
    levels = np.random.default_rng(seed).integers(0, 256, (side_px // 4, side_px // 4, 3), np.uint8)
    return png(levels.repeat(4, 0).repeat(4, 1))


def png(levels: Any) -> bytes:
    """A PNG of pixels, (H, W, C)."""
    stream = io.BytesIO()
    Image.fromarray(levels).save(stream, "PNG")
    return stream.getvalue()


def tensor(data: bytes) -> torch.Tensor:
    """The pixels of a file, (1, H, W, 3)."""
    return torch.from_numpy(pixels(data).copy())[None]


def raw(data: bytes) -> RawPicture:
    """A file as a request has it."""
    levels = pixels(data)
    return RawPicture(levels.shape[1], levels.shape[0], levels.tobytes())


def almost_equal(sampled: Any, expected: Any) -> bool:
    """Whether pictures are equal up to the rounding of another batch size.

    A stage's 8-bit conditioning may fall on the other side of a level, which networks with random weights carry further.
    """
    difference = np.abs(np.asarray(sampled).astype(int) - np.asarray(expected))
    return np.shape(sampled) == np.shape(expected) and bool(difference.mean() < 0.1 and difference.max() < 16)
