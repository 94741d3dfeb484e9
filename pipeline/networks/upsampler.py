"""An upsampler: its loss on crops, its measures and its cost (arXiv:2204.06125, section 2.1 and appendix C)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.diffusion.process import Denoise, Diffusion
from models.pixels import resize, resize_crop, to_pixels, to_uint8
from models.sample_random import SampleRandom
from models.upsampler.config import UpsamplerConfig
from models.upsampler.degradation import degraded_low_res, random_crop
from models.upsampler.network import Upsampler
from models.upsampler.stage import UpsamplerStage
from pipeline.data.batch import Batch
from pipeline.networks.counting import Work, count_chain, first_steps
from pipeline.networks.diffusion_loss import DiffusionLoss
from pipeline.networks.kind import NetworkKind
from pipeline.networks.measuring import ValidationRows, sample_few_steps
from pipeline.networks.quality import psnr_db


class UpsamplerObjective(nn.Module):
    """Diffusion loss of crops of the large picture given the same crops of the degraded small one.

    Args:
        network: The upsampler.
    """

    def __init__(self, network: Upsampler) -> None:
        super().__init__()
        self.network = network
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean loss of the batch."""
        network, config = self.network, self.network.config
        pictures = resize_crop(to_pixels(batch.require_images()), config.image_px)
        x0 = random_crop(pictures, config.crop_px, random, multiple_px=network.factor)
        low_res = degraded_low_res(x0, config.crop_px // network.factor, config.degradation, random)
        condition = network.encode_condition(low_res, *self._level(x0, random))
        return self._loss(lambda x, t: network(x, t, condition), x0, random)

    def _level(self, x0: Tensor, random: SampleRandom) -> tuple[Tensor | None, Tensor | None]:
        """The share of noise of each sample's condition, and that noise; None if it has none."""
        largest = self.network.config.noise_level_max
        if not largest:
            return None, None
        return random.uniform("level").to(x0.device) * largest, random.normal_like("condition", x0)


def _denoiser(upsampler: Upsampler, rows: ValidationRows) -> tuple[Denoise, Tensor]:
    config = upsampler.config
    large = resize(to_pixels(rows.batch.require_images()), config.image_px)
    _, condition = upsampler.begin(resize(large, config.low_res_px), rows.noise())
    return lambda x, t: upsampler(x, t, condition), large


def _measure(upsampler: Upsampler, rows: ValidationRows) -> dict[str, float]:
    """PSNR of pictures that were shrunk and enlarged again, and that of bicubic enlargement."""
    config = upsampler.config
    large = resize(to_pixels(rows.batch.require_images()), config.image_px)
    small = resize(large, config.low_res_px)
    x, condition = upsampler.begin(small, rows.noise())

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return upsampler(x, t, condition)

    ours = to_uint8(sample_few_steps(denoise, x, Diffusion(config.diffusion), clip=True))
    rows.show(ours)
    real = to_uint8(large).cpu().numpy()
    # Equal pictures have no finite ratio: a blank page counts as 99 dB, as in the evaluation.
    return {
        name: float(psnr_db(pictures.cpu().numpy(), real).clip(max=99.0).mean())
        for name, pictures in (("psnr_db", ours), ("bicubic_psnr_db", to_uint8(resize(small, config.image_px))))
    }


def _work(upsampler: Upsampler, _clip: object) -> Work:
    config = upsampler.config
    channels = 4 if upsampler.takes_level else 3  # of the condition: the enlarged picture, and the plane of its noise

    def run(size: int) -> Tensor:
        crops = torch.zeros(size, channels, config.crop_px, config.crop_px)
        return upsampler(crops[:, :3], first_steps(size), crops).sum()

    def denoiser() -> Denoise:
        condition = torch.zeros(1, channels, config.image_px, config.image_px)
        return lambda x, t: upsampler(x, t, condition)

    x = torch.zeros(1, 3, config.image_px, config.image_px)
    return Work(run, *count_chain(upsampler, config.diffusion, config.sampler, denoiser, x))


UPSAMPLER = NetworkKind(
    name="upsampler",
    config=UpsamplerConfig,
    create=lambda config, _: Upsampler(config),
    objective=lambda network, _: UpsamplerObjective(network),
    work=_work,
    measure=_measure,
    measures=("psnr_db", "bicubic_psnr_db"),
    stage=lambda name, networks: UpsamplerStage.of(networks[name], int(name.rpartition("_")[2]) - 1),
    denoiser=_denoiser,
    pictures=True,
    channels_last=True,
)
