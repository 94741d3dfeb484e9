"""What is stored of a downloaded picture: resized, encoded, with its checksum and its EXIF tags."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import exifread
import numpy as np

from pipeline.data.causes import FetchError
from pipeline.pictures.frame import Pixels, square_box
from pipeline.pictures.read import MAX_AREA_PX, MAX_MEMORY_BYTES, DecodedPicture, PictureError, read
from pipeline.pictures.stored import encode, fit, load_opencv
from pipeline.recipe.sections import DownloadConfig

Boxes = Sequence[Sequence[float]]
"""Boxes to blur: (x_min, y_min, x_max, y_max) each, as shares of the upright picture's width and height."""

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}
_HASH_OF_LENGTH = {32: "md5", 64: "sha256", 128: "sha512"}
_WHERE = "download"
_FARTHEST = 1.0
"""Distance of a box's edge from the picture, as a share of its side: some are a little outside, and pixels far."""


@dataclass(frozen=True)
class StoredPicture:
    """A picture as it goes into the shard."""

    data: bytes
    width: int
    """Of the stored picture, in pixels."""
    height: int
    original_width: int
    """Of the downloaded picture, upright, in pixels."""
    original_height: int
    exif: str | None
    """EXIF tags as JSON; None if they are damaged."""
    digest: str
    """Checksum of the downloaded file; empty if the recipe wants none."""


def read_boxes(value: Any) -> Boxes | None:
    """Boxes of a row as numbers, None if they are malformed; lists in CSV are text."""
    try:
        if isinstance(value, str):
            value = json.loads(value) if value.strip() else None
        if not isinstance(value, list | None):
            return None
        boxes = [[float(side) for side in box] for box in ([] if value is None else value)]
    except (ArithmeticError, RecursionError, TypeError, ValueError):
        return None
    return tuple(map(tuple, boxes)) if all(map(_is_box, boxes)) else None


def _is_box(sides: Sequence[float]) -> bool:
    if len(sides) != 4 or not all(-_FARTHEST <= side <= 1 + _FARTHEST for side in sides):  # NaN is not in there
        return False
    return sides[0] <= sides[2] and sides[1] <= sides[3]


