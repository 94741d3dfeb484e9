"""A kind of network, as the rest of the pipeline needs to know it: one row of the table in table.py.

A row is data and functions of one network alone. What all networks share (reading shards, starting from other weights,
writing the artifact) stands where it is done: pipeline/train/assemble.py, files.py, costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from models.clip_config import ClipDims
from models.diffusion.process import Denoise
from models.stage import Stage
from pipeline.data.batches import Samples, TextEncoder
from pipeline.networks.counting import Work
from pipeline.networks.measuring import ValidationRows
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip import OpenClip

C = TypeVar("C")
N = TypeVar("N", bound=nn.Module)

OF_DIFFUSION = ("diffusion.schedule", "diffusion.prediction", "diffusion.num_timesteps")


def _itself(network: nn.Module) -> Sequence[nn.Module]:
    return (network,)


@dataclass(frozen=True, kw_only=True)
class NetworkKind(Generic[C, N]):
    """One kind of network. A network carries its configuration as ``network.config``."""

    name: str
    """``kind`` in config.json."""
    config: type[C]
    """Type of the configuration: by it a section of a recipe finds its row."""
    create: Callable[[C, ClipDims], N]
    """A network with random weights, of torch's global generator."""
    objective: Callable[[N, TextEncoder], nn.Module]
    """The loss module (batch, generator) -> mean loss, around a network or its average. The text encoder is the frozen
    CLIP's, for a kind that reads captions."""
    work: Callable[[N, OpenClip], Work]
    """What to count of a network on the meta device; the recipe's CLIP is given beside it."""
    measure: Callable[[N, ValidationRows], dict[str, float]] | None = None
    """Sample-quality metrics on a few validation rows during training, by name."""
    denoiser: Callable[[N, ValidationRows], tuple[Denoise, Tensor]] | None = None
    """For a diffusion of pictures: the network under the conditions of these rows, unguided, and the true pictures in
    [-1, 1], (B, 3, H, W)."""
    pictures: bool = False
    """Whether it is trained on pictures, of ``config.image_px``."""
    embeddings: bool = False
    """Whether it is trained on z_image."""
    captions: bool = False
    """Whether it is trained on captions as the frozen CLIP encodes them; its shape then depends on that CLIP."""
    create_on_data: Callable[[C, ClipDims, Artifact], N] | None = None
    """For training, in place of ``create``: a network of which parts are measured on the embed step's artifact."""
    finish: Callable[[N, TextEncoder, Samples, int], None] | None = None
    """Fill in, at the end of a training, what sampling needs: (network, text encoder, training rows, seed)."""
    publish: Callable[[Artifact, N], None] | None = None
    """Write a trained network; None: as config.json and model.safetensors (files.py)."""
    meaning: tuple[str, ...] = OF_DIFFUSION
    """Fields of the configuration, dotted, that change what weights of the same shape mean."""
    channels_last: bool = False
    """Whether kernels are kept in the memory order in which UNets are fast."""
    stage: Callable[[str, Mapping[str, Any]], Stage] | None = None
    """The stage of a cascade that such a network is: (its step, all networks of the cascade by step) -> stage; None:
    it is none, or a part of another's."""
    compiled: Callable[[N], Sequence[nn.Module]] = _itself
    """The modules whose calls torch.compile takes; none where the forward is not written for one graph."""


AnyKind = NetworkKind[Any, Any]
