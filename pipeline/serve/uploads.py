"""Pictures that clients send: forms with files (multipart/form-data), base64, and their one way through the decoder."""

import asyncio
import binascii
import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import ParamSpec, TypeVar

import numpy as np
from fastapi import Request
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from models.request import RawMask, RawPicture
from pipeline.errors import ConfigError
from pipeline.pictures.frame import resize, square
from pipeline.pictures.read import PictureError, on_white, read
from pipeline.sampling.masks import Mask, centre_square, masked_pixels, shrink_mask, transparent_pixels
from pipeline.serve.held import HeldBytes
from pipeline.serve.protocols import Images, PictureModel, Vectors
from pipeline.serve.web import ApiError, read_body

FILE_FIELDS = ("image", "mask")
MAX_FILES = 4
_MAX_FIELDS = 64
_MAX_FIELD_BYTES = 1 << 16
_MAX_AREA_PX = 40_000_000
"""Largest picture that is decoded for a client, in pixels."""
_MAX_MEMORY_BYTES = 512 << 20
"""Largest memory that decoding one of them may take, by its header."""
_DECODERS = ThreadPoolExecutor(2, "unclip-decode")
"""More would need the memory of as many pictures: any number of clients may send the largest one. Those that wait do so
here, and hold no thread that other requests need."""
_TO_EMBED = HeldBytes("pictures to embed", 512 << 20)
"""Those that are decoded and wait for CLIP: a file of a few bytes may be a large picture."""
_MAX_SHORTER_PX = 1024
_MAX_SENT_PX = 1 << 22
"""Largest area of a picture that is sent to the networks, in pixels; a longer strip is resized."""


P = ParamSpec("P")
T = TypeVar("T")


