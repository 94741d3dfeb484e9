"""CLIP: the loss of its training, and its artifact, in open_clip's own layout.

open_clip takes longer to import than torch. It is imported lazily, so that upsamplers start without it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import nn

from models.clip_config import ClipConfig, ClipDims
from models.sample_random import SampleRandom
from pipeline.data.batch import Batch
from pipeline.data.negatives import Bigrams, bigrams_of, hard_negatives
from pipeline.errors import DataError
from pipeline.networks.contrast import ContrastiveObjective, Pairs, sum_of
from pipeline.networks.counting import Work, count
from pipeline.networks.kind import NetworkKind
from pipeline.workspace.hashing import copy_file
from pipeline.workspace.store import MANIFEST, Artifact

if TYPE_CHECKING:
    from pipeline.clip.frozen import FrozenClip, FrozenText
    from pipeline.clip.model import OpenClip


class ClipObjective(ContrastiveObjective):
    """The contrastive loss over the global batch; in training, against hard negatives too where the recipe says so.

    Args:
        network: The model in training, or its moving average.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._clip = _with_tokenizer(network)
        self._hard_negatives: bool = getattr(network, "config").hard_negatives  # noqa: B009  (open_clip's class)

    def prepare(self, batch: Batch, random: SampleRandom) -> Batch:
        """Bound the temperature, and add a hard negative of each caption, by the words of the global batch."""
        from pipeline.clip.model import clamp_logit_scale

        if self.training:
            clamp_logit_scale(self._clip)
        if not self._hard_negatives:
            return batch
        bigrams = bigrams_of_all(batch.captions)
        seeds = random.seeds("negatives").tolist()
        num_words = map(self._clip.inputs.num_whole_words, batch.captions)
        return replace(batch, negatives=tuple(map(_reordered, batch.captions, repeat(bigrams), seeds, num_words)))

    def encode(self, batch: Batch, random: SampleRandom) -> Pairs:
        """The features of a batch."""
        del random
        images = batch.require_images()
        model, tokens = self._clip.model, self._clip.tokenize(batch.captions).to(images.device)
        image, text, scale, *_ = model(self._clip.prepare(images), tokens)
        if batch.negatives is None:
            return Pairs(image, text, scale)
        negatives = self._clip.tokenize(batch.negatives).to(images.device)
        return Pairs(image, text, scale, model.encode_text(negatives, normalize=True))


def bigrams_of_all(captions: Sequence[str]) -> Bigrams:
    """The pairs of neighbouring words of the captions of all workers."""
    own = bigrams_of(captions)
    if not torch.distributed.is_initialized():
        return own
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, own)
    return frozenset().union(*parts)


def _reordered(caption: str, bigrams: Bigrams, seed: int, num_words: int) -> str:
    """A hard negative of a caption; the caption itself where there is none."""
    return next(iter(hard_negatives(caption, bigrams, 1, Random(seed), num_words)), caption)


def save_clip_artifact(artifact: Artifact, clip: OpenClip) -> None:
    """Write CLIP in open_clip's ``local-dir:`` layout, the configuration last."""
    from pipeline.clip.files import CONFIG_FILE, save_clip

    with tempfile.TemporaryDirectory(prefix="unclip-") as name:
        folder = Path(name)
        save_clip(clip, folder)
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
            artifact.write_whole(file.name, partial(copy_file, file))


def clip_folder(artifact: Artifact, *, with_weights: bool = True) -> Path:
    """The local folder of a CLIP with its files; an object store's are fetched, the weights only if they are wanted.

    Raises:
        DataError: If the configuration or the weights are missing.
    """
    from pipeline.clip.files import CONFIG_FILE, WEIGHTS_FILE

    beside = {name for name in artifact.names() if "/" not in name and name.endswith((".json", ".model", ".txt"))}
    for name in sorted(beside - {MANIFEST} | ({WEIGHTS_FILE} if with_weights else set())):
        artifact.path(name)
    return artifact.path(CONFIG_FILE).parent


