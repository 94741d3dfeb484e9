"""The degradation of latent-diffusion's ``bsrgan_light``, in torch: blur, resizing, noise and JPEG in random order.

arXiv:2204.06125 (appendix C) corrupts the conditioning of 256 -> 1024 with it; the model is arXiv:2103.14006, here in
the lighter form of arXiv:2112.10752. Pictures are (1, 3, H, W) in [-1, 1]; each is degraded on its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from models.pixels import resize
from models.sample_random import SampleRandom
from models.upsampler.jpeg import jpeg

T = TypeVar("T")

GREY_LEVEL = 2 / 255
"""One of 256 levels, in units of pixels in [-1, 1]."""
RESIZE_MODES = ("bilinear", "bicubic", "area")


def bsr_light(image: Tensor, small_px: int, random: SampleRandom) -> Tensor:
    """Degraded small pictures, (B, 3, small_px, small_px).

    Each picture goes through blur, downsampling by a random factor, downsampling to ``small_px``, Gaussian noise and
    JPEG, in an order of its own in which the last downsampling follows the first, and through JPEG once more.

    Args:
        image: Large pictures, (B, 3, H, H) in [-1, 1], H a multiple of small_px.
        small_px: Side of the result, in pixels; at least 8.
        random: Random numbers of these samples.

    Raises:
        ValueError: If the sizes do not fit.
    """
    side = image.shape[-1]
    if image.shape[-2] != side or small_px < 8 or side % small_px:
        raise ValueError(f"pictures of {tuple(image.shape[-2:])} px cannot be degraded to {small_px} px squares")
    seeds = random.seeds("bsr").tolist()
    draws = [Draws(torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat([_degrade(one[None], small_px, its) for one, its in zip(image, draws, strict=True)])


class Draws:
    """Random numbers of the kinds needed here, from one generator."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def uniform(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def chance(self, prob: float) -> bool:
        """True with probability ``prob``."""
        return self.uniform(0.0, 1.0) < prob

    def integer(self, low: int, high: int) -> int:
        """A whole number, low .. high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def choice(self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.integer(0, len(options) - 1)]

    def order(self, count: int) -> list[int]:
        """A permutation of 0 .. count - 1."""
        return torch.randperm(count, generator=self.generator).tolist()

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator)


def _degrade(image: Tensor, small_px: int, draws: Draws) -> Tensor:
    scale = image.shape[-1] // small_px
    if scale == 4 and draws.chance(0.25):
        image = _halve(image, draws)
        scale = 2
    order = draws.order(5)
    first, last = order.index(1), order.index(2)
    if first > last:
        order[first], order[last] = order[last], order[first]
    for step in order:
        if step == 0:
            image = filter_each(image, blur_kernel(scale, draws, image.shape[-1]))
        elif step == 1:
            image = _shrink(image, scale, draws)
        elif step == 2:
            image = _resized(image, small_px, draws)
        elif step == 3:
            image = add_noise(image, draws)
        elif draws.chance(0.9):
            image = jpeg(image, draws.integer(80, 95))
    return jpeg(image, draws.integer(80, 95))


def _halve(image: Tensor, draws: Draws) -> Tensor:
    half = image.shape[-1] // 2
    return _resized(image, half, draws) if draws.chance(0.5) else resize(image, half)


def _shrink(image: Tensor, scale: int, draws: Draws) -> Tensor:
    """Downsample by a random factor, or blur and keep every ``scale``-th pixel."""
    side = image.shape[-1]
    if draws.chance(0.8):
        return _resized(image, max(1, int(side / draws.uniform(1.0, 2.0 * scale))), draws)
    sigma = draws.uniform(0.1, 0.6 * scale)
    # The kernel is centred on the block of pixels that each kept pixel stands for.
    kernel = _gaussian(sigma**2, sigma**2, 0.0, radius=min(12, side - 1), centre=(scale - 1) / 2)
    return filter_each(image, kernel)[..., ::scale, ::scale].clamp(-1, 1)


def _resized(image: Tensor, side: int, draws: Draws) -> Tensor:
    """Resize without antialiasing, with a random one of OpenCV's linear, cubic and area modes."""
    mode = draws.choice(RESIZE_MODES)
    corners = None if mode == "area" else False
    return F.interpolate(image, size=(side, side), mode=mode, align_corners=corners).clamp(-1, 1)


def blur_kernel(scale: int, draws: Draws, side_px: int) -> Tensor:
    """A random Gaussian kernel (1, K, K): stretched and turned, or round, with equal probability.

    Args:
        scale: Factor from the small picture to the large one; larger ones are blurred more.
        draws: Source of the draws.
        side_px: Side of the picture to be blurred, in pixels: bounds the kernel.
    """
    radius = min(7, side_px - 1)
    if draws.chance(0.5):
        widest = (4 + scale) / 4
        long, short = draws.uniform(0.0, widest), draws.uniform(0.0, widest)
        return _gaussian(long, short, draws.uniform(0.0, math.pi), radius=radius)
    sigma = draws.uniform(0.0, (2 + 0.2 * scale) / 4)
    return _gaussian(sigma**2, sigma**2, 0.0, radius=radius)


def _gaussian(long: float, short: float, angle: float, *, radius: int, centre: float = 0.0) -> Tensor:
    """A Gaussian (1, K, K), K = 2 radius + 1, of variances ``long`` and ``short`` (px squared) along turned axes."""
    place = torch.arange(-radius, radius + 1, dtype=torch.float32) - centre
    down, right = place[:, None], place[None, :]
    along = math.cos(angle) * right + math.sin(angle) * down
    across = math.cos(angle) * down - math.sin(angle) * right
    # A variance below 0.02 px squared is a single pixel; less would only overflow.
    exponent = -0.5 * (along**2 / max(long, 0.02) + across**2 / max(short, 0.02))
    kernel = torch.exp(exponent - exponent.max())
    return (kernel / kernel.sum())[None]


def add_noise(image: Tensor, draws: Draws) -> Tensor:
    """Add Gaussian noise of one or two grey levels: coloured, grey, or correlated between colours (40, 40, 20 %)."""
    level = draws.integer(1, 2) * GREY_LEVEL
    _, channels, height, width = image.shape
    kind = draws.uniform(0.0, 1.0)
    if kind > 0.6:
        noise = level * draws.normal(1, channels, height, width)
    elif kind < 0.4:
        noise = level * draws.normal(1, 1, height, width)
    else:
        turn, _ = torch.linalg.qr(draws.normal(channels, channels))
        share = torch.rand(channels, generator=draws.generator).sqrt()
        mixed = torch.einsum("ij,j,bjhw->bihw", turn, share, draws.normal(1, channels, height, width))
        noise = 2 * GREY_LEVEL * mixed
    return (image + noise.to(image)).clamp(-1, 1)


def filter_each(image: Tensor, kernels: Tensor) -> Tensor:
    """Correlate each picture (B, C, H, W) with its own kernel (B, K, K), K odd, edges reflected."""
    batch, channels, height, width = image.shape
    pad = kernels.shape[-1] // 2
    padded = F.pad(image, (pad, pad, pad, pad), mode="reflect")
    weight = kernels.to(image).repeat_interleave(channels, dim=0)[:, None]
    planes = padded.reshape(1, batch * channels, *padded.shape[-2:])
    return F.conv2d(planes, weight, groups=batch * channels).reshape(batch, channels, height, width)
