"""What is stored of a picture: its size, its bytes, its blurred boxes; and what is refused."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import resize
from pipeline.data.resize import Resizer
from pipeline.pictures.frame import square
from pipeline.pictures.read import PictureError, decode
from tests.data.conftest import CASES, make_picture
from tests.data.downloading import CONFIG, sizes_of


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("no", (96, 64)),
        ("keep_ratio", (48, 32)),
        ("center_crop", (32, 32)),
        ("border", (32, 32)),
        ("keep_ratio_largest", (32, 21)),
    ],
)
def test_resizer_gives_every_mode_its_size(mode: Any, size: tuple[int, int]) -> None:
    picture = make_picture(0)
    stored = Resizer(replace(CONFIG, resize_mode=mode, encode_format="png", encode_quality=1)).store(picture)
    assert sizes_of(stored) == (*size, 96, 64)
    pixels = np.asarray(decode(stored.data, where="x"))
    assert pixels.shape == (*size[::-1], 3)
    if mode == "border":
        assert (pixels[:5] == 255).all()
        assert (pixels[27:] == 255).all()
        assert not (pixels[6:26] == 255).all(axis=(1, 2)).any()
    if mode == "center_crop":
        assert np.abs(pixels.astype(int) - square(decode(picture, where="x"), 32)).mean() < 3


def test_resizer_keeps_small_pictures_if_configured_and_enlarges_otherwise() -> None:
    picture = make_picture(0, size=(24, 16))
    assert sizes_of(Resizer(replace(CONFIG, resize_only_if_bigger=True)).store(picture))[:2] == (24, 16)
    assert sizes_of(Resizer(CONFIG).store(picture))[:2] == (32, 32)


def test_resizer_keeps_the_bytes_of_a_plain_picture_of_the_right_size_only() -> None:
    config = replace(CONFIG, skip_reencode=True, resize_mode="no")
    plain, lying = make_picture(0), (CASES / "lying-down.jpg").read_bytes()
    assert Resizer(config).store(plain).data == plain
    turned = Resizer(config).store(lying)
    assert turned.data != lying
    assert sizes_of(turned) == (64, 96, 64, 96)
    assert Resizer(config).store(make_picture(0, kind="PNG")).data[:2] == b"\xff\xd8"
    smaller = replace(config, resize_mode="center_crop")
    assert Resizer(smaller).store(plain).data != plain


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"min_image_px": 65}, "image too small"),
        ({"max_aspect_ratio": 1.4}, "aspect ratio too large"),
        ({"max_image_area_px": 6143.0}, "image area too large"),
        ({"max_memory_bytes": 20_000}, "image needs too much memory"),
    ],
)
def test_resizer_refuses_what_the_recipe_refuses(change: dict[str, float], reason: str) -> None:
    with pytest.raises(PictureError) as caught:
        Resizer(replace(CONFIG, **change)).store(make_picture(0))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("limit", "reason"),
    [({"MAX_AREA_PX": 6143}, "image area too large"), ({"MAX_MEMORY_BYTES": 20_000}, "image needs too much memory")],
)
def test_a_picture_that_stays_as_it_is_is_refused_where_its_readers_would_refuse_it(
    limit: dict[str, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resizer = Resizer(replace(CONFIG, max_image_area_px=1e12, max_memory_bytes=1 << 40))
    assert sizes_of(resizer.measure(make_picture(0)))[:2] == (96, 64)
    for name, value in limit.items():
        monkeypatch.setattr(resize, name, value)
    with pytest.raises(PictureError) as caught:
        resizer.measure(make_picture(0))
    assert caught.value.reason == reason


def test_bytes_after_the_end_of_a_png_do_not_matter() -> None:
    picture = make_picture(0, kind="PNG")
    config = replace(CONFIG, encode_format="png", encode_quality=1)
    assert Resizer(config).store(picture + b"x" * 65).data == Resizer(config).store(picture).data


def test_boxes_are_blurred_where_they_are_in_the_stored_picture() -> None:
    config = replace(CONFIG, encode_format="png", encode_quality=1, image_px=64, blur_column="faces")
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    plain = np.asarray(decode(Resizer(config).store(buffer.getvalue()).data, where="x")).astype(int)
    box = ((0.45, 0.3, 0.55, 0.5),)  # the square is the middle half of the width
    blurred = np.asarray(decode(Resizer(config).store(buffer.getvalue(), box).data, where="x")).astype(int)
    changed = np.abs(plain - blurred).max(axis=2) > 8
    rows, columns = np.nonzero(changed)
    assert (rows.min() < 26 <= rows.max(), columns.min() < 30 <= columns.max()) == (True, True)
    assert not changed[45:].any()
    assert not changed[:, :14].any()
    outside = Resizer(config).store(buffer.getvalue(), ((0.0, 0.0, 0.2, 1.0),))
    assert np.array_equal(np.asarray(decode(outside.data, where="x")), plain)
