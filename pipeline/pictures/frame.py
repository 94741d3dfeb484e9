"""The square crop and the resize of decoded pictures.

The resize is Pillow's antialiased bicubic on 8-bit levels, as in CLIP's preprocessing; its integer arithmetic gives the
same bytes on every machine. Picture arrays are uint8 (H, W, 3).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""A part of a picture: left, top, right, bottom, in pixels."""

STRIP_AREA_PX = 1 << 18
"""Part of a large picture that is copied or converted at once, in pixels: whole, it would take the memory twice."""
_LONGEST_STRIP = 100
"""Times that a picture may be longer than wide before only its middle is resized: a strip of 1 x 20,000 px would take
3 GB at the side of a network."""

Image.MAX_IMAGE_PIXELS = None  # ``read`` has its own limit, which gives an error, no warning; crops ask, too


def square(image: Image.Image, side_px: int) -> Pixels:
    """Crop the centre square of an RGB picture and resize it to (side_px, side_px, 3)."""
    return np.array(resize(crop_square(image), (side_px, side_px)))


def crop_square(image: Image.Image) -> Image.Image:
    """The centre square of a picture."""
    return image.crop(square_box(image))


def square_box(image: Image.Image) -> Box:
    """The centre square of a picture."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return left, top, left + side, top + side


@dataclass(frozen=True)
class Framing:
    """How a network's own preprocessing makes a square of a picture: open_clip's ``PreprocessCfg``, to the same bytes.

    Its fields are open_clip's, so that a network of another tool sees here what it saw there.
    """

    side_px: int
    """Side of the square, in pixels."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """shortest: resize the shorter side and crop the centre; longest: resize the longer side and pad; squash: resize
    both sides, whatever the shape."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Kernel of the resize, antialiased."""
    fill_level: int = 0
    """Level of the padding, 0 to 255."""

    def __call__(self, image: Image.Image) -> Pixels:
        """Frame an RGB picture; returns (side_px, side_px, 3)."""
        kernel = Image.Resampling.BILINEAR if self.interpolation == "bilinear" else Image.Resampling.BICUBIC
        if self.resize_mode == "shortest" and max(image.size) > _LONGEST_STRIP * min(image.size):
            image = _middle(image, _LONGEST_STRIP)
        size = self._resized(*image.size)
        if image.size != size:
            image = image.resize(size, kernel)
        if size == (self.side_px, self.side_px):
            return np.array(image)
        left, top = (_crop_start(length, self.side_px) for length in size)
        padded = Image.new("RGB", (self.side_px, self.side_px), (self.fill_level,) * 3)
        padded.paste(image, (-left, -top))
        return np.array(padded)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        side = self.side_px
        if self.resize_mode == "squash":
            return side, side
        if self.resize_mode == "longest":
            ratio = max(width / side, height / side)
            return max(1, round(width / ratio)), max(1, round(height / ratio))
        return (side, int(side * height / width)) if width <= height else (int(side * width / height), side)


def _middle(image: Image.Image, ratio: int) -> Image.Image:
    """The middle of a strip, so that its longer side is ``ratio`` times the shorter."""
    width, height = (min(length, ratio * min(image.size)) for length in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _crop_start(length: int, side_px: int) -> int:
    """First pixel of the crop, negative for padding; open_clip rounds the two in different ways."""
    return round((length - side_px) / 2) if length >= side_px else -((side_px - length) // 2)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize a picture to (width, height) in pixels with antialiased bicubic interpolation."""
    return image.resize(size, Image.Resampling.BICUBIC)


def thumbnail(image: Image.Image, largest_px: int = 256) -> Image.Image:
    """The picture itself, or a copy that is resized so that its longer side is ``largest_px``."""
    if max(image.size) <= largest_px:
        return image
    small = image.copy()
    small.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    return small
