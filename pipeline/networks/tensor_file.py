"""Writes safetensors files tensor by tensor.

The library's own writer copies all tensors in memory first, and what it has written must be read for its checksum.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
