"""What an upsampler is conditioned on: the small picture, resized to the large one and slightly spoilt in training.

Legend: B batch, C channels, H and W pixels. Pictures are (B, C, H, W), float, in [-1, 1]. Every draw is per picture (a
blur drawn per batch teaches the network to tell batches apart) and comes from the torch.Generator that is passed in.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def bicubic(image: Tensor, size_px: int) -> Tensor:
    """Bicubic with antialiasing to (B, C, size_px, size_px), up or down; edges overshoot [-1, 1].

    Antialiased also upwards, where it changes the kernel alone (a = -0.5, as Pillow): diffusers' ``UnCLIPPipeline``
    does so, and a network must see the same kernel in training and sampling.
    """
    size = (size_px, size_px)
    return F.interpolate(image, size=size, mode="bicubic", antialias=True, align_corners=False)


def resize(image: Tensor, size_px: int) -> Tensor:
    """``bicubic`` with the overshoot clipped to [-1, 1]."""
    return bicubic(image, size_px).clamp(-1, 1)


def quantise_8bit(image: Tensor) -> Tensor:
    """Round to the 256 grey levels of a stored picture, still in [-1, 1]: the network sees what a file would hold."""
    return ((image.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


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


def filter_each(image: Tensor, kernels: Tensor) -> Tensor:
    """Correlate each picture (B, C, H, W) with its own kernel (B, K, K), K odd, edges reflected."""
    batch, channels, height, width = image.shape
    pad = kernels.shape[-1] // 2
    padded = F.pad(image, (pad, pad, pad, pad), mode="reflect")
    weight = kernels.to(image).repeat_interleave(channels, dim=0)[:, None]
    planes = padded.reshape(1, batch * channels, *padded.shape[-2:])
    return F.conv2d(planes, weight, groups=batch * channels).reshape(batch, channels, height, width)


def random_blur(
    image: Tensor, generator: torch.Generator, *, sigma_px: float = 0.6, prob: float = 0.5, kernel_size: int = 3
) -> Tensor:
    """Blur some of the pictures: the corruption of 64 -> 256 (arXiv:2204.06125, appendix C: kernel 3, sigma 0.6).

    Args:
        image: (B, C, H, W).
        generator: Source of the draws, on the CPU.
        sigma_px: Standard deviation of the blur, in pixels.
        prob: Probability that a picture is blurred. [reading]: the paper gives none.
        kernel_size: Odd width of the kernel, in pixels.
    """
    blurred = torch.rand(image.shape[0], generator=generator) < prob
    return gaussian_blur(image, sigma_px * blurred.to(image.dtype), kernel_size)


def random_crop(image: Tensor, size_px: int, generator: torch.Generator, *, multiple_px: int = 1) -> Tensor:
    """One random square of each picture, (B, C, size_px, size_px).

    Args:
        image: (B, C, H, W).
        size_px: Side of the crop, in pixels.
        generator: Source of the draws, on the CPU.
        multiple_px: The corner lies on a multiple of this, in pixels: the scale factor of an upsampler, so that a crop
            and its small picture share one grid.

    Raises:
        ValueError: If the crop is larger than the picture.
    """
    batch, _, height, width = image.shape
    if size_px > min(height, width):
        raise ValueError(f"a crop of {size_px} px does not fit a picture of {height} x {width} px")
    tops = torch.randint((height - size_px) // multiple_px + 1, (batch,), generator=generator) * multiple_px
    lefts = torch.randint((width - size_px) // multiple_px + 1, (batch,), generator=generator) * multiple_px
    corners = zip(image, tops.tolist(), lefts.tolist(), strict=True)
    return torch.stack([one[:, y : y + size_px, x : x + size_px] for one, y, x in corners])


def augment_noise(condition: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """Conditioning noised to a level of its own: noise conditioning augmentation, arXiv:2106.15282, section 3.

    Args:
        condition: (B, C, H, W).
        level: (B,), share of noise in [0, 1], which the network is told; 0 leaves a picture as it is.
        noise: Standard normal, in the shape of ``condition``.
    """
    share = level.to(condition)[:, None, None, None]
    return (1 - share**2).sqrt() * condition + share * noise
