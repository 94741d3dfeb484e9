"""A request between two engines of a chain, each with some of the cascade's stages.

The first engine has CLIP and makes the items of every phase; each engine takes them through the stages that it has.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray

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

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors in memory."""
        sizes = list[int]()

        def note(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor[:1].nbytes if _is_one_row(tensor) else tensor.nbytes)
            return tensor

        _mapped(self.batch, note)
        return sum(sizes)


def on_device(batch: Batch, device: torch.device | str) -> Batch:
    """A batch with all its tensors on a device."""

    def move(tensor: torch.Tensor) -> torch.Tensor:
        if _is_one_row(tensor):
            return tensor[:1].to(device).expand_as(tensor)
        return tensor.to(device)

    return _mapped(batch, move)


def _is_one_row(tensor: torch.Tensor) -> bool:
    """Whether all items share one row in memory; it stays so on its way."""
    return len(tensor) > 1 and not tensor.stride(0)


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
    return on_device(replace(batch, request=request), "cpu")


def packed(work: Work) -> bytes:
    """Work as bytes for ``pickle.loads``, its tensors as numpy's arrays.

    torch's own way writes an archive for each tensor, of all the memory that it is a part of: .8 ms for the five of a
    small request, there and back, where this takes .03.
    """
    stream = io.BytesIO()
    _Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(work)
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Pickles tensors of the CPU as arrays."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        if value.dtype is torch.bfloat16:  # numpy has no such numbers
            return torch.Tensor.bfloat16, (value.float(),)
        if _is_one_row(value):
            return _one_row, (value[:1].numpy(), len(value))
        return torch.from_numpy, (value.numpy(),)


def _one_row(row: NDArray[Any], count: int) -> torch.Tensor:
    tensor = torch.from_numpy(row)
    return tensor.expand(count, *tensor.shape[1:])
