"""SHA-256 of files, computed while they are written where a writer goes from front to back."""

import contextlib
import hashlib
import io
import shutil
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

_written: dict[Path, tuple[int, str]] = {}
"""Files inside a block of ``checksum_of_writing``; sizes and checksums of those that are whole."""


class HashedFile(io.BufferedIOBase):
    """A new file, written from front to back. No subclass of Python's own files: numpy writes past their methods.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        """Write bytes."""
        self._digest.update(data)
        return self._file.write(data)

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes that were written."""
        return self._file.tell()

    def flush(self) -> None:
        """Bring what was written to the operating system."""
        if not self._file.closed:
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            num_bytes = self._file.tell()
            self._file.close()
            if self._path in _written:
                _written[self._path] = (num_bytes, self._digest.hexdigest())
        super().close()


@contextlib.contextmanager
def checksum_of_writing(path: Path) -> Generator[Callable[[int], str]]:
    """Remember the checksum of a file that is written inside the block.

    Yields:
        A function: size of the file in bytes to its checksum as hexadecimal digits; empty if ``HashedFile`` has not
        written a whole file of this size.
    """
    _written[path] = (-1, "")
    try:
        yield lambda num_bytes: _written[path][1] if _written[path][0] == num_bytes else ""
    finally:
        del _written[path]


def copy_file(source: Path, target: Path) -> None:
    """Copy a file piece by piece, as weights may be larger than memory; its checksum needs no second reading."""
    with source.open("rb") as stream, HashedFile(target) as copy:
        shutil.copyfileobj(stream, copy)


def sha256_of(path: Path) -> str:
    """SHA-256 of a local file, as hexadecimal digits; reads it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
