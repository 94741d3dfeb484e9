"""A request between two engines of a chain, each with some of the cascade's stages.

The first engine has CLIP and makes the items of every phase; each engine takes them through the stages that it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from models.rows import map_rows
from models.stage import Batch, Stage


@dataclass(frozen=True)
class Work:
    """What is left of a request."""

    batch: Batch
    """The items of its phase, on the CPU."""
    stages: tuple[int, ...]
    """Stages that they still pass, by their number among all; none: the phase has ended, and the next one is made."""
    step: str
    """Step of the recipe whose network does the next stage; empty: the engine with CLIP."""
    is_last: bool
    """Whether this is the request's last phase."""
    num_steps: int
    """Network steps taken so far."""
    taken_s: float = 0.0
    """Time in the engines so far, in seconds."""


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """A batch with all its tensors on a device."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device)

    values = {name: value.to(device) for name, value in batch.values.items()}
    return replace(batch, text=map_rows(batch.text, move), values=values, negative=map_rows(batch.negative, move))


def portable(batch: Batch, stages: Sequence[Stage]) -> Batch:
    """A batch as it is sent: on the CPU, without what ``stages`` do not read.

    Captions are as large as pictures, and a request may carry pictures.
    """
    request = batch.request and replace(batch.request, edit=None)
    if stages and all(stage.dims is None for stage in stages):
        batch = replace(batch, text=batch.text[:0], negative=batch.negative and batch.negative[:0])
    return on_device(replace(batch, request=request), "cpu")
