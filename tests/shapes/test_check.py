import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import permutations, product

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.evaluate.metrics import Rate, rate_of
from pipeline.shapes.check import CheckResult, check, compare, describe, faults, guess_levels
from pipeline.shapes.draw import draw_array
from pipeline.shapes.perceive import PerceivedObject, perceive
from pipeline.shapes.scene import RADIUS, Object, Scene, evaluation_scenes

Picture = NDArray[np.uint8]
SCENES = [each.scene for each in evaluation_scenes(240, seed=0)]
PICTURES = [draw_array(scene) for scene in SCENES]


def resize(picture: Picture, image_px: int) -> Picture:
    return np.asarray(Image.fromarray(picture).resize((image_px, image_px), Image.Resampling.BICUBIC))


def tally(results: Iterable[CheckResult]) -> dict[tuple[int, str], Rate]:
    rates: dict[tuple[int, str], Rate] = {}
    for result in results:
        for attribute, is_right in result.correct.items():
            key = (result.num_objects, attribute)
            rates[key] = rates.get(key, Rate(0, 0)) + rate_of([is_right])
    return rates


def shares(change: Callable[[Picture], Picture]) -> dict[tuple[int, str], float]:
    rates = tally(check(change(p), s) for p, s in zip(PICTURES, SCENES, strict=True))
    return {key: rate.value for key, rate in rates.items()}


def test_check_of_real_pictures_is_the_ceiling() -> None:
    assert min(shares(lambda picture: picture).values()) >= 0.99


@pytest.mark.parametrize(("low_px", "out_px"), [(16, 64), (16, 128), (24, 64)])
def test_check_of_blurred_pictures_stays_near_the_ceiling(low_px: int, out_px: int) -> None:
    assert min(shares(lambda picture: resize(resize(picture, low_px), out_px)).values()) >= 0.98


def test_check_of_noisy_pictures_stays_near_the_ceiling() -> None:
    rng = np.random.default_rng(0)
    noisy = shares(lambda p: np.clip(resize(p, 64) + rng.normal(0, 10, (64, 64, 3)), 0, 255).astype(np.uint8))
    assert min(noisy.values()) >= 0.97


def test_check_of_shuffled_prompts_is_the_floor() -> None:
    rng = np.random.default_rng(0)
    results: list[CheckResult] = []
    for num_objects in (1, 2):
        places = [i for i, scene in enumerate(SCENES) if len(scene.objects) == num_objects]
        results += [check(PICTURES[a], SCENES[b]) for a, b in zip(places, rng.permutation(places), strict=True)]
    rates = tally(results)
    for attribute, chance in {"colour": 1 / 7, "shape": 1 / 6, "background": 1 / 5, "size": 1 / 3}.items():
        assert rates[1, attribute].to_dict()["low"] < chance + 0.05, attribute
        assert rates[1, attribute].value < chance + 0.12, attribute
    assert rates[2, "both colours"].value < 0.15
    assert rates[2, "binding"].value < 0.06
    assert rates[2, "relation"].value < 0.1


RED_CIRCLE_LEFT = Scene(
    (Object("circle", "red", "large", 0.27, 0.5), Object("square", "blue", "small", 0.75, 0.5)),
    "white",
    "to the left of",
)


def wrong(picture_scene: Scene) -> set[str]:
    return {name for name, right in check(draw_array(picture_scene), RED_CIRCLE_LEFT).correct.items() if not right}


def test_check_of_two_objects_names_what_is_wrong() -> None:
    circle, square = RED_CIRCLE_LEFT.objects
    assert wrong(RED_CIRCLE_LEFT) == set()
    swapped = (Object("circle", "red", "large", 0.7, 0.5), Object("square", "blue", "small", 0.2, 0.5))
    assert wrong(Scene(swapped, "white")) == {"relation", "everything"}
    rebound = (Object("square", "red", "large", 0.27, 0.5), Object("circle", "blue", "small", 0.75, 0.5))
    assert wrong(Scene(rebound, "white")) == {"binding", "sizes", "everything"}
    resized = (circle, Object("square", "blue", "medium", 0.75, 0.5))
    assert wrong(Scene(resized, "white")) == {"sizes", "everything"}
    above = (Object("circle", "red", "large", 0.45, 0.26), Object("square", "blue", "small", 0.5, 0.8))
    assert wrong(Scene(above, "white")) == {"relation", "everything"}
    assert wrong(Scene((circle, square), "black")) == {"background", "everything"}
    alone = {"both colours", "both shapes", "binding", "sizes", "relation", "count", "everything"}
    assert wrong(Scene((circle,), "white")) == alone


def test_a_third_object_is_one_too_many_and_is_not_compared() -> None:
    perception = perceive(draw_array(RED_CIRCLE_LEFT))
    third = PerceivedObject("green", "star", "small", 0.5, 0.1, 0.01)
    right = compare(replace(perception, objects=(*perception.objects, third)), RED_CIRCLE_LEFT).correct
    assert {name for name, is_right in right.items() if not is_right} == {"count", "everything"}


def test_check_identifies_objects_of_one_colour_by_shape() -> None:
    objects = (Object("star", "green", "medium", 0.5, 0.25), Object("circle", "green", "medium", 0.5, 0.75))
    picture = draw_array(Scene(objects, "gray"))
    assert check(picture, Scene(objects, "gray", "above")).correct["everything"]
    below = check(picture, Scene(objects[::-1], "gray", "above")).correct
    assert below["binding"]
    assert not below["relation"]


