"""Finds the background and the objects of a picture from its pixels alone, without a network or the prompt.

The background is the colour of the border. Every other pixel is modelled as a mixture of the background and one plain
hue, the one with the smallest residual; so a soft edge keeps its object's colour (red that fades into white is not
pink). Connected pixels of a hue are an object. Its outline, centred and scaled by its area, is compared with drawn
shapes at several blurs.

Legend: P side of the working picture in pixels, C number of object colours, K side of an outline, N templates.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pipeline.shapes.components import connected_components
from pipeline.shapes.draw import coverage, unit_area
from pipeline.shapes.scene import ALONE, BACKGROUNDS, COLOURS, RADIUS, SHAPES

_WORK_PX = 96  # every picture is resized to this side
_BORDER_PX = 3
_MIN_AREA = 0.006  # of the picture; a small star covers 0.027, less where it is eroded
_MIN_SHARE = 0.3  # of a larger neighbouring object's area: a smaller region is a stain on it, not an object
_MIN_ALPHA = 0.55  # share of the hue in a pixel that counts as inside
_MIN_CONTRAST = 30.0  # sRGB distance from the background
_MAX_RESIDUAL = (
    0.3  # of an object's contrast: an object with more has none of the plain hues (dark gray on white: 0.33),
)
_NOISE = 30.0  # unless its residual is below this sRGB distance: for objects of low contrast (pink on beige: 95)
_MAX_BACKGROUND_DELTA = 24.0  # CIE76 in Lab; the nearest two backgrounds are 33 apart
_MIN_SIMILARITY = 0.9  # cosine to the nearest template, below which the shape is unknown
_OUTLINE_PX = 24
_OUTLINE_SPAN = 2.4  # side of the window, in square roots of the object's area
_REACH_PX = 4  # an object's soft edge ends this far from its inside
_BLURS_PX = (0.5, 1.5, 2.5, 3.5, 4.5)  # standard deviations of the templates' blurs, in working pixels

_NAMES = tuple(COLOURS)
_HUES = np.array(tuple(COLOURS.values()), np.float32)  # (C, 3)

_Floats = NDArray[np.float32]
_Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class PerceivedObject:
    """One object of a picture; a name is None if no name of the scenes fits."""

    colour: str | None
    shape: str | None
    size: str | None
    x: float
    """Centre of mass, as a fraction of the width."""
    y: float
    area: float
    """Share of the picture that it covers."""


@dataclass(frozen=True)
class Perception:
    """The background's name (None if no name fits) and the objects, largest first."""

    background: str | None
    objects: tuple[PerceivedObject, ...]


def perceive(image: NDArray[np.uint8]) -> Perception:
    """Find the background and the objects of a picture.

    Args:
        image: (height, width, 3), uint8, sRGB; any size from about 24 px, square.

    Returns:
        The background and every object of at least 0.6 % of the picture, largest first.

    Raises:
        ValueError: If the array is not an RGB picture.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        message = f"a picture is uint8 (height, width, 3), not {image.dtype} {image.shape}"
        raise ValueError(message)
    picture = Image.fromarray(image)
    if picture.size != (_WORK_PX, _WORK_PX):
        picture = picture.resize((_WORK_PX, _WORK_PX), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture, np.float32)  # (P, P, 3)
    border = _border_colour(pixels)
    difference = pixels - border
    alpha, residual, label = _unmix(difference, _HUES - border)
    contrast = np.sqrt(np.square(difference).sum(axis=2))
    own = np.take_along_axis(alpha, label[..., None], axis=2)[..., 0]
    inside = (own >= _MIN_ALPHA) & (contrast >= _MIN_CONTRAST)
    masks = _find_objects(inside, label)
    objects: list[PerceivedObject] = []
    for position, (mask, hue) in enumerate(masks):
        others = [other for i, (other, _) in enumerate(masks) if i != position]
        is_plain = residual[mask].mean() <= max(_NOISE, _MAX_RESIDUAL * contrast[mask].mean())
        soft = _soft_mask(mask, others, alpha[..., hue], label == hue)
        objects.append(_describe(soft, _NAMES[hue] if is_plain else None, ALONE if len(masks) == 1 else 1.0))
    return Perception(_background_name(border), tuple(sorted(objects, key=lambda item: -item.area)))


def _border_colour(pixels: _Floats) -> _Floats:
    """Median colour of a thin frame along the border, (3,)."""
    b = _BORDER_PX
    sides = (pixels[:b], pixels[-b:], pixels[:, :b], pixels[:, -b:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0).astype(np.float32)


def _unmix(difference: _Floats, hues: _Floats) -> tuple[_Floats, _Floats, NDArray[np.int64]]:
    """Explain each pixel's difference from the background by one hue.

    Args:
        difference: (P, P, 3) pixel minus background.
        hues: (C, 3) hue minus background.

    Returns:
        The share of each hue, (P, P, C), in [0, 1.1]; the residual of the best hue, (P, P), as an sRGB distance; and
        the best hue, (P, P).
    """
    lengths = np.square(hues).sum(axis=1)  # (C,)
    usable = lengths >= _MIN_CONTRAST**2
    alpha = np.clip(difference @ (hues / np.maximum(lengths, 1)[:, None]).T, 0, 1.1)  # (P, P, C)
    # |d - a h|^2 = |d|^2 - 2 a d.h + a^2 |h|^2, without an array of (P, P, C, 3).
    cost = np.square(difference).sum(axis=2)[..., None] + alpha * (alpha * lengths - 2 * (difference @ hues.T))
    cost = np.where(usable, cost, np.float32(np.inf))
    label = cost.argmin(axis=2)
    best = np.take_along_axis(cost, label[..., None], axis=2)[..., 0]
    return alpha * usable, np.sqrt(np.maximum(best, 0)), label


def _find_objects(inside: _Mask, label: NDArray[np.int64]) -> list[tuple[_Mask, int]]:
    """Connected regions of one hue that are large enough, with their hues; stains on larger objects are dropped."""
    regions: list[tuple[_Mask, int]] = []
    for hue in np.unique(label[inside]):
        core = _erode(inside & (label == hue))  # separates objects that a thin bridge connects
        numbers, count = connected_components(core)
        areas = np.bincount(numbers.ravel(), minlength=count + 1)
        regions += [(numbers == i, int(hue)) for i in range(1, count + 1) if areas[i] >= _MIN_AREA * inside.size]
    regions.sort(key=lambda region: -int(region[0].sum()))
    objects: list[tuple[_Mask, int]] = []
    for mask, hue in regions:
        near = _dilate(mask, 2)
        if not any((near & other).any() and mask.sum() < _MIN_SHARE * other.sum() for other, _ in objects):
            objects.append((mask, hue))
    return objects


def _erode(mask: _Mask) -> _Mask:
    """Keep the pixels whose four neighbours are in the mask."""
    padded = np.pad(mask, 1)
    return mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _dilate(mask: _Mask, reach_px: int) -> _Mask:
    """Add every pixel within ``reach_px`` along both axes (numpy's shifts: 10 times faster than Pillow's filter)."""
    for axis in (0, 1):
        swept = mask.copy()
        for shift in range(1, reach_px + 1):
            ahead, behind = [slice(None)] * 2, [slice(None)] * 2
            ahead[axis], behind[axis] = slice(shift, None), slice(None, -shift)
            swept[tuple(ahead)] |= mask[tuple(behind)]
            swept[tuple(behind)] |= mask[tuple(ahead)]
        mask = swept
    return mask


def _soft_mask(mask: _Mask, others: list[_Mask], share: _Floats, is_hue: _Mask) -> _Floats:
    """The object's share of each pixel, (P, P) in [0, 1]: zero far from it and inside other objects."""
    near = _dilate(mask, 1)
    allowed = _dilate(mask, _REACH_PX) & (is_hue | near)
    for other in others:
        allowed &= ~_dilate(other, 1) | near
    soft = np.where(allowed, np.clip(share, 0, 1), 0).astype(np.float32)
    level = float(np.quantile(soft[mask], 0.8))  # a pale object counts like a strong one
    return np.where(soft < 0.06, 0, np.minimum(soft / max(level, 0.3), 1)).astype(np.float32)