def load_clip_artifact(artifact: Artifact, device: torch.device | str = "cpu", *, with_text: bool = True) -> FrozenClip:
    """Read the frozen CLIP, without its text tower if it is to embed pictures alone.

    Raises:
        DataError: If it is missing or damaged, or has no image tower.
    """
    from pipeline.clip.files import NO_IMAGE_TOWER
    from pipeline.clip.frozen import FrozenClip

    clip = load_text_artifact(artifact)
    if not isinstance(clip, FrozenClip):
        raise DataError(f"{artifact.uri}: {NO_IMAGE_TOWER}")
    return (clip if with_text else FrozenClip(clip.clip.without_text())).to(device)


def draw_as_loading(artifact: Artifact) -> None:
    """Take from torch's global generator what loading the CLIP takes, so that the next network has the same weights.

    open_clip draws weights before any are loaded. This draws them too, one tensor after another, and keeps none.

    Raises:
        DataError: If its configuration is missing or damaged.
    """
    from pipeline.clip import files

    try:
        files.draw_as_loading(clip_folder(artifact, with_weights=False))
    except ValueError as error:
        raise DataError(f"{artifact.uri}: {error}; {artifact.mend()}") from error


def load_text_artifact(
    artifact: Artifact, device: torch.device | str = "cpu", *, with_images: bool = True
) -> FrozenText:
    """Read the frozen CLIP, with its image tower if it has one and ``with_images`` is set.

    On torch's meta device it has no weights, and none are read.

    Raises:
        DataError: If it is missing or damaged.
    """
    from pipeline.clip.files import load_clip, load_shape
    from pipeline.clip.frozen import freeze

    has_weights = torch.device(device).type != "meta"
    try:
        folder = clip_folder(artifact, with_weights=has_weights)
        clip = load_clip(folder) if has_weights else load_shape(folder)
    except ValueError as error:
        raise DataError(f"{artifact.uri}: {error}; {artifact.mend()}") from error
    return freeze(clip if with_images or not clip.has_images else clip.without_images()).to(device)


def _create(config: ClipConfig, _dims: ClipDims) -> nn.Module:
    from pipeline.clip.model import create_clip

    return create_clip(config).model


def _blocks(network: nn.Module) -> list[nn.Module]:
    from pipeline.clip.model import blocks_of_clip

    return blocks_of_clip(network)


def _with_tokenizer(network: Any) -> OpenClip:
    """A network of ``_create``, or a copy of one, with its tokenizer and its configuration."""
    from pipeline.clip.model import wrap_clip

    return wrap_clip(network, network.config.to_open_clip())


def _work(network: nn.Module, clip: OpenClip) -> Work:
    """``sampling_flops``: one picture embedded."""
    images = torch.zeros(1, 3, clip.image_px, clip.image_px)
    tokens = torch.zeros(1, clip.dims.context_length, dtype=torch.int64)
    network.eval()
    encode_text: Any = network.encode_text

    def encode(size: int) -> Pairs:
        image, text, scale, *_ = network(images.expand(size, -1, -1, -1), tokens.expand(size, -1))
        if getattr(getattr(network, "config", None), "hard_negatives", False):  # a pretrained one has no configuration
            return Pairs(image, text, scale, encode_text(tokens.expand(size, -1), normalize=True))
        return Pairs(image, text, scale)

    flops = count(lambda: clip.model.encode_image(images))
    return Work(lambda size: sum_of(encode(size)), flops, 1, encode=encode)


CLIP = NetworkKind(
    name="clip",
    config=ClipConfig,
    create=_create,
    objective=lambda network, _: ClipObjective(network),
    work=_work,
    pictures=True,
    contrasts=True,
    publish=lambda output, network: save_clip_artifact(output, _with_tokenizer(network)),
    meaning=(),
    blocks=_blocks,
    compiled=lambda _: (),
)
