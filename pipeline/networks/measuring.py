"""Validation rows and the sampler for the sample-quality metrics during training.

The seeds and the sampler are always the same, and not those of the recipe, because sampler settings are no part of a
training. Legend: B rows, D joint space.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, cast

import torch.nn.functional as F
from torch import Tensor

from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource, derive_seed
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import sample
from models.text import TextEncoding
from pipeline.data.batch import Batch

if TYPE_CHECKING:
    from pipeline.clip.frozen import FrozenClip, FrozenText

NUM_EMBEDDINGS = 64
"""Rows on which a network of embeddings is measured."""
_NUM_PICTURES = 8
_MOST_PIXELS = 1 << 19
_NUM_STEPS = 15
"""Steps of DDIM without noise or guidance."""


def num_pictures(side_px: int) -> int:
    """Rows on which a network of pictures is measured: 8, fewer where these would pass 2^19 pixels, at least one."""
    return max(1, min(_NUM_PICTURES, _MOST_PIXELS // side_px**2))


@dataclass(frozen=True)
class ValidationRows:
    """The first validation rows of one training; their encodings are computed once."""

    batch: Batch
    """On the device of the network."""
    frozen_clip: FrozenText | None
    """None for a network that reads no captions, or stored ones."""
    seed: int
    """Seed of the training."""
    shown: list[Tensor] = field(default_factory=list[Tensor])
    """The pictures of the last measure, uint8 (B, H, W, 3), if it samples any."""

    @property
    def clip(self) -> FrozenText:
        """The frozen CLIP, which this training was set up to read."""
        assert self.frozen_clip is not None
        return self.frozen_clip

    @property
    def image_clip(self) -> FrozenClip:
        """The frozen CLIP with its image tower, for a kind that measures pictures."""
        return cast("FrozenClip", self.clip)

    @cached_property
    def text(self) -> TextEncoding:
        """The captions of the rows."""
        if self.batch.text is not None:
            return self.batch.text.encoding()
        return self.clip.encode_text(self.batch.captions)

    def show(self, pictures: Tensor) -> None:
        """Keep what a measure has sampled for the rows, for people to look at."""
        self.shown[:] = [pictures]

    def noise(self) -> NoiseSource:
        """Noise for each row, the same at every call."""
        return NoiseSource.from_seeds([derive_seed(self.seed, f"measures/{row}") for row in range(len(self.batch))])


def sample_few_steps(denoise: Denoise, x: Tensor, diffusion: Diffusion, *, clip: bool) -> Tensor:
    """Samples from the noise ``x``, (B, ...), by a few steps of DDIM."""
    num_steps = min(_NUM_STEPS, diffusion.num_timesteps)
    return sample(denoise, x, diffusion, SamplerConfig(method="ddim", num_steps=num_steps, clip_x0=clip))


def mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of the rows of two (B, D) tensors."""
    return float(F.cosine_similarity(a.double(), b.double()).mean())


COSINES_TO_CAPTIONS = ("cos_z_image", "cos_z_text", "cos_unrelated_text")


def cosines_to_captions(z_image: Tensor, rows: ValidationRows) -> dict[str, float]:
    """Mean cosine of sampled embeddings (B, D) to the true z_image, to z_text, and to another caption's z_text."""
    z_text = rows.text.z_text
    references = {"z_image": rows.batch.require_z_image(), "z_text": z_text, "unrelated_text": z_text.roll(1, dims=0)}
    return {f"cos_{name}": mean_cosine(z_image, vectors) for name, vectors in references.items()}
