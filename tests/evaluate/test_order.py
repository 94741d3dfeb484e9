import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from pipeline.evaluate import order
from pipeline.evaluate.metrics import FeatureSums, frechet_distance
from pipeline.evaluate.order import (
    HOLDS,
    OPEN,
    REVERSED,
    Measure,
    Statistic,
    check_order,
    frechet_of_rows,
    frechet_statistic,
    mean_statistic,
)


def compare(first: Statistic, second: Statistic, num_prompts: int) -> Any:
    """The comparison of two variants by one measure."""
    measure = Measure({"first": first, "second": second}, num_prompts)
    return check_order(("first", "second"), {"measure": measure})["measure"]["first over second"]


@pytest.mark.parametrize(("num_rows", "num_others"), [(40, 40), (5, 7), (12, 30)])
def test_frechet_distance_of_rows_is_that_of_their_covariances(num_rows: int, num_others: int) -> None:
    """More rows than features and fewer, the same number in both sets and not."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(num_rows, 8)), rng.normal(0.3, 2, (num_others, 8))
    expected = frechet_distance(FeatureSums.of(a), FeatureSums.of(b))
    assert frechet_of_rows(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_of_rows(a, a) == pytest.approx(0, abs=1e-6)


def test_paired_differences_are_surer_than_those_of_separate_samples() -> None:
    """Prompts differ by 1, variants by 0.1 with a spread of 0.1: only as pairs do 60 prompts show it."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 1, 60)
    better, worse = (mean_statistic(hard + gain + rng.normal(0, 0.1, 60)) for gain in (0.1, 0.0))
    result = compare(better, worse, 60)
    assert result["verdict"] == HOLDS
    assert 0 < result["low"] < result["difference"] < result["high"] < 0.2
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * np.sqrt(2) * 0.1 / np.sqrt(60), rel=0.25)
    assert compare(worse, better, 60)["verdict"] == REVERSED
    separate = mean_statistic(rng.permutation(hard) + 0.1)
    assert compare(separate, worse, 60)["verdict"] == OPEN


def test_equal_variants_leave_the_order_open() -> None:
    same = mean_statistic(np.array([True, False, True]))
    assert compare(same, same, 3) == {"difference": 0.0, "low": 0.0, "high": 0.0, "verdict": OPEN}


def test_the_smaller_frechet_distance_is_the_better_one() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(60, 4))
    near, far = (frechet_statistic(rng.normal(shift, 1, (60, 4)), real) for shift in (0.0, 1.0))
    result = compare(near, far, 60)
    assert result["verdict"] == HOLDS
    assert result["difference"] == pytest.approx(4, abs=1.5)


def test_every_neighbour_of_the_order_is_compared_by_every_measure_with_enough_prompts() -> None:
    values = {name: mean_statistic(np.full(9, level)) for name, level in (("a", 3.0), ("b", 2.0), ("c", 2.5))}
    table = check_order(("a", "b", "c"), {"level": Measure(values, 9), "rare": Measure(values, 1)})
    assert table == {
        "level": {
            "a over b": {"difference": 1.0, "low": 1.0, "high": 1.0, "verdict": HOLDS},
            "b over c": {"difference": -0.5, "low": -0.5, "high": -0.5, "verdict": REVERSED},
        }
    }


@pytest.mark.parametrize("look_s", [0.0, math.inf])
def test_each_variant_is_computed_once_for_each_resample_and_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, look_s: float
) -> None:
    monkeypatch.setattr(order, "_LOOK_S", look_s)
    calls, looks = Counter[str](), list[tuple[int, int]]()

    def statistic(name: str) -> Statistic:
        return lambda _: calls.update([name]) or 0.0

    costly = Measure({name: statistic(name) for name in "abcd"}, 9, num_resamples=25)
    cheap = Measure({name: mean_statistic(np.zeros(9)) for name in "abc"}, 9, num_resamples=75)
    check_order(("a", "b", "c"), {"cheap": cheap, "costly": costly}, lambda *look: looks.append(look))
    assert calls == dict.fromkeys("abc", 1 + 25)
    assert (looks[0], looks[-1]) == ((0, 100), (0 if look_s else 100, 100))
    assert looks == sorted(looks)
