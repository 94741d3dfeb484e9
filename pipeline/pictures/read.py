"""The only decoder of pictures.

Download, training, embed, evaluate, search, serve and edits use it, so one file gives the same array everywhere. A
decoded picture is RGB with 8 bits per channel and upright: its EXIF orientation is applied, 16-bit levels are scaled,
palettes and CMYK are converted (colour profiles are not applied), transparent parts become white, and only the first
frame of an animation is read.
"""

import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from pipeline.errors import ConfigError, DataError
from pipeline.pictures.frame import STRIP_AREA_PX

MAX_AREA_PX = 178_956_970
"""Largest picture that is decoded, in pixels (Pillow's own limit): a larger one may be a decompression bomb."""
MAX_MEMORY_BYTES = 1 << 30
"""Largest memory that decoding one picture may take, in bytes, by its header."""
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are read. Pillow supports more, for example EPS, for which it starts Ghostscript on the file."""

_DECODED_BYTES = {"1": 5, "L": 5, "P": 5, "RGB": 4, "I;16": 12, "I": 24, "F": 24}
"""Bytes for each pixel while a decoded mode becomes RGB with 8 bits; 8 for the others."""
_DECODER_BYTES = {"AVIF": 14, "JPEG2000": 16, "WEBP": 12}
"""Bytes for each pixel that a format's decoder holds beside the picture."""
_PROGRESSIVE_BYTES = 8
"""Bytes for each pixel of the file while a progressive JPEG is decoded: its coefficients, whatever the draft's size."""
_TURN_BYTES = 4
_TILE_TAGS = (322, 323)
_DRAFT_SIDES = 2  # docs/decisions.md: PSNR is 40 dB at one side, 48 dB at two, and half the time is saved
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that turns a picture of each EXIF orientation upright."""
_FIRST_SWAPPED = 5
"""From this orientation on, width and height are swapped."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # about damaged metadata; the picture itself is read or refused


class PictureError(DataError):
    """A picture that cannot be read.

    Args:
        where: The file, or shard, key and uid.
        reason: The fault, in the same words for all pictures with this fault, so that faults can be counted.
        detail: Message of the decoder.
    """

    def __init__(self, where: str, reason: str, detail: str = "") -> None:
        super().__init__(where, reason, detail)  # all three, because Ray rebuilds an error from these arguments
        self.where, self.reason, self.detail = self.args

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class DecodedPicture:
    """A decoded picture with facts about its file."""

    image: Image.Image
    """Upright RGB; RGBA if it was requested and the file has transparency."""
    width: int
    """Width of the upright picture in the file, in pixels; ``image`` may be smaller."""
    height: int
    """Height of the upright picture in the file, in pixels."""
    format: str
    """One of ``FORMATS``, or MPO, a JPEG that contains more pictures."""
    is_plain: bool
    """Whether the file's own pixels are upright, opaque, and grey or RGB, so that it may be stored as it is."""


