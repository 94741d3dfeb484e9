"""An artifact that one start of a training writes, until another start has begun.

A machine that was cut off may come back while the training goes on elsewhere. What still runs on it must not write into
the artifact of the other start: it would remove newer checkpoints, or change a network after its checksum was taken.
"""

import contextlib
from collections.abc import Collection, Generator
from pathlib import Path

from pipeline.errors import StepError
from pipeline.workspace.store import LIVE, Artifact
from pipeline.workspace.stored_files import StoredFiles

_ATTEMPT = f"{LIVE}attempt.json"


def begin_attempt(artifact: Artifact, attempt: str) -> None:
    """Let a start write an artifact, and no earlier one any more."""
    artifact.write_json(_ATTEMPT, {"attempt": attempt})


class FencedArtifact(Artifact):
    """The artifact as one start writes it: it looks before each change whether the start is still the newest.

    A file is compared when its bytes are written, right before it is published: what a store publishes later than that
    (a rename, an upload) is not held back.

    Args:
        uri: The artifact's.
        attempt: What ``begin_attempt`` was called with.
    """

    def __init__(self, uri: str, attempt: str) -> None:
        super().__init__(uri)
        self._attempt = attempt

    def __reduce__(self) -> tuple[type["FencedArtifact"], tuple[str, str]]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (FencedArtifact, (self.uri, self._attempt))

    @contextlib.contextmanager
    def write(self, name: str) -> Generator[Path]:
        """As ``Artifact.write``.

        Raises:
            StepError: Also if another start has begun, or the step is finished.
        """
        with super().write(name) as path:
            yield path
            self._require_newest()

    def write_bytes(self, name: str, data: bytes) -> None:
        """As ``Artifact.write_bytes``; see ``write``."""
        if isinstance(self._files, StoredFiles):  # on a disk it is written by ``write``
            self._require_newest()
        super().write_bytes(name, data)

    def remove(self, name: str) -> None:
        """As ``Artifact.remove``; see ``write``."""
        self._require_newest()
        super().remove(name)

    def remove_all(self, names: Collection[str]) -> None:
        """As ``Artifact.remove_all``; see ``write``."""
        self._require_newest()
        super().remove_all(names)

    def clear_temporaries(self, start: str = "") -> None:
        """As ``Artifact.clear_temporaries``; see ``write``."""
        self._require_newest()
        super().clear_temporaries(start)

    def _require_newest(self) -> None:
        state = self.find_json(_ATTEMPT)
        if state is None or state.get("attempt") != self._attempt:
            raise StepError("another start of this step has taken over; this one has ended and changed nothing since")
