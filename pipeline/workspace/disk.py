"""Folders of a disk, or of what is mounted like one: their files, and messages when they are full or forbidden."""

import contextlib
import errno
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeVar

from pipeline.errors import StepError, UnclipError

T = TypeVar("T")

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, finished work is kept",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file is where a folder should be",
}
_PASSING_ERRNOS = frozenset(
    {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
)
"""What storage over a network says while its server restarts, or another machine has just changed a folder."""
_WAITS_S = (0.1, 0.3, 1.0, 3.0, 6.0)


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


def files_below(folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is in a folder at any depth and is no folder itself, by its path from there; links are not followed.

    A folder that cannot be read is never taken for an empty one: a training whose checkpoints are not seen would begin
    again. One that is not there, or is removed meanwhile, is empty.

    Raises:
        StepError: If a folder cannot be read, also after some seconds; names it.
    """
    starts = [""]
    while starts:
        start = starts.pop()
        for entry, is_folder in _ask(_entries, f"{folder}/{start}") or ():
            if is_folder:
                starts.append(f"{start}{entry.name}/")
            else:
                yield f"{start}{entry.name}", entry


def is_there(path: str) -> bool:
    """Whether there is such a file or folder, or what a link leads to.

    Raises:
        StepError: If that cannot be found out; names the path.
    """
    return _ask(os.stat, path) is not None


def _entries(folder: str) -> list[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, and whether each is a folder: some file systems are asked once more for that."""
    with os.scandir(folder) as entries:
        return [(entry, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _ask(action: Callable[[str], T], path: str) -> T | None:
    """The answer of a disk about a path, after some tries where a failure may pass; None if there is no such path.

    Raises:
        StepError: If the disk does not answer; names the path.
    """
    for wait_s in (*_WAITS_S, None):
        try:
            return action(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno not in _PASSING_ERRNOS or wait_s is None:
                reason = _DISK_REASONS.get(error.errno or 0, "")
                reason = reason or f"{error.strerror}: see that this storage is mounted and answers, and run again"
                raise StepError(f"{path}: cannot be read: {reason}") from error
            time.sleep(wait_s)
    raise AssertionError


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
