"""Readers of a shard's table, of all its rows or of some, with words for what is damaged."""

import contextlib
import errno
import itertools
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from pipeline.data.mends import repair_hint
from pipeline.data.rows import require_columns
from pipeline.errors import DataError
from pipeline.workspace.disk import patiently

pc: Any = pyarrow.compute  # its functions are created at import, so a type checker does not know them
T = TypeVar("T")

TAKEN_IN = b"taken_in"
"""Key in the metadata of a table whose tar somebody else wrote: it may hold samples that are no rows."""


_OF_CONTENT = frozenset({errno.EINVAL})
"""Numbers of the errors that Arrow raises for what it has read, besides none: that of an offset that no file has."""


class Place(NamedTuple):
    """Where the picture of a row lies in the shard's tar, so that it can be read alone."""

    picture_offset: int
    """Its first byte in the tar."""
    picture_bytes: int
    """Its size."""
    picture_crc32: int
    """CRC-32 of the row's uid and the picture's bytes: it is the right picture of the right row, and whole."""

    @classmethod
    def of(cls, uid: str, picture: bytes, offset: int) -> "Place":
        """The place of a picture that lies at an offset."""
        return cls(offset, len(picture), _checksum(uid, picture))

    def holds(self, uid: str, data: bytes) -> bool:
        """Whether the bytes that were read here are the picture of this row."""
        return len(data) == self.picture_bytes and _checksum(uid, data) == self.picture_crc32


PLACE_FIELDS = tuple((name, pa.int64()) for name in Place._fields)
"""The columns of ``Place``, behind all others; null of a row without a picture."""


class Places:
    """The places of a shard's pictures: 0.4 MB for 10,000.

    Args:
        path: The shard's table, which may have been written before it said them.

    Raises:
        DataError, StepError: As ``undamaged``.
    """

    def __init__(self, path: Path) -> None:
        has_places = set(Place._fields) <= set(read_names(path))
        self._table = read_table(path, ["key", *Place._fields]).combine_chunks() if has_places else None

    def find(self, key: str) -> Place | None:
        """The place of a row's picture; None if the table says none."""
        row: int = -1 if self._table is None else pc.index(self._table["key"], key).as_py()
        if self._table is None or row < 0:
            return None
        values = self._table.select(list(Place._fields)).slice(row, 1).to_pylist()[0]
        return None if values["picture_offset"] is None else Place(**values)


def _checksum(uid: str, picture: bytes) -> int:
    return zlib.crc32(picture, zlib.crc32(uid.encode()))


def read_table(path: Path | IO[bytes], columns: Sequence[str], *, use_threads: bool = True) -> pa.Table:
    """Read columns of a shard's table, from a local path or what ``Artifact.ranged`` gives.

    Args:
        path: The table.
        columns: Names of the columns, in the order in which they are given back.
        use_threads: Whether several threads decode, which takes less time and more of the processor.

    Raises:
        DataError, StepError: As ``undamaged``; DataError also if it lacks a column.
    """

    def read() -> pa.Table:
        with pq.ParquetFile(path) as file:
            require_columns(file.schema_arrow.names, columns, where=name_of(path))
            return file.read(list(columns), use_threads=use_threads).select(list(columns))

    return undamaged(read, path)


def read_batches(path: Path | IO[bytes], columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """Read columns of a table, up to ``num_rows`` rows at a time, which is all that is in memory beside a row group.

    Raises:
        DataError, StepError: As ``undamaged``; DataError also if it lacks a column.
    """

    def batches(file: pq.ParquetFile) -> Iterator[pa.Table]:
        require_columns(file.schema_arrow.names, columns, where=name_of(path))
        for batch in file.iter_batches(num_rows, columns=list(columns)):
            yield pa.Table.from_batches([batch])

    yield from _parts(path, batches)


def read_groups(path: Path | IO[bytes], columns: Sequence[str]) -> Iterator[pa.Table]:
    """Read columns of a table, a row group at a time.

    Raises:
        DataError, StepError: As ``undamaged``.
    """

    def groups(file: pq.ParquetFile) -> Iterator[pa.Table]:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, list(columns))

    yield from _parts(path, groups)


