"""The parts of a training: its rows, its network, its loss, and the artifact that it writes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from models.clip_config import ClipDims
from models.diffusion.noise import derive_seed
from models.layers.unet import set_checkpointing
from models.text import NullText, TextEncoding
from pipeline.data.batch import CaptionTable, TextEncoder
from pipeline.data.samples import Samples
from pipeline.data.selection import embeddings_of, selection_of
from pipeline.data.token_states import EmptyCaption
from pipeline.data.training_rows import ShardReader, require_rows_of
from pipeline.errors import DataError
from pipeline.networks.clip import draw_as_loading, load_clip_artifact, load_text_artifact
from pipeline.networks.files import copy_weights, create_network, load_initial, load_network, save_network
from pipeline.networks.kind import AnyKind
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import Recipe, TrainedSection
from pipeline.recipe.steps import STEP_ROWS
from pipeline.recipe.train_sections import is_checkpoint
from pipeline.train.checkpoint import Checkpoint, DamagedCheckpointError
from pipeline.train.resume import checkpoint_steps
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip.frozen import FrozenText

CAPTION_TABLE_BYTES = 512 << 20
"""Encodings of all captions are kept in memory if they take at most this much."""


@dataclass(frozen=True)
class EarlierTraining:
    """A training that this one continues with other settings."""

    artifact: Artifact
    key: str
    last_step: int
    """Steps up to which both are the same."""


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
    """The step's key, which its checkpoints carry."""
    device: torch.device
    rank: int = 0
    world_size: int = 1
    num_threads: int = 1
    """Threads of this worker that decode pictures."""
    earlier: tuple[EarlierTraining, ...] = ()
    """Trainings without the last phases of this one, the nearest first."""

    @property
    def section(self) -> TrainedSection:
        """The recipe's section of this step."""
        return self.recipe.trained()[self.name]

    @property
    def kind(self) -> AnyKind:
        """The row of the network that this step trains."""
        return kind_of(self.section.model)

    @property
    def reads_states(self) -> bool:
        """Whether the captions are read as the embed step encoded them, and none is encoded here."""
        return self.recipe.embed.token_states and self.kind.takes_token_states

    @property
    def has_weights(self) -> bool:
        """Whether this worker builds the first weights; where the state is divided, the first worker hands them out."""
        return self.rank == 0 or self.section.resources.shards_of(self.world_size) == 1

    @property
    def seed(self) -> int:
        """Seed of this training alone."""
        return derive_seed(self.recipe.seed, self.name)


@dataclass(frozen=True)
class Parts:
    """The parts of one training."""

    network: nn.Module
    """On the CPU; on the meta device where ``TrainJob.has_weights`` is false."""
    objective: Callable[[nn.Module], nn.Module]
    """Loss module (batch, random numbers) -> mean loss, around the network or its average."""
    train: Samples
    validation: Samples
    publish: Callable[[nn.Module], None]
    """Write a network as the step's artifact."""
    clip: FrozenText | None
    """For a kind that reads captions, unless they are stored and no picture is embedded."""


def assemble(job: TrainJob) -> Parts:
    """Build the parts; the network's first weights depend on the seed alone.

    Raises:
        DataError: If the input artifacts are damaged or do not fit together.
    """
    torch.manual_seed(derive_seed(job.seed, "weights"))
    kind = job.kind
    # The image tower only on the worker that measures pictures with it.
    with_images = kind.measures_pictures and job.rank == 0 and not job.section.resources.validates_beside
    clip = load_frozen(job, with_images=with_images)
    train, validation = (samples_of(job, split) for split in ("train", "validation"))
    empty = _empty_caption(job, clip, train)
    network = _create(job, empty)
    encode = text_encoder(clip) if clip is None or job.reads_states else _caption_table(clip, train)

    def publish(trained: nn.Module) -> None:
        if kind.finish is not None:
            kind.finish(trained, encode, train, job.seed)
        if kind.publish is not None:
            kind.publish(job.output, trained)
        else:
            config: Any = trained.config
            save_network(job.output, config, None if empty is None else empty.dims, trained.state_dict())

    return Parts(network, lambda module: kind.objective(module, encode), train, validation, publish, clip)


def load_frozen(job: TrainJob, *, with_images: bool) -> FrozenText | None:
    """The frozen CLIP that the training runs, or one of its towers alone; None if it runs neither.

    Raises:
        DataError: If it is missing or damaged, or has no image tower.
    """
    if not job.kind.captions or (job.reads_states and not with_images):
        return None
    artifact, is_half = job.inputs["clip"], job.section.train.clip_precision == "bfloat16"
    if with_images:
        clip = load_clip_artifact(artifact, with_text=not job.reads_states)
    else:
        clip = load_text_artifact(artifact, with_images=False)
    return clip.to(job.device, torch.bfloat16) if is_half else clip.to(job.device)


