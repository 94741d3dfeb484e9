"""An upsampler, P(image | smaller image): a UNet of convolutions alone, arXiv:2204.06125, section 2.1.

Legend: B batch, h w pixels of the small picture, H W of the large one. It is trained on crops and run at full size.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.diffusion.noise import NoiseSource
from models.layers.unet import UNet
from models.pixels import bicubic, quantise_8bit, resize
from models.upsampler.config import UpsamplerConfig
from models.upsampler.degradation import augment_noise

NUM_COLOURS = 3


class Upsampler(nn.Module):
    """A UNet that reads [noised picture, enlarged small picture] and predicts the noise in the former."""

    def __init__(self, config: UpsamplerConfig) -> None:
        super().__init__()
        self.config = config
        learned = config.diffusion.variance == "learned_range"
        self.out_channels = NUM_COLOURS * (2 if learned else 1)
        self.takes_level = config.noise_level_max > 0
        in_channels = 2 * NUM_COLOURS + (1 if self.takes_level else 0)
        self.unet = UNet(config.unet, config.image_px, in_channels, self.out_channels)

    @property
    def factor(self) -> int:
        """Side of the large picture over that of the small one."""
        return self.config.image_px // self.config.low_res_px

    def encode_condition(
        self,
        low_res: Float[Tensor, "B 3 h w"],
        level: Float[Tensor, " B"] | None = None,
        noise: Float[Tensor, "B 3 H W"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """The small picture, rounded to 256 levels and enlarged; computed once for all steps of a chain.

        In training, ``low_res`` is degraded first (degradation.py). Where ``noise_level_max`` is set, the result is
        noised to ``level``, and a fourth channel holds the level (a plane, as in arXiv:1710.04026).

        Args:
            low_res: The small picture in [-1, 1].
            level: Share of noise of each picture, in [0, 1); None: none.
            noise: Standard normal; needed with ``level``.

        Raises:
            ValueError: If a level is given without noise, or to an upsampler that was not built for it.
        """
        side_px = low_res.shape[-1] * self.factor
        if self.config.rounded:
            enlarged = resize(quantise_8bit(low_res), side_px)
        else:
            enlarged = bicubic(low_res.clamp(-1, 1), side_px)
        if level is not None and (noise is None or not self.takes_level):
            raise ValueError("a noise level needs noise, and an upsampler with noise_level_max above 0")
        if not self.takes_level:
            return enlarged
        if level is None or noise is None:
            return torch.cat([enlarged, torch.zeros_like(enlarged[:, :1])], dim=1)
        plane = level.to(enlarged)[:, None, None, None].expand(-1, 1, *enlarged.shape[2:])
        return torch.cat([augment_noise(enlarged, level, noise), plane], dim=1)

    def begin(
        self, low_res: Float[Tensor, "B 3 h w"], noise: NoiseSource
    ) -> tuple[Float[Tensor, "B 3 H W"], Float[Tensor, "B C H W"]]:
        """x_T and the condition of a chain, noised to ``config.noise_level``; at 0 only x_T takes from ``noise``."""
        side_px = low_res.shape[-1] * self.factor
        size = (NUM_COLOURS, side_px, side_px)
        level = level_noise = None
        if self.config.noise_level > 0:
            level = torch.full((len(low_res),), self.config.noise_level, device=low_res.device)
            level_noise = noise.normal(size, device=low_res.device)
        return noise.normal(size, device=low_res.device), self.encode_condition(low_res, level, level_noise)

    def forward(
        self, x: Float[Tensor, "B 3 H W"], t: Int[Tensor, " B"], condition: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B O H W"]:
        """The network's output at noised pictures ``x``: O is 3, or 6 where the variance is learned."""
        condition = condition.to(x.dtype)
        out = self.unet(torch.cat([x, condition], dim=1), t)
        if not self.config.residual:
            return out
        return torch.cat([out[:, :NUM_COLOURS] + condition[:, :NUM_COLOURS], out[:, NUM_COLOURS:]], dim=1)
