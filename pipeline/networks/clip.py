"""CLIP's part of a training: the contrastive loss of one batch, open_clip's own."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed
from torch import Tensor, nn

from pipeline.clip import OpenClip, clamp_logit_scale, clip_loss
from pipeline.data.batches import Batch


class ClipObjective(nn.Module):
    """The contrastive loss over the global batch.

    Args:
        clip: The model in training.
        network: The module whose weights are used: ``clip.model`` or its moving average.
    """

    def __init__(self, clip: OpenClip, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._clip = clip

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of this worker's share, against the captions and pictures of all workers."""
        del generator
        clip = replace(self._clip, model=self.network)  # pyright: ignore[reportArgumentType]  (a copy of clip.model)
        rank, world_size = 0, 1
        if self.training:
            clamp_logit_scale(clip)
            if torch.distributed.is_initialized():
                rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        images = batch.require_images()
        tokens = clip.tokenize(batch.captions).to(images.device)
        return clip_loss(clip, images, tokens, rank=rank, world_size=world_size)
