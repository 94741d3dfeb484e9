"""The decoder: its loss, its measures and its cost (arXiv:2204.06125, section 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.decoder.config import DecoderConfig
from models.decoder.inpainting import known_planes, random_masks
from models.decoder.network import Decoder
from models.decoder.stage import DecoderStage, decoder_denoiser
from models.diffusion.process import Denoise, Diffusion
from models.pixels import resize_crop, to_pixels, to_uint8
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch, TextEncoder
from pipeline.networks.counting import Work, count_chain, first_steps, full_captions
from pipeline.networks.diffusion_loss import DiffusionLoss
from pipeline.networks.kind import OF_DIFFUSION, NetworkKind
from pipeline.networks.measuring import ValidationRows, mean_cosine, sample_few_steps

_SKETCH_WEIGHT = 0.3
"""Of the mean squared error of sketches, of values in [-1, 1]: .2 and 1 drew the same (docs/lab.md)."""


class DecoderObjective(nn.Module):
    """Diffusion loss of the small picture given z_image and caption, each dropped at random, and both pooled vectors.

    A decoder with inpainting channels also reads random parts of the picture, but only in training: the validation loss
    is always that of whole pictures. A training's loss has the error of the sketches in it, for a decoder that has one.

    Args:
        network: The decoder.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: Decoder, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean loss of the batch."""
        network, config, z_image = self.network, self.network.config, batch.require_z_image()
        device = z_image.device
        x0 = resize_crop(to_pixels(batch.require_images()), config.image_px)
        text = batch.encoded(self._encode_text)
        keep_image = random.keep("image", config.image_drop_prob, device) if self.training else None
        keep_text = random.keep("text", config.text_drop_prob, device) if self.training else None
        planes, keep_pooled = None, None
        if config.pooled_drop_prob > 0 and self.training:
            keep_pooled = random.keep("pooled", config.pooled_drop_prob, device)
        if config.inpainting and self.training:
            mask = random_masks(random, config.image_px, config.unknown_prob).to(device)
            planes = known_planes(x0, mask)
        condition = network.encode_condition(
            z_image, text, keep_image=keep_image, keep_text=keep_text, keep_pooled=keep_pooled, planes=planes
        )
        loss = self._loss(lambda x, t: network(x, t, condition), x0, random)
        if condition.sketch is not None and self.training:
            coarse = F.adaptive_avg_pool2d(x0, config.sketch_px)
            loss = loss + _SKETCH_WEIGHT * F.mse_loss(condition.sketch, coarse)
        return loss


def _denoiser(decoder: Decoder, rows: ValidationRows) -> tuple[Denoise, Tensor]:
    pictures = resize_crop(to_pixels(rows.batch.require_images()), decoder.config.image_px)
    return decoder_denoiser(decoder, rows.batch.require_z_image(), rows.text), pictures


def _measure(decoder: Decoder, rows: ValidationRows) -> dict[str, float]:
    """Mean cosine between CLIP's embedding of a sample and the z_image it was sampled from, and another picture's."""
    z_image, (denoise, real) = rows.batch.require_z_image(), _denoiser(decoder, rows)
    x = rows.noise().normal(real.shape[1:], device=z_image.device)
    pictures = to_uint8(sample_few_steps(denoise, x, Diffusion(decoder.config.diffusion), clip=True))
    rows.show(pictures)
    embeddings = rows.image_clip.encode_image(pictures)
    references = {"z_image": z_image, "unrelated_image": z_image.roll(1, dims=0)}
    return {f"cos_{name}": mean_cosine(embeddings, vectors) for name, vectors in references.items()}


def _work(decoder: Decoder, _clip: object) -> Work:
    config, dims = decoder.config, decoder.dims
    shape = (3, config.image_px, config.image_px)

    def run(size: int) -> Tensor:
        condition = decoder.encode_condition(torch.zeros(size, dims.embed_dim), full_captions(dims, size))
        return decoder(torch.zeros(size, *shape), first_steps(size), condition).sum()

    def denoiser() -> Denoise:
        z_image = torch.zeros(1, dims.embed_dim)
        return decoder_denoiser(decoder, z_image, full_captions(dims, 1), config.sampler.guidance_scale)

    return Work(run, *count_chain(decoder, config.diffusion, config.sampler, denoiser, torch.zeros(1, *shape)))


def _compiled(decoder: Decoder) -> tuple[nn.Module, ...]:
    """What reads the caption runs before the UNet, in a call of its own."""
    readers = (decoder.text_transformer, decoder.text_adapter, decoder.sketch)
    return (decoder, *(reader for reader in readers if reader is not None))


DECODER = NetworkKind(
    name="decoder",
    config=DecoderConfig,
    create=Decoder,
    objective=DecoderObjective,
    work=_work,
    measure=_measure,
    measures=("cos_z_image", "cos_unrelated_image"),
    stage=lambda name, networks: DecoderStage.of(networks[name], networks.get("noisy_clip"), name),
    denoiser=_denoiser,
    pictures=True,
    embeddings=True,
    captions=True,
    measures_pictures=True,
    meaning=("image_norm", *OF_DIFFUSION),
    channels_last=True,
    compiled=_compiled,
)
