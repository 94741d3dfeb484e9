"""What each network's training is made of: its data, its network, its loss, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.ar_prior.config import ArPriorConfig
from models.ar_prior.network import ArPrior
from models.cascade import prior_denoiser
from models.clip_config import ClipDims
from models.decoder.network import Decoder
from models.diffusion.analytic import X0Variance
from models.diffusion.noise import NoiseSource, derive_seed
from models.diffusion.process import Diffusion
from models.diffusion.samplers import config_timesteps
from models.layers.checkpointing import set_checkpointing
from models.noisy_clip.network import NoisyClip
from models.prior.config import PriorConfig
from models.prior.network import Prior
from models.upsampler.network import Upsampler
from pipeline.data.batches import Batch, CaptionTable, Samples
from pipeline.data.training_rows import ShardReader
from pipeline.networks.ar_prior import ArPriorObjective, build_ar_prior
from pipeline.networks.decoder import DecoderObjective
from pipeline.networks.files import (
    Network,
    build_network,
    load_clip_artifact,
    load_initial,
    save_clip_artifact,
    save_network,
)
from pipeline.networks.noisy_clip import NoisyClipObjective
from pipeline.networks.prior import PriorObjective
from pipeline.networks.upsampler import UpsamplerObjective
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.sections import NetworkStepConfig
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip import FrozenClip

CAPTION_TABLE_BYTES = 512 << 20
"""Encodings of all captions are kept when they take no more than this."""
_ANALYTIC_ROWS = 512


@dataclass(frozen=True)
class TrainJob:
    """One network to train on one worker."""

    name: str
    """Step name."""
    recipe: Recipe
    inputs: dict[str, Artifact]
    """Committed artifacts, by step name."""
    output: Artifact
    digest: str
    """The step's key: what a checkpoint belongs to."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_threads: int = 1
    """Threads of this worker that decode pictures."""

    @property
    def section(self) -> TrainedSection:
        """The recipe's section of this step."""
        return self.recipe.trained()[self.name]

    @property
    def seed(self) -> int:
        """Seed of this training alone."""
        return derive_seed(self.recipe.seed, self.name)


@dataclass(frozen=True)
class Parts:
    """The pieces that the loop puts together."""

    network: nn.Module
    objective: Callable[[nn.Module], nn.Module]
    """Loss module (batch, generator) -> mean loss, around the network or its average."""
    train: Samples
    validation: Samples
    publish: Callable[[nn.Module], None]
    """Write a network as the step's artifact."""


def assemble(job: TrainJob) -> Parts:
    """Build the pieces; the network's first weights depend on the seed alone.

    Raises:
        DataError: If the input artifacts are damaged or do not fit together.
    """
    torch.manual_seed(derive_seed(job.seed, "weights"))
    if job.name == "clip":
        return _assemble_clip(job)
    if job.name in {"prior", "prior_2"}:
        parts = _assemble_either_prior(job)
    elif job.name == "noisy_clip":
        parts = _assemble_noisy_clip(job)
    else:
        parts = _assemble_decoder(job) if job.name == "decoder" else _assemble_upsampler(job)
    set_checkpointing(parts.network, enabled=job.section.resources.checkpointing)
    return parts


def _assemble_clip(job: TrainJob) -> Parts:
    from pipeline.clip import create_clip  # not needed by an upsampler, and longer to import than torch
    from pipeline.networks.clip import ClipObjective

    config = job.recipe.clip.model
    clip = create_clip(config)

    def publish(network: nn.Module) -> None:
        trained = replace(clip, model=network)  # pyright: ignore[reportArgumentType]  (a copy of clip.model)
        save_clip_artifact(job.output, trained)

    train, validation = _samples(job, image_px=config.image_px)
    return Parts(clip.model, lambda network: ClipObjective(clip, network), train, validation, publish)


def _assemble_either_prior(job: TrainJob) -> Parts:
    section = job.recipe.prior if job.name == "prior" else job.recipe.prior_2
    assert section is not None
    if isinstance(section.model, PriorConfig):
        return _assemble_prior(job, section, section.model)
    return _assemble_ar_prior(job, section, section.model)


def _assemble_prior(job: TrainJob, section: NetworkStepConfig[Any], config: PriorConfig) -> Parts:
    clip = load_clip_artifact(job.inputs["clip"], job.device)
    network = _start(build_network(config, clip.dims), section.init_from)
    assert isinstance(network, Prior)
    network.null_text.set(clip.encode_text([""]))
    train, validation = _samples(job, embeddings=True)
    encode = _caption_table(clip, train)

    def publish(trained: nn.Module) -> None:
        assert isinstance(trained, Prior)
        if config.sampler.method == "analytic":
            _measure_x0_variance(trained, encode, train, job.seed)
        save_network(job.output, "prior", config, clip.dims, trained.state_dict())

    def objective(network: nn.Module) -> nn.Module:
        assert isinstance(network, Prior)
        return PriorObjective(network, encode)

    return Parts(network, objective, train, validation, publish)


