"""Captions of a scene: two canonical templates name every attribute, shorter ones leave some out."""

import numpy as np

from pipeline.shapes.scene import Scene

CANONICAL_ONE = "a {size} {colour} {shape} on a {background} background"
CANONICAL_TWO = "a {size} {colour} {shape} {relation} a {size_2} {colour_2} {shape_2} on a {background} background"
# (template, weight); {a} and {a_2} are the articles of the colours: "an orange", else "a".
TEMPLATES_ONE: tuple[tuple[str, int], ...] = (
    (CANONICAL_ONE, 6),
    ("{a} {colour} {shape} on a {background} background", 2),
    ("{a} {colour} {shape}", 1),
    ("{colour} {shape}, {background} background", 1),
    ("a drawing of a {size} {colour} {shape}", 1),
    ("a picture of {a} {colour} {shape} on {background}", 1),
)
TEMPLATES_TWO: tuple[tuple[str, int], ...] = (
    (CANONICAL_TWO, 6),
    ("{a} {colour} {shape} {relation} {a_2} {colour_2} {shape_2} on a {background} background", 2),
    ("{a} {colour} {shape} {relation} {a_2} {colour_2} {shape_2}", 2),
    ("{a} {colour} {shape} and {a_2} {colour_2} {shape_2}, {background} background", 1),
    ("a drawing of a {size} {colour} {shape} {relation} a {size_2} {colour_2} {shape_2}", 1),
)


def canonical_caption(scene: Scene) -> str:
    """Name every attribute of the scene; evaluation uses this caption as its prompt."""
    return _fill(CANONICAL_ONE if len(scene.objects) == 1 else CANONICAL_TWO, scene)


def training_caption(scene: Scene, seed: int, index: int) -> str:
    """Choose a template by weight, from (seed, index) alone, and fill it."""
    templates = TEMPLATES_ONE if len(scene.objects) == 1 else TEMPLATES_TWO
    weights = np.cumsum([weight for _, weight in templates])
    number = np.random.default_rng((seed, index, 1)).integers(weights[-1])  # 1: independent of the scene's own numbers
    return _fill(templates[int(np.searchsorted(weights, number, side="right"))][0], scene)


def _fill(template: str, scene: Scene) -> str:
    words = {"background": scene.background, "relation": scene.relation or ""}
    for suffix, item in zip(("", "_2"), scene.objects, strict=False):
        words[f"a{suffix}"] = "an" if item.colour[0] in "aeiou" else "a"
        words[f"size{suffix}"] = item.size
        words[f"colour{suffix}"] = item.colour
        words[f"shape{suffix}"] = item.shape
    return template.format_map(words)
