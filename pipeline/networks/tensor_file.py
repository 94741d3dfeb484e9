"""Writes safetensors files tensor by tensor, and opens them, patient with storage that fails for a moment.

The library's own writer copies all tensors in memory first, and what it has written must be read for its checksum. The
errors of its reader do not tell storage that fails from a file that is damaged or missing.
"""

import errno
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pipeline.workspace.disk import patiently
from pipeline.workspace.hashing import HashedFile

_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a file that safetensors reads: the length of a header, the header, and the tensors one after the other.

    The same tensors give the same bytes; at most one tensor is copied at a time.

    Args:
        tensors: By name, in memory; of any shape, and of a type of ``_TYPES``.
        path: The file to write.
        metadata: Text by name, for the header.

    Raises:
        OSError: If the disk is full.
    """
    # The widest numbers first, so that each begins at a multiple of its size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        header[name] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with HashedFile(path) as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            stream.write(tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy())


def open_tensors(path: Path) -> Any:
    """What ``safe_open`` gives of a file.

    Raises:
        FileNotFoundError: If there is no file.
        SafetensorError, RuntimeError, ValueError: If it is damaged.
        StepError: If the storage does not give it, also after minutes.
        MemoryError: If there is no memory to map it.
    """
    return patiently(lambda: _open(path), str(path))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, by name; raises as ``open_tensors`` and, of damage, as ``get_tensor``."""
    file = open_tensors(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _open(path: Path) -> Any:
    """As ``open_tensors``; storage that does not give the file is an OSError with its number."""
    with path.open("rb") as stream:
        stream.read(1)
    try:
        return safe_open(path, "pt")
    except (OSError, RuntimeError, SafetensorError) as error:
        quoted = re.search(r"\((?:os error )?(\d+)\)$", str(error))  # as safetensors and torch write it
        if quoted is None and not isinstance(error, OSError):
            raise
        number = int(quoted[1]) if quoted else errno.EIO  # safetensors says of any failure that there is no such file
        if number == errno.ENOMEM:
            raise MemoryError(str(error)) from error
        raise OSError(number, str(error)) from error
