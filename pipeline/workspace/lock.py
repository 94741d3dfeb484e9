"""One writer at a time in a local place; a lock dies with its process."""

import contextlib
import fcntl
import os
import platform
import time
from collections.abc import Generator
from pathlib import Path

from pipeline.errors import StepError
from pipeline.workspace.store import Workspace, translate_os_errors


@contextlib.contextmanager
def locked(file: Path, place: str) -> Generator[None]:
    """Let one process write to a place.

    Args:
        file: The lock's file.
        place: What is locked, for the message.

    Raises:
        StepError: If another process has the lock.
    """
    with translate_os_errors(str(file.parent)):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("a+")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StepError(f"{place} ({lock.read().strip()}); wait for it") from None
        lock.truncate(0)
        with translate_os_errors(str(file.parent)):
            os.write(
                lock.fileno(), f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}".encode()
            )
        yield


def locked_workspace(workspace: Workspace) -> contextlib.AbstractContextManager[None]:
    """Let one run, or one change of an index, write to a local workspace."""
    root = workspace.local_root
    place = f"{root}: another run is using this workspace"
    return locked(root / ".lock", place) if workspace.is_local else contextlib.nullcontext()
