"""Principal components, and the numbers as tokens (against scikit-learn: tests/oracles)."""

import numpy as np
import pytest
import torch
from tiny_models import embeddings, measured

from models.ar_prior.buckets import DotHistogram, from_buckets, to_buckets
from models.pca import Pca, PcaSums


def test_pca_of_batches_is_that_of_all_rows() -> None:
    x, sums = embeddings(), PcaSums(12)
    for rows in (x[:0], x[:7], x[7:7], x[7:150], x[150:]):
        sums.update(rows)
    assert sums.num_rows == 300
    pca, expected = sums.pca(), measured(x)
    torch.testing.assert_close(pca.components, expected.components, rtol=0, atol=1e-9)
    torch.testing.assert_close(pca.variance, expected.variance, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(pca.mean, expected.mean)


def test_pca_survives_a_mean_far_larger_than_the_spread() -> None:
    x = embeddings()
    near, far = measured(x), measured(x + 1e6)
    torch.testing.assert_close(far.variance, near.variance, rtol=1e-6, atol=1e-12)


def test_keep_by_energy_keeps_the_fewest_components_within_the_error() -> None:
    x = embeddings()
    pca = measured(x)
    for max_error in (0.5, 0.1, 0.01):
        part = pca.keep_by_energy(max_error)
        residual = (part.reconstruct(part.project(x)) - x).square().sum() / (x - x.mean(0)).square().sum()
        assert residual <= max_error + 1e-12
        assert part.error == pytest.approx(float(residual), abs=1e-9)
        assert pca.keep(len(part.components) - 1).error > max_error
    assert pca.keep_by_energy(0.01).components.shape[0] > pca.keep_by_energy(0.5).components.shape[0]


def test_keep_by_energy_takes_a_share_to_the_bound_and_all_where_none_suffices() -> None:
    pca = Pca(torch.zeros(3), torch.eye(3), torch.tensor([0.5, 0.25, 0.25]), 1.0)
    assert [len(pca.keep_by_energy(error).components) for error in (0.5, 0.4, 0.2)] == [1, 2, 3]
    assert len(pca.keep(2).keep_by_energy(0.1).components) == 2


def test_directions_without_variance_count_as_nothing() -> None:
    flat = embeddings() @ torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(1)).double())[0]
    turned = flat @ torch.linalg.qr(torch.randn(12, 5, generator=torch.Generator().manual_seed(2)).double())[0].T
    variance = measured(turned).variance
    assert (variance >= 0).all()
    assert variance[5:].max() < 1e-12


def test_pca_refuses_what_has_no_components() -> None:
    with pytest.raises(ValueError, match="at least two"):
        measured(embeddings(1))
    with pytest.raises(ValueError, match="13 components"):
        measured(embeddings()).keep(13)


def test_buckets_are_of_equal_width_and_ends_take_the_rest() -> None:
    x = torch.tensor([-9.0, -5.0, -4.99, -0.001, 0.0, 4.999, 5.0, 9.0])
    assert to_buckets(x, 5.0, 10).tolist() == [0, 0, 0, 4, 5, 9, 9, 9]
    grid = torch.linspace(-5, 5, 10_001)
    again = from_buckets(to_buckets(grid, 5.0, 1024), 5.0, 1024)
    assert (again - grid).abs().max() <= 5 / 1024 + 1e-6
    every = torch.arange(1024)
    assert torch.equal(to_buckets(from_buckets(every, 5.0, 1024), 5.0, 1024), every)


def test_edges_are_linear_inside_a_bin() -> None:
    histogram = DotHistogram(num_bins=4)
    histogram.update(torch.tensor([-0.9, -0.8, -0.7, -0.6]))
    torch.testing.assert_close(histogram.edges(4), torch.tensor([-0.875, -0.75, -0.625]))


def test_dot_edges_cut_the_data_into_equally_frequent_buckets() -> None:
    dot = torch.rand(5000, generator=torch.Generator().manual_seed(0)) ** 3 - 0.4
    histogram = DotHistogram()
    histogram.update(dot[:1000])
    histogram.update(dot[1000:])
    edges = histogram.edges(8)
    assert edges.tolist() == sorted(edges.tolist())
    np.testing.assert_allclose(edges, np.quantile(dot.numpy(), np.arange(1, 8) / 8), atol=1e-3)
    counts = torch.bincount(torch.bucketize(dot, edges), minlength=8)
    assert counts.min() > 0.97 * 625
    assert counts.max() < 1.03 * 625
    assert DotHistogram().counts.sum() == 0
    with pytest.raises(ValueError, match="no dot product"):
        DotHistogram().edges(8)