async def decoding(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run what decodes pictures of clients in one of the threads for it; it does not begin if nobody waits for it."""
    job = [partial(work, *args, **kwargs)]

    def run() -> T:
        return job.pop()()

    try:
        return await asyncio.wrap_future(_DECODERS.submit(run))
    finally:
        job.clear()  # what is cancelled lies in the queue until its turn comes, and would keep its files so long


async def embed_picture(model: PictureModel, decode: Callable[P, Images], *args: P.args, **kwargs: P.kwargs) -> Vectors:
    """Decode a client's picture as ``decoding`` does, and embed it, (D,).

    Raises:
        ApiError: As ``decode``.
        Overloaded: If the pictures of others that wait for CLIP leave no room for it.
    """
    image = await decoding(decode, *args, **kwargs)
    with _TO_EMBED.hold(image.nbytes):
        return await model.embed_image(image)


@dataclass(frozen=True)
class Form:
    """A form: its texts, and its files, by name."""

    texts: dict[str, str] = field(default_factory=dict[str, str])
    files: dict[str, list[bytes]] = field(default_factory=dict[str, list[bytes]])


async def read_form(request: Request, limit_bytes: int) -> Form:
    """The body as a form with files. Several files have one name, or, as OpenAI's clients write lists, ``name[]``.

    Raises:
        ApiError: 413 above a limit, 400 if it is no such form.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise ApiError(400, "send the pictures as a form, multipart/form-data", code="invalid_form")
    stream = read_body(request, limit_bytes)
    parser = MultiPartParser(
        request.headers, stream, max_files=MAX_FILES, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES
    )
    try:
        data = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    form = Form()
    try:
        for name, value in data.multi_items():
            if isinstance(value, UploadFile):
                form.files.setdefault(name.removesuffix("[]"), []).append(await value.read())
            elif name.removesuffix("[]") in FILE_FIELDS:
                message = f"{name}: came as text; send the file itself, with a file name"
                raise ApiError(400, message, param=name, code="invalid_value")
            elif name in form.texts:
                raise ApiError(400, f"{name}: given twice", param=name, code="invalid_value")
            elif value:  # an empty field is the default, as null is in JSON
                form.texts[name] = value
    finally:
        await data.close()
    return form


def decode_base64(text: str, name: str) -> Images:
    """A picture in base64, or as a data URL; resized as ``raw_picture`` does.

    Raises:
        ApiError: 400, if it is not base64, no picture, or too large to decode.
    """
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = binascii.a2b_base64(text, strict_mode=True)  # b64decode would run a regular expression over 24 MB
    except ValueError:
        raise ApiError(400, f"{name}: not base64", param=name, code="invalid_value") from None
    return bounded_picture(data, name)


def bounded_picture(data: bytes, name: str) -> Images:
    """A whole picture file, resized as ``raw_picture`` does; errors as ``decode_picture``."""
    return np.array(_bounded(decode_picture(data, name)))


def decode_picture(data: bytes, name: str, *, alpha: bool = False) -> Image.Image:
    """A client's picture, as the project's decoder reads it; RGBA if ``alpha`` is set and it has transparency.

    Raises:
        ApiError: 400, if it is no picture, or too large to decode.
    """
    if not data:
        raise ApiError(400, f"{name}: the file is empty", param=name, code="invalid_value")
    try:
        limits = {"max_area_px": _MAX_AREA_PX, "max_memory_bytes": _MAX_MEMORY_BYTES}
        return read(data, where=name, alpha=alpha, **limits).image
    except PictureError as error:
        raise ApiError(400, str(error), param=name, code="invalid_value") from None


def raw_picture(data: bytes, name: str, side_px: int = 0) -> RawPicture:
    """A client's picture for a request.

    Args:
        data: The file.
        name: Of its field.
        side_px: Side of its centre square; 0: the whole picture, because CLIP's own framing decides what it sees,
            resized so that its shorter side is 1,024 px at most.

    Raises:
        ApiError: As ``decode_picture``.
    """
    return _raw_picture(decode_picture(data, name), data, side_px)


def _raw_picture(image: Image.Image, data: bytes, side_px: int) -> RawPicture:
    pixels = square(image, side_px) if side_px else np.array(_bounded(image))
    height, width, _ = pixels.shape
    return RawPicture(width, height, pixels.tobytes(), hashlib.sha256(data).hexdigest())


def masked_picture(picture: bytes, mask: bytes | None, side_px: int) -> tuple[RawPicture, RawMask | None]:
    """The centre square of a client's picture, and where it is resampled: where its mask says so, or it is transparent.

    Args:
        picture: File of the picture.
        mask: File of the mask.
        side_px: Side of the pictures that the networks make, in pixels: a larger mask is resized.

    Returns:
        The picture, as ``raw_picture``; and the mask, None if there is none and the picture is opaque.

    Raises:
        ApiError: 400, if one is no picture, the sizes differ, or the mask is empty.
    """
    image = decode_picture(picture, "image", alpha=True)
    is_transparent = image.mode == "RGBA"
    raw = _raw_picture(on_white(image) if is_transparent else image, picture, side_px)
    if mask is None:
        masked = centre_square(transparent_pixels(image)) if is_transparent else np.zeros((1, 1), np.bool_)
        return raw, _raw_mask(masked, side_px) if masked.any() else None
    try:
        masked = masked_pixels(decode_picture(mask, "mask", alpha=True), image, "mask", "image")
    except ConfigError as error:
        raise ApiError(400, str(error), param="mask", code="invalid_value") from None
    return raw, _raw_mask(masked, side_px)


def _raw_mask(masked: Mask, side_px: int) -> RawMask:
    masked = shrink_mask(masked, side_px)
    return RawMask(len(masked), masked.astype(np.uint8).tobytes())


def _bounded(image: Image.Image) -> Image.Image:
    """The whole picture, resized if it is larger than any network sees."""
    scale = min(1.0, _MAX_SHORTER_PX / min(image.size), sqrt(_MAX_SENT_PX / (image.width * image.height)))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return resize(image, size) if scale < 1 else image
