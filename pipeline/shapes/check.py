"""Checks from the pixels alone whether a picture shows what its prompt says.

Real pictures give the ceiling. The floor is the rate of guessing: pictures checked against other scenes' prompts, and
``guess_levels`` for attributes that depend on which object is which, or on their number. Print both next to any result,
so that nobody has to trust this checker.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pipeline.shapes.perceive import PerceivedObject, Perception, perceive
from pipeline.shapes.scene import RADIUS, RELATIONS, Scene

GIVEN = {"binding": "both shapes", "relation": "which is which"}
"""Attributes that cannot be correct without another one (``condition_of``), with its name in the tables: their share of
the pictures in which that one is correct says whether objects and words belong together, however well the objects are
drawn."""


@dataclass(frozen=True)
class CheckResult:
    """Which attributes of a scene its picture shows: attribute -> correct or not.

    One object: ``colour``, ``shape`` and ``size`` of the largest object, ``background``, and ``count``: the picture
    has exactly one object. Two objects: ``both colours`` and ``both shapes`` of the two largest, in either order;
    ``binding``: each of the two colours is on its own shape; ``relation``: the objects, identified by colour (or by
    shape if the colours are equal), stand as the prompt says; ``sizes``: binding is correct and each object has its
    size; ``background``; ``count``: exactly two. ``everything``: all of these are correct.
    """

    num_objects: int
    correct: dict[str, bool]


def check(image: NDArray[np.uint8], scene: Scene) -> CheckResult:
    """Compare a picture with the scene that it should show.

    Args:
        image: (height, width, 3), uint8, sRGB, square; any size from about 24 px.
        scene: The scene of the prompt.
    """
    return compare(perceive(image), scene)


def compare(perception: Perception, scene: Scene) -> CheckResult:
    """Compare the perception of a picture with the scene that it should show."""
    objects = perception.objects
    correct = {
        "background": perception.background == scene.background,
        "count": len(objects) == len(scene.objects),
    }
    if len(scene.objects) == 1:
        for attribute in ("colour", "shape", "size"):
            correct[attribute] = bool(objects) and _agree(objects[:1], scene, attribute)
    else:
        correct |= _compare_two(objects[:2], scene)
    correct["everything"] = all(correct.values())
    return CheckResult(len(scene.objects), correct)


def condition_of(attribute: str, scene: Scene) -> str:
    """The attribute without which one of GIVEN cannot be correct, for a scene of two objects.

    The relation needs what tells the objects apart: their colours, or their shapes if the colours are equal.
    """
    first, second = scene.objects
    identity = "both shapes" if first.colour == second.colour else "both colours"
    return {"binding": "both shapes", "relation": identity}[attribute]


def faults(correct: Mapping[str, bool], scene: Scene) -> list[str]:
    """The attributes that are wrong, without those that must be wrong because another one is."""
    causes: dict[str, tuple[str, ...]] = {}
    if len(scene.objects) == 2:
        relation = condition_of("relation", scene)
        causes = {"binding": ("both colours", "both shapes"), "sizes": ("binding",), "relation": (relation,)}
    return [
        name
        for name, is_correct in correct.items()
        if not is_correct and name != "everything" and all(correct[cause] for cause in causes.get(name, ()))
    ]


def describe(perception: Perception) -> str:
    """What a picture shows, in words; "?" where no name fits."""
    objects = [" ".join(name or "?" for name in (item.size, item.colour, item.shape)) for item in perception.objects]
    return f"{', '.join(objects) or 'no object'} on {perception.background or '?'}"


def _compare_two(objects: tuple[PerceivedObject, ...], scene: Scene) -> dict[str, bool]:
    names = ("both colours", "both shapes", "binding", "sizes", "relation")
    if len(objects) < 2:
        return dict.fromkeys(names, False)
    orders = list(permutations(objects))
    correct = {
        "both colours": any(_agree(order, scene, "colour") for order in orders),
        "both shapes": any(_agree(order, scene, "shape") for order in orders),
        "binding": any(_agree(order, scene, "colour", "shape") for order in orders),
        "sizes": any(_agree(order, scene, "colour", "shape", "size") for order in orders),
    }
    identity = "shape" if condition_of("relation", scene) == "both shapes" else "colour"
    correct["relation"] = any(_agree(order, scene, identity) and _is_in_relation(order, scene) for order in orders)
    return correct


def _agree(order: tuple[PerceivedObject, ...], scene: Scene, *attributes: str) -> bool:
    return all(
        getattr(perceived, attribute) == getattr(item, attribute)
        for perceived, item in zip(order, scene.objects, strict=True)
        for attribute in attributes
    )


def _is_in_relation(order: tuple[PerceivedObject, ...], scene: Scene) -> bool:
    """Whether the first object stands in the scene's relation to the second: its direction must be the main one."""
    sign_x, sign_y = RELATIONS[scene.relation or ""]
    dx, dy = order[0].x - order[1].x, order[0].y - order[1].y
    along, across = (sign_x * dx, abs(dy)) if sign_x else (sign_y * dy, abs(dx))
    return along > across


def guess_levels(correct: Mapping[str, bool], scene: Scene) -> dict[str, float]:
    """The probability that an attribute is correct by guessing, given what else the picture shows.

    The measured colours, shapes and background of the picture stay. Which shape has which colour, where the objects
    stand and how large they are is guessed; all choices are equally likely. The mean over pictures is the floor of the
    attribute's rate: if both colours are correct in 83 % of the pictures, the relation is correct in 21 % by chance.

        count        1 of the 2 numbers of objects
        binding      if both colours and both shapes are correct: 1 order in 2, or every order if the objects share a
                     colour or a shape
        relation     if the objects can be identified (both colours are correct, or both shapes if the colours are
                     equal): 1 direction in 4
        sizes        the probability of binding, times 1 size in 3 for each object
        everything   if background and count are correct: the product of the probabilities of sizes and relation

    Args:
        correct: ``CheckResult.correct`` of the picture.
        scene: The scene of its prompt.

    Returns:
        Attribute -> probability; the floor of the other attributes is another scene's prompt.
    """
    count = {"count": 1 / 2}
    if len(scene.objects) == 1:
        return count
    first, second = scene.objects
    share_attribute = first.colour == second.colour or first.shape == second.shape
    binding = (correct["both colours"] and correct["both shapes"]) * (1.0 if share_attribute else 0.5)
    can_identify = correct[condition_of("relation", scene)]
    sizes = binding / len(RADIUS) ** 2
    return count | {
        "binding": binding,
        "relation": can_identify / len(RELATIONS),
        "sizes": sizes,
        "everything": (correct["background"] and correct["count"]) * sizes / len(RELATIONS),
    }
