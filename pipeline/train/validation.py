"""What a network draws of the first validation rows while it is trained: what its loss does not say.

Always with the same seeds and by the same sampler, not the recipe's: how a network is sampled is no part of its
training. Legend: B rows, D joint space, H W pixels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.ar_prior.config import TokenSamplerConfig
from models.ar_prior.network import ArPrior
from models.ar_prior.sampling import iterate_embeddings
from models.cascade import decoder_denoiser, prior_denoiser
from models.decoder.network import Decoder
from models.diffusion.config import SamplerConfig
from models.diffusion.noise import NoiseSource, derive_seed
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import sample
from models.pixels import to_pixels, to_uint8
from models.prior.network import Prior
from models.text import TextEncoding
from models.upsampler.degradation import resize
from models.upsampler.network import Upsampler
from pipeline.data.batches import Batch, Samples
from pipeline.networks.files import load_clip_artifact
from pipeline.networks.quality import psnr_db
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip import FrozenClip

NUM_EMBEDDINGS = 64
"""Rows that a prior draws."""
NUM_PICTURES = 8
"""Rows that a decoder or an upsampler draws, less where they would pass ``_MOST_PIXELS``."""
_MOST_PIXELS = 1 << 19
_NUM_STEPS = 15
"""Steps of DDIM without noise or guidance."""


class Measures:
    """The measures of one training; what does not change from time to time is read once.

    Args:
        validation: Rows, with what this training reads of them.
        clip: The clip step, for the priors and the decoder.
        seed: Of the training.
        device: Where the networks are.
    """

    def __init__(self, validation: Samples, clip: Artifact | None, seed: int, device: torch.device) -> None:
        self._validation = validation
        self._clip_artifact = clip
        self._seed = seed
        self._device = device
        self._clip: FrozenClip | None = None
        self._rows: Batch | None = None
        self._text: TextEncoding | None = None

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> dict[str, float]:
        """Numbers by name; none of a CLIP, or where there are no validation rows."""
        if isinstance(network, Prior | ArPrior):
            return self._of_prior(network) if self._read(NUM_EMBEDDINGS) else {}
        if not isinstance(network, Decoder | Upsampler):
            return {}
        if not self._read(max(1, min(NUM_PICTURES, _MOST_PIXELS // network.config.image_px**2))):
            return {}
        return self._of_decoder(network) if isinstance(network, Decoder) else self._of_upsampler(network)

    def _read(self, count: int) -> bool:
        if self._rows is None:
            rows = self._validation.first(count)
            self._rows = None if rows is None else rows.to(self._device)
        return self._rows is not None

    def _of_prior(self, prior: Prior | ArPrior) -> dict[str, float]:
        """Cosines of what is drawn for captions: to the true z_image, to z_text, and to another caption's z_text."""
        text, noise = self._captions(), self._noise()
        if isinstance(prior, ArPrior):
            *_, drawn = iterate_embeddings(prior, text, noise, TokenSamplerConfig())
        else:
            x = noise.normal((prior.dims.embed_dim,), device=self._device)
            drawn = prior.unscale(_draw(prior_denoiser(prior, text), x, Diffusion(prior.config.diffusion), clip=False))
        others = text.z_text.roll(1, dims=0)
        references = {"z_image": self._embeddings(), "z_text": text.z_text, "unrelated_text": others}
        return {f"cos_{name}": _cosine(drawn, vectors) for name, vectors in references.items()}

    def _of_decoder(self, decoder: Decoder) -> dict[str, float]:
        """Cosines of what CLIP sees in pictures drawn from a true z_image: to it, and to another picture's."""
        side_px, z_image = decoder.config.image_px, self._embeddings()
        denoise = decoder_denoiser(decoder, z_image, self._captions())
        x = self._noise().normal((3, side_px, side_px), device=self._device)
        pictures = to_uint8(_draw(denoise, x, Diffusion(decoder.config.diffusion), clip=True))
        seen = self._load_clip().encode_image(pictures)
        return {"cos_z_image": _cosine(seen, z_image), "cos_unrelated_image": _cosine(seen, z_image.roll(1, dims=0))}

    def _of_upsampler(self, upsampler: Upsampler) -> dict[str, float]:
        """PSNR of pictures made small and enlarged again, and that of bicubic enlargement."""
        assert self._rows is not None
        config = upsampler.config
        large = resize(to_pixels(self._rows.require_images()), config.image_px)
        small = resize(large, config.low_res_px)
        x, condition = upsampler.begin(small, self._noise())
        drawn = _draw(lambda x, t: upsampler(x, t, condition), x, Diffusion(config.diffusion), clip=True)
        enlarged = {"psnr_db": drawn, "bicubic_psnr_db": resize(small, config.image_px)}
        real = to_uint8(large).cpu().numpy()
        # Equal pictures have no finite ratio: a blank page counts as 99 dB, as in the evaluation.
        return {
            name: float(psnr_db(to_uint8(pixels).cpu().numpy(), real).clip(max=99.0).mean())
            for name, pixels in enlarged.items()
        }

    def _captions(self) -> TextEncoding:
        if self._text is None:
            assert self._rows is not None
            self._text = self._load_clip().encode_text(self._rows.captions)
        return self._text

    def _embeddings(self) -> Tensor:
        assert self._rows is not None
        return self._rows.require_z_image()

    def _load_clip(self) -> FrozenClip:
        if self._clip is None:
            assert self._clip_artifact is not None
            self._clip = load_clip_artifact(self._clip_artifact, self._device)
        return self._clip

    def _noise(self) -> NoiseSource:
        assert self._rows is not None
        return NoiseSource.from_seeds([derive_seed(self._seed, f"measures/{row}") for row in range(len(self._rows))])


def _draw(denoise: Denoise, x: Tensor, diffusion: Diffusion, *, clip: bool) -> Tensor:
    num_steps = min(_NUM_STEPS, diffusion.num_timesteps)
    return sample(denoise, x, diffusion, SamplerConfig(method="ddim", num_steps=num_steps, clip_x0=clip))


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.double(), b.double()).mean())
