"""Numbers about pictures against scikit-image, and against what they are for."""

import numpy as np
import pytest
from skimage.filters import laplace
from skimage.metrics import structural_similarity

from pipeline.networks.quality import sharpness, ssim


def _pictures(side_px: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = np.cumsum(np.cumsum(rng.normal(size=(3, side_px, side_px, 3)), axis=1), axis=2)
    spread = smooth.max(axis=(1, 2, 3), keepdims=True) - smooth.min(axis=(1, 2, 3), keepdims=True)
    return (255 * (smooth - smooth.min(axis=(1, 2, 3), keepdims=True)) / spread).astype(np.uint8)


def _noisy(pictures: np.ndarray, std: float) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, std, pictures.shape)
    return (pictures + noise).clip(0, 255).round().astype(np.uint8)


@pytest.mark.parametrize("side_px", [16, 33])
@pytest.mark.parametrize("std", [3.0, 40.0])
def test_ssim_equals_scikit_image(side_px: int, std: float) -> None:
    a = _pictures(side_px)
    b = _noisy(a, std)
    expected = [
        structural_similarity(
            x, y, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
        )
        for x, y in zip(a, b, strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b), expected, rtol=1e-6)


def test_ssim_of_equal_and_of_tiny_pictures() -> None:
    a = _pictures(16)
    np.testing.assert_allclose(ssim(a, a), 1.0)
    small = a[:, :4, :4]
    assert (ssim(small, 255 - small) < ssim(small, _noisy(small, 2.0))).all()
    with pytest.raises(ValueError, match="uint8"):
        ssim(a, a.astype(np.float32))


def test_sharpness_is_the_variance_of_the_laplacian_and_falls_with_blur() -> None:
    pictures = _pictures(24)
    luma = pictures @ np.array([0.299, 0.587, 0.114])
    expected = [laplace(plane, ksize=3)[1:-1, 1:-1].var() for plane in luma]
    np.testing.assert_allclose(sharpness(pictures), expected, rtol=1e-9)
    blurred = (pictures[:, :-1].astype(int) + pictures[:, 1:]).astype(int) // 2
    assert (sharpness(blurred.astype(np.uint8)) < sharpness(pictures)).all()
    assert sharpness(np.full((1, 8, 8, 3), 77, np.uint8))[0] == 0
