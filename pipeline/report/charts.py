"""Loss curves as inline SVG: no plotting library, no script, and colours from the page's own style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 340, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 12, 24
_MAX_POINTS = 400
"""Most points of a curve; a longer curve is averaged in runs."""


@dataclass(frozen=True)
class Curve:
    """One measured quantity over the steps of a training."""

    steps: Sequence[int]
    values: Sequence[float]


def line_chart(curve: Curve, *, label: str) -> str:
    """Draw a curve: its values faintly, their running average strongly; the axis is logarithmic above a ratio of 8.

    Args:
        curve: Steps ascending; values that are not finite are left out.
        label: Text for screen readers.

    Returns:
        An ``<svg>`` element that uses the classes grid, tick, raw and line.

    Raises:
        ValueError: If fewer than two values are finite.
    """
    points = [(s, v) for s, v in zip(curve.steps, curve.values, strict=True) if math.isfinite(v)]
    if len(points) < 2:
        raise ValueError(f"{label}: a curve needs two values, there are {len(points)}")
    points = _thin(points)
    values = [value for _, value in points]
    low, high = min(values), max(values)
    is_log = low > 0 and high > 8 * low
    ticks = log_ticks(low, high) if is_log else linear_ticks(low, high)
    bottom, top = min(ticks[0], low), max(ticks[-1], high)
    first, last = points[0][0], max(points[-1][0], points[0][0] + 1)

    def place_x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - _RIGHT)

    def place_y(value: float) -> float:
        a, b, v = (math.log(bottom), math.log(top), math.log(value)) if is_log else (bottom, top, value)
        return _HEIGHT - _BOTTOM - (v - a) / (b - a) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_escape(label)}">']
    for tick in ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:.3g}</text>')
    for step, anchor in ((first, "start"), ((first + last) // 2, "middle"), (last, "end")):
        x = place_x(step)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{step:,}</text>')
    for name, series in (("raw", points), ("line", _smooth(points, is_log=is_log))):
        path = " ".join(f"{place_x(step):.1f},{place_y(value):.1f}" for step, value in series)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
    return "".join([*parts, "</svg>"])


def linear_ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers; the first is at or below ``low``, the last at or above ``high``."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 3))
    step = next(unit * factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= 4)
    start = math.floor(low / step)
    ticks = [start * step]
    while ticks[-1] < high - 1e-9 * span or len(ticks) < 2:
        ticks.append((start + len(ticks)) * step)
    return ticks


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten (for short ranges also 2 and 5, or 3 times them) around ``low``..``high``; low > 0."""
    decades = math.log10(high / low)
    factors = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3 else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [factor * 10.0**exponent for exponent in exponents for factor in factors]
    below = max((mark for mark in marks if mark <= low), default=marks[0])
    above = min((mark for mark in marks if mark >= high), default=marks[-1])
    return [mark for mark in marks if below <= mark <= above]


def _thin(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    run = -(-len(points) // _MAX_POINTS)
    chunks = [points[i : i + run] for i in range(0, len(points), run)]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def _smooth(points: list[tuple[int, float]], *, is_log: bool) -> list[tuple[int, float]]:
    """Mean over a window centred on each point; geometric if the axis is logarithmic."""
    values = [math.log(value) if is_log else value for _, value in points]
    radius = max(1, len(points) // 40)
    means = [sum(values[max(0, i - radius) : i + radius + 1]) for i in range(len(values))]
    means = [total / len(values[max(0, i - radius) : i + radius + 1]) for i, total in enumerate(means)]
    return [(step, math.exp(mean) if is_log else mean) for (step, _), mean in zip(points, means, strict=True)]


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
