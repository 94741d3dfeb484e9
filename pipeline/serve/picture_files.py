"""Pictures as files: PNG, JPEG or WebP of a side, with text inside a PNG."""

import io
from collections.abc import Mapping
from typing import Literal

import numpy as np
from PIL import Image, PngImagePlugin

from pipeline.recipe.provenance import CHUNK, Signer
from pipeline.serve.protocols import Images

Format = Literal["png", "jpeg", "webp"]


def encode_picture(
    image: Images,
    side_px: int,
    kind: Format = "png",
    *,
    quality: int = 100,
    made_with: Mapping[str, str] | None = None,
    signer: Signer | None = None,
) -> bytes:
    """A picture (H, W, 3) as a file.

    Args:
        image: The picture.
        side_px: Side of the file's picture; a larger one is shrunk with antialiasing, a smaller one enlarged.
        kind: Format.
        quality: Of JPEG and WebP, from 0 to 100.
        made_with: Text chunks of a PNG.
        signer: Signs a PNG that has them.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    if picture.width != side_px:
        resample = Image.Resampling.LANCZOS if picture.width > side_px else Image.Resampling.BICUBIC
        picture = picture.resize((side_px, side_px), resample)
    stream = io.BytesIO()
    if kind == "png":
        chunks = PngImagePlugin.PngInfo()
        for name, text in (made_with or {}).items():
            chunks.add_itxt(name, text)
        if signer is not None and made_with:
            chunks.add_itxt(CHUNK, signer.sign(picture.size, picture.tobytes(), made_with["unclip"]))
        picture.save(stream, "PNG", pnginfo=chunks)
    else:
        picture.save(stream, kind.upper(), quality=quality)
    return stream.getvalue()
