"""Resizing and JPEG against Pillow, on a photograph."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data as pictures
from torch import Tensor

from models.pixels import resize
from models.upsampler.jpeg import jpeg


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """A photograph, (1, 3, 128, 128) on the 256 levels."""
    levels = pictures.astronaut()[:256:2, 100:356:2].copy()
    return torch.from_numpy(levels).permute(2, 0, 1)[None].float() / 127.5 - 1


@pytest.mark.parametrize("size_px", [32, 48, 256])
def test_resize_is_pillows_bicubic_and_not_nearest_neighbour(photo: Tensor, size_px: int) -> None:
    # public code was seen making the low-resolution picture by nearest neighbour, which aliases
    actual = resize(photo, size_px)
    for channel in range(3):
        plane = Image.fromarray(photo[0, channel].numpy())
        expected = np.asarray(plane.resize((size_px, size_px), Image.Resampling.BICUBIC)).clip(-1, 1)
        assert np.abs(actual[0, channel].numpy() - expected).max() < 1e-3


@pytest.mark.parametrize("quality", [30, 57, 80, 95])
def test_jpeg_gives_what_pillows_decoder_gives(photo: Tensor, quality: int) -> None:
    levels = ((photo[0].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "JPEG", quality=quality)
    decoded = np.asarray(Image.open(file)).astype(np.float64)
    actual = ((jpeg(photo, quality)[0].permute(1, 2, 0) + 1) * 127.5).numpy()
    error = ((actual - decoded) ** 2).mean()
    assert error < 0.25 * ((levels.astype(np.float64) - decoded) ** 2).mean()
    assert 10 * math.log10(255**2 / error) > 41
