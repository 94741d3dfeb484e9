import numpy as np
import pytest
from PIL import Image

from pipeline.shapes.components import connected_components
from pipeline.shapes.draw import draw_array
from pipeline.shapes.perceive import perceive
from pipeline.shapes.scene import BACKGROUNDS, COLOURS, RADIUS, SHAPES, Object, Scene


def test_connected_components_numbers_regions_along_rows_and_columns() -> None:
    mask = np.array(
        [
            [1, 0, 1, 1, 0, 1],
            [1, 0, 0, 1, 0, 1],
            [1, 1, 1, 1, 0, 0],
            [0, 0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0, 1],
        ],
        dtype=np.bool_,
    )
    numbers, count = connected_components(mask)
    assert count == 5
    assert numbers.tolist() == [
        [1, 0, 1, 1, 0, 2],
        [1, 0, 0, 1, 0, 2],
        [1, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 3, 0],
        [4, 0, 0, 0, 0, 5],
    ]


def test_connected_components_of_nothing_and_of_everything() -> None:
    assert connected_components(np.zeros((4, 4), np.bool_))[1] == 0
    numbers, count = connected_components(np.ones((4, 4), np.bool_))
    assert count == 1
    assert (numbers == 1).all()


@pytest.mark.parametrize("background", BACKGROUNDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_perceive_names_every_colour_shape_and_size_on_every_background(colour: str, background: str) -> None:
    for shape in SHAPES:
        for size in RADIUS:
            perception = perceive(draw_array(Scene((Object(shape, colour, size, 0.45, 0.55),), background)))
            assert perception.background == background
            assert [(o.colour, o.shape, o.size) for o in perception.objects] == [(colour, shape, size)]
            assert perception.objects[0].x == pytest.approx(0.45, abs=0.01)
            assert perception.objects[0].y == pytest.approx(0.55, abs=0.1)  # a triangle's mass is below its middle


def test_perceive_names_nothing_in_noise_stripes_and_plain_pictures() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert all(item.shape is None or item.area < 0.05 for item in perceive(noise).objects)
    assert perceive(np.full((64, 64, 3), 255, np.uint8)).objects == ()
    stripe = np.full((64, 64, 3), 255, np.uint8)
    stripe[20:28, 4:60] = COLOURS["red"]
    (item,) = perceive(stripe).objects
    assert (item.colour, item.shape, item.size) == ("red", None, None)


def test_perceive_names_no_colour_that_is_not_a_plain_hue() -> None:
    picture = np.full((64, 64, 3), 255, np.uint8)
    picture[20:44, 20:44] = (90, 90, 90)
    (item,) = perceive(picture).objects
    assert (item.colour, item.shape) == (None, "square")


def test_perceive_names_no_background_of_another_colour() -> None:
    assert perceive(np.full((64, 64, 3), COLOURS["red"], np.uint8)).background is None
    assert perceive(np.full((64, 64, 3), (100, 70, 40), np.uint8)).background is None


def test_perceive_does_not_take_the_soft_edge_of_red_for_pink() -> None:
    picture = draw_array(Scene((Object("star", "red", "large", 0.5, 0.5),), "white"))
    blurred = Image.fromarray(picture).resize((16, 16), Image.Resampling.BICUBIC)
    soft = np.asarray(blurred.resize((128, 128), Image.Resampling.BICUBIC))
    assert [item.colour for item in perceive(soft).objects] == ["red"]


def test_perceive_separates_touching_objects_of_two_colours() -> None:
    scene = Scene(
        (Object("square", "red", "medium", 0.34, 0.5), Object("square", "blue", "medium", 0.66, 0.5)), "white"
    )
    perception = perceive(draw_array(scene))
    assert {(item.colour, item.shape) for item in perception.objects} == {("red", "square"), ("blue", "square")}


@pytest.mark.parametrize("shape", [(64, 64), (64, 64, 4)])
def test_perceive_refuses_what_is_not_an_rgb_picture(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a picture is uint8"):
        perceive(np.zeros(shape, np.uint8))