def _describe(soft: _Floats, colour: str | None, scale: float) -> PerceivedObject:
    """Name the shape and the size of a soft mask."""
    outline, x_px, y_px, area_px = _outline(soft)
    similarity = _templates() @ outline  # (N,)
    best = int(similarity.argmax())
    shape = SHAPES[best * len(SHAPES) // len(similarity)]
    radius = float(np.sqrt(area_px / unit_area(shape))) / _WORK_PX
    is_shape = similarity[best] >= _MIN_SIMILARITY
    return PerceivedObject(
        colour=colour,
        shape=shape if is_shape else None,
        size=min(RADIUS, key=lambda size: abs(scale * RADIUS[size] - radius)) if is_shape else None,
        x=x_px / _WORK_PX,
        y=y_px / _WORK_PX,
        area=area_px / _WORK_PX**2,
    )


def _outline(soft: _Floats) -> tuple[_Floats, float, float, float]:
    """A soft mask centred on its mass and scaled by its area: (K * K,) of length 1, then x, y and area in pixels."""
    area = float(soft.sum())
    middles = np.arange(soft.shape[0], dtype=np.float32) + 0.5
    x, y = float(soft.sum(axis=0) @ middles) / area, float(soft.sum(axis=1) @ middles) / area
    step = _OUTLINE_SPAN * float(np.sqrt(area)) / _OUTLINE_PX
    corner = _OUTLINE_PX / 2 * step
    window = Image.fromarray(soft).transform(
        (_OUTLINE_PX, _OUTLINE_PX),
        Image.Transform.AFFINE,
        (step, 0, x - corner, 0, step, y - corner),
        Image.Resampling.BILINEAR,
    )
    outline = np.asarray(window, np.float32).ravel()
    return outline / max(float(np.linalg.norm(outline)), 1e-6), x, y, area


@cache
def _templates() -> _Floats:
    """Outlines of every shape in every size and blur, (N, K * K), in the order of SHAPES."""
    outlines: list[_Floats] = []
    for shape, radius, blur in product(SHAPES, RADIUS.values(), _BLURS_PX):
        picture = coverage(shape, radius * _WORK_PX, _WORK_PX / 2, _WORK_PX / 2, (_WORK_PX, _WORK_PX))
        share = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), np.float32) / np.float32(255)
        everywhere = np.ones_like(share, dtype=np.bool_)
        outlines.append(_outline(_soft_mask(_erode(share >= _MIN_ALPHA), [], share, everywhere))[0])
    return np.stack(outlines)


def _background_name(colour: _Floats) -> str | None:
    """The nearest background in Lab, or None if an object's colour is nearer or nothing is near."""
    names = (*BACKGROUNDS, *COLOURS)
    palette = _lab(np.array([*BACKGROUNDS.values(), *COLOURS.values()], np.float32))
    delta = np.linalg.norm(palette - _lab(colour[None]), axis=1)
    best = int(delta.argmin())
    return names[best] if names[best] in BACKGROUNDS and delta[best] <= _MAX_BACKGROUND_DELTA else None


def _lab(colours: _Floats) -> NDArray[np.float64]:
    """CIE Lab (D65) of sRGB colours 0-255, (n, 3): IEC 61966-2-1 and CIE 15."""
    c = colours.astype(np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    ratio = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])],
        axis=1,
    )