def read(
    data: bytes,
    *,
    where: str,
    side_px: int = 0,
    max_area_px: float = MAX_AREA_PX,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
    alpha: bool = False,
) -> DecodedPicture:
    """Decode an encoded picture.

    Args:
        data: Bytes of the file.
        where: Name of the file in an error.
        side_px: Side to which the caller will resize. libjpeg may then decode at a lower resolution, as long as both
            sides have at least twice this; 0: all pixels are decoded.
        max_area_px: Largest area that is decoded, in pixels.
        max_memory_bytes: Largest memory that decoding may take, in bytes; estimated from the header before any pixel is
            decoded.
        alpha: Keep transparency; otherwise transparent parts become white.

    Raises:
        PictureError: If the file is not a picture, damaged, truncated or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
            _require_area(picture, where, max_area_px)
            if side_px:
                picture.draft(None, (_DRAFT_SIDES * side_px, _DRAFT_SIDES * side_px))
            _require_memory(picture, where, width * height, max_memory_bytes)
            return _decode(picture, where, (width, height), alpha=alpha)
    except PictureError:
        raise
    except MemoryError:
        raise PictureError(where, "image needs too much memory") from None
    except Image.UnidentifiedImageError:
        raise PictureError(where, "not a picture", f"formats that are read: {', '.join(FORMATS)}") from None
    except Exception as error:  # on damaged bytes, Pillow's parsers raise any error, even KeyError
        reason = "image file is truncated" if "truncated" in str(error).lower() else "image cannot be decoded"
        raise PictureError(where, reason, f"{type(error).__name__}: {error}") from error


def decode(data: bytes, *, where: str) -> Image.Image:
    """Decode all pixels of an encoded picture to upright RGB.

    Raises:
        PictureError: As ``read``.
    """
    return read(data, where=where).image


def read_file(path: str, *, alpha: bool = False) -> Image.Image:
    """Decode all pixels of a user's picture file to upright RGB, or RGBA if ``alpha`` is set and it has transparency.

    Raises:
        ConfigError: If the file does not exist or is not a picture.
    """
    try:
        return read(Path(path).read_bytes(), where=path, alpha=alpha).image
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except PictureError as error:
        raise ConfigError(str(error)) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None


def _require_area(picture: Image.Image, where: str, max_area_px: float) -> None:
    if picture.width * picture.height > max_area_px:
        size = f"{picture.width} x {picture.height} px"
        raise PictureError(where, "image area too large", f"{size}; limit: {max_area_px:.0f} px in all")


def _require_memory(picture: ImageFile.ImageFile, where: str, file_area_px: int, max_bytes: int) -> None:
    """Refuse a picture whose decoding takes too much memory at its peak.

    Args:
        picture: The opened file, of which nothing is decoded; its size may be reduced by a draft.
        where: Its name, for the error.
        file_area_px: Area of the picture in the file, in pixels.
        max_bytes: The limit.
    """
    mode = "I;16" if picture.mode.startswith("I;16") else picture.mode
    per_px = _DECODED_BYTES.get(mode, 8) + _DECODER_BYTES.get(picture.format or "", 0)
    if "exif" in picture.info or picture.format == "TIFF":  # it may have to be turned
        per_px += _TURN_BYTES
    in_file = _PROGRESSIVE_BYTES if "progressive" in picture.info else 0
    num_bytes = per_px * max(picture.width * picture.height, _tile_area_px(picture)) + in_file * file_area_px
    if num_bytes > max_bytes:
        detail = f"{picture.width} x {picture.height} px: {num_bytes >> 20} MiB; limit: {max_bytes >> 20} MiB"
        raise PictureError(where, "image needs too much memory", detail)


def _tile_area_px(picture: ImageFile.ImageFile) -> int:
    """Area of one tile of a TIFF, which may be larger than its picture; 0 without tiles."""
    if not isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 0
    width, height = (picture.tag_v2.get(tag, 0) for tag in _TILE_TAGS)
    return width * height if isinstance(width, int) and isinstance(height, int) else 0


def _decode(picture: ImageFile.ImageFile, where: str, size: tuple[int, int], *, alpha: bool) -> DecodedPicture:
    width, height = size
    picture.load()
    orientation = _orientation(picture)
    if orientation >= _FIRST_SWAPPED:
        width, height = height, width
    transpose = _TRANSPOSES.get(orientation)
    is_plain = transpose is None and picture.mode in {"L", "RGB"} and not picture.has_transparency_data
    image = _to_8_bits(picture if transpose is None else picture.transpose(transpose), where, alpha=alpha)
    return DecodedPicture(image, width, height, str(picture.format), is_plain)


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 if the tag is missing or damaged, and for TIFF, which Pillow turns itself."""
    try:
        value = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  (damaged metadata can raise any error; the picture itself is readable)
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSES else 1


def _to_8_bits(picture: Image.Image, where: str, *, alpha: bool) -> Image.Image:
    if picture.mode == "F" or picture.mode.startswith("I"):
        picture = _scale_levels(picture, where)
    if picture.has_transparency_data:
        image = picture.convert("RGBA") if alpha else on_white(picture)
    else:
        image = picture if picture.mode == "RGB" else picture.convert("RGB")
    image.info = {}  # Pillow would write a profile or a palette's transparency into files of this picture
    return image


def on_white(picture: Image.Image) -> Image.Image:
    """A transparent picture on white, strip by strip: whole, it would take twice the memory."""
    image = Image.new("RGB", picture.size)
    rows = max(1, STRIP_AREA_PX // picture.width)
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(picture.height, top + rows))
        rgba = picture.crop(box).convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image.paste(Image.alpha_composite(white, rgba).convert("RGB"), box)
    return image


def _scale_levels(picture: Image.Image, where: str) -> Image.Image:
    """Scale grey levels of 16 bits, or floats in [0, 1], to 8 bits, because Pillow would clip them at 255.

    The higher 8 of 16 bits are kept, as Pillow does for 16-bit RGB. Integers of 32 bits are read as 16 bits if their
    maximum is between 256 and 65,535.
    """
    levels = np.asarray(picture)
    white = 1 if picture.mode == "F" else 2**16 - 1
    is_in_range = levels.min() >= 0 and levels.max() <= white and (picture.mode != "I" or levels.max() > 255)
    if not is_in_range:
        raise PictureError(where, "nobody knows which level is white", f"levels {levels.min()} to {levels.max()}")
    small = np.rint(levels * 255).astype(np.uint8) if picture.mode == "F" else (levels >> 8).astype(np.uint8)
    transparent = picture.info.get("transparency")
    if isinstance(transparent, int):
        small[levels == transparent] = 255
    return Image.fromarray(small)
