"""Does a picture show what its prompt says? Read from its pixels alone.

Real pictures give the ceiling. The floor is what can be guessed: pictures beside other scenes' prompts, and, for what
depends on which object is which, ``guess_levels``. Print both beside any result, so that nobody has to trust this
checker.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pipeline.shapes.perceive import Perception, Seen, perceive
from pipeline.shapes.scene import RADIUS, RELATIONS, Scene


@dataclass(frozen=True)
class CheckResult:
    """What of a scene its picture shows: attribute -> right or not.

    One object: ``colour``, ``shape``, ``size`` of the largest object found, ``background``, and ``count``: exactly one
    object was found. Two: ``both colours`` and ``both shapes`` of the two largest, in either order; ``binding``: each
    of the two colours on its own shape; ``relation``: the objects, told apart by colour (or by shape where the colours
    are equal), stand as said; ``sizes``: as binding, and each of its size; ``background``; ``count``: exactly two.
    ``everything`` is all of these together.
    """

    num_objects: int
    right: dict[str, bool]


def check(image: NDArray[np.uint8], scene: Scene) -> CheckResult:
    """Compare a picture with the scene it should show.

    Args:
        image: (height, width, 3), uint8, sRGB, square; any size from about 24 px.
        scene: What the prompt says.

    Returns:
        Each attribute of the scene, right or not.
    """
    return compare(perceive(image), scene)


def compare(seen: Perception, scene: Scene) -> CheckResult:
    """Compare what was seen in a picture with the scene it should show."""
    right = {"background": seen.background == scene.background, "count": len(seen.objects) == len(scene.objects)}
    if len(scene.objects) == 1:
        for attribute in ("colour", "shape", "size"):
            right[attribute] = bool(seen.objects) and _agree(seen.objects[:1], scene, attribute)
    else:
        right |= _compare_two(seen.objects[:2], scene)
    right["everything"] = all(right.values())
    return CheckResult(len(scene.objects), right)


def _compare_two(objects: tuple[Seen, ...], scene: Scene) -> dict[str, bool]:
    names = ("both colours", "both shapes", "binding", "sizes", "relation")
    if len(objects) < 2:
        return dict.fromkeys(names, False)
    first, second = scene.objects
    orders = list(permutations(objects))
    right = {
        "both colours": any(_agree(order, scene, "colour") for order in orders),
        "both shapes": any(_agree(order, scene, "shape") for order in orders),
        "binding": any(_agree(order, scene, "colour", "shape") for order in orders),
        "sizes": any(_agree(order, scene, "colour", "shape", "size") for order in orders),
    }
    telling = "colour" if first.colour != second.colour else "shape"
    right["relation"] = any(_agree(order, scene, telling) and _stands(order, scene) for order in orders)
    return right


def _agree(order: tuple[Seen, ...], scene: Scene, *attributes: str) -> bool:
    return all(
        getattr(seen, attribute) == getattr(item, attribute)
        for seen, item in zip(order, scene.objects, strict=True)
        for attribute in attributes
    )


def _stands(order: tuple[Seen, ...], scene: Scene) -> bool:
    """Say whether the first stands in the relation to the second: the named direction is the main one."""
    sign_x, sign_y = RELATIONS[scene.relation or ""]
    dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
    along, across = (sign_x * dx, abs(dy)) if sign_x else (sign_y * dy, abs(dx))
    return along > across


def guess_levels(right: Mapping[str, bool], scene: Scene) -> dict[str, float]:
    """How likely each attribute that ties two objects together would be right if the tie were guessed.

    What the picture shows of either object stays as it was measured: its colours, its shapes, its background. Which
    shape goes to which colour, where the objects stand and how large they are is guessed, all choices equally likely.
    The mean over pictures is the floor of the attribute's rate: with both colours right in 83 % of the pictures, the
    relation is right in 21 % of them by chance.

        binding      both colours and both shapes are right: 1 order in 2; any order where the objects share a colour or
                     a shape
        relation     what tells the objects apart is right (both colours, or both shapes where the colours are equal):
                     1 direction in 4
        sizes        the guess of binding, and 1 size in 3 of each object
        everything   background and count are right: the guesses of sizes and relation

    Args:
        right: What ``check`` said of the picture.
        scene: The scene of its prompt.

    Returns:
        Attribute -> probability; nothing for a scene of one object, whose floor is another scene's prompt.
    """
    if len(scene.objects) == 1:
        return {}
    first, second = scene.objects
    share_a_look = first.colour == second.colour or first.shape == second.shape
    binding = (right["both colours"] and right["both shapes"]) * (1.0 if share_a_look else 0.5)
    are_told_apart = right["both shapes" if first.colour == second.colour else "both colours"]
    sizes = binding / len(RADIUS) ** 2
    return {
        "binding": binding,
        "relation": are_told_apart / len(RELATIONS),
        "sizes": sizes,
        "everything": (right["background"] and right["count"]) * sizes / len(RELATIONS),
    }
