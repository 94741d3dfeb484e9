"""The degradation of the small picture in an upsampler's training: arXiv:2204.06125, appendix C.

Legend: B batch, C channels, H and W pixels. Pictures are (B, C, H, W), float, in [-1, 1]. Every random number is of one
picture: a blur sampled per batch teaches the network to tell batches apart.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from models.pixels import resize
from models.sample_random import SampleRandom
from models.upsampler.bsr import bsr_light, filter_each

Degradation = Literal["blur", "bsr", "none"]


def degraded_low_res(image: Tensor, small_px: int, kind: Degradation, random: SampleRandom) -> Tensor:
    """Shrink pictures and corrupt each in its own way, (B, 3, small_px, small_px).

    Args:
        image: Large pictures or crops of them, (B, 3, H, H) in [-1, 1].
        small_px: Side of the result, in pixels; H is a multiple of it.
        kind: "blur" for 64 -> 256, "bsr" for 256 -> 1024, "none" to shrink alone.
        random: Random numbers of these samples.

    Raises:
        ValueError: If the sizes do not fit ``bsr``.
    """
    # Under a training's bfloat16 autocast the filters would keep only 8 bits of the pictures.
    with torch.autocast(image.device.type, enabled=False):
        if kind == "bsr":
            return bsr_light(image, small_px, random)
        small = resize(image, small_px)
        return random_blur(small, random) if kind == "blur" else small


def gaussian_blur(image: Tensor, sigma_px: Tensor, kernel_size: int = 3) -> Tensor:
    """Gaussian blur with its own width for each picture, edges reflected.

    Args:
        image: (B, C, H, W).
        sigma_px: (B,), standard deviations in pixels; 0 leaves a picture as it is.
        kernel_size: Odd width of the kernel, in pixels (arXiv:2204.06125, appendix C: 3).
    """
    offsets = torch.arange(kernel_size, device=image.device, dtype=image.dtype) - kernel_size // 2
    width = sigma_px.to(image).clamp(min=1e-3)[:, None]
    kernel = torch.exp(-0.5 * (offsets / width) ** 2)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    return filter_each(image, kernel[:, :, None] * kernel[:, None, :])


def random_blur(
    image: Tensor, random: SampleRandom, *, sigma_px: float = 0.6, prob: float = 0.5, kernel_size: int = 3
) -> Tensor:
    """Blur some of the pictures: the corruption of 64 -> 256 (arXiv:2204.06125, appendix C: kernel 3, sigma 0.6).

    Args:
        image: (B, C, H, W).
        random: Random numbers of these samples.
        sigma_px: Standard deviation of the blur, in pixels.
        prob: Probability that a picture is blurred. [reading]: the paper gives none.
        kernel_size: Odd width of the kernel, in pixels.
    """
    blurred = random.uniform("blur") < prob
    return gaussian_blur(image, sigma_px * blurred.to(image.dtype), kernel_size)


def random_crop(image: Tensor, size_px: int, random: SampleRandom, *, multiple_px: int = 1) -> Tensor:
    """One random square of each picture, (B, C, size_px, size_px).

    Args:
        image: (B, C, H, W).
        size_px: Side of the crop, in pixels.
        random: Random numbers of these samples.
        multiple_px: The corner lies on a multiple of this, in pixels: the scale factor of an upsampler, so that a crop
            and its small picture share one grid.

    Raises:
        ValueError: If the crop is larger than the picture.
    """
    height, width = image.shape[2:]
    if size_px > min(height, width):
        raise ValueError(f"a crop of {size_px} px does not fit a picture of {height} x {width} px")
    tops = random.integers("crop_top", (height - size_px) // multiple_px + 1) * multiple_px
    lefts = random.integers("crop_left", (width - size_px) // multiple_px + 1) * multiple_px
    corners = zip(image, tops.tolist(), lefts.tolist(), strict=True)
    return torch.stack([one[:, y : y + size_px, x : x + size_px] for one, y, x in corners])


def augment_noise(condition: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Conditioning noised to a level of its own: noise conditioning augmentation, arXiv:2106.15282, section 3.

    Args:
        condition: (B, C, H, W).
        level: (B,), share of noise in [0, 1], which the network reads; 0 leaves a picture as it is.
        noise: Standard normal, in the shape of ``condition``.
    """
    share = level.to(condition)[:, None, None, None]
    return (1 - share**2).sqrt() * condition + share * noise
