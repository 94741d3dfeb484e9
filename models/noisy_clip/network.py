"""A CLIP image tower for noised pictures, to guide a sampler towards captions: arXiv:2112.10741, section 2.4.

It is trained on x_t against the embeddings of the frozen CLIP's text tower, so that its gradient is meaningful at every
step of a chain (the frozen image tower has never seen noise). Legend: B batch, D joint space, H W pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.clip_config import ClipDims
from models.diffusion.guidance import clip_log_prob, score_guided
from models.diffusion.process import Denoise, Diffusion
from models.layers.embedding import TimestepEmbedding
from models.layers.unet import GroupNorm, ResBlock, UNetStage
from models.noisy_clip.config import NoisyClipConfig

_FIRST_TEMPERATURE, _LEAST_TEMPERATURE = 0.07, 0.01
_NUM_COLOURS = 3


class NoisyClip(nn.Module):
    """Noised pictures and their timesteps to embeddings in the joint space."""

    def __init__(self, config: NoisyClipConfig, dims: ClipDims) -> None:
        super().__init__()
        self.config = config
        self.dims = dims
        tower = config.tower
        width = 4 * tower.channels
        self.timestep = TimestepEmbedding(tower.channels, width)
        self.conv_in = nn.Conv2d(_NUM_COLOURS * tower.patch_px**2, tower.channels, 3, padding=1)
        stages: list[UNetStage] = []
        channels = tower.channels
        for level, mult in enumerate(tower.channel_mults):
            if level > 0:
                stages.append(UNetStage(ResBlock((channels, channels), width, tower, "down"), None))
            for _ in range(tower.num_res_blocks):
                stages.append(UNetStage(ResBlock((channels, tower.channels * mult), width, tower), None))
                channels = tower.channels * mult
        self.stages = nn.ModuleList(stages)
        self.norm_out = GroupNorm(tower.norm_groups, channels)
        self.out = nn.Linear(channels, dims.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(_FIRST_TEMPERATURE)))

    @property
    def logit_scale(self) -> Tensor:
        """Inverse temperature, at most 100 (arXiv:2103.00020, section 2.5)."""
        return self.log_scale.clamp(max=-math.log(_LEAST_TEMPERATURE)).exp()

    def forward(self, x: Float[Tensor, "B 3 H W"], t: Int[Tensor, " B"]) -> Float[Tensor, "B D"]:
        """Embed noised pictures ``x`` at steps ``t``; of length one."""
        patch_px = self.config.tower.patch_px
        embedding = F.silu(self.timestep(t))
        hidden = self.conv_in(x if patch_px == 1 else F.pixel_unshuffle(x, patch_px))
        for stage in self.stages:
            hidden = stage(hidden, embedding, None, None)
        pooled = F.silu(self.norm_out(hidden)).mean((2, 3))
        return F.normalize(self.out(pooled).float(), dim=-1)


def clip_guided(
    denoise: Denoise, network: NoisyClip, z_text: Float[Tensor, "B D"], diffusion: Diffusion, scale: float
) -> Denoise:
    """A decoder's denoiser that also follows the gradient towards captions: arXiv:2112.10741, equation 9.

    Args:
        denoise: Network on B items, guided or not.
        network: Trained with the same noise schedule.
        z_text: Embeddings of the captions.
        diffusion: The decoder's process.
        scale: Strength, dimensionless.
    """
    log_prob = clip_log_prob(network, z_text, float(network.logit_scale.detach()))
    return score_guided(denoise, log_prob, diffusion, scale)
