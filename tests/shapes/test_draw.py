import io

import numpy as np
import pytest
from PIL import Image

from pipeline.shapes.draw import coverage, draw, draw_array, encode, unit_area
from pipeline.shapes.scene import BACKGROUNDS, COLOURS, SHAPES, Object, Scene, training_scene


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_shapes_area_and_extent(shape: str) -> None:
    share = np.asarray(coverage(shape, 40.0, 50.0, 50.0, (100, 100)), np.float64) / 255
    assert share.sum() == pytest.approx(unit_area(shape) * 40**2, rel=0.02)
    rows, columns = np.nonzero(share > 0.5)
    assert (columns.min() + columns.max() + 1) / 2 == pytest.approx(50, abs=0.6)
    assert (rows.min() + rows.max() + 1) / 2 == pytest.approx(50, abs=0.6)
    assert 68 <= max(np.ptp(columns), np.ptp(rows)) + 1 <= 81


def test_draw_paints_plain_colours_with_soft_edges() -> None:
    scene = Scene((Object("circle", "red", "large", 0.5, 0.5),), "white")
    picture = draw_array(scene, 128)
    assert picture.shape == (128, 128, 3)
    assert tuple(picture[64, 64]) == COLOURS["red"]
    assert tuple(picture[0, 0]) == BACKGROUNDS["white"]
    plain = (picture == COLOURS["red"]).all(axis=2) | (picture == BACKGROUNDS["white"]).all(axis=2)
    assert 40 < (~plain).sum() < 400


@pytest.mark.parametrize("image_px", [32, 64, 128, 256])
def test_draw_keeps_places_at_every_size(image_px: int) -> None:
    scene = Scene((Object("square", "blue", "medium", 0.3, 0.7),), "black")
    blue = draw_array(scene, image_px)[..., 2].astype(np.float64)
    middles = (np.arange(image_px) + 0.5) / image_px
    assert blue.sum(axis=0) @ middles / blue.sum() == pytest.approx(0.3, abs=0.25 / image_px)
    assert blue.sum(axis=1) @ middles / blue.sum() == pytest.approx(0.7, abs=0.25 / image_px)


def test_encode_png_is_lossless_and_jpeg_is_a_jpeg() -> None:
    scene = training_scene(0, 1)
    with Image.open(io.BytesIO(encode(draw(scene)))) as picture:
        assert picture.format == "PNG"
        np.testing.assert_array_equal(np.asarray(picture), draw_array(scene))
    with Image.open(io.BytesIO(encode(draw(scene), "jpeg"))) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture, np.float64) - draw_array(scene)).mean() < 4
