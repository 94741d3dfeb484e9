"""The prior's part of a training: the loss of one batch (arXiv:2204.06125, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.prior.network import Prior
from pipeline.data.batches import Batch, TextEncoder
from pipeline.networks.diffusion_loss import DiffusionLoss, draw_keep


class PriorObjective(nn.Module):
    """Squared error of the un-noised z_image that the network predicts, captions dropped at times.

    Args:
        network: The prior.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: Prior, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of the batch."""
        network, z_image = self.network, batch.require_z_image()
        size, device = len(batch), z_image.device
        text = self._encode_text(batch.captions)
        keep = draw_keep(size, network.config.text_drop_prob, generator, device) if self.training else None
        x0 = network.scale(z_image)
        condition = network.encode_condition(text, keep=keep)
        return self._loss(lambda x, t: network(x, t, condition), x0, generator)
