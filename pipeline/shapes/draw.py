"""Pictures of scenes in flat colours; each object is drawn four times too large and reduced, which antialiases it.

Shapes are polygons in units of the object's radius, centred on their bounding boxes.
"""

import io
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pipeline.shapes.scene import BACKGROUNDS, COLOURS, Scene

_SUPERSAMPLE = 4
_SQUARE = 0.88  # the other shapes reach 1; a shorter side makes all shapes look equally large
_ARM = 0.36
_STAR_INNER = 0.42


def _star() -> list[tuple[float, float]]:
    outer = 1 / math.cos(math.radians(18))  # the side tips reach x = -1 and 1
    lift = (outer - outer * math.cos(math.radians(36))) / 2
    points: list[tuple[float, float]] = []
    for i in range(10):
        angle, reach = math.radians(36 * i), outer * (1 if i % 2 == 0 else _STAR_INNER)
        points.append((reach * math.sin(angle), lift - reach * math.cos(angle)))
    return points


def _circle() -> list[tuple[float, float]]:
    angles = [2 * math.pi * i / 64 for i in range(64)]
    return [(0.98 * math.cos(angle), 0.98 * math.sin(angle)) for angle in angles]


_W = _ARM
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "circle": _circle(),
    "square": [(-_SQUARE, -_SQUARE), (_SQUARE, -_SQUARE), (_SQUARE, _SQUARE), (-_SQUARE, _SQUARE)],
    "triangle": [(0, -0.9), (1, 0.9), (-1, 0.9)],
    "star": _star(),
    "cross": [
        (-_W, -1), (_W, -1), (_W, -_W), (1, -_W), (1, _W), (_W, _W),
        (_W, 1), (-_W, 1), (-_W, _W), (-1, _W), (-1, -_W), (-_W, -_W),
    ],
}  # fmt: skip


def unit_area(shape: str) -> float:
    """Area of a shape of radius 1 (shoelace formula): a circle of radius r covers about 3.0 r^2."""
    points = np.array(_POLYGONS[shape])
    x, y = points[:, 0], points[:, 1]
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def coverage(shape: str, radius_px: float, x_px: float, y_px: float, size_px: tuple[int, int]) -> Image.Image:
    """Share of each pixel that a shape covers.

    Args:
        shape: One of SHAPES.
        radius_px: Half the extent, in pixels.
        x_px: Centre, in pixels from the left edge.
        y_px: Centre, in pixels from the top edge.
        size_px: Width and height of the result, in pixels.

    Returns:
        A grey picture (mode L), 0 outside and 255 inside.
    """
    width, height = size_px
    large = Image.new("L", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), 0)
    # Pillow's coordinates refer to pixel centres, hence the half.
    points = [
        (_SUPERSAMPLE * (x_px + radius_px * x) - 0.5, _SUPERSAMPLE * (y_px + radius_px * y) - 0.5)
        for x, y in _POLYGONS[shape]
    ]
    ImageDraw.Draw(large).polygon(points, fill=255)
    return large.reduce(_SUPERSAMPLE)


def draw(scene: Scene, image_px: int = 128) -> Image.Image:
    """Draw a scene as an RGB picture of ``image_px`` by ``image_px`` pixels; later objects cover earlier ones."""
    picture = Image.new("RGB", (image_px, image_px), BACKGROUNDS[scene.background])
    for item in scene.objects:
        # Only the object's own window is drawn large: 5 times faster than the whole picture.
        x, y, radius = item.x * image_px, item.y * image_px, scene.radius(item) * image_px
        left, top = math.floor(x - radius) - 1, math.floor(y - radius) - 1
        side = math.ceil(2 * radius) + 3
        mask = coverage(item.shape, radius, x - left, y - top, (side, side))
        picture.paste(COLOURS[item.colour], (left, top), mask)
    return picture


def draw_array(scene: Scene, image_px: int = 128) -> NDArray[np.uint8]:
    """Draw a scene as a uint8 array (image_px, image_px, 3)."""
    return np.asarray(draw(scene, image_px))


def encode(picture: Image.Image, encoding: str = "png") -> bytes:
    """Encode a picture as PNG (lossless, fast) or JPEG (quality 95)."""
    buffer = io.BytesIO()
    if encoding == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()
