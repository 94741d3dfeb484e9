import json
from dataclasses import replace
from typing import Any

import pytest

from pipeline.evaluate.checks import held_out_check, pixel_check
from pipeline.evaluate.metrics import Rate, difference_of
from pipeline.evaluate.prompts import Prompt, PromptSet
from pipeline.report.report import format_metrics
from pipeline.shapes.check import check
from pipeline.shapes.draw import draw_array
from pipeline.shapes.scene import HELD_OUT, Object, Scene, novelties

SCENE = Scene(
    (Object("circle", "red", "large", 0.27, 0.5), Object("square", "blue", "small", 0.75, 0.5)),
    "white",
    "to the left of",
)
NOTHING = dict.fromkeys(check(draw_array(SCENE, 32), SCENE).correct, False)
REAL = dict.fromkeys(NOTHING, True)


def _row(right: dict[str, bool], prompt_number: int = 0) -> dict[str, Any]:
    return {
        "prompt_number": prompt_number,
        "check": json.dumps(NOTHING | right),
        "check_shuffled": json.dumps(NOTHING),
        "check_real": json.dumps(REAL),
    }


def test_pixel_check_shows_guess_levels_and_not_zeros_as_the_floor() -> None:
    """Ten pictures of two objects: both colours right in nine, both shapes in four; another prompt is never right."""
    rows = [_row({"both colours": n < 9, "both shapes": n < 4, "binding": n < 3}) for n in range(10)]
    table = pixel_check(rows, PromptSet((Prompt("", scene=SCENE),), "drawn"))["two objects"]
    assert table["binding"]["generated"]["rate"] == 0.3
    assert table["binding"]["real"]["rate"] == 1
    assert table["binding"]["guess"]["rate"] == pytest.approx(0.4 / 2)
    assert table["relation"]["guess"]["rate"] == pytest.approx(0.9 / 4)
    assert table["both colours"]["guess"]["rate"] == 0
    assert table["count"]["guess"]["rate"] == 0.5
    lines = format_metrics({"pixel_check": {"two objects": table}}).splitlines()
    assert [line.split()[-1] for line in lines[:5]] == ["guessed", "0.0%", "0.0%", "20.0%", "50.0%"]


def test_an_attribute_given_another_counts_only_the_pictures_that_have_the_other() -> None:
    """Both shapes right in four of ten, among them the binding in three, the colours in all four."""
    rows = [_row({"both colours": n < 8, "both shapes": n < 4, "binding": n < 3, "relation": n < 2}) for n in range(10)]
    table = pixel_check(rows, PromptSet((Prompt("", scene=SCENE),), "drawn"))["two objects"]
    binding = table["binding, given both shapes"]
    assert (binding["generated"]["hits"], binding["generated"]["total"]) == (3, 4)
    assert binding["generated"]["low"] < 0.75 < binding["generated"]["high"]
    assert (binding["guess"]["rate"], binding["guess"]["total"]) == (0.5, 4)
    relation = table["relation, given which is which"]
    assert (relation["generated"]["hits"], relation["generated"]["total"]) == (2, 8)
    assert relation["guess"]["rate"] == 0.25
    assert (relation["real"]["hits"], relation["real"]["total"]) == (10, 10)


def test_objects_of_one_colour_are_told_apart_by_their_shapes() -> None:
    """Ten pictures with both colours right, seven with the shapes too, and four of these with the relation."""
    first, second = SCENE.objects
    of_one_colour = PromptSet(
        (Prompt("", scene=replace(SCENE, objects=(first, replace(second, colour="red")))),), "drawn"
    )
    rows = [_row({"both colours": True, "both shapes": n < 7, "relation": n < 4}) for n in range(10)]
    relation = pixel_check(rows, of_one_colour)["two objects"]["relation, given which is which"]
    assert (relation["generated"]["hits"], relation["generated"]["total"]) == (4, 7)
    assert relation["guess"]["rate"] == 0.25


def test_the_guess_of_a_given_attribute_knows_which_colours_are_wrong() -> None:
    """Four pictures with both shapes, one of them with both colours: only there can an order of the shapes be right."""
    rows = [_row({"both colours": n < 1, "both shapes": True}) for n in range(4)]
    table = pixel_check(rows, PromptSet((Prompt("", scene=SCENE),), "drawn"))["two objects"]
    assert table["binding, given both shapes"]["guess"]["rate"] == pytest.approx(0.5 / 4)


def test_a_condition_that_no_picture_meets_has_no_row() -> None:
    table = pixel_check([_row({})], PromptSet((Prompt("", scene=SCENE),), "drawn"))["two objects"]
    assert "binding, given both shapes" not in table


def test_held_out_combinations_are_compared_by_kind_with_their_trained_twins() -> None:
    colour, shape = HELD_OUT.objects[0]
    star = replace(SCENE.objects[0], colour=colour, shape=shape)
    pair = tuple(
        replace(item, colour=look[0], shape=look[1])
        for item, look in zip(SCENE.objects, HELD_OUT.pairs[0], strict=True)
    )
    new_colour = replace(SCENE, objects=(star, SCENE.objects[1]))
    background = next(
        b for b in ("white", "black", "gray", "beige") if novelties(Scene(pair, b, "above")) == ("new pair",)
    )
    new_pair = Scene(pair, background, "to the left of")
    both = next(
        Scene(pair, b, "above") for b in ("white", "black", "gray", "beige", "cyan")
        if novelties(Scene(pair, b, "above")) == ("new setting", "new pair")
    )  # fmt: skip
    assert (novelties(SCENE), novelties(new_colour)) == ((), ("new colour of a shape",))
    prompts = PromptSet(tuple(Prompt("", scene=scene) for scene in (new_colour, new_pair, both)), "drawn")
    trained = PromptSet(tuple(Prompt("", scene=SCENE) for _ in range(2)), "trained")
    rows = [_row({"both shapes": n < 3}, 0) for n in range(10)]
    rows += [_row({"both shapes": n < 5}, 1) for n in range(10)] + [_row({"both shapes": True}, 2)]
    trained_rows = [_row({"both shapes": n < 6}, 0) for n in range(8)]
    trained_rows += [_row({"both shapes": n < 1}, 1) for n in range(4)]
    table = held_out_check(rows, prompts, trained_rows, trained)["two objects"]
    assert list(table) == ["new colour of a shape", "new pair"]  # the third prompt, in a new setting, has no twin
    assert {kind: checks["both shapes"]["held_out"]["hits"] for kind, checks in table.items()} == {
        "new colour of a shape": 3, "new pair": 6,
    }  # fmt: skip
    assert table["new pair"]["everything"]["held_out"]["total"] == 11
    shapes = table["new colour of a shape"]["both shapes"]
    assert shapes["trained"]["rate"] == 0.75
    assert table["new pair"]["both shapes"]["trained"]["rate"] == 0.25
    assert shapes["difference"] == difference_of(Rate(3, 10), Rate(6, 8))
    assert shapes["difference"]["difference"] == pytest.approx(-0.45)
    assert held_out_check(rows, prompts, [], PromptSet((), "trained")) == {}
