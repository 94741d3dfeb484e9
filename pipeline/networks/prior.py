"""The diffusion prior: its loss, its measures, its cost, the end of its training (arXiv:2204.06125, section 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.diffusion.analytic import X0Variance
from models.diffusion.noise import NoiseSource, derive_seed
from models.diffusion.process import Denoise, Diffusion
from models.diffusion.samplers import config_timesteps
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.prior.stage import PriorStage, prior_denoiser
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch, TextEncoder
from pipeline.data.samples import Samples
from pipeline.networks.counting import Work, count_chain, first_steps, full_captions
from pipeline.networks.diffusion_loss import DiffusionLoss
from pipeline.networks.kind import OF_DIFFUSION, NetworkKind
from pipeline.networks.measuring import COSINES_TO_CAPTIONS, ValidationRows, cosines_to_captions, sample_few_steps

_ANALYTIC_ROWS = 512


class PriorObjective(nn.Module):
    """Squared error of the predicted un-noised z_image; captions are dropped at random.

    Args:
        network: The prior.
        encode_text: The frozen CLIP's text tower.
    """

    def __init__(self, network: Prior, encode_text: TextEncoder) -> None:
        super().__init__()
        self.network = network
        self._encode_text = encode_text
        self._loss = DiffusionLoss(network.config.diffusion)

    def forward(self, batch: Batch, random: SampleRandom) -> Tensor:
        """Mean loss of the batch."""
        network, z_image = self.network, batch.require_z_image()
        text = batch.encoded(self._encode_text)
        keep = random.keep("text", network.config.text_drop_prob, z_image.device) if self.training else None
        x0 = network.scale(z_image)
        condition = network.encode_condition(text, keep=keep)
        return self._loss(lambda x, t: network(x, t, condition), x0, random)


def _measure(prior: Prior, rows: ValidationRows) -> dict[str, float]:
    x = rows.noise().normal((prior.dims.embed_dim,), device=rows.batch.require_z_image().device)
    diffusion = Diffusion(prior.config.diffusion)
    z_image = prior.unscale(sample_few_steps(prior_denoiser(prior, rows.text), x, diffusion, clip=False))
    return cosines_to_captions(z_image, rows)


def _work(prior: Prior, _clip: object) -> Work:
    config, dims = prior.config, prior.dims

    def run(size: int) -> Tensor:
        condition = prior.encode_condition(full_captions(dims, size))
        return prior(torch.zeros(size, dims.embed_dim), first_steps(size), condition).sum()

    def denoiser() -> Denoise:
        return prior_denoiser(prior, full_captions(dims, 1), config.sampler.guidance_scale)

    flops, calls = count_chain(prior, config.diffusion, config.sampler, denoiser, torch.zeros(1, dims.embed_dim))
    return Work(run, flops * config.num_candidates, calls)


def _measure_x0_variance(prior: Prior, encode: TextEncoder, train: Samples, seed: int) -> None:
    """Measure ``x0_variance`` on training rows, if the sampler is analytic."""
    if prior.config.sampler.method != "analytic":
        return
    batch = train.first(_ANALYTIC_ROWS)
    assert batch is not None
    batch = batch.to(prior.z_mean.device)
    diffusion = Diffusion(prior.config.diffusion)
    measure = X0Variance(diffusion, config_timesteps(prior.config.sampler, diffusion))
    noise = NoiseSource.from_seeds([derive_seed(seed, f"analytic/{row}") for row in range(len(batch))])
    with torch.no_grad():
        x0 = prior.scale(batch.require_z_image())
        measure.update(prior_denoiser(prior, batch.encoded(encode)), x0, noise)
    prior.x0_variance.copy_(measure.table())


PRIOR = NetworkKind(
    name="prior",
    config=PriorConfig,
    create=Prior,
    objective=PriorObjective,
    work=_work,
    measure=_measure,
    measures=COSINES_TO_CAPTIONS,
    stage=lambda name, networks: PriorStage.of(networks[name], name),
    embeddings=True,
    captions=True,
    meaning=("image_norm", *OF_DIFFUSION),
    finish=_measure_x0_variance,
)
