"""The pictures that a download stores: made by OpenCV, as img2dataset's are."""

import contextlib
import functools
from collections.abc import Generator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.pictures.frame import STRIP_AREA_PX, Box, Pixels


@functools.cache
def load_opencv() -> Any:
    """OpenCV, with one thread; only processes that store pictures load its libraries."""
    import cv2

    cv2.setNumThreads(1)
    return cv2


def fit(image: Image.Image, size: tuple[int, int], box: Box | None = None) -> Pixels:
    """Resize as img2dataset does by default: smaller by the mean of areas, larger by Lanczos' kernel.

    OpenCV averages blocks of 2 x 2 in vector instructions, and other areas slowly. So a picture that becomes less than
    twice smaller is first interpolated linearly to twice its target, and then averaged by such blocks: in half of the
    time, and as good as the area filter (docs/lab.md). All other sizes are img2dataset's to the byte.

    Args:
        image: An RGB picture.
        size: Width and height of the result, in pixels.
        box: The part of the picture that is resized; None: all of it.

    Raises:
        MemoryError: If there is not enough.
    """
    cv2, pixels = load_opencv(), _levels(image, box)
    height, width = pixels.shape[:2]
    with _memory_errors():
        if size[0] >= width and size[1] >= height:
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4) if size != (width, height) else pixels
        else:
            twice = 2 * size[0], 2 * size[1]
            if twice[0] > width and twice[1] > height:
                pixels = cv2.resize(pixels, twice, interpolation=cv2.INTER_LINEAR)
            pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        return cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB) if pixels.shape[2] == 4 else pixels


def encode(pixels: Pixels, extension: Literal["jpg", "png", "webp"], quality: int) -> bytes:
    """Encode a picture as img2dataset does; the same picture gives the same bytes.

    Args:
        pixels: (H, W, 3).
        extension: Format.
        quality: 0 to 100; of PNG: compression, 0 to 9.

    Raises:
        MemoryError: If there is not enough.
    """
    cv2 = load_opencv()
    settings = {"jpg": cv2.IMWRITE_JPEG_QUALITY, "png": cv2.IMWRITE_PNG_COMPRESSION, "webp": cv2.IMWRITE_WEBP_QUALITY}
    with _memory_errors():
        _, data = cv2.imencode(f".{extension}", cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), [settings[extension], quality])
    return data.tobytes()


def _levels(image: Image.Image, box: Box | None) -> Pixels:
    """The levels of a part of an RGB picture, for reading.

    A picture that Pillow holds in one block is not copied: (H, W, 4). A larger one is, strip by strip, because Pillow's
    own export takes the memory twice: (H, W, 3).
    """
    left, top, right, bottom = box or (0, 0, *image.size)
    if 4 * image.width * image.height <= Image.core.get_block_size():
        levels = np.asarray(pa.array(image).values)
        return levels.reshape(image.height, image.width, 4)[top:bottom, left:right]
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    rows = max(1, STRIP_AREA_PX // (right - left))
    for start in range(top, bottom, rows):
        stop = min(start + rows, bottom)
        pixels[start - top : stop - top] = np.asarray(image.crop((left, start, right, stop)))
    return pixels


@contextlib.contextmanager
def _memory_errors() -> Generator[None]:
    """Raise OpenCV's error for too little memory as Python's."""
    cv2 = load_opencv()
    try:
        yield
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(str(error)) from None
        raise
