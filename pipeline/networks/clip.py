"""CLIP: the contrastive loss of its training, open_clip's own, and its artifact, in open_clip's own layout.

open_clip takes longer to import than torch. It is imported lazily, so that upsamplers start without it.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from models.clip_config import ClipConfig, ClipDims
from pipeline.data.batches import Batch
from pipeline.data.negatives import bigrams_of, hard_negatives
from pipeline.errors import DataError
from pipeline.networks.counting import Work, count
from pipeline.networks.kind import NetworkKind
from pipeline.workspace.store import MANIFEST, Artifact

if TYPE_CHECKING:
    from pipeline.clip import FrozenClip, FrozenText, OpenClip


class ClipObjective(nn.Module):
    """The contrastive loss over the global batch; in training, against hard negatives too where the recipe says so.

    Args:
        network: The model in training, or its moving average.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._clip = _with_tokenizer(network)
        self._hard_negatives: bool = getattr(network, "config").hard_negatives  # noqa: B009  (open_clip's class)

    def forward(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Mean loss of this worker's share, against the captions and pictures of all workers."""
        from pipeline.clip import clamp_logit_scale, clip_loss

        rank, world_size, negatives = 0, 1, None
        if self.training:
            clamp_logit_scale(self._clip)
            if torch.distributed.is_initialized():
                rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        images = batch.require_images()
        tokens = self._clip.tokenize(batch.captions).to(images.device)
        if self.training and self._hard_negatives:
            seed = int(torch.randint(2**62, (1,), generator=generator))
            negatives = self._clip.tokenize(_reordered(batch.captions, random.Random(seed))).to(images.device)
        return clip_loss(self._clip, images, tokens, negatives=negatives, rank=rank, world_size=world_size)


def _reordered(captions: Sequence[str], rng: random.Random) -> list[str]:
    """A hard negative of each caption, by the words of all of them; the caption itself where there is none."""
    bigrams = bigrams_of(captions)
    return [next(iter(hard_negatives(caption, bigrams, 1, rng)), caption) for caption in captions]


def save_clip_artifact(artifact: Artifact, clip: OpenClip) -> None:
    """Write CLIP in open_clip's ``local-dir:`` layout, the configuration last."""
    from pipeline.clip import CONFIG_FILE, save_clip

    with tempfile.TemporaryDirectory(prefix="unclip-") as name:
        folder = Path(name)
        save_clip(clip, folder)
        for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
            with artifact.write(file.name) as path:
                shutil.copyfile(file, path)


def clip_folder(artifact: Artifact) -> Path:
    """The local folder of a CLIP with all its files; an object store's are fetched.

    Raises:
        DataError: If the configuration or the weights are missing.
    """
    from pipeline.clip import CONFIG_FILE, WEIGHTS_FILE

    beside = {name for name in artifact.names() if "/" not in name and name.endswith((".json", ".model", ".txt"))}
    for name in sorted(beside - {MANIFEST} | {WEIGHTS_FILE}):
        artifact.path(name)
    return artifact.path(CONFIG_FILE).parent


def load_clip_artifact(artifact: Artifact, device: torch.device | str = "cpu") -> FrozenClip:
    """Read the frozen CLIP.

    Raises:
        DataError: If it is missing or damaged, or has no image tower.
    """
    from pipeline.clip import NO_IMAGE_TOWER, FrozenClip

    clip = load_text_artifact(artifact, device)
    if not isinstance(clip, FrozenClip):
        raise DataError(f"{artifact.uri}: {NO_IMAGE_TOWER}")
    return clip


def load_text_artifact(artifact: Artifact, device: torch.device | str = "cpu") -> FrozenText:
    """Read the frozen CLIP, with its image tower if it has one.

    Raises:
        DataError: If it is missing or damaged.
    """
    from pipeline.clip import freeze, load_clip

    try:
        return freeze(load_clip(clip_folder(artifact))).to(device)
    except ValueError as error:
        raise DataError(f"{artifact.uri}: {error}; remove it and run again") from error


def _create(config: ClipConfig, _dims: ClipDims) -> nn.Module:
    from pipeline.clip import create_clip

    model = create_clip(config).model
    setattr(model, "config", config)  # noqa: B010  (open_clip's class has no such attribute; a copy keeps it)
    return model


def _with_tokenizer(network: Any) -> OpenClip:
    """A network of ``_create``, or a copy of one, with its tokenizer and its configuration."""
    from pipeline.clip import wrap_clip

    return wrap_clip(network, network.config.to_open_clip())


def _work(network: nn.Module, clip: OpenClip) -> Work:
    """``sampling_flops``: one picture embedded."""
    images = torch.zeros(1, 3, clip.image_px, clip.image_px)
    tokens = torch.zeros(1, clip.dims.context_length, dtype=torch.int64)
    network.eval()

    def run(size: int) -> Tensor:
        image, text, *_ = network(images.expand(size, -1, -1, -1), tokens.expand(size, -1))
        return image.sum() + text.sum()

    return Work(run, count(lambda: clip.model.encode_image(images)), 1)


CLIP = NetworkKind(
    name="clip",
    config=ClipConfig,
    create=_create,
    objective=lambda network, _: ClipObjective(network),
    work=_work,
    pictures=True,
    publish=lambda output, network: save_clip_artifact(output, _with_tokenizer(network)),
    meaning=(),
    compiled=lambda _: (),
)
