"""Principal components from merged sums against scikit-learn."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from tests.models.tiny_models import embeddings, measured


def test_pca_is_that_of_scikit_learn() -> None:
    x = embeddings()
    ours, theirs = measured(x).keep(5), PCA(5, svd_solver="full").fit(x.numpy())
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-12)
    np.testing.assert_allclose(ours.variance, theirs.explained_variance_, rtol=1e-9)
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-9)  # signs too
    every = measured(x).components
    assert (every.gather(1, every.abs().argmax(1, keepdim=True)) > 0).all()
    np.testing.assert_allclose(ours.project(x), theirs.transform(x.numpy()), atol=1e-9)
    np.testing.assert_allclose(
        ours.reconstruct(ours.project(x)), theirs.inverse_transform(theirs.transform(x.numpy())), atol=1e-9
    )
    assert ours.error == pytest.approx(1 - theirs.explained_variance_ratio_.sum(), abs=1e-10)
