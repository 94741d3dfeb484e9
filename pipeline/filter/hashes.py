"""A perceptual hash of pictures, which finds copies that were encoded again, resized or mirrored.

The hash is the signs of the 63 lowest frequencies of a grey 32 x 32 picture (pHash). Mirrored pictures have another
one, so each picture has two. Hashes of simple drawings agree by chance, in other colours too, so two pictures
are near only if their 8 x 8 colours agree as well.
Legend: N pictures.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.pictures.frame import resize
from pipeline.pictures.read import read

NUM_BITS = 64
THUMB_PX = 8
THUMB_BYTES = THUMB_PX * THUMB_PX * 3

_SIDE_PX = 32
_LEAST_COEFFICIENT = 8.0
"""A bit is set from here on: half a grey level of a cosine; below, noise of the encoding decides the sign."""
_MOST_LEVELS = 24
_MEAN_LEVELS = 6.0
_LUMA = np.array([0.299, 0.587, 0.114])

Hashes = NDArray[np.uint64]
Thumbs = NDArray[np.uint8]


def _cosines() -> NDArray[np.float64]:
    """The 8 lowest rows of the orthonormal DCT-II of 32 values, (8, 32)."""
    rows, columns = np.arange(8)[:, None], np.arange(_SIDE_PX)[None]
    matrix = np.cos(np.pi * (2 * columns + 1) * rows / (2 * _SIDE_PX)) * np.sqrt(2 / _SIDE_PX)
    matrix[0] /= np.sqrt(2)
    return matrix


_COSINES = _cosines()


@dataclass(frozen=True)
class PictureHash:
    """What is compared of a picture."""

    direct: int
    """64 bits."""
    mirrored: int
    """64 bits of the picture with left and right exchanged."""
    thumb: bytes
    """Its colours, uint8 (8, 8, 3)."""


def hash_picture(data: bytes, *, where: str) -> PictureHash:
    """Hash the bytes of a picture file.

    Raises:
        PictureError: If the file cannot be decoded.
    """
    image = resize(read(data, where=where, side_px=_SIDE_PX).image, (_SIDE_PX, _SIDE_PX))
    colours = np.asarray(image, np.float64)
    grey = colours @ _LUMA
    blocks = colours.reshape(THUMB_PX, _SIDE_PX // THUMB_PX, THUMB_PX, _SIDE_PX // THUMB_PX, 3)
    thumb = np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)
    return PictureHash(_bits(grey), _bits(grey[:, ::-1]), thumb.tobytes())


def _bits(grey: NDArray[np.float64]) -> int:
    is_set = _COSINES @ grey @ _COSINES.T > _LEAST_COEFFICIENT
    is_set[0, 0] = False  # the mean brightness
    return int.from_bytes(np.packbits(is_set).tobytes(), "big")


def find_near(direct: Hashes, mirrored: Hashes, thumbs: Thumbs, groups: Hashes, max_distance: int) -> NDArray[np.int64]:
    """For each picture, an earlier one that is nearly the same and stays; -1 if there is none, so that it stays.

    Time is N times the number of pictures that stay.

    Args:
        direct: Hashes, (N,).
        mirrored: Hashes of the mirrored pictures, (N,).
        thumbs: Colours, (N, 192).
        groups: Only pictures of one group are compared, (N,).
        max_distance: Most bits in which two hashes differ.
    """
    same_as = np.full(len(direct), -1, np.int64)
    for first in range(len(direct) - 1):
        if same_as[first] >= 0:
            continue
        rest = first + 1 + np.flatnonzero(same_as[first + 1 :] < 0)
        rest = rest[groups[rest] == groups[first]]
        for hashes, is_mirrored in ((direct, False), (mirrored, True)):
            close = rest[np.bitwise_count(hashes[rest] ^ direct[first]) <= max_distance]
            same_as[close[_same_colours(thumbs[first], thumbs[close], is_mirrored=is_mirrored)]] = first
            rest = rest[same_as[rest] < 0]
    return same_as


def _same_colours(thumb: Thumbs, others: Thumbs, *, is_mirrored: bool) -> NDArray[np.bool_]:
    pixels = thumb.reshape(THUMB_PX, THUMB_PX, 3)
    reference = (pixels[:, ::-1] if is_mirrored else pixels).reshape(1, -1).astype(np.int16)
    difference = np.abs(others.astype(np.int16) - reference)
    return (difference.max(axis=1, initial=0) <= _MOST_LEVELS) & (difference.mean(axis=1) <= _MEAN_LEVELS)