def test_check_of_one_object_names_what_is_wrong() -> None:
    picture = draw_array(Scene((Object("star", "pink", "small", 0.5, 0.5),), "beige"))
    requested = Scene((Object("star", "red", "large", 0.5, 0.5),), "beige")
    assert check(picture, requested).correct == {
        "background": True, "count": True, "colour": False, "shape": True, "size": False, "everything": False,
    }  # fmt: skip
    empty = check(np.full((64, 64, 3), 255, np.uint8), requested).correct
    assert not any(empty.values())


def test_check_takes_a_few_milliseconds() -> None:
    start = time.process_time()
    for picture, scene in zip(PICTURES[:60], SCENES[:60], strict=True):
        check(picture, scene)
    assert (time.process_time() - start) / 60 < 0.015  # 3 ms on a quiet core; this is for a crowded one


def flags_of(picture_scene: Scene, requested: Scene) -> dict[str, bool]:
    return check(draw_array(picture_scene), requested).correct


def test_guess_levels_are_the_shares_of_all_the_ways_to_guess() -> None:
    """Every order of the shapes, every direction and every size, checked one by one."""
    requested = RED_CIRCLE_LEFT
    hits: dict[str, list[bool]] = {}
    axes = {"x": ((0.27, 0.5), (0.75, 0.5)), "y": ((0.5, 0.27), (0.5, 0.75))}
    for shapes in permutations(item.shape for item in requested.objects):
        for places in (places for axis in axes.values() for places in permutations(axis)):
            for sizes in product(RADIUS, repeat=2):
                objects = (
                    Object(shape, item.colour, size, *place)
                    for shape, item, size, place in zip(shapes, requested.objects, sizes, places, strict=True)
                )
                for name, is_right in flags_of(Scene(tuple(objects), requested.background), requested).items():
                    hits.setdefault(name, []).append(is_right)
    shares = {name: sum(flags) / len(flags) for name, flags in hits.items()}
    assert shares["both colours"] == shares["both shapes"] == 1
    guessed = guess_levels(flags_of(requested, requested), requested)
    assert guessed.pop("count") == 1 / 2  # the pictures above have as many objects as requested
    assert guessed == pytest.approx({name: shares[name] for name in guessed})
    assert guessed == pytest.approx({"binding": 1 / 2, "relation": 1 / 4, "sizes": 1 / 18, "everything": 1 / 72})


def test_guess_levels_depend_on_what_the_picture_shows() -> None:
    right = flags_of(RED_CIRCLE_LEFT, RED_CIRCLE_LEFT)
    assert guess_levels(right | {"both shapes": False}, RED_CIRCLE_LEFT) == {
        "count": 1 / 2, "binding": 0, "relation": 1 / 4, "sizes": 0, "everything": 0,
    }  # fmt: skip
    assert guess_levels(right | {"both colours": False}, RED_CIRCLE_LEFT)["relation"] == 0
    assert guess_levels(right | {"count": False}, RED_CIRCLE_LEFT)["everything"] == 0
    first, second = RED_CIRCLE_LEFT.objects
    of_one_colour = replace(RED_CIRCLE_LEFT, objects=(first, replace(second, colour="red")))
    right = flags_of(of_one_colour, of_one_colour)
    assert guess_levels(right, of_one_colour)["binding"] == 1  # whatever goes where, a red circle and a red square
    assert guess_levels(right | {"both shapes": False}, of_one_colour)["relation"] == 0
    of_one_shape = replace(RED_CIRCLE_LEFT, objects=(first, replace(second, shape="circle")))
    assert guess_levels(flags_of(of_one_shape, of_one_shape), of_one_shape)["binding"] == 1
    assert guess_levels({"colour": True}, Scene((first,), "white")) == {"count": 1 / 2}


def test_faults_name_the_causes_and_not_what_follows_from_them() -> None:
    right = flags_of(RED_CIRCLE_LEFT, RED_CIRCLE_LEFT)
    assert faults(right, RED_CIRCLE_LEFT) == []
    circle, square = RED_CIRCLE_LEFT.objects
    for objects, wrong_names in (
        ((circle, replace(square, shape="star")), ["both shapes"]),  # binding and sizes follow
        ((circle, replace(square, colour="green")), ["both colours"]),  # so does the relation
        ((replace(circle, shape="square"), replace(square, shape="circle")), ["binding"]),
        ((circle, replace(square, size="medium")), ["sizes"]),
        ((circle,), ["count", "both colours", "both shapes"]),
    ):
        assert faults(flags_of(Scene(objects, "white"), RED_CIRCLE_LEFT), RED_CIRCLE_LEFT) == wrong_names
    of_one_colour = replace(RED_CIRCLE_LEFT, objects=(circle, replace(square, colour="red")))
    shown = Scene((circle, replace(square, colour="red", shape="star")), "white")
    assert faults(flags_of(shown, of_one_colour), of_one_colour) == ["both shapes"]  # the relation follows
    one = Scene((circle,), "white")
    assert faults({"colour": False, "shape": True, "everything": False}, one) == ["colour"]


def test_description_says_what_the_picture_shows() -> None:
    assert describe(perceive(draw_array(RED_CIRCLE_LEFT))) == "large red circle, small blue square on white"
    assert describe(perceive(np.full((64, 64, 3), (255, 0, 255), np.uint8))) == "no object on ?"
