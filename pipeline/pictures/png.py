"""PNG files of pictures and of arrays of pixels: the same picture gives the same bytes."""

import io
import struct
import zlib
from collections.abc import Mapping

from PIL import Image

from pipeline.pictures.frame import Pixels

Picture = Image.Image | Pixels

_PNG_HEAD_BYTES = 33  # signature and IHDR


def to_image(picture: Picture) -> Image.Image:
    """Convert a picture to an RGB PIL image."""
    return picture.convert("RGB") if isinstance(picture, Image.Image) else Image.fromarray(picture)


def to_png(picture: Picture) -> bytes:
    """Encode a picture as PNG; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def with_texts(png: bytes, texts: Mapping[str, str]) -> bytes:
    """A PNG file with more text chunks (iTXt: PNG, 3rd edition, 11.3.3.4), in front of its pixels."""
    bodies = [b"iTXt" + name.encode("latin-1") + b"\0\0\0\0\0" + text.encode() for name, text in texts.items()]
    chunks = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in bodies]
    return png[:_PNG_HEAD_BYTES] + b"".join(chunks) + png[_PNG_HEAD_BYTES:]
