"""An upsampler, P(image | smaller image): a UNet of convolutions alone, arXiv:2204.06125, section 2.1.

Legend: B batch, h w pixels of the small picture, H W of the large one. It is trained on crops and run at full size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.config import UpsamplerConfig
from models.degradation import quantise_8bit, resize
from models.unet import UNet

NUM_COLOURS = 3


class Upsampler(nn.Module):
    """A UNet that reads [noised picture, enlarged small picture] and predicts the noise in the former."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        learned = config.diffusion.variance == "learned_range"
        self.out_channels = NUM_COLOURS * (2 if learned else 1)
        self.unet = UNet(config.unet, config.image_px, 2 * NUM_COLOURS, self.out_channels)

    @property
    def factor(self) -> int:
        """Side of the large picture over that of the small one."""
        return self.config.image_px // self.config.low_res_px

    def encode_condition(self, low_res: Float[Tensor, "B 3 h w"]) -> Float[Tensor, "B 3 H W"]:
        """The small picture, rounded to 256 levels and enlarged; computed once for all steps of a chain.

        In training, spoil ``low_res`` first (models/degradation.py).
        """
        return resize(quantise_8bit(low_res), low_res.shape[-1] * self.factor)

    def forward(
        self, x: Float[Tensor, "B 3 H W"], t: Int[Tensor, " B"], condition: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B C H W"]:
        """The network's output at noised pictures ``x``: C is 3, or 6 where the variance is learned."""
        return self.unet(torch.cat([x, condition.to(x.dtype)], dim=1), t)
