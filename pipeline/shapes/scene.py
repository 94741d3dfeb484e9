"""The scene of a picture: one or two objects on a plain background, determined by (seed, index) alone.

Legend: lengths are fractions of the picture's width (it is square); x grows to the right and y downwards, from 0 to 1.
The combinations of attributes in ``HELD_OUT`` are never in training; every evaluation prompt contains one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 20, 20),
    "orange": (255, 136, 0),
    "yellow": (255, 228, 0),
    "green": (10, 160, 50),
    "blue": (20, 60, 235),
    "purple": (145, 25, 180),
    "pink": (255, 120, 190),
}
"""Colours of objects, sRGB 0-255, at hues of 0, 32, 54, 136, 229, 286 and 329 degrees."""
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "beige": (226, 202, 152),
    "cyan": (130, 218, 226),
}
"""Backgrounds, sRGB 0-255; the two that have a hue are pale, so that no object is mistaken for them."""
RADIUS: dict[str, float] = {"small": 0.135, "medium": 0.17, "large": 0.21}
"""Half the extent of an object in a picture of two; two large ones just fit side by side."""
ALONE = 1.4
"""Factor by which a single object is larger: sizes are relative to the available room."""
RELATIONS: dict[str, tuple[int, int]] = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Direction from the second object to the first, as the signs of x and y."""

TWO_OBJECTS_PROB = 0.5
_MARGIN = 0.02  # smallest distance of an object from the border
_GAP = 0.08  # smallest distance between two objects: more than a pixel at 16 px, the decoder's resolution
_MAX_SHIFT_ACROSS = 0.04  # largest shift of each object across the direction of the relation
_MAX_SHIFT = 0.05  # largest shift of a single object from the middle


@dataclass(frozen=True)
class Object:
    """One object: names from SHAPES, COLOURS and RADIUS, and its centre."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; ``relation``: the first's position relative to the second (None for one)."""

    objects: tuple[Object, ...]
    background: str
    relation: str | None = None

    def radius(self, item: Object) -> float:
        """Half the extent of one of the objects, as a fraction of the picture's width."""
        return RADIUS[item.size] * (ALONE if len(self.objects) == 1 else 1.0)


@dataclass(frozen=True)
class HeldOut:
    """Combinations that training never shows."""

    objects: tuple[tuple[str, str], ...]
    """(colour, shape), on any background, alone or not."""
    settings: tuple[tuple[str, str, str], ...]
    """(colour, shape, background), alone or not."""
    pairs: tuple[tuple[tuple[str, str], tuple[str, str]], ...]
    """((colour, shape), (colour, shape)) in one picture, in either order."""


@dataclass(frozen=True)
class EvaluationScene:
    """A held-out scene and its kind, one of EVALUATION_KINDS."""

    scene: Scene
    kind: str


EVALUATION_KINDS: dict[str, int] = {
    "one object, new setting": 3,
    "one object, new colour of the shape": 1,
    "two objects, new pair": 3,
    "two objects, new colour of a shape": 1,
}
"""Kinds of evaluation prompts and their shares, in eighths."""

NOVELTIES = ("new colour of a shape", "new setting", "new pair")
"""What can be new in a scene: one colour and shape, these on this background, or two objects in one picture. A scene
of one kind may contain others: pairs stand on any background."""


