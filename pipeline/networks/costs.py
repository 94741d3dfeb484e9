"""The cost of a recipe before anything runs: parameters, arithmetic and memory of each network.

The networks are built and run on torch's meta device, which knows shapes and types and computes nothing: the 3.5B
decoder of the paper is counted in seconds on a laptop. A multiplication and an addition count as two operations; matrix
products, convolutions and attention are counted, element-wise work (a few percent) is not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pipeline.clip.model import OpenClip, create_clip, describe_clip
from pipeline.data.order import Share
from pipeline.errors import ConfigError
from pipeline.networks.contrast import Pairs, contrastive_loss
from pipeline.networks.counting import (
    Activations,
    CountedAttention,
    FusedAttention,
    count_forward_pass,
    count_training_pass,
)
from pipeline.networks.exchange import rows_of_all
from pipeline.networks.files import num_parameters
from pipeline.networks.table import kind_of
from pipeline.recipe.recipe import Recipe, TrainedSection

Json = dict[str, Any]

UTILISATION = 0.4
"""Share of a GPU's peak that a good training reaches: an assumption, for the hours."""
PEAK_FLOPS = {"a100": 312e12, "h100": 989e12}
"""Dense bfloat16 peak of the GPUs whose hours are printed, in operations per second."""
_FLOAT32_BYTES = 4
_OPTIMIZER_STATES = 2
"""AdamW keeps two moments for each parameter."""


@dataclass(frozen=True)
class NetworkCost:
    """The cost of one network; bytes are for one worker."""

    name: str
    num_parameters: int
    """Trained parameters (of a frozen CLIP: all)."""
    training_flops: float
    """Forward and backward of one sample; 0 if the network is not trained."""
    num_samples: int
    """Batch times steps; 0 if the network is not trained."""
    sampling_flops: float
    """All network calls for one result: a picture, or an embedding with its candidates. CLIP: one picture embedded."""
    num_calls: int
    """Network calls of one chain; guidance doubles the items of each."""
    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    average_bytes: int
    activations_bytes: int
    """Saved for the backward pass of this worker's share of the batch, or of a part of it, in float32; under bfloat16
    the inputs of matrix products take half of it, those of norms do not. The kernels' workspaces are not counted."""

    @property
    def training_bytes(self) -> int:
        """Memory of a worker in training, without the frozen CLIP and the kernels' workspaces."""
        state = self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.average_bytes
        return state + self.activations_bytes

    def hours(self, gpu: str) -> float:
        """GPU hours of the whole training at ``UTILISATION``."""
        return self.training_flops * self.num_samples / (PEAK_FLOPS[gpu] * UTILISATION) / 3600

    def to_dict(self) -> Json:
        """All fields, the totals and the hours."""
        hours = {f"{gpu}_hours": self.hours(gpu) for gpu in PEAK_FLOPS}
        return asdict(self) | {"training_bytes": self.training_bytes} | hours


def recipe_costs(recipe: Recipe) -> list[NetworkCost]:
    """Cost of every network of a recipe, in the order of the cascade.

    Raises:
        ConfigError: If the shape of the recipe's pretrained CLIP is not known on this machine.
    """
    with torch.device("meta"), FusedAttention(CountedAttention):
        clip = build_clip(recipe)
        return [_cost(name, section, clip, recipe) for name, section in recipe.trained().items()]


