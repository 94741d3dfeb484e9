"""Masks of pictures, as files: where they are transparent, or white."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.errors import ConfigError

Mask = NDArray[np.bool_]

_THRESHOLD = 128
"""The grey level of a mask from which a pixel is masked; a pixel whose alpha is below it is transparent."""


def masked_pixels(mask: Image.Image, picture: Image.Image, mask_name: str, picture_name: str) -> Mask:
    """True where a picture is masked, cut to the picture's centre square.

    A pixel is masked where the mask is transparent (as in OpenAI's API), or white if the mask has no transparency.

    Args:
        mask: Decoded with its transparency.
        picture: The picture it belongs to.
        mask_name: For messages.
        picture_name: For messages.

    Raises:
        ConfigError: If it differs in size from the picture, or masks nothing.
    """
    if mask.size != picture.size:
        sizes = " and ".join(f"{width} x {height} px" for width, height in (mask.size, picture.size))
        raise ConfigError(f"{mask_name}: the mask and {picture_name} are of different sizes, {sizes}; make them equal")
    is_transparent = mask.mode == "RGBA"
    masked = centre_square(transparent_pixels(mask) if is_transparent else np.asarray(mask.convert("L")) >= _THRESHOLD)
    if not masked.any():
        raise ConfigError(f"{mask_name}: the mask is empty; make the part to inpaint white, or transparent")
    return masked


def transparent_pixels(picture: Image.Image) -> Mask:
    """True where an RGBA picture is transparent."""
    return np.asarray(picture.getchannel("A")) < _THRESHOLD


def centre_square(masked: Mask) -> Mask:
    """The centre square of a mask, as of its picture."""
    height, width = masked.shape
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return np.ascontiguousarray(masked[top : top + side, left : left + side])


def shrink_mask(masked: Mask, side_px: int) -> Mask:
    """A square mask of at most ``side_px``; a pixel is masked if any part of it is."""
    side = len(masked)
    if side <= side_px:
        return masked
    starts = np.arange(side_px) * side // side_px
    ends = -(-np.arange(1, side_px + 1) * side // side_px)
    # reduceat takes [start, end) of each pair; the padding gives the last end a place.
    places = np.stack([starts, ends], axis=1).ravel()
    for axis in (0, 1):
        padded = np.insert(masked, masked.shape[axis], False, axis=axis)
        masked = np.logical_or.reduceat(padded, places, axis=axis).take(range(0, len(places), 2), axis=axis)
    return masked
