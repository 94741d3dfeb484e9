"""Metrics of pictures: similarity to a reference, and sharpness. A picture is uint8 (H, W, 3)."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_SIGMA = 1.5
_RADIUS = 5
_K1, _K2, _RANGE = 0.01, 0.03, 255.0
_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)."""


def psnr_db(a: Array, b: Array) -> Array:
    """Peak signal-to-noise ratio of each picture: uint8 (N, H, W, 3) twice -> (N,), in dB; equal pictures give inf.

    Raises:
        ValueError: If a shape or type differs.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"psnr of {a.dtype}{a.shape} with {b.dtype}{b.shape}: uint8 pictures of equal shape")
    errors = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / errors)


def ssim(a: Array, b: Array) -> Array:
    """Structural similarity of each picture, mean over pixels and colours: Wang et al., 2004, equation 13.

    Gaussian window of 11 px with sigma 1.5, smaller for smaller pictures; only whole windows count.

    Args:
        a: (N, H, W, 3), uint8.
        b: The same shape and type.

    Returns:
        (N,), float64, 1 for equal pictures.

    Raises:
        ValueError: If a shape or type differs.
    """
    if a.shape != b.shape or a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"ssim of {a.dtype}{a.shape} with {b.dtype}{b.shape}: uint8 pictures of equal shape")
    x, y = _planes(a), _planes(b)
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * _RANGE) ** 2, (_K2 * _RANGE) ** 2
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    bottom = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (top / bottom).flatten(1).mean(1).view(len(a), -1).mean(1).numpy()


def sharpness(pictures: Array) -> Array:
    """Variance of the Laplacian of the brightness: higher is sharper, and noise counts as sharp.

    Args:
        pictures: (N, H, W, 3), uint8, at least 3 px each side.

    Returns:
        (N,), float64, in grey levels squared.
    """
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    luma = torch.from_numpy(pictures.astype(np.float64) @ np.array(_LUMA))[:, None]
    return F.conv2d(luma, kernel[None, None]).flatten(1).var(1, correction=0).numpy()


def _planes(pictures: Array) -> Tensor:
    """Every colour of every picture as a picture of its own, (3 N, 1, H, W)."""
    planes = torch.from_numpy(pictures.astype(np.float64)).permute(0, 3, 1, 2)
    return planes.reshape(-1, 1, *planes.shape[2:])


def _blur(planes: Tensor) -> Tensor:
    """Weighted mean over the window, where the whole window lies inside."""
    radius = min(_RADIUS, (min(planes.shape[2:]) - 1) // 2)
    places = torch.arange(-radius, radius + 1, dtype=torch.float64)
    weights = torch.exp(-(places**2) / (2 * _SIGMA**2))
    weights = (weights / weights.sum())[None, None]
    return F.conv2d(F.conv2d(planes, weights[..., None]), weights[:, :, None])
