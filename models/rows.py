"""Select and concatenate rows of values whose tensors all have the batch as their first axis.

Such a value is a tensor, a named tuple, a tuple, or a frozen dataclass of such values; None stays None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = TypeVar("Rows")


def map_rows(value: Rows, change: Callable[[Tensor], Tensor]) -> Rows:
    """``value`` with ``change`` applied to each of its tensors."""
    return _combine([value], lambda tensors: change(tensors[0]))


def take_rows(value: Rows, index: slice | Tensor) -> Rows:
    """Some rows of ``value``; a slice shares its memory."""
    return map_rows(value, lambda tensor: tensor[index])


def concat_rows(parts: Sequence[Rows]) -> Rows:
    """The rows of several values in one, in order; a single one is returned as it is.

    Axes of different lengths (captions) are padded at their end with zeros to the longest; masks are False there.

    Raises:
        ValueError: If something is None in one part and not in another.
    """
    return parts[0] if len(parts) == 1 else _combine(parts, _concat)


def _concat(tensors: Sequence[Tensor]) -> Tensor:
    longest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded: list[Tensor] = []
    for tensor in tensors:
        extra = [most - size for most, size in zip(longest, tensor.shape[1:], strict=True)]
        # F.pad counts axes from the last.
        padded.append(F.pad(tensor, [pad for count in reversed(extra) for pad in (0, count)]) if any(extra) else tensor)
    return torch.cat(padded)


def _combine(parts: Sequence[Any], combine: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return combine(parts)
    if any(part is None for part in parts):
        if any(part is not None for part in parts):
            raise ValueError("a value that some rows have and others have not cannot be concatenated")
        return None
    if is_dataclass(first):
        names = [field.name for field in fields(first)]
        return type(first)(*(_combine([getattr(part, name) for part in parts], combine) for name in names))
    columns = [_combine(column, combine) for column in zip(*cast("Sequence[tuple[Any, ...]]", parts), strict=True)]
    make = getattr(type(first), "_make", tuple)  # a named tuple, or a plain one
    return make(columns)
