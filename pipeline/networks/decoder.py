"""The decoder's part of a training: the loss of one batch (arXiv:2204.06125, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.decoder.inpainting import draw_regions, known_planes
from models.decoder.network import Decoder
from models.pixels import resize_crop, to_pixels
from pipeline.data.batches import Batch, TextEncoder
from pipeline.networks.diffusion_loss import DiffusionLoss, draw_keep


class DecoderObjective(nn.Module):
    """Diffusion loss of the small picture given z_image and caption, each dropped at times.

    A decoder with inpainting channels is shown random parts of the picture too, in training alone: the validation loss
    stays that of drawing whole pictures.

    Args:
        network: The decoder.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: Decoder, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of the batch."""
        network, config, z_image = self.network, self.network.config, batch.require_z_image()
        size, device = len(batch), z_image.device
        x0 = resize_crop(to_pixels(batch.require_images()), config.image_px)
        text = self._encode_text(batch.captions)
        keep_image = draw_keep(size, config.image_drop_prob, generator, device) if self.training else None
        keep_text = draw_keep(size, config.text_drop_prob, generator, device) if self.training else None
        known = None
        if config.inpainting and self.training:
            drawn = draw_regions(size, config.image_px, config.unknown_prob, generator).to(device)
            known = known_planes(x0, drawn)
        condition = network.encode_condition(z_image, text, keep_image=keep_image, keep_text=keep_text, known=known)
        return self._loss(lambda x, t: network(x, t, condition), x0, generator)
