"""An upsampler's part of a training: the loss of one batch of crops (arXiv:2204.06125, section 2.1 and appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.pixels import resize_crop, to_pixels
from models.upsampler.degradation import random_crop
from models.upsampler.low_res import spoilt_low_res
from models.upsampler.network import Upsampler
from pipeline.data.batches import Batch
from pipeline.networks.diffusion_loss import DiffusionLoss, draw_normal


class UpsamplerObjective(nn.Module):
    """Diffusion loss of crops of the large picture given the same crops of the spoilt small one.

    Args:
        network: The upsampler.
    """

    def __init__(self, network: Upsampler) -> None:
        super().__init__()
        self.network = network
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of the batch."""
        network, config = self.network, self.network.config
        pictures = resize_crop(to_pixels(batch.require_images()), config.image_px)
        x0 = random_crop(pictures, config.crop_px, generator, multiple_px=network.factor)
        low_res = spoilt_low_res(x0, config.crop_px // network.factor, config.degradation, generator)
        condition = network.encode_condition(low_res, *self._level(x0, generator))
        return self._loss(lambda x, t: network(x, t, condition), x0, generator)

    def _level(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """The share of noise of each sample's condition, and that noise; None where there is none."""
        largest = self.network.config.noise_level_max
        if not largest:
            return None, None
        return torch.rand(len(x0), generator=generator).to(x0.device) * largest, draw_normal(x0, generator)
