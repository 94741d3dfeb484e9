"""Distances of sets against their definitions, written out as loops."""

import itertools
import math

import numpy as np
import pytest

from pipeline.evaluate import sets
from pipeline.evaluate.metrics import Rate
from pipeline.evaluate.sets import cmmd, precision_recall


def _unit(count: int, dim: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(count, dim)) + shift
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _kernel(x: np.ndarray, y: np.ndarray) -> float:
    return math.exp(-float(((x.astype(np.float64) - y.astype(np.float64)) ** 2).sum()) / (2 * 10.0**2))


def test_cmmd_is_its_definition() -> None:
    a, b = _unit(7, 5, 0), _unit(9, 5, 1, shift=0.7)
    within = [np.mean([_kernel(x, y) for x, y in itertools.permutations(rows, 2)]) for rows in (a, b)]
    between = np.mean([_kernel(x, y) for x in a for y in b])
    assert cmmd(a, b) == pytest.approx(1000 * (within[0] + within[1] - 2 * between), rel=1e-6)
    assert cmmd(a, b) == pytest.approx(cmmd(b, a), rel=1e-9)


def test_cmmd_is_near_zero_for_one_distribution_and_grows_with_the_shift() -> None:
    a = _unit(400, 8, 0)
    values = [cmmd(a, _unit(400, 8, 1, shift=shift)) for shift in (0.0, 0.3, 1.0)]
    assert abs(values[0]) < 0.1
    assert values[0] < values[1] < values[2]
    with pytest.raises(ValueError, match="at least 2"):
        cmmd(a, a[:1])


def _share_inside(rows: np.ndarray, manifold: np.ndarray, k: int) -> Rate:
    hits = 0
    for row in rows:
        for i, centre in enumerate(manifold):
            others = sorted(float(np.linalg.norm(centre - other)) for j, other in enumerate(manifold) if j != i)
            if float(np.linalg.norm(row - centre)) <= others[k - 1]:
                hits += 1
                break
    return Rate(hits, len(rows))


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_their_definitions(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "_ROWS_AT_A_TIME", 4)  # several blocks
    rng = np.random.default_rng(3)
    generated, real = rng.normal(size=(17, 3)) * 0.8 + 0.4, rng.normal(size=(23, 3))
    values = precision_recall(generated, real, k)
    assert values == (_share_inside(generated, real, k), _share_inside(real, generated, k))
    assert 0 < values[0].hits < values[0].total


def test_precision_and_recall_tell_quality_from_variety() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2))
    collapsed = rng.normal(size=(200, 2)) * 0.01
    wild = rng.normal(size=(200, 2)) * 20
    precision, recall = precision_recall(collapsed, real)
    assert precision.value == 1.0
    assert recall.value < 0.1
    precision, recall = precision_recall(wild, real)
    assert precision.value < 0.2
    assert recall.value > 0.8
    with pytest.raises(ValueError, match="more than 3"):
        precision_recall(real[:3], real)
