"""The variational bound of networks that were trained with it, in bits per dimension, on a few validation pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.diffusion.bits_per_dim import bits_per_dim
from models.diffusion.config import DiffusionConfig
from models.diffusion.limits import ClipRange
from models.diffusion.process import Diffusion
from models.pixels import to_pixels, to_uint8
from pipeline.networks.measuring import ValidationRows
from pipeline.networks.table import kind_of

_NUM_TERMS = 64
"""Network calls for each picture: an unbiased estimate of all T terms."""


def is_trained_with_bound(config: Any) -> bool:
    """Whether a network's loss has the bound: the bound alone, or the hybrid loss of a learned variance."""
    diffusion: DiffusionConfig | None = getattr(config, "diffusion", None)
    return diffusion is not None and (diffusion.loss == "vlb" or diffusion.variance == "learned_range")


def bound_of(network: nn.Module, rows: ValidationRows) -> Tensor | None:
    """Bits per dimension of each picture under its condition, (B,); None if it was not trained with the bound.

    The pictures have the training's side and 256 levels. Guidance is off, because it samples another distribution.
    """
    config: Any = network.config
    denoiser = kind_of(config).denoiser
    if denoiser is None or not is_trained_with_bound(config):
        return None
    denoise, pictures = denoiser(network, rows)
    x0 = to_pixels(to_uint8(pictures))
    diffusion, limit = Diffusion(config.diffusion), ClipRange(-1.0, 1.0)
    return bits_per_dim(denoise, x0, diffusion, rows.noise(), num_terms=_NUM_TERMS, limit=limit).total
