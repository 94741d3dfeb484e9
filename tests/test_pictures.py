"""The only decoder: correct results for files that decoders get wrong, and errors that name the file."""

import io
import pickle
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.pixels import resize_crop, to_pixels, to_uint8
from pipeline.errors import ConfigError
from pipeline.pictures.frame import square
from pipeline.pictures.read import PictureError, decode, read, read_file

CASES = Path(__file__).parent / "cases"
GREY = Image.linear_gradient("L").resize((32, 24))
GREY_16 = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)
_LYING = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How a camera turns the upright picture that it stores with each orientation (CIPA DC-008, tag 0x0112)."""


def _blocks(size: tuple[int, int] = (96, 64), seed: int = 0) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _bomb(side_px: int) -> bytes:
    """A PNG file whose header promises more than its few bytes hold."""
    data = _encode(Image.new("1", (8, 8)), "PNG")
    header = b"IHDR" + struct.pack(">II", side_px, side_px) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", _LYING)
def test_every_orientation_of_every_format_becomes_upright(orientation: int, kind: str) -> None:
    upright, turn = _blocks(), _LYING[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"tiffinfo": {0x0112: orientation}} if kind == "TIFF" else {"exif": exif, "quality": 95}
    data = _encode(upright if turn is None else upright.transpose(turn), kind, **options)
    for side_px in (0, 8):
        picture = read(data, where="x", side_px=side_px)
        assert (picture.width, picture.height) == upright.size
        small = np.asarray(upright.resize(picture.image.size)).astype(float)
        assert np.abs(np.asarray(picture.image) - small).mean() < 4


def test_a_phones_photo_becomes_upright() -> None:
    data = (CASES / "lying-down.jpg").read_bytes()
    with Image.open(io.BytesIO(data)) as lying:
        assert lying.size == (96, 64)
        expected = lying.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode(data, where="x")), np.asarray(expected))


@pytest.mark.parametrize("name", ["gray16.png", "gray16.tif", "rgb16.png", "rgba16.png"])
def test_sixteen_bits_are_scaled_to_eight(name: str) -> None:
    pixels = np.asarray(decode((CASES / name).read_bytes(), where="x"))
    # 7710 = 30 * 257 and 56540 = 220 * 257 in colour; 13364 = 52 * 257 and 33410 = 130 * 257 in grey.
    assert (pixels.min(), pixels.max()) == ((52, 130) if "gray" in name else (30, 220))
    assert tuple(pixels[0, 0]) == ((130, 130, 130) if "gray" in name else (30, 200, 30))


@pytest.mark.parametrize(
    ("data", "most_difference"),
    [
        (_encode(GREY, "PNG"), 0),
        (_encode(GREY_16, "PNG"), 0),
        (_encode(GREY_16, "TIFF", compression="tiff_lzw"), 0),
        (_encode(GREY_16, "PPM"), 0),
        (_encode(GREY_16, "JPEG2000"), 0),
        (_encode(Image.fromarray(np.asarray(GREY).astype(np.int32) * 257), "TIFF"), 0),
        (_encode(Image.fromarray(np.asarray(GREY).astype(np.float32) / 255), "TIFF"), 0),
        (_encode(GREY.convert("RGB").quantize(256), "PNG"), 0),
        (_encode(GREY, "GIF"), 0),
        (_encode(GREY.convert("RGB"), "BMP"), 0),
        (_encode(GREY.convert("CMYK"), "TIFF"), 0),
        (_encode(GREY.convert("CMYK"), "JPEG", quality=100), 2),
        (_encode(Image.merge("LA", (GREY, Image.new("L", GREY.size, 255))), "PNG"), 0),
        (_encode(GREY.convert("RGB"), "AVIF", quality=100), 2),
    ],
    ids=[
        "L",
        "I;16-png",
        "I;16-tiff",
        "I-pgm",
        "I;16-jp2",
        "I-tiff",
        "F-tiff",
        "P",
        "gif",
        "bmp",
        "CMYK-tiff",
        "CMYK-jpeg",
        "LA",
        "avif",
    ],
)
def test_every_mode_becomes_the_same_rgb(data: bytes, most_difference: int) -> None:
    image = decode(data, where="x")
    assert image.mode == "RGB"
    assert not image.info
    expected = np.asarray(GREY.convert("RGB")).astype(int)
    assert np.abs(np.asarray(image) - expected).max() <= most_difference


def test_one_bit_pictures_are_black_and_white() -> None:
    assert set(np.unique(decode(_encode(GREY.convert("1"), "PNG"), where="x"))) == {0, 255}


@pytest.mark.parametrize(
    "data",
    [
        _encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"),
        _encode(Image.new("LA", (4, 4), (9, 0)), "PNG"),
        _encode(Image.new("P", (4, 4), 0), "PNG", transparency=0),
        _encode(Image.new("L", (4, 4), 9), "PNG", transparency=9),
        _encode(Image.new("I;16", (4, 4), 900), "PNG", transparency=900),
        _encode(Image.new("RGB", (4, 4), (9, 9, 9)), "PNG", transparency=(9, 9, 9)),
        _encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "WEBP", lossless=True),
    ],
    ids=["RGBA", "LA", "P", "L", "I;16", "RGB", "webp"],
)
def test_transparent_parts_are_white(data: bytes) -> None:
    assert (np.asarray(decode(data, where="x")) == 255).all()


def test_half_transparent_parts_are_mixed_with_white_or_kept_for_a_mask(tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(_encode(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG"))
    assert (np.asarray(read_file(str(path))) == 127).all()
    assert np.asarray(read_file(str(path), alpha=True)).tolist() == [[[0, 0, 0, 128]] * 4] * 4


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<html>for sale</html>", "shard 7: not a picture"),
        (b"", "shard 7: not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "shard 7: not a picture"),
        (_encode(_blocks(), "JPEG")[:-200], "shard 7: image file is truncated"),
        (_encode(_blocks(), "PNG")[:-200], "shard 7: image file is truncated"),
        (_bomb(20_000), "shard 7: image area too large .20000 x 20000 px"),
        (_encode(Image.fromarray(np.full((4, 4), 99.0, np.float32)), "TIFF"), "nobody knows which level is white"),
        (_encode(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"), "nobody knows which level is white"),
        (_encode(Image.fromarray(np.full((4, 4), 200, np.int32)), "TIFF"), "nobody knows which level is white"),
        (_encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF"), "nobody knows which level is white"),
    ],
    ids=["html", "empty", "eps", "jpeg", "png", "bomb", "float", "nan", "int8", "int32"],
)
def test_what_cannot_be_read_is_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(PictureError, match=reason) as caught:
        decode(data, where="shard 7")
    again = pickle.loads(pickle.dumps(caught.value))  # as it comes back from a worker
    assert (str(again), again.reason) == (str(caught.value), caught.value.reason)


def test_a_users_file_is_refused_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ConfigError, match=r"a\.png: no such file"):
        read_file(str(path))
    path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"a\.png: not a picture"):
        read_file(str(path))
    with pytest.raises(ConfigError, match="directory"):
        read_file(str(tmp_path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "JPEG2000", "AVIF"])
def test_damaged_bytes_are_read_or_refused_and_nothing_else(kind: str) -> None:
    rng, whole, refused = random.Random(0), _encode(_blocks((24, 16)), kind), 0
    for number in range(60):
        data = bytearray(whole)
        for _ in range(1 + number % 9):
            data[rng.randrange(min(len(data), 200))] = rng.randrange(256)
        try:
            read(bytes(data), where="x", max_area_px=1e6)
        except PictureError:
            refused += 1
    assert refused > 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture() -> None:
    data = _encode(_blocks(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert decode(data, where="x").size == (96, 64)


def test_read_for_a_small_side_keeps_twice_that_side() -> None:
    data = _encode(_blocks((1024, 512)), "JPEG", quality=95)
    picture = read(data, where="x", side_px=100)
    assert (picture.image.size, picture.width, picture.height) == ((512, 256), 1024, 512)
    whole, drafted = square(decode(data, where="x"), 100).astype(float), square(picture.image, 100)
    assert 10 * np.log10(255**2 / ((whole - drafted) ** 2).mean()) > 45


def test_square_cuts_the_middle_and_cutting_again_changes_nothing() -> None:
    picture = _blocks((90, 60))
    whole = square(picture, 60)
    assert np.array_equal(whole, np.asarray(picture)[:, 15:75])
    assert np.array_equal(square(Image.fromarray(whole), 24), square(picture, 24))
    assert square(picture, 128).shape == (128, 128, 3)


def test_square_equals_the_networks_resize_up_to_rounding() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ours = square(Image.fromarray(noise), 24).astype(int)
    theirs = to_uint8(resize_crop(to_pixels(torch.from_numpy(noise)[None]), 24))[0].numpy()
    assert np.abs(ours - theirs).max() <= 1
