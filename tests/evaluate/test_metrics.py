import math
from fractions import Fraction

import numpy as np
import pytest

from pipeline.evaluate import metrics
from pipeline.evaluate.metrics import (
    FeatureSums,
    Rate,
    cosine,
    difference_of,
    frechet_distance,
    mean_of,
    r_precision,
    rate_of,
    wilson_interval,
)
from pipeline.networks.quality import psnr_db


def _features(count: int, dim: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


@pytest.mark.parametrize(("hits", "total"), [(1, 10), (5, 10), (9, 10), (118, 120), (37, 120)])
def test_wilson_interval_ends_solve_the_score_equation(hits: int, total: int) -> None:
    """Both ends p satisfy (hits / total - p)^2 = z^2 p (1 - p) / total, by definition."""
    z, share = 1.959963984540054, hits / total
    low, high = wilson_interval(hits, total)
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, rel=1e-9)
    assert 0 < low < share < high < 1


def test_wilson_interval_at_the_borders_stays_in_0_1() -> None:
    z2 = 1.959963984540054**2
    assert wilson_interval(0, 20) == (0.0, pytest.approx(z2 / (20 + z2)))
    assert wilson_interval(20, 20) == (pytest.approx(20 / (20 + z2)), 1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert {wilson_interval(0, total)[0] for total in range(1, 300)} == {0.0}  # to the bit
    assert {wilson_interval(total, total)[1] for total in range(1, 300)} == {1.0}


@pytest.mark.parametrize(("hits", "total"), [(-1, 3), (4, 3)])
def test_wilson_interval_refuses_impossible_counts(hits: int, total: int) -> None:
    with pytest.raises(ValueError, match="not in 0"):
        wilson_interval(hits, total)


def test_rates_add_up_like_their_trials() -> None:
    flags = [True, False, True, True, False]
    assert rate_of(flags[:2]) + rate_of(flags[2:]) == rate_of(flags) == Rate(3, 5)
    assert rate_of(flags).to_dict()["rate"] == float(Fraction(3, 5))
    assert math.isnan(rate_of([]).value)


def test_difference_of_two_rates_is_that_of_newcombes_paper() -> None:
    """Newcombe 1998, table II, contrasts a and e by method 10."""
    difference = difference_of(Rate(56, 70), Rate(48, 80))
    assert difference["difference"] == pytest.approx(0.2)
    assert (round(difference["low"], 4), round(difference["high"], 4)) == (0.0524, 0.3339)
    none = difference_of(Rate(5, 56), Rate(0, 29))
    assert (round(none["low"], 4), round(none["high"], 4)) == (-0.0381, 0.1926)


def test_mean_of_matches_its_definition() -> None:
    values = mean_of([1.0, 2.0, 6.0])
    assert values["mean"] == 3.0
    assert values["std"] == pytest.approx(math.sqrt(7))
    assert values["high"] - values["mean"] == pytest.approx(1.959963984540054 * math.sqrt(7 / 3))
    assert mean_of([])["mean"] is None
    assert mean_of([2.0])["std"] == 0.0


def test_cosine_is_the_angle_between_rows() -> None:
    a = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]])
    b = np.array([[0.0, 3.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(cosine(a, b), [0, math.sqrt(0.5), -1])
    assert cosine(np.zeros((1, 2)), b[:1])[0] == 0  # no direction, and no division by zero
    with pytest.raises(ValueError, match="one row"):
        cosine(a, b[:2])


def test_psnr_of_a_constant_error() -> None:
    a = np.full((2, 4, 4, 3), 100, np.uint8)
    b = a.copy()
    b[0] += 10
    values = psnr_db(a, b)
    assert values[0] == pytest.approx(20 * math.log10(255 / 10))
    assert values[1] == math.inf
    with pytest.raises(ValueError, match="uint8"):
        psnr_db(a.astype(np.float32), b)


def test_psnr_does_not_wrap_around_in_uint8() -> None:
    black, white = np.zeros((1, 2, 2, 3), np.uint8), np.full((1, 2, 2, 3), 255, np.uint8)
    assert psnr_db(black, white)[0] == 0.0
    assert psnr_db(white, black)[0] == 0.0


def test_r_precision_counts_pictures_nearest_to_their_own_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    z_text = np.eye(3)
    z_image = np.array([[0.9, 0.1, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    assert r_precision(z_image, z_text, [0, 1, 2]) == Rate(2, 3)
    monkeypatch.setattr(metrics, "_ROWS_AT_A_TIME", 2)  # several blocks
    assert r_precision(z_image, z_text, [0, 1, 2]) == Rate(2, 3)


def test_feature_sums_of_parts_merge_into_the_whole() -> None:
    rows = _features(90, 7, seed=0) + 5
    whole = FeatureSums.of(rows)
    merged = FeatureSums.of(rows[:11]) + FeatureSums.of(rows[11:50]) + FeatureSums.of(rows[50:])
    np.testing.assert_allclose(merged.mean, rows.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(rows.astype(np.float64), rowvar=False), atol=1e-9)
    np.testing.assert_allclose(merged.outer, whole.outer, rtol=1e-12)
    assert merged.count == 90
    with pytest.raises(ValueError, match="at least 2"):
        _ = FeatureSums.of(rows[:1]).covariance


def test_frechet_distance_of_parts_is_that_of_the_whole() -> None:
    rows, others = _features(200, 6, seed=1), _features(200, 6, seed=2) * 2 + 1
    merged = FeatureSums.of(rows[:33]) + FeatureSums.of(rows[33:])
    whole = frechet_distance(FeatureSums.of(rows), FeatureSums.of(others))
    assert frechet_distance(merged, FeatureSums.of(others)) == pytest.approx(whole, rel=1e-9)


def test_frechet_distance_of_diagonal_normals_has_a_closed_form() -> None:
    """With commuting covariances: |mean difference|^2 + sum of (std difference)^2."""
    corners = np.array([[x, y] for x in (-1.0, 1.0) for y in (-1.0, 1.0)])  # uncorrelated, variance 4/3 each
    a, b = corners * [2.0, 0.5], corners * [1.0, 3.0] + [4.0, -1.0]
    unit = math.sqrt(4 / 3)
    expected = 16 + 1 + (unit * (2 - 1)) ** 2 + (unit * (3 - 0.5)) ** 2
    assert frechet_distance(FeatureSums.of(a), FeatureSums.of(b)) == pytest.approx(expected)


def test_frechet_distance_agrees_with_the_square_root_of_the_product() -> None:
    """The formula as written, tr sqrt(A B), from the eigenvalues of the non-symmetric product."""
    rows, others = _features(60, 5, seed=3), _features(60, 5, seed=4) @ _features(5, 5, seed=5)
    a, b = FeatureSums.of(rows), FeatureSums.of(others)
    cross = np.sqrt(np.linalg.eigvals(a.covariance @ b.covariance).real.clip(0)).sum()
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_zero_to_itself_even_when_singular() -> None:
    few, others = FeatureSums.of(_features(4, 12, seed=6)), FeatureSums.of(_features(5, 12, seed=7))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    same = [FeatureSums.of(_features(9, 3, seed)) for seed in range(20)]
    assert all(0 <= frechet_distance(sums, sums) < 1e-9 for sums in same)
    assert frechet_distance(few, others) == pytest.approx(frechet_distance(others, few), rel=1e-6)
    assert frechet_distance(few, others) > 1
