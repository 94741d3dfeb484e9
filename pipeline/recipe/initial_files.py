"""The files of a checkpoint, by name and without torch: one, or several if the training's state was divided.

A plan looks for them before anything runs, and the checkpoints themselves are written under these names.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.workspace.store import LIVE

CHECKPOINTS = f"{LIVE}checkpoints/"
"""Where a training writes its checkpoints."""
KEPT_STATE = "state/"
"""Where a finished one keeps its last state, if the recipe wants that."""

_SUFFIX = ".safetensors"
_MOST_HEADER_BYTES = 100_000_000
"""As safetensors has it."""


def file_name(first: str, number: int, num_files: int) -> str:
    """Name of a file of a checkpoint, by the name of its first; numbers begin at 0."""
    return first if number == 0 else first.replace(_SUFFIX, f".{number + 1}-of-{num_files}{_SUFFIX}")


def steps_of_checkpoints(names: Iterable[str], folder: str) -> dict[int, str]:
    """The first files of the checkpoints in a folder, which are written last, by their step; whole or not."""
    inside = [name for name in names if name.startswith(folder)]
    steps = {name: name.removeprefix(folder).removesuffix(_SUFFIX) for name in inside}
    return {int(step): name for name, step in steps.items() if step.isdigit()}


def num_files(path: str) -> int:
    """How many files a checkpoint has, by the header of its first; 1 for a file that says nothing of others."""
    try:
        return len(json.loads(_metadata(path)["seals"]))
    except (OSError, ValueError, KeyError, TypeError):  # no checkpoint, or a damaged one: the training says which
        return 1


def key_in(path: str) -> str:
    """Key of the training that wrote a checkpoint, by the header of its first file; empty for another file."""
    try:
        return str(_metadata(path)["digest"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _metadata(path: str) -> Any:
    with Path(path).open("rb") as stream:
        num_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(num_bytes) if num_bytes <= _MOST_HEADER_BYTES else b"")
    return header["__metadata__"]


def missing_files(path: str) -> list[str]:
    """Names of the files of a checkpoint that are not beside its first."""
    first, count = Path(path), num_files(path)
    names = [file_name(first.name, number, count) for number in range(1, count)]
    return [name for name in names if not (first.parent / name).exists()]
