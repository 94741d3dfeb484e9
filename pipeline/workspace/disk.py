"""Folders of a disk, or of what is mounted like one: files, locks, and messages when they are full or forbidden."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import IO, TypeVar

from pipeline.errors import StepError, UnclipError
from pipeline.workspace.outage import Outage

T = TypeVar("T")

_DISK_REASONS = {
    errno.ENOSPC: "the disk is full; free some space and run again, finished work is kept",
    errno.EDQUOT: "the disk quota is used up; free some space and run again, finished work is kept",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EEXIST: "a file is where a folder should be",
}
_WITHOUT_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What flock says on Lustre without `-o flock`, on NFS whose server has no locks, and on some FUSE mounts."""
_PASSING_ERRNOS = frozenset(
    {errno.ESTALE, errno.EIO, errno.EREMOTEIO, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
)
"""What storage over a network says while its server restarts, or another machine has just changed a folder."""
_PATIENCE_S = 300.0
"""As an object store has it: a server that is started again is away for a minute or two."""
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 15.0


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


def flock(file: IO[str] | IO[bytes] | int, operation: int, where: str) -> None:
    """Lock an open file, as ``fcntl.flock``.

    Args:
        file: The file, or its descriptor.
        operation: Of ``fcntl``: ``LOCK_EX`` or ``LOCK_SH``, perhaps with ``LOCK_NB``.
        where: The path, for the message.

    Raises:
        BlockingIOError: With ``LOCK_NB``, if another process holds it.
        StepError: If this file system has no locks.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        mend = "mount it with locks (Lustre: -o flock), or use a folder on another one"
        raise StepError(f"{where}: this file system has no locks ({error.strerror}): {mend}") from error


def files_below(folder: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """What is in a folder at any depth and is no folder itself, by its path from there; links are not followed.

    A folder that cannot be read is never taken for an empty one: a training whose checkpoints are not seen would begin
    again. One that is not there, or is removed meanwhile, is empty.

    Raises:
        StepError: If a folder cannot be read, also after minutes; names it.
    """
    starts = [""]
    while starts:
        start = starts.pop()
        for entry, is_folder in _found(_entries, f"{folder}/{start}") or ():
            if is_folder:
                starts.append(f"{start}{entry.name}/")
            else:
                yield f"{start}{entry.name}", entry


def names_in(folder: str) -> list[str]:
    """Names of what is directly in a folder, in any order; none if there is no such folder.

    Raises:
        StepError: If it cannot be read; names it.
    """
    return [entry.name for entry, _ in _found(_entries, folder) or ()]


def is_there(path: str) -> bool:
    """Whether there is such a file or folder, or what a link leads to.

    Raises:
        StepError: If that cannot be found out; names the path.
    """
    return facts_of(path) is not None


def facts_of(path: str) -> os.stat_result | None:
    """Size and times of a file, or of what a link leads to; None if there is no such file.

    Raises:
        StepError: If they cannot be found out; names the path.
    """
    return _found(os.stat, path)


def content_of(path: str) -> bytes | None:
    """The content of a small file; None if there is none.

    Raises:
        StepError: If it cannot be read; names the path.
    """
    return _found(lambda path: Path(path).read_bytes(), path)


def _entries(folder: str) -> list[tuple[os.DirEntry[str], bool]]:
    """What is in a folder, and whether each is a folder: some file systems are asked once more for that."""
    with os.scandir(folder) as entries:
        return [(entry, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _found(look: Callable[[str], T], path: str) -> T | None:
    """What a look at a path gives; None if there is no such path."""
    try:
        return patiently(lambda: look(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def patiently(action: Callable[[], T], where: str, what: str = "read") -> T:
    """What an action on a disk gives, done again for five minutes while it fails for a reason that may pass.

    After ten seconds a warning says so.

    Args:
        action: Must be whole by itself: of a file that is written, all from its beginning.
        where: The path, for the message.
        what: What is done to it, for the message.

    Raises:
        FileNotFoundError, NotADirectoryError: If the path is not there, which is an answer.
        StepError: If the disk fails in another way, or for longer; names the path.
    """
    outage, wait_s = Outage(where), _FIRST_WAIT_S
    while True:
        try:
            return action()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            may_pass = error.errno in _PASSING_ERRNOS
            if not may_pass or outage.lasted_s + wait_s > _PATIENCE_S:
                mend = "see that this storage is mounted and answers" if may_pass else "mend it"
                reason = _DISK_REASONS.get(error.errno or 0, f"{error.strerror or error}: {mend}, and run again")
                raise StepError(f"{where}: cannot be {what}: {reason}") from error
            outage.wait(wait_s, error)
        wait_s = min(3 * wait_s, _LONGEST_WAIT_S)


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