def _held_out() -> HeldOut:
    """Build the lists by rules that touch every colour, shape and background about equally often."""
    colours, backgrounds = tuple(COLOURS), tuple(BACKGROUNDS)
    objects = (("orange", "star"), ("purple", "triangle"), ("pink", "cross"))
    settings = [
        (colours[(2 * j + 3 * k + step) % len(colours)], shape, background)
        for (j, shape), (k, background), step in product(enumerate(SHAPES), enumerate(backgrounds), (1, 4))
        if step == 1 or (j + k) % 2 == 0
    ]
    pairs = [
        (
            (colour, SHAPES[(i + step) % len(SHAPES)]),
            (colours[(i + step) % len(colours)], SHAPES[(2 * i + 3 * step + turn) % len(SHAPES)]),
        )
        for (i, colour), step, turn in product(enumerate(colours), (1, 2, 3), (0, 1))
    ]
    # One pair in seven has one colour twice, as if both colours were sampled independently.
    pairs += [
        ((colour, SHAPES[i % len(SHAPES)]), (colour, SHAPES[(2 * i + 1) % len(SHAPES)]))
        for i, colour in enumerate(colours)
        if i % len(SHAPES) != (2 * i + 1) % len(SHAPES)
    ]
    return HeldOut(
        objects=objects,
        settings=tuple(setting for setting in settings if setting[:2] not in objects),
        pairs=tuple(pair for pair in pairs if not set(pair) & set(objects)),
    )


HELD_OUT = _held_out()
_HELD_OUT_OBJECTS = frozenset(HELD_OUT.objects)
_HELD_OUT_SETTINGS = frozenset(HELD_OUT.settings)
_HELD_OUT_PAIRS = frozenset(frozenset(pair) for pair in HELD_OUT.pairs)


def novelties(scene: Scene) -> tuple[str, ...]:
    """The kinds of held-out combinations that the scene contains, of NOVELTIES."""
    looks = [(item.colour, item.shape) for item in scene.objects]
    is_new = {
        "new colour of a shape": any(look in _HELD_OUT_OBJECTS for look in looks),
        "new setting": any((*look, scene.background) in _HELD_OUT_SETTINGS for look in looks),
        "new pair": frozenset(looks) in _HELD_OUT_PAIRS,
    }
    return tuple(name for name in NOVELTIES if is_new[name])


def is_held_out(scene: Scene) -> bool:
    """Whether the scene contains a combination that training must never show."""
    return bool(novelties(scene))


def training_scene(seed: int, index: int) -> Scene:
    """Sample training scene ``index``, which is never held out, from (seed, index) alone.

    Args:
        seed: Seed of the whole set; >= 0.
        index: Number of the scene in the set; >= 0.

    Returns:
        One object, or two that differ in colour or shape.
    """
    rng = np.random.default_rng((seed, index))
    num_objects = 2 if rng.random() < TWO_OBJECTS_PROB else 1  # before the loop, which rejects more scenes of two
    while True:
        scene = _place(rng, [_look(rng) for _ in range(num_objects)], _pick(rng, BACKGROUNDS))
        if not is_held_out(scene) and not _has_equal_objects(scene):
            return scene


def evaluation_scenes(num_scenes: int, seed: int) -> list[EvaluationScene]:
    """Sample held-out scenes with different prompts, half of them with one object.

    Args:
        num_scenes: Number of scenes; at most 280, because there are no more different prompts of one object.
        seed: Seed of the choice and the positions. A smaller ``num_scenes`` gives the first scenes of a larger one.

    Returns:
        Scenes with their kinds, which alternate in the proportions of EVALUATION_KINDS.

    Raises:
        ValueError: If ``num_scenes`` is not in [1, 280].
    """
    if not 1 <= num_scenes <= 280:
        message = f"num_scenes must be from 1 to 280, not {num_scenes}"
        raise ValueError(message)
    rng = np.random.default_rng((seed, 1))
    turns = [kind for kind, share in EVALUATION_KINDS.items() for _ in range(share)]
    prompts: set[object] = set()
    scenes: list[EvaluationScene] = []
    while len(scenes) < num_scenes:
        kind = turns[(3 * len(scenes)) % len(turns)]  # 3 and 8 are coprime: one and two objects alternate
        scene = _held_out_scene(rng, kind)
        prompt = _prompt_of(scene)
        if prompt not in prompts and not _has_equal_objects(scene):
            prompts.add(prompt)
            scenes.append(EvaluationScene(scene, kind))
    return scenes


