"""A file of an object store as a stream, of which only what is read is fetched."""

import contextlib
import io
from typing import Any, Protocol


class Store(Protocol):
    """What a ranged file asks of its store; see ``ObjectStore``."""

    def unstrip_protocol(self, path: str) -> str:
        """The URI of a path."""
        ...

    def opened(self, path: str) -> tuple[Any, int]:
        """An open file, and its size in bytes."""
        ...

    def read_range(self, file: Any, start: int, stop: int) -> bytes:
        """Bytes of an opened file."""
        ...

    def read_ranges(self, path: str, starts: list[int], stops: list[int]) -> list[bytes]:
        """Parts of a file."""
        ...


class RangedFile(io.BufferedReader):
    """A file of a store, read by ranges."""

    def __init__(self, store: Store, path: str, buffer_bytes: int) -> None:
        super().__init__(_RawFile(store, path), buffer_bytes)
        self._store = store
        self._path = path

    def read_ranges(self, starts: list[int], stops: list[int]) -> list[bytes]:
        """See ``ObjectStore.read_ranges``: not a byte more is fetched."""
        return self._store.read_ranges(self._path, starts, stops)


class _RawFile(io.RawIOBase):
    def __init__(self, store: Store, path: str) -> None:
        self._store = store
        self.name = store.unstrip_protocol(path)
        self._file, self._size = store.opened(path)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        stop = min(self._position + len(buffer), self._size)
        data = self._store.read_range(self._file, self._position, stop) if stop > self._position else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(Exception):
                self._file.close()
        super().close()
