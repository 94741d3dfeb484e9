"""Faults of a training's workers: they cannot read their inputs, each time for another reason; or a test kills them."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pipeline.runtime.context import StepContext
from pipeline.workspace.store import Artifact


class _Unreadable(Artifact):
    """An artifact whose files cannot be read.

    Args:
        uri: Its folder.
        error: Class of what is raised.
    """

    def __init__(self, uri: str, error: type[Exception]) -> None:
        super().__init__(uri)
        self._error = error

    def path(self, name: str) -> Path:
        """Raises the error."""
        raise self._error(f"{name} cannot be read")


@dataclass(frozen=True)
class FaultyContext(StepContext):
    """A training whose first start ends with an error, the second without memory; the third is sound."""

    @property
    def inputs(self) -> dict[str, Artifact]:
        """The inputs, in the process that asks for them."""
        if "memory" in self.notice:
            return super().inputs
        error = torch.OutOfMemoryError if self.notice else RuntimeError
        return {name: _Unreadable(artifact.uri, error) for name, artifact in super().inputs.items()}


def train_workers() -> list[psutil.Process]:
    """The workers of Ray Train below this process."""
    return processes_with("RayTrainWorker")


def train_controllers() -> list[psutil.Process]:
    """The controllers of Ray Train below this process."""
    return processes_with("TrainController")


def processes_with(word: str) -> list[psutil.Process]:
    """The processes below this one whose command line has a word."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if word in " ".join(child.cmdline()):
                found.append(child)
    return found
