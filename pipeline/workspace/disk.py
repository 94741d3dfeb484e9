"""This machine's disk: messages when it is full or forbidden, and folders of this user's own."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Generator
from pathlib import Path

from pipeline.errors import StepError, UnclipError

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, finished work is kept",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file is where a folder should be",
}


@contextlib.contextmanager
def translate_os_errors(where: str) -> Generator[None]:
    """Turn a full or forbidden disk into a message.

    Raises:
        StepError: For a full disk or quota, a read-only disk, a missing permission, or a file in the place of a folder:
            from an OSError, or a library's error that quotes one (safetensors: SafetensorError, FAISS: RuntimeError).
    """
    try:
        yield
    except UnclipError:
        raise
    except OSError as error:
        if error.errno not in _DISK_REASONS:
            raise
        raise StepError(f"{where}: {_DISK_REASONS[error.errno]}") from error
    except Exception as error:  # each library has its own class; one that quotes no OSError passes unchanged
        reasons = [reason for code, reason in _DISK_REASONS.items() if os.strerror(code) in str(error)]
        if not reasons:
            raise
        raise StepError(f"{where}: {reasons[0]}") from error


def own_folder(name: str) -> Path:
    """A folder for temporary files that this user alone can read and write, whoever else uses this machine.

    Raises:
        StepError: If another user has made it.
    """
    return require_own(Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}", "set TMPDIR to a folder of your own")


def require_own(folder: Path, mend: str) -> Path:
    """Make a folder that this user alone can read and write, if it is not there.

    Raises:
        StepError: If another user has made it; ``mend`` says what to do then.
    """
    with translate_os_errors(str(folder)):
        folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise StepError(f"{folder} belongs to another user; remove it, or {mend}")
    return folder
