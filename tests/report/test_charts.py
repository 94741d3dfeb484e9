import math
import re
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest

from pipeline.report.charts import Curve, line_chart, linear_ticks, log_ticks


def _points(svg: str, kind: str) -> list[tuple[float, float]]:
    text = re.search(rf'class="{kind}" points="([^"]*)"', svg)
    assert text is not None
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in text[1].split())]


def test_line_chart_is_well_formed_and_inside_its_frame() -> None:
    svg = line_chart(Curve(range(0, 500, 5), [2.0 - 0.001 * s for s in range(100)]), label='loss of "a" & <b>')
    root = ET.fromstring(svg)
    assert root.tag == "svg"
    for kind in ("raw", "line"):
        for x, y in _points(svg, kind):
            assert 0 <= x <= 340
            assert 0 <= y <= 190
    assert "&amp; &lt;b>" in svg


def test_line_chart_places_values_on_a_linear_axis() -> None:
    (x0, y0), (x1, y1), (x2, y2) = _points(line_chart(Curve([0, 10, 20], [1.0, 3.0, 2.0]), label="x"), "raw")
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(2 * (y0 - y2), abs=0.21)


def test_line_chart_turns_logarithmic_over_a_wide_range() -> None:
    (_, y0), (_, y1), (_, y2) = _points(line_chart(Curve([0, 1, 2], [1.0, 0.1, 0.01]), label="x"), "raw")
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.11)


def test_line_chart_leaves_out_what_is_not_finite() -> None:
    svg = line_chart(Curve([0, 1, 2, 3], [1.0, math.nan, 2.0, math.inf]), label="x")
    assert len(_points(svg, "raw")) == 2
    with pytest.raises(ValueError, match="two values"):
        line_chart(Curve([0, 1], [1.0, math.nan]), label="x")


def test_line_chart_thins_long_curves_and_keeps_their_end() -> None:
    svg = line_chart(Curve(range(10_000), [float(s) for s in range(10_000)]), label="x")
    points = _points(svg, "raw")
    assert len(points) == 400
    assert points[-1][0] == pytest.approx(330)


def test_a_constant_curve_can_be_drawn() -> None:
    assert len(_points(line_chart(Curve([0, 5], [0.0, 0.0]), label="x"), "line")) == 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.013, 0.094), (-3, 17), (5, 5), (0.998, 1.001), (120, 940)])
def test_linear_ticks_enclose_the_range_with_few_round_numbers(low: float, high: float) -> None:
    ticks = linear_ticks(low, high)
    assert ticks[0] <= low + 1e-12
    assert ticks[-1] >= high - 1e-9
    assert 2 <= len(ticks) <= 6
    steps = {round((b - a) / 10 ** math.floor(math.log10(b - a) + 1e-9), 6) for a, b in pairwise(ticks)}
    assert steps <= {1.0, 2.0, 5.0, 10.0}


@pytest.mark.parametrize(("low", "high"), [(0.02, 0.9), (1e-5, 3.0), (0.1, 1.0), (0.5, 700)])
def test_log_ticks_enclose_the_range(low: float, high: float) -> None:
    ticks = log_ticks(low, high)
    assert ticks[0] <= low
    assert ticks[-1] >= high
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 8