def find_rows(
    path: Path | IO[bytes], keys: Sequence[str], values: pa.Array, columns: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Columns of the rows of which one of the columns ``keys`` has one of some strings; reads a row group at a time.

    Raises:
        DataError, StepError: As ``undamaged``.
    """

    def rows(file: pq.ParquetFile) -> Iterator[dict[str, Any]]:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, list(keys))
            is_match = np.zeros(table.num_rows, np.bool_)
            for key in keys:
                is_match |= pc.is_in(table.column(key).cast(pa.string()), value_set=values).to_numpy()
            if is_match.any():
                yield from file.read_row_group(group, list(columns)).filter(pa.array(is_match)).to_pylist()

    yield from _parts(path, rows)


def read_names(path: Path | IO[bytes]) -> list[str]:
    """Names of the columns of a shard's table.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    return list(read_schema(path).names)


def read_schema(path: Path | IO[bytes]) -> pa.Schema:
    """Columns of a shard's table, with their types and the table's metadata.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    return undamaged(lambda: pq.read_schema(path), path)


def undamaged(read: Callable[[], T], path: Path | IO[bytes]) -> T:
    """What Arrow reads of a shard's file, read again for minutes while its storage does not give it.

    Args:
        read: Reads all of it anew each time.
        path: The file, for messages.

    Raises:
        DataError: If the file is not there or its content is damaged; names the file and what to do.
        StepError: If the storage does not give it, also after minutes, which says nothing about its content.
    """

    def read_content() -> T:
        try:
            return read()
        except OSError as error:
            if error.errno is None or error.errno in _OF_CONTENT:
                raise pa.ArrowInvalid(str(error)) from error
            raise OSError(error.errno, os.strerror(error.errno)) from error  # in fewer words

    try:
        return patiently(read_content, name_of(path))
    except (pa.ArrowInvalid, FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"{name_of(path)}: damaged ({error}); {repair_hint(path)}") from error


def _parts(path: Path | IO[bytes], parts_of: Callable[[pq.ParquetFile], Iterator[T]]) -> Iterator[T]:
    """The parts of a table one after the other; where its storage fails, it is opened again, and they go on.

    Args:
        path: The table.
        parts_of: Its parts, always the same ones.

    Raises:
        DataError, StepError: As ``undamaged``.
    """
    parts: Iterator[T] | None = None
    num_read = 0
    with contextlib.ExitStack() as stack:

        def read_next() -> list[T]:
            """The next part; none at the end."""
            nonlocal parts
            try:
                if parts is None:
                    stack.close()
                    file = stack.enter_context(pq.ParquetFile(path))
                    parts = itertools.islice(parts_of(file), num_read, None)
                return list(itertools.islice(parts, 1))
            except OSError:  # a generator ends by it
                parts = None
                raise

        while part := undamaged(read_next, path):
            num_read += 1
            yield part[0]


def name_of(path: Path | IO[bytes]) -> str:
    """What a message calls a file of ``Artifact.ranged``."""
    return str(path) if isinstance(path, Path) else path.name


def good_rows(table: pa.Table) -> pa.Table:
    """The rows whose picture was stored."""
    return table.filter(pc.field("status") == "success")


def split_counts(path: Path) -> dict[str, int]:
    """Rows of a shard's table by split, without those that have no picture; for the shard's record."""
    names = [name for name in ("split", "status") if name in read_names(path)]
    table = read_table(path, names)
    return splits_of(good_rows(table) if "status" in names else table)


def splits_of(table: pa.Table) -> dict[str, int]:
    """Rows of a table by split."""
    counts = Counter(table["split"].to_pylist())
    return {str(split): count for split, count in sorted(counts.items())}
