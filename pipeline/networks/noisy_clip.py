"""The noise-aware CLIP: the contrastive loss of noised pictures, and its cost."""

from __future__ import annotations

import torch

from models.diffusion.process import Diffusion
from models.diffusion.timesteps import UniformTimesteps
from models.noisy_clip.config import NoisyClipConfig
from models.noisy_clip.network import NoisyClip
from models.pixels import resize_crop, to_pixels
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch, TextEncoder
from pipeline.networks.contrast import ContrastiveObjective, Pairs, sum_of
from pipeline.networks.counting import Work, count, first_steps
from pipeline.networks.kind import NetworkKind


class NoisyClipObjective(ContrastiveObjective):
    """Pictures at random timesteps against the captions of the global batch, as the frozen CLIP embeds these.

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

    def encode(self, batch: Batch, random: SampleRandom) -> Pairs:
        """The features of a batch."""
        network = self.network
        x0 = resize_crop(to_pixels(batch.require_images()), network.config.image_px)
        t = self._draws.draw(random)[0].to(x0.device, non_blocking=True)
        x_t = self._diffusion.q_sample(x0, t, random.normal_like("noise", x0))
        return Pairs(network(x_t, t), self._encode_text(batch.captions).z_text, network.logit_scale)


def _work(network: NoisyClip, _clip: object) -> Work:
    """``sampling_flops``: one call and its gradient, which every guided step of the decoder adds."""
    side_px = network.config.image_px

    def encode(size: int) -> Pairs:
        image = network(torch.zeros(size, 3, side_px, side_px), first_steps(size))
        return Pairs(image, torch.zeros(image.shape), network.logit_scale)  # as the frozen CLIP embeds captions

    def gradient() -> None:
        x = torch.zeros(1, 3, side_px, side_px, requires_grad=True)
        torch.autograd.grad(network(x, first_steps(1)).sum(), x)

    network.eval().requires_grad_(requires_grad=False)
    flops = count(gradient)
    network.requires_grad_(requires_grad=True)
    return Work(lambda size: sum_of(encode(size)), flops, 1, encode=encode)


NOISY_CLIP = NetworkKind(
    name="noisy_clip",
    config=NoisyClipConfig,
    create=NoisyClip,
    objective=NoisyClipObjective,
    work=_work,
    pictures=True,
    contrasts=True,
    captions=True,
    channels_last=True,
)