def _assemble_ar_prior(job: TrainJob, section: NetworkStepConfig[Any], config: ArPriorConfig) -> Parts:
    clip = load_clip_artifact(job.inputs["clip"], job.device)
    network = build_ar_prior(config, clip.dims, job.inputs["embed"])
    _start(network, section.init_from)  # with the code that those weights were trained on
    network.null_text.set(clip.encode_text([""]))
    train, validation = _samples(job, embeddings=True)
    encode = _caption_table(clip, train)

    def publish(trained: nn.Module) -> None:
        save_network(job.output, "ar_prior", network.config, clip.dims, trained.state_dict())

    def objective(network: nn.Module) -> nn.Module:
        assert isinstance(network, ArPrior)
        return ArPriorObjective(network, encode)

    return Parts(network, objective, train, validation, publish)


def _assemble_decoder(job: TrainJob) -> Parts:
    clip = load_clip_artifact(job.inputs["clip"], job.device)
    config = job.recipe.decoder.model
    network = _start(build_network(config, clip.dims), job.recipe.decoder.init_from)
    assert isinstance(network, Decoder)
    network.null_text.set(clip.encode_text([""]))
    train, validation = _samples(job, image_px=config.image_px, embeddings=True)
    encode = _caption_table(clip, train)

    def publish(trained: nn.Module) -> None:
        save_network(job.output, "decoder", config, clip.dims, trained.state_dict())

    def objective(network: nn.Module) -> nn.Module:
        assert isinstance(network, Decoder)
        return DecoderObjective(network, encode)

    return Parts(_channels_last(network), objective, train, validation, publish)


def _assemble_noisy_clip(job: TrainJob) -> Parts:
    section = job.recipe.noisy_clip
    assert section is not None
    clip, config = load_clip_artifact(job.inputs["clip"], job.device), section.model
    network = build_network(config, clip.dims)
    train, validation = _samples(job, image_px=config.image_px)
    encode = _caption_table(clip, train)

    def publish(trained: nn.Module) -> None:
        save_network(job.output, "noisy_clip", config, clip.dims, trained.state_dict())

    def objective(network: nn.Module) -> nn.Module:
        assert isinstance(network, NoisyClip)
        return NoisyClipObjective(network, encode)

    return Parts(_channels_last(network), objective, train, validation, publish)


def _assemble_upsampler(job: TrainJob) -> Parts:
    section = job.recipe.upsampler_1 if job.name == "upsampler_1" else job.recipe.upsampler_2
    assert section is not None
    config = section.model
    network = _start(build_network(config, ClipDims()), section.init_from)
    train, validation = _samples(job, image_px=config.image_px)

    def publish(trained: nn.Module) -> None:
        save_network(job.output, "upsampler", config, None, trained.state_dict())

    def objective(network: nn.Module) -> nn.Module:
        assert isinstance(network, Upsampler)
        return UpsamplerObjective(network)

    return Parts(_channels_last(network), objective, train, validation, publish)


def _start(network: Network, init_from: str) -> Network:
    if init_from:
        load_initial(network, init_from)
    return network


def _channels_last(network: nn.Module) -> nn.Module:
    """Kernels in the memory order in which the UNets are quick."""
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in the stubs)


def _samples(job: TrainJob, *, image_px: int = 0, embeddings: bool = False) -> tuple[Samples, Samples]:
    """Rows of the two splits; pictures where ``image_px`` is set."""
    download = job.inputs["download"] if image_px else None
    embed = job.inputs["embed"] if embeddings else None

    def of(split: str) -> Samples:
        return Samples(ShardReader(download, embed, split), image_px, num_threads=job.num_threads)

    return of("train"), of("validation")


def _caption_table(clip: FrozenClip, train: Samples) -> CaptionTable:
    """Captions encoded once where they are few, batch by batch otherwise."""
    row_bytes = 4 * (clip.dims.context_length * clip.dims.text_width + clip.dims.embed_dim)
    if train.num_rows * row_bytes > CAPTION_TABLE_BYTES:
        return CaptionTable(clip.encode_text, None)
    return CaptionTable(clip.encode_text, train.reader.captions())


def _measure_x0_variance(prior: Prior, encode: CaptionTable, train: Samples, seed: int) -> None:
    """Fill in what analytic sampling needs, from training rows."""
    batch = train.first(_ANALYTIC_ROWS)
    assert batch is not None
    batch = batch.to(prior.z_mean.device)
    diffusion = Diffusion(prior.config.diffusion)
    measure = X0Variance(diffusion, config_timesteps(prior.config.sampler, diffusion))
    noise = NoiseSource.from_seeds([derive_seed(seed, f"analytic/{row}") for row in range(len(batch))])
    with torch.no_grad():
        x0 = prior.scale(batch.require_z_image())
        measure.update(prior_denoiser(prior, encode(batch.captions)), x0, noise)
    prior.x0_variance.copy_(measure.table())


def part_of(batch: Batch, part: slice) -> Batch:
    """Some samples of a batch."""
    return replace(
        batch,
        uids=batch.uids[part],
        captions=batch.captions[part],
        images=None if batch.images is None else batch.images[part],
        z_image=None if batch.z_image is None else batch.z_image[part],
    )
