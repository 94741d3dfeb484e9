"""A kind of network, as the rest of the pipeline sees it: one row of the table in table.py.

A row holds data and functions of one network only. The code that all networks share (reading shards, starting from
other weights, writing the artifact) is in pipeline/train/assemble.py, files.py and costs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from models.clip_config import ClipDims
from models.diffusion.process import Denoise
from models.layers.unet import blocks_of
from models.stage import Stage
from pipeline.data.batch import TextEncoder
from pipeline.data.samples import Samples
from pipeline.networks.counting import Work
from pipeline.networks.measuring import ValidationRows
from pipeline.workspace.store import Artifact

if TYPE_CHECKING:
    from pipeline.clip.model import OpenClip

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
    """Type of the configuration, by which the row of a recipe's section is looked up."""
    create: Callable[[C, ClipDims], N]
    """Create a network with random weights from torch's global generator."""
    objective: Callable[[N, TextEncoder], nn.Module]
    """The loss module (batch, random numbers) -> mean loss, around a network or its average. The text encoder is the
    frozen CLIP's, for a kind that reads captions. A loss that compares samples is a ``ContrastiveObjective``."""
    work: Callable[[N, OpenClip], Work]
    """The work to count on the meta device: (network, the recipe's CLIP) -> work."""
    measure: Callable[[N, ValidationRows], dict[str, float]] | None = None
    """Sample-quality metrics on a few validation rows during training, by name."""
    measures: tuple[str, ...] = ()
    """Names of those metrics."""
    denoiser: Callable[[N, ValidationRows], tuple[Denoise, Tensor]] | None = None
    """For a diffusion of pictures: the network under the conditions of these rows, unguided, and the true pictures in
    [-1, 1], (B, 3, H, W)."""
    pictures: bool = False
    """Whether it is trained on pictures, of ``config.image_px``."""
    embeddings: bool = False
    """Whether it is trained on z_image."""
    contrasts: bool = False
    """Whether its loss is a ``ContrastiveObjective``: worked off in parts, each sample is encoded twice."""
    captions: bool = False
    """Whether it is trained on captions as the frozen CLIP encodes them; its shape then depends on that CLIP."""
    measures_pictures: bool = False
    """Whether its measures embed pictures: other trainings keep the text tower of the frozen CLIP alone."""
    create_on_data: Callable[[C, ClipDims, Artifact], N] | None = None
    """For training, in place of ``create``: a network with parts that are measured on the embed step's artifact."""
    finish: Callable[[N, TextEncoder, Samples, int], None] | None = None
    """At the end of a training, measure what sampling needs: (network, text encoder, training rows, seed)."""
    publish: Callable[[Artifact, N], None] | None = None
    """Write a trained network; None: as config.json and model.safetensors (files.py)."""
    meaning: tuple[str, ...] = OF_DIFFUSION
    """Fields of the configuration, dotted, that change what weights of the same shape mean."""
    channels_last: bool = False
    """Whether kernels are stored in the memory order in which UNets are fast."""
    stage: Callable[[str, Mapping[str, Any]], Stage] | None = None
    """Make the network's stage of a cascade: (step name, all networks of the cascade by step) -> stage; None: it has no
    stage of its own."""
    blocks: Callable[[N], Sequence[nn.Module]] = blocks_of
    """The modules that are called one after another and hold most parameters, an inner one before the one around it. A
    divided state is gathered block by block, so each must be read by calling it alone."""
    compiled: Callable[[N], Sequence[nn.Module]] = _itself
    """The modules to compile with torch.compile; none if the forward cannot be one graph."""

    @property
    def takes_token_states(self) -> bool:
        """Whether it is trained on captions of rows that are embedded, so that ``embed.token_states`` serves it."""
        return self.captions and self.embeddings


AnyKind = NetworkKind[Any, Any]
