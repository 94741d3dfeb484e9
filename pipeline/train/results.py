"""Results of validations, one file a checkpoint: written by whoever validates, read by the curves and by the pruning.

A checkpoint is validated by the first worker, or beside the training by a process that the training knows nothing of.
Its number depends on the weights and the seed alone, so a result stays true when a training is continued from before
it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.workspace.manifest import read_record
from pipeline.workspace.store import LIVE, Artifact

Json = dict[str, Any]

RESULTS = f"{LIVE}validation/"
_BESIDE = f"{RESULTS}beside.json"
_SUFFIX = ".json"
_MEND = "remove this file, which says only how the validations went"


@dataclass(frozen=True)
class BesideState:
    """What became of the validations beside a training so far."""

    running: int = -1
    """Step of the checkpoint that is being validated, which must not be removed meanwhile; -1: none."""
    skipped: int = 0
    """Checkpoints without a validation."""
    failed: int = 0
    """Validations that were begun and gave no result."""
    reason: str = ""
    """Why the last of them was skipped or failed."""
    last_look: dict[int, str] | None = None
    """The checkpoints that were there at the last look, by step, each with what changes when it is written again; None:
    an earlier release looked."""

    @property
    def text(self) -> str:
        """For people: what was left out, and why; empty if nothing was."""
        counts = [f"{count} {word}" for count, word in ((self.skipped, "skipped"), (self.failed, "failed")) if count]
        return f"validations: {', '.join(counts)} ({self.reason})" if counts else ""


def result_name(step: int) -> str:
    """Name of the file of one checkpoint's result."""
    return f"{RESULTS}{step:08d}{_SUFFIX}"


def grid_name(step: int) -> str:
    """Name of the file of what one checkpoint's network samples, beside the true pictures."""
    return f"{RESULTS}{step:08d}.png"


def write_result(artifact: Artifact, step: int, measures: Mapping[str, float], grid: bytes = b"") -> None:
    """Write loss and measures of a checkpoint, with the time; before them its grid, a PNG file, if it has one."""
    if grid:
        artifact.write_bytes(grid_name(step), grid)
    artifact.write_json(result_name(step), {"time": round(time.time(), 3), **measures})


def read_result(artifact: Artifact, step: int) -> Json:
    """``time``, loss and measures of a checkpoint; empty if it was not validated."""
    return artifact.read_json(result_name(step)) if artifact.exists(result_name(step)) else {}


def result_steps(artifact: Artifact) -> list[int]:
    """The steps that have a result, in order."""
    names = [name for name in artifact.names() if name.startswith(RESULTS)]
    stems = [name.removeprefix(RESULTS).removesuffix(_SUFFIX) for name in names]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def read_beside(artifact: Artifact) -> BesideState:
    """What became of the validations beside a training.

    Raises:
        DataError: If its file is damaged; names it.
    """
    content = artifact.find_bytes(_BESIDE)
    return BesideState() if content is None else read_record(BesideState, content, f"{artifact.uri}/{_BESIDE}", _MEND)


def write_beside(artifact: Artifact, state: BesideState) -> None:
    """Publish what became of the validations beside a training."""
    artifact.write_json(_BESIDE, asdict(state))