class Resizer:
    """Decodes each picture once, resizes and encodes it.

    Args:
        config: The recipe's section.
    """

    def __init__(self, config: DownloadConfig) -> None:
        load_opencv()  # before the memory of this process is limited
        self._config = config
        self._blur: Any = _load_blurrer() if config.blur_column else None

    def store(self, data: bytes, boxes: Boxes = (), checksum: str = "") -> StoredPicture:
        """Make the stored picture of a downloaded file.

        Args:
            data: The file.
            boxes: Parts to blur.
            checksum: Hex digest that the file must have (MD5, SHA-256 or SHA-512, by its length); empty: none.

        Raises:
            FetchError: If the file has another checksum.
            PictureError: If it is no picture, damaged, or refused by the recipe.
        """
        if checksum:
            kind = _HASH_OF_LENGTH.get(len(checksum.strip()))
            if kind is None or hashlib.new(kind, data).hexdigest() != checksum.strip().lower():
                raise FetchError("hash", "" if kind else "the list's checksum is no MD5, SHA-256 or SHA-512")
        encoded, width, height, original_width, original_height = self._store(data, boxes)
        kind = self._config.compute_hash
        digest = "" if kind == "none" else hashlib.new(kind, data).hexdigest()
        return StoredPicture(encoded, width, height, original_width, original_height, _exif(data), digest)

    def measure(self, data: bytes) -> StoredPicture:
        """The sizes of a picture that is stored as it is: all of it is decoded, and nothing is encoded.

        Raises:
            PictureError: If it is no picture, damaged, or too large for the recipe or for those that read it later.
        """
        config = self._config
        picture = read(
            data,
            where=_WHERE,
            max_area_px=min(config.max_image_area_px, MAX_AREA_PX),
            max_memory_bytes=min(config.max_memory_bytes, MAX_MEMORY_BYTES),
        )
        return StoredPicture(b"", picture.width, picture.height, picture.width, picture.height, None, "")

    def _store(self, data: bytes, boxes: Boxes) -> tuple[bytes, int, int, int, int]:
        config = self._config
        least_px = 0 if config.resize_mode == "no" else config.image_px
        picture = read(
            data,
            where=_WHERE,
            side_px=least_px,
            max_area_px=config.max_image_area_px,
            max_memory_bytes=config.max_memory_bytes,
        )
        original = picture.width, picture.height
        if min(original) < config.min_image_px:
            raise PictureError(_WHERE, "image too small")
        if max(original) > config.max_aspect_ratio * min(original):
            raise PictureError(_WHERE, "aspect ratio too large")
        pixels = self._resize(picture, boxes)
        height, width = pixels.shape[:2]
        is_unchanged = (width, height) == original and not boxes
        is_stored_format = picture.format == _PILLOW_FORMATS[config.encode_format]
        if config.skip_reencode and is_unchanged and picture.is_plain and is_stored_format:
            return data, *original, *original
        return encode(pixels, config.encode_format, config.encode_quality), width, height, *original

    def _resize(self, picture: DecodedPicture, boxes: Boxes) -> Pixels:
        """The picture at its target size, its boxes blurred."""
        config, side_px = self._config, self._config.image_px
        of_longer = config.resize_mode in {"border", "keep_ratio_largest"}
        side = (max if of_longer else min)(picture.width, picture.height)
        if config.resize_mode == "no" or (config.resize_only_if_bigger and side <= side_px):
            return self._blurred(fit(picture.image, picture.image.size), boxes)
        if config.resize_mode == "center_crop":
            pixels = fit(picture.image, (side_px, side_px), square_box(picture.image))
            return self._blurred(pixels, _in_square(boxes, picture))
        width, height = (max(1, round(length * side_px / side)) for length in (picture.width, picture.height))
        pixels = self._blurred(fit(picture.image, (width, height)), boxes)
        if config.resize_mode != "border":
            return pixels
        canvas = np.full((side_px, side_px, 3), 255, np.uint8)
        top, left = (side_px - height) // 2, (side_px - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        return canvas

    def _blurred(self, pixels: Pixels, boxes: Boxes) -> Pixels:
        """The picture with blurred boxes, by img2dataset's blurrer."""
        return self._blur(pixels, boxes) if boxes else pixels


def _load_blurrer() -> Any:
    """img2dataset's blurrer, whose import takes seconds; before the memory of this process is limited."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else its import looks for a newer release on the network
    from img2dataset.blurrer import BoundingBoxBlurrer

    return BoundingBoxBlurrer()


def _in_square(boxes: Boxes, picture: DecodedPicture) -> Boxes:
    """Boxes as shares of the centre square; those outside of it are dropped."""
    side = min(picture.width, picture.height)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    moved: list[tuple[float, ...]] = []
    for x_min, y_min, x_max, y_max in boxes:
        xs = [min(1.0, max(0.0, (x * picture.width - left) / side)) for x in (x_min, x_max)]
        ys = [min(1.0, max(0.0, (y * picture.height - top) / side)) for y in (y_min, y_max)]
        if xs[0] < xs[1] and ys[0] < ys[1]:
            moved.append((xs[0], ys[0], xs[1], ys[1]))
    return moved


def _exif(data: bytes) -> str | None:
    """EXIF tags as img2dataset stores them."""
    if data.startswith(b"\xff\xd8") and b"Exif" not in data:  # most of them: the parser would search in vain
        return "{}"
    try:
        tags = exifread.process_file(io.BytesIO(data), details=False)
    except Exception:  # noqa: BLE001  (damaged metadata can raise any error; the picture itself is readable)
        return None
    return json.dumps({name: str(value).strip() for name, value in tags.items() if value is not None})
