"""The noise-aware CLIP: the contrastive loss of noised pictures, and its cost."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.diffusion.process import Diffusion
from models.diffusion.timesteps import UniformTimesteps
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip, noisy_clip_loss
from models.pixels import resize_crop, to_pixels
from pipeline.data.batches import Batch, TextEncoder
from pipeline.networks.counting import Work, count, first_steps
from pipeline.networks.diffusion_loss import draw_normal
from pipeline.networks.kind import NetworkKind


class NoisyClipObjective(nn.Module):
    """Pictures at random timesteps against their captions, as the frozen CLIP embeds these.

    Each worker contrasts only its own share of the batch, so the number of negatives is that of a share.

    Args:
        network: The noise-aware tower.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: NoisyClip, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text
        self._diffusion = Diffusion(network.config.diffusion)
        self._draws = UniformTimesteps(self._diffusion.num_timesteps)

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of the batch."""
        x0 = resize_crop(to_pixels(batch.require_images()), self.network.config.image_px)
        t = self._draws.draw(len(batch), generator)[0].to(x0.device, non_blocking=True)
        x_t = self._diffusion.q_sample(x0, t, draw_normal(x0, generator))
        return noisy_clip_loss(self.network, x_t, t, self._encode_text(batch.captions).z_text)


def _work(network: NoisyClip, _clip: object) -> Work:
    """``sampling_flops``: one call and its gradient, which every guided step of the decoder adds."""
    side_px = network.config.image_px

    def run(size: int) -> Tensor:
        return network(torch.zeros(size, 3, side_px, side_px), first_steps(size)).sum()

    def gradient() -> None:
        x = torch.zeros(1, 3, side_px, side_px, requires_grad=True)
        torch.autograd.grad(network(x, first_steps(1)).sum(), x)

    network.eval().requires_grad_(requires_grad=False)
    flops = count(gradient)
    network.requires_grad_(requires_grad=True)
    return Work(run, flops, 1)


NOISY_CLIP = NetworkKind(
    name="noisy_clip",
    config=NoisyClipConfig,
    create=NoisyClip,
    objective=NoisyClipObjective,
    work=_work,
    pictures=True,
    captions=True,
    channels_last=True,
)
