"""Pictures as files, PIL images and arrays: decoded, cut square, encoded.

A picture here is uint8 (H, W, 3), or a PIL image.
"""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.errors import ConfigError, DataError

Picture = Image.Image | NDArray[np.uint8]


def to_image(picture: Picture) -> Image.Image:
    """The picture as an RGB PIL image."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def to_png(picture: Picture) -> bytes:
    """PNG bytes; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def from_bytes(data: bytes, *, where: str) -> Image.Image:
    """Decode an encoded picture as RGB.

    Raises:
        DataError: If it cannot be decoded; names ``where``.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: not a readable picture ({error})") from None


def read_file(path: str, *, alpha: bool = False) -> Image.Image:
    """A user's picture, turned as its camera says: RGB, or RGBA where ``alpha`` is asked for and the file has it.

    Raises:
        ConfigError: If there is no such file, or it is not a picture.
    """
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGBA" if alpha and upright.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: not a picture that can be read ({error})") from None


def centre_square(image: Image.Image, side_px: int) -> NDArray[np.uint8]:
    """Scale the shorter side to ``side_px`` and cut the centre: uint8 (side_px, side_px, 3)."""
    scale = side_px / min(image.size)
    size = (max(side_px, round(image.width * scale)), max(side_px, round(image.height * scale)))
    left, top = (size[0] - side_px) // 2, (size[1] - side_px) // 2
    scaled = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + side_px, top + side_px)).convert("RGB"))


def thumbnail(image: Image.Image, largest_px: int = 256) -> Image.Image:
    """The picture itself, or a smaller copy whose longer side is ``largest_px``."""
    if max(image.size) <= largest_px:
        return image
    small = image.copy()
    small.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    return small


def decode_picture(data: bytes, image_px: int) -> NDArray[np.uint8]:
    """Decode, cut the centre square and scale it (bicubic, antialiased): uint8, (image_px, image_px, 3)."""
    with Image.open(io.BytesIO(data)) as picture:
        if picture.format == "JPEG":
            picture.draft("RGB", (image_px, image_px))
        rgb = picture.convert("RGB")
    side = min(rgb.size)
    left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
    if rgb.size != (image_px, image_px):
        box = (left, top, left + side, top + side)
        rgb = rgb.resize((image_px, image_px), Image.Resampling.BICUBIC, box=box)
    return np.asarray(rgb)
