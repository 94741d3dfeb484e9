"""A request between two engines of a chain, each with some of the cascade's stages.

The first engine has CLIP and makes the items of every phase; each engine takes them through the stages that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        if len(tensor) > 1 and not tensor.stride(0):  # one row for all items, as it stays
            return tensor[:1].to(device).expand_as(tensor)
        return tensor.to(device)

    return _mapped(batch, move)


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    values = {name: change(value) for name, value in batch.values.items()}
    return replace(batch, text=map_rows(batch.text, change), values=values, negative=map_rows(batch.negative, change))


def portable(batch: Batch, stages: Sequence[Stage]) -> Batch:
    """A batch as it is sent: on the CPU, without what ``stages`` do not read.

    Captions are as large as pictures, and a request may carry pictures.
    """
    request = batch.request and replace(batch.request, edit=None)
    if stages and all(stage.dims is None for stage in stages):
        batch = replace(batch, text=batch.text[:0], negative=batch.negative and batch.negative[:0])
    return _mapped(on_device(replace(batch, request=request), "cpu"), _alone)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor with nothing else in its memory: whoever pickles a part of another one sends all of that."""
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
