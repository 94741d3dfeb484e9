"""Does a picture show what its prompt says? Rates with intervals, from pixels alone.

The same rates for real pictures are the ceiling, and for pictures beside other scenes' prompts the floor: print both
beside any result, so that nobody has to trust this checker.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import permutations
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from pipeline.shapes.perceive import Perception, Seen, perceive
from pipeline.shapes.scene import RELATIONS, Scene


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


@dataclass(frozen=True)
class Rate:
    """A share of pictures with its Wilson 95 % interval."""

    num_right: int
    num_all: int
    share: float
    low: float
    high: float


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
        item, found = scene.objects[0], seen.objects[0] if seen.objects else None
        right["colour"] = found is not None and found.colour == item.colour
        right["shape"] = found is not None and found.shape == item.shape
        right["size"] = found is not None and found.size == item.size
    else:
        right |= _compare_two(seen.objects[:2], scene)
    right["everything"] = all(right.values())
    return CheckResult(len(scene.objects), right)


def _compare_two(found: tuple[Seen, ...], scene: Scene) -> dict[str, bool]:
    names = ("both colours", "both shapes", "binding", "sizes", "relation")
    if len(found) < 2:
        return dict.fromkeys(names, False)
    first, second = scene.objects
    orders = list(permutations(found))
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


def aggregate(results: Iterable[CheckResult]) -> dict[int, dict[str, Rate]]:
    """Rates of each attribute, apart for scenes of one object and of two.

    Returns:
        Number of objects -> attribute -> rate; a number without results is left out.
    """
    tallies: dict[int, dict[str, list[bool]]] = {}
    for result in results:
        tally = tallies.setdefault(result.num_objects, {})
        for attribute, right in result.right.items():
            tally.setdefault(attribute, []).append(right)
    return {
        num_objects: {attribute: wilson_rate(sum(rights), len(rights)) for attribute, rights in tally.items()}
        for num_objects, tally in sorted(tallies.items())
    }


def wilson_rate(num_right: int, num_all: int) -> Rate:
    """Share with its 95 % score interval (E. B. Wilson, 1927), which holds for small counts and near 0 and 1.

    Raises:
        ValueError: If ``num_all`` is below 1.
    """
    if num_all < 1:
        message = f"a rate needs at least one result, not {num_all}"
        raise ValueError(message)
    z = 1.959964
    share = num_right / num_all
    middle = (share + z * z / (2 * num_all)) / (1 + z * z / num_all)
    half = z / (1 + z * z / num_all) * sqrt(share * (1 - share) / num_all + z * z / (4 * num_all**2))
    return Rate(num_right, num_all, share, max(0.0, middle - half), min(1.0, middle + half))