def training_flops(recipe: Recipe, name: str) -> float:
    """Operations of the forward and backward pass of one sample of one training.

    Raises:
        ConfigError: If the shape of the recipe's pretrained CLIP is not known on this machine.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), FusedAttention(CountedAttention):
        return _cost(name, recipe.trained()[name], build_clip(recipe), recipe).training_flops


def format_costs(costs: list[NetworkCost]) -> str:
    """The costs as a table for a terminal."""
    names = ("network", "parameters", "training", "samples", "A100 h", "H100 h", "sampling", "state", "activations")
    widths = (14, 12, 12, 9, 9, 9, 12, 10, 12)
    rows = [names, *(_cells(cost) for cost in costs)]
    lines = ["".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [
        f"training: forward and backward of one sample; hours: all samples at {UTILISATION:.0%} of the bfloat16 peak.",
        "sampling: all network calls for one result; clip: one picture embedded.",
        "state: weights, gradients, two moments and the average, float32, for each worker; activations: for its share",
        "of the batch or a part of it, in float32 too. The frozen CLIP and the kernels' workspaces are not counted.",
    ]
    return "\n".join(lines)


def _cells(cost: NetworkCost) -> tuple[str, ...]:
    state = cost.training_bytes - cost.activations_bytes
    training = ("frozen", "", "", "")
    if cost.num_samples:
        hours = (f"{cost.hours(gpu):,.3g}" for gpu in PEAK_FLOPS)
        training = (f"{_short(cost.training_flops)}FLOP", _short(cost.num_samples), *hours)
    memory = (f"{_short(state)}B", f"{_short(cost.activations_bytes)}B")
    return (cost.name, _short(cost.num_parameters), *training, f"{_short(cost.sampling_flops)}FLOP", *memory)


def build_clip(recipe: Recipe) -> OpenClip:
    """The recipe's CLIP with random weights, on the default device.

    Raises:
        ConfigError: If the shape of a pretrained one is not known on this machine.
    """
    section = recipe.clip
    if section.source == "train":
        return create_clip(section.model)
    is_folder = Path(section.name).is_dir()
    try:
        return describe_clip(f"local-dir:{section.name}" if is_folder else section.name)
    except ValueError as error:
        raise ConfigError(f"clip.name: {error}") from error


def _cost(name: str, section: TrainedSection, clip: OpenClip, recipe: Recipe) -> NetworkCost:
    is_clip = section is recipe.clip
    kind = kind_of(section.model)
    network = clip.model if is_clip else kind.create(section.model, clip.dims)
    work = kind.work(network, clip)
    parameters = num_parameters(network)
    weights = _FLOAT32_BYTES * parameters
    if is_clip and recipe.clip.source == "pretrained":
        return NetworkCost(name, parameters, 0.0, 0, work.sampling_flops, work.num_calls, weights, 0, 0, 0, 0)
    flops, activations = count_training_pass(network, work.run)
    train, share = section.train, largest_share(section)
    part = share.largest_part(section.resources.samples_a_pass)
    activations *= part
    if work.encode is not None:
        with torch.no_grad():
            width = work.encode(2).image.shape[1]
        logits = _kept_logits(network, width, share)
        activations = activations + logits if part == share.largest else max(activations, logits)
        flops += count_forward_pass(work.run) if part < share.largest else 0
    return NetworkCost(
        name=name,
        num_parameters=parameters,
        training_flops=flops,
        num_samples=train.batch_size * train.total_steps,
        sampling_flops=work.sampling_flops,
        num_calls=work.num_calls,
        weights_bytes=weights,
        gradients_bytes=weights,
        optimizer_bytes=_OPTIMIZER_STATES * weights,
        average_bytes=weights,
        activations_bytes=round(activations),
    )


def largest_share(section: TrainedSection) -> Share:
    """The share of the last of the fewest workers of a training: no other one's is larger."""
    num_workers = section.resources.fewest_workers
    return Share(section.train.batch_size, num_workers - 1, num_workers)


def _kept_logits(network: nn.Module, width: int, share: Share) -> int:
    """Bytes that a contrastive loss saves for its backward pass, of a share against the global batch.

    Args:
        network: The network.
        width: Features of a picture and of a caption.
        share: Of a worker.
    """
    with FakeTensorMode(), torch.device("cpu"), Activations(network) as activations:  # meta has no autocast
        image, text = (torch.empty(len(share), width, requires_grad=True) for _ in range(2))
        contrastive_loss(Pairs(image, text, torch.ones(())), share, partial(rows_of_all, exchanges=False))
    return activations.num_bytes


def _short(count: float) -> str:
    """A count for people: 950, 1.80M, 3.50G."""
    for unit, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:.0f} "
