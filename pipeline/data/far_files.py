"""Vectors of files in an object store: from this machine's copy of a file if it has one, else by ranges.

A search compares its queries with some vectors of very many files. A file is fetched whole only when so much was asked
of it that the requests have cost as much: what is searched all the time ends on this machine's disk, as far as its
cache has room, and a single search fetches little more than the vectors that it compares.
"""

import errno
import functools
import logging
import mmap
import resource
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import StepError

_log = logging.getLogger(__name__)

_MAPPED_FILES = 4096  # Linux allows a process 65,530 maps
_REQUEST_BYTES = 256 << 10
"""What a store sends in the time of one request, of which many are under way."""
_GAP_BYTES = 16 << 10
"""Vectors of a file that are so near to one another come by one request."""
_WHOLE_FILES = 8
"""Most files that are fetched whole at once; the others wait for a later call, so that none takes minutes."""
_THREADS = 16
_VECTORS_AT_ONCE = 8192

Name = TypeVar("Name", int, Path)


class Files(Protocol):
    """Files in an object store, by number."""

    def path_here(self, number: int) -> Path | None:
        """The local path of a file that need not be fetched; None if this machine has no copy of it."""
        ...

    def path(self, number: int) -> Path:
        """The local path of a file, which is fetched whole if it is not here."""
        ...

    def num_bytes(self, number: int) -> int:
        """About how large a file is."""
        ...

    def read_parts(self, parts: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Parts of files, (number, start, stop) in bytes, many at a time."""
        ...


class FarFiles:
    """Reads parts of one size of very many files, which stay as they are; several threads may read at once.

    The store is asked about a file once: whether this machine's copy is still right. Memory grows with the number of
    files that were read, by some 300 bytes each: 30 MB for 100,000.

    Args:
        files: The files.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._paths: dict[int, Path | None] = {}
        """Local path of each file that was looked for; None: it is not here."""
        self._num_asked = Counter[int]()
        """Parts that were read of each file that is not here."""
        self._stay_far = set[int]()
        """Files for which this machine had no room."""
        self._maps = MappedFiles[Path](lambda path: path)

    def read(self, numbers: NDArray[np.int64], starts: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint8]:
        """The bytes (len(numbers), num_bytes) that begin at some places of some files.

        Raises:
            DataError: If a file is missing or too short.
            StepError: If the store does not answer.
        """
        values = np.empty((len(numbers), num_bytes), np.uint8)
        for first in range(0, len(numbers), _VECTORS_AT_ONCE):
            some = slice(first, first + _VECTORS_AT_ONCE)
            self._read(numbers[some], starts[some], values[some])
        return values

    def _read(self, numbers: NDArray[np.int64], starts: NDArray[np.int64], values: NDArray[np.uint8]) -> None:
        order, num_bytes, far = np.lexsort((starts, numbers)), values.shape[1], list[int]()
        self._find(*np.unique(numbers, return_counts=True))
        for place, number, start in zip(order.tolist(), numbers[order].tolist(), starts[order].tolist(), strict=True):
            content = self._content(number)
            if content is None:
                far.append(place)
            else:
                values[place] = np.frombuffer(content, np.uint8, num_bytes, start)
        if far:
            values[far] = self._read_far(numbers[far], starts[far], num_bytes)

    def _read_far(self, numbers: NDArray[np.int64], starts: NDArray[np.int64], num_bytes: int) -> NDArray[np.uint8]:
        """As ``read``, from the store, at places that are sorted by file and start."""
        is_first = np.ones(len(numbers), np.bool_)
        is_first[1:] = (np.diff(numbers) != 0) | (np.diff(starts) > num_bytes + _GAP_BYTES)
        firsts, part_of = np.flatnonzero(is_first), np.cumsum(is_first) - 1
        stops = starts[np.append(firsts[1:], len(numbers)) - 1] + num_bytes
        parts = list(zip(numbers[firsts].tolist(), starts[firsts].tolist(), stops.tolist(), strict=True))
        contents, offsets = self._files.read_parts(parts), starts - starts[firsts][part_of]
        values = np.empty((len(numbers), num_bytes), np.uint8)
        for place, (part, offset) in enumerate(zip(part_of.tolist(), offsets.tolist(), strict=True)):
            values[place] = np.frombuffer(contents[part], np.uint8, num_bytes, offset)
        return values

    def _content(self, number: int) -> mmap.mmap | None:
        """A file that is on this machine; None if it is not."""
        path = self._paths[number]
        if path is not None:
            try:
                return self._maps.content(path)
            except FileNotFoundError:  # the cache needed its room
                self._paths[number] = None
                self._stay_far.add(number)
        return None

    def _find(self, numbers: NDArray[np.int64], num_parts: NDArray[Any]) -> None:
        """Look for files that were not asked before, and fetch those for which the requests have cost as much."""
        new = [number for number in numbers.tolist() if number not in self._paths]
        if new:
            with ThreadPoolExecutor(_THREADS) as threads:
                self._paths.update(zip(new, threads.map(self._files.path_here, new), strict=True))
        due = list[int]()
        for number, count in zip(numbers.tolist(), num_parts.tolist(), strict=True):
            if self._paths[number] is None and number not in self._stay_far:
                self._num_asked[number] += count
                if self._num_asked[number] * _REQUEST_BYTES >= self._files.num_bytes(number):
                    due.append(number)
        if due:
            due = due[:_WHOLE_FILES]
            with ThreadPoolExecutor(_WHOLE_FILES) as threads:
                self._paths.update(zip(due, threads.map(self._whole, due), strict=True))

    def _whole(self, number: int) -> Path | None:
        try:
            return self._files.path(number)
        except StepError as error:  # a full disk, on which a search by ranges does not depend
            _log.warning("%s; vectors of this file are read by ranges", error)
            self._stay_far.add(number)
            return None


class MappedFiles(Generic[Name]):
    """Local files as bytes, of which those that were read last stay mapped; several threads may read at once.

    Args:
        path_of: The path of a file.
    """

    def __init__(self, path_of: Callable[[Name], Path]) -> None:
        def map_one(name: Name) -> mmap.mmap:
            with path_of(name).open("rb") as file:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

        self._map = functools.lru_cache(num_mapped_files())(map_one)

    def content(self, name: Name) -> mmap.mmap:
        """A whole file.

        Raises:
            OSError: If it cannot be opened.
        """
        try:
            return self._map(name)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            self._map.cache_clear()  # what else the process has open, as a server's connections, has grown
            return self._map(name)


def num_mapped_files() -> int:
    """How many files may stay mapped; each of them is also an open file of the process."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAPPED_FILES if limit == resource.RLIM_INFINITY else min(_MAPPED_FILES, limit // 4)