def trained_twins(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """For each scene one of the same shapes, sizes, places and relation, whose combinations training shows.

    Its colours and its background are sampled anew. Shapes differ in how well they are drawn, so that held-out
    combinations, of which some are of the hardest shapes alone, are compared with these and not with any others.

    Args:
        scenes: The scenes.
        seed: Seed of the colours. The twins of the first scenes are the first twins.
    """
    rng = np.random.default_rng((seed, 3, 2))
    return [_trained_twin(rng, scene) for scene in scenes]


def _trained_twin(rng: np.random.Generator, scene: Scene) -> Scene:
    while True:
        objects = tuple(replace(item, colour=_pick(rng, COLOURS)) for item in scene.objects)
        twin = replace(scene, objects=objects, background=_pick(rng, BACKGROUNDS))
        if not is_held_out(twin) and not _has_equal_objects(twin):
            return twin


def _prompt_of(scene: Scene) -> object:
    """What the canonical caption of a scene says."""
    return (scene.background, scene.relation, *((o.size, o.colour, o.shape) for o in scene.objects))


def _held_out_scene(rng: np.random.Generator, kind: str) -> Scene:
    background = _pick(rng, BACKGROUNDS)
    if kind == "one object, new setting":
        colour, shape, background = HELD_OUT.settings[int(rng.integers(len(HELD_OUT.settings)))]
        looks = [(colour, shape)]
    elif kind == "two objects, new pair":
        looks = list(HELD_OUT.pairs[int(rng.integers(len(HELD_OUT.pairs)))])
    else:
        looks = [HELD_OUT.objects[int(rng.integers(len(HELD_OUT.objects)))]]
        if kind.startswith("two"):
            looks.append(_look(rng))
    if rng.random() < 0.5:
        looks.reverse()
    return _place(rng, looks, background)


def _pick(rng: np.random.Generator, names: dict[str, tuple[int, int, int]]) -> str:
    return tuple(names)[int(rng.integers(len(names)))]


def _look(rng: np.random.Generator) -> tuple[str, str]:
    return _pick(rng, COLOURS), SHAPES[int(rng.integers(len(SHAPES)))]


def _has_equal_objects(scene: Scene) -> bool:
    looks = [(item.colour, item.shape) for item in scene.objects]
    return len(set(looks)) < len(looks)


def _place(rng: np.random.Generator, looks: list[tuple[str, str]], background: str) -> Scene:
    """Sample a size and a position for each (colour, shape), and a relation for two."""
    sizes = [tuple(RADIUS)[int(rng.integers(len(RADIUS)))] for _ in looks]
    if len(looks) == 1:
        reach = min(_MAX_SHIFT, 0.5 - _MARGIN - ALONE * RADIUS[sizes[0]])
        x, y = 0.5 + rng.uniform(-reach, reach, size=2)
        return Scene((Object(looks[0][1], looks[0][0], sizes[0], float(x), float(y)),), background)
    relation = tuple(RELATIONS)[int(rng.integers(len(RELATIONS)))]
    sign_x, sign_y = RELATIONS[relation]
    first, second = (RADIUS[size] for size in sizes)
    slack = 1 - 2 * _MARGIN - _GAP - 2 * (first + second)
    gap = _GAP + slack * rng.uniform(0, 0.3)
    length = 2 * (first + second) + gap
    start = 0.5 - length / 2 + (slack + _GAP - gap) / 2 * rng.uniform(-1, 1)
    # Along the axis: first the object with the smaller x or y, then the other.
    low, high = (first, second) if sign_x + sign_y < 0 else (second, first)
    along = [start + low, start + length - high]
    if sign_x + sign_y > 0:
        along.reverse()
    across = [float(0.5 + rng.uniform(-1, 1) * min(_MAX_SHIFT_ACROSS, 0.5 - _MARGIN - r)) for r in (first, second)]
    xs, ys = (along, across) if sign_x else (across, along)
    objects = tuple(
        Object(shape, colour, size, float(x), float(y))
        for (colour, shape), size, x, y in zip(looks, sizes, xs, ys, strict=True)
    )
    return Scene(objects, background, relation)