def text_encoder(clip: FrozenText | None) -> TextEncoder:
    """The encoder of captions, batch by batch; of a kind that reads none, one that is never called.

    It computes in the type of its weights: called in a training step, it is inside of the training's autocast.
    """
    if clip is None:
        return _no_captions

    def encode(captions: Sequence[str]) -> TextEncoding:
        with torch.autocast(clip.device.type, enabled=False):
            return clip.encode_text(captions)

    return encode


def _empty_caption(job: TrainJob, clip: FrozenText | None, train: Samples) -> EmptyCaption | None:
    """What the network takes from the frozen CLIP; None of a kind that reads no captions."""
    if job.reads_states:
        if clip is None and job.has_weights:
            draw_as_loading(job.inputs["clip"])
        return train.reader.empty_caption()
    return None if clip is None else EmptyCaption(clip.dims, clip.encode_text([""]))


def _create(job: TrainJob, empty: EmptyCaption | None) -> nn.Module:
    kind, section = job.kind, job.section
    dims = ClipDims() if empty is None else empty.dims
    if kind.create_on_data is not None:
        network = kind.create_on_data(section.model, dims, embeddings_of(job.inputs))
    else:
        with contextlib.nullcontext() if job.has_weights else torch.device("meta"):
            network = kind.create(section.model, dims)
    # A training with checkpoints of its own goes on without the file, which may be gone by then.
    if job.has_weights and not checkpoint_steps(job.output):
        _begin(network, job)
    if empty is not None:
        for module in network.modules():
            if isinstance(module, NullText):
                module.set(empty.text)
    network = in_memory_order(kind, network)
    set_checkpointing(network, enabled=section.resources.checkpointing)
    return network


def _begin(network: nn.Module, job: TrainJob) -> None:
    """Give a new network the weights that its training begins with, if the recipe names some."""
    init_from, first = getattr(job.section, "init_from", ""), job.inputs.get(STEP_ROWS[job.name].begins_with)
    if first is not None:
        copy_weights(load_network(first), network, first.uri)
    elif is_checkpoint(init_from):
        copy_weights(_averaged(init_from), network, init_from)
    elif init_from:
        load_initial(network, init_from)


def _averaged(file: str) -> nn.Module:
    """The averaged network of a checkpoint."""
    folder, _, name = file.rpartition("/")
    artifact = Artifact(folder or ".")
    other = "name another checkpoint, or the folder of a network"
    try:
        checkpoint = Checkpoint(artifact, name)
    except DataError:
        raise DataError(f"init_from {file}: no such file; {other}") from None
    except DamagedCheckpointError as error:
        raise DataError(f"init_from {file}: {error}; {other}") from error
    try:
        network = create_network(checkpoint.network, file)
        network.load_state_dict(checkpoint.read("ema"))
    except DamagedCheckpointError as error:
        raise DataError(f"init_from {file}: {error}; {other}") from error
    return network


def in_memory_order(kind: AnyKind, network: nn.Module) -> nn.Module:
    """The network with its kernels in the memory order in which its kind is fast."""
    if not kind.channels_last:
        return network
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  (missing in the stubs)


def samples_of(job: TrainJob, split: str) -> Samples:
    """Rows of one split, with the columns that this kind of network reads."""
    kind, model = job.kind, job.section.model
    image_px: int = getattr(model, "image_px") if kind.pictures else 0  # noqa: B009  (kinds of pictures have it)
    download = job.inputs["download"] if kind.pictures else None
    embed = embeddings_of(job.inputs) if kind.embeddings else None
    states = job.inputs["embed"] if job.reads_states else None
    imported = job.inputs.get("filter_embeddings") or job.inputs.get("embed")
    if download is not None and imported is not None and job.recipe.embed.import_from:
        require_rows_of(download, imported, where=job.name)
    reader = ShardReader(download, embed, split, None if kind.embeddings else selection_of(job.inputs), states)
    config = job.section.train
    return Samples(
        reader,
        image_px,
        num_threads=job.num_threads,
        window_rows=config.shuffle_rows,
        weights=job.recipe.pairs.weights,
        num_streams=config.num_streams,
    )


def _no_captions(captions: Sequence[str]) -> TextEncoding:
    raise AssertionError(
        f"{len(captions)} captions to encode: set captions=True in the row of a network that reads them"
    )


def _caption_table(clip: FrozenText, train: Samples) -> TextEncoder:
    """An encoder that encodes all captions once if they are few, else batch by batch."""
    if train.num_rows * caption_bytes(clip.dims) > CAPTION_TABLE_BYTES:
        return CaptionTable(text_encoder(clip), None)
    return CaptionTable(text_encoder(clip), train.reader.captions())


def caption_bytes(dims: ClipDims) -> int:
    """Memory of one encoded caption."""
    return 4 * (dims.context_length * dims.text_width + dims.embed_dim)
