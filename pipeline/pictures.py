"""The one decoder of pictures, the one square crop, the one resize, and PNG files.

Every reader uses them: download, training, embed, evaluate, search, serve and edits, so that one file gives one array.
A decoded picture is RGB with 8 bits a channel and stands upright: its EXIF orientation is applied, 16-bit levels are
scaled, palettes and CMYK are converted (colour profiles are not applied), transparent parts become white, and of an
animation the first frame is taken. The resize is Pillow's antialiased bicubic on 8-bit levels: CLIP's own
preprocessing, in integers, so that every machine gives the same bytes.
An array of a picture here is uint8 (H, W, 3).
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile

from pipeline.errors import ConfigError, DataError

Pixels = NDArray[np.uint8]
Picture = Image.Image | Pixels

MAX_AREA_PX = 178_956_970
"""Largest picture that is decoded, in pixels (Pillow's own limit): a larger one is taken for a decompression bomb."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""What is read. Pillow knows more, among them EPS, for which it starts Ghostscript on the file."""

_DRAFT_SIDES = 2  # docs/decisions.md: at one side the result is off by 40 dB, at two by 48, and half the time is saved
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings each EXIF orientation upright."""
_FIRST_SWAPPED = 5
"""From this orientation on, width and height change places."""

Image.MAX_IMAGE_PIXELS = None  # ``decode`` has its own limit, which warns nobody and depends on its caller
warnings.filterwarnings("ignore", module=r"PIL\.")  # damage in metadata: the picture itself is read or refused


class PictureError(DataError):
    """A picture that cannot be read.

    Args:
        where: The file, or shard, key and uid.
        reason: What is wrong with it; pictures with one fault share it, so that faults can be counted.
        detail: What the decoder says.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(where, reason, detail)  # all of them: an error that crosses Ray is made again from these
        self.where = where
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class Decoded:
    """A decoded picture, and what its file holds."""

    image: Image.Image
    """Upright RGB; RGBA where that was asked for and the file has transparency."""
    width: int
    """Width of the upright picture in the file, in pixels; ``image`` may be smaller."""
    height: int
    """Height of the same."""
    format: str
    """One of ``FORMATS``, or MPO, a JPEG with further pictures."""
    is_plain: bool
    """Whether the file's own pixels are upright, opaque, and grey or RGB, so that it may be stored as it is."""


def read(
    data: bytes, *, where: str, side_px: int = 0, max_area_px: float = MAX_AREA_PX, alpha: bool = False
) -> Decoded:
    """Decode an encoded picture.

    Args:
        data: The file.
        where: What to call it in an error.
        side_px: Side that the picture is going to be resized to. libjpeg may then leave out resolution that would be
            lost anyway, as long as both sides keep twice this; 0: all pixels are decoded.
        max_area_px: Largest area decoded, in pixels.
        alpha: Keep transparency instead of painting it white.

    Raises:
        PictureError: If it is no picture, damaged, cut short or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return _decode(picture, where, side_px, max_area_px, alpha=alpha)
    except (PictureError, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise PictureError(where, "not a picture", f"formats that are read: {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's parsers raise whatever damaged bytes lead them to, KeyError and all
        reason = "image file is truncated" if "truncated" in str(error).lower() else "image cannot be decoded"
        raise PictureError(where, reason, f"{type(error).__name__}: {error}") from error


def decode(data: bytes, *, where: str) -> Image.Image:
    """All pixels of an encoded picture, as upright RGB.

    Raises:
        PictureError: As ``read``.
    """
    return read(data, where=where).image


def square(image: Image.Image, side_px: int) -> Pixels:
    """The centre square of an RGB picture, cut out and then resized to (side_px, side_px, 3)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return np.array(resize(image.crop((left, top, left + side, top + side)), (side_px, side_px)))


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The picture at ``size`` (width, height), in pixels: bicubic, antialiased."""
    return image.resize(size, Image.Resampling.BICUBIC)


def read_file(path: str, *, alpha: bool = False) -> Image.Image:
    """All pixels of a user's picture: upright RGB, or RGBA where ``alpha`` is set and the file has transparency.

    Raises:
        ConfigError: If there is no such file, or it is not a picture.
    """
    try:
        return read(Path(path).read_bytes(), where=path, alpha=alpha).image
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except PictureError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def to_image(picture: Picture) -> Image.Image:
    """The picture as an RGB PIL image."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def to_png(picture: Picture) -> bytes:
    """PNG bytes; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def thumbnail(image: Image.Image, largest_px: int = 256) -> Image.Image:
    """The picture itself, or a smaller copy whose longer side is ``largest_px``."""
    if max(image.size) <= largest_px:
        return image
    small = image.copy()
    small.thumbnail((largest_px, largest_px), Image.Resampling.LANCZOS)
    return small


def _decode(picture: ImageFile.ImageFile, where: str, side_px: int, max_area_px: float, *, alpha: bool) -> Decoded:
    width, height = picture.size
    if width * height > max_area_px:
        raise PictureError(where, "image area too large", f"{width} x {height} px; limit: {max_area_px:.0f} px in all")
    if side_px:
        picture.draft(None, (_DRAFT_SIDES * side_px, _DRAFT_SIDES * side_px))
    picture.load()
    orientation = _orientation(picture)
    if orientation >= _FIRST_SWAPPED:
        width, height = height, width
    turn = _TURNS.get(orientation)
    is_plain = turn is None and picture.mode in {"L", "RGB"} and not picture.has_transparency_data
    image = _to_8_bits(picture if turn is None else picture.transpose(turn), where, alpha=alpha)
    return Decoded(image, width, height, str(picture.format), is_plain)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where the tag is missing or damaged, and for TIFF, which Pillow turns itself."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  (whatever damaged metadata leads the parser to; the picture itself is whole)
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _to_8_bits(picture: Image.Image, where: str, *, alpha: bool) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _scale_levels(picture, where)
    if picture.has_transparency_data:
        rgba = picture.convert("RGBA")
        picture = rgba if alpha else Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    converted = picture.convert("RGBA" if picture.mode == "RGBA" and alpha else "RGB")
    converted.info = {}  # a profile or a palette's transparency would be written into files made of this picture
    return converted


def _scale_levels(picture: Image.Image, where: str) -> Image.Image:
    """Grey levels of 16 bits, or floats in [0, 1], as 8 bits.

    Pillow would clip them at 255. Of 16 bits the higher 8 are kept, as Pillow itself does with 16-bit RGB. Integers of
    32 bits count as 16 bits if they look like it: at most 65,535, and more than 8 bits hold.
    """
    levels = np.asarray(picture)
    most = 1 if picture.mode == "F" else 2**16 - 1
    is_known = levels.min() >= 0 and levels.max() <= most and (picture.mode != "I" or levels.max() > 255)
    if not is_known:
        raise PictureError(where, "nobody knows which level is white", f"levels {levels.min()} to {levels.max()}")
    small = np.rint(levels * 255).astype(np.uint8) if picture.mode == "F" else (levels >> 8).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        small[levels == transparent] = 255
    return Image.fromarray(small)
